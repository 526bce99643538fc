"""One step of an optimizer: what is stepped, by how much, whether at all, and by what.

    1. Collect the parameters that have a gradient, check them and create their state.
    2. Sort them: a `Plan` of those that kernels step, and the rest, for the reference path. The
       plan is kept: while its `Watcher` sees the same tensors and options, 1 and 2 are skipped.
    3. Decide the scale of the gradients and whether the step is skipped. Where kernels on one
       device do everything, they decide it themselves; else it is decided here.
    4. Run the plan, and the reference path for the rest.

Whatever can go wrong is found in 1 and 2, before anything changes. A stepper owns the plan and the
plans that CUDA graphs were captured with. It keeps no optimizer, because a cycle would live on.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fusedreg import backend, dist, reference
from fusedreg.checks import check_grad, check_is_fake, check_param
from fusedreg.contract import UpdateRule
from fusedreg.dist import Group, Sharding, local
from fusedreg.engine.plan import NOT_BEFORE_CAPTURE, Plan, is_capturing
from fusedreg.engine.watch import Watcher
from fusedreg.formats import planes_of
from fusedreg.norms import clip_factor, norms_by_sharding
from fusedreg.reference import Block
from fusedreg.scalars import Flag, Number, is_traced, is_zero, number, on_host
from fusedreg.states import create_states, settings_of
from fusedreg.types import GroupsWithGrads, ParamGroup, Settings, States


class Scaler(NamedTuple):
    """What torch.amp.GradScaler has written into the optimizer."""

    grad_scale: Tensor | None = None
    """Divides the gradients."""
    found_inf: Tensor | None = None
    """Not 0: skip the step."""


NO_SCALER = Scaler()


def scaler_of(optimizer: object) -> Scaler:
    """What GradScaler says of this step."""
    grad_scale = getattr(optimizer, "grad_scale", None)
    found_inf = getattr(optimizer, "found_inf", None)
    if grad_scale is None and found_inf is None:
        return NO_SCALER
    return Scaler(grad_scale, found_inf)


class Outcome(NamedTuple):
    """What a step has to tell."""

    grad_norm: Tensor | None = None
    skipped_steps: Tensor | None = None
    launches: int = 0


NOTHING = Outcome()
"""Before the first step."""


@dataclass
class OptimizerOptions:
    """Options that belong to the optimizer and not to a param group, and what its steps report.

    All in one object, because a wrapper may share the class and forward the attributes that it
    lacks, as Lightning's wrappers do. Its properties then read and write those of the optimizer.
    """

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    process_group: Group | None = None
    splitter: str | None = None
    """What gives each rank a part of the parameters and leaves no mark on them."""
    outcome: Outcome = NOTHING
    """Of the last step."""
    warned: set[str] = field(default_factory=set)
    """Keys of groups that look like a misspelt option and that there was a warning of."""

    @property
    def needs_norm(self) -> bool:
        """Whether the norm of all gradients is needed."""
        return self.max_grad_norm is not None or self.skip_nonfinite

    def told(self, grad_norm: Tensor | None, skipped: Tensor | None, launches: int) -> Outcome:
        """The outcome of a step, which is the last one's where it tells the same."""
        last = self.outcome
        same = last.grad_norm is grad_norm and last.skipped_steps is skipped
        return last if same and last.launches == launches else Outcome(grad_norm, skipped, launches)


class Stepper:
    """Steps one optimizer."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.captured: tuple[Plan, ...] = ()
        """A CUDA graph reads the tables of its plan as long as it lives."""

    def forget(self) -> None:
        """Make a new plan in the next step."""
        self.plan = None

    def step(
        self,
        rule: UpdateRule,
        groups: list[ParamGroup],
        states: States,
        own: OptimizerOptions,
        scaler: Scaler,
    ) -> Outcome:
        """Step all parameters that have a gradient, without autograd.

        Args:
            rule: the optimizer.
            groups: its param groups.
            states: its state; what is missing is created.
            own: what belongs to the optimizer and not to a group.
            scaler: what GradScaler says.
        """
        fresh = not states
        plan, rest = self._gather(rule, groups, states, own)
        if fresh and states and _creates_state_for_checkpoint(groups):
            return own.told(None, own.outcome.skipped_steps, 0)
        has_parts = rule.layerwise and any(map(dist.has_parts, self._shardings(groups)))
        if plan is None and not rest and not (own.needs_norm or has_parts):
            return own.told(None, own.outcome.skipped_steps, 0)
        over_ranks = has_parts or (own.needs_norm and own.process_group is not None)
        if plan is not None and not rest and not over_ranks and plan.device is not None:
            return self._run_plan(plan, plan.device, own, scaler)
        return self._run_both(rule, groups, states, own, scaler, plan, rest, has_parts)

    def create_states(self, rule: UpdateRule, groups: list[ParamGroup], states: States) -> None:
        """Create the states of all parameters, as a step of them all would."""
        for group in groups:
            rule.validate(group)
        create_states(rule, states, [(group, group["params"]) for group in groups])

    # ---- what is stepped, and by what ----------------------------------------------------------

    def _gather(
        self, rule: UpdateRule, groups: list[ParamGroup], states: States, own: OptimizerOptions
    ) -> tuple[Plan | None, GroupsWithGrads]:
        """The plan of what kernels step, and the rest; all checked, their state created.

        Where it raises, nothing has changed but that state may have been created.
        """
        traced = is_traced()  # kernels would go past it: it sees operations, not memory
        old = None if traced else self.plan
        kept = old if old is not None and self._still_holds(old, rule, groups, states) else None
        if not traced:
            self.plan = kept  # so that nothing of the old one is believed
        self._check_norm_is_global(rule, groups, own)
        self._check_tensors_are_whole(rule, groups)
        if traced:
            rest = _collect(rule, groups)
            for param in (param for _, params in rest for param in params):
                check_is_fake(param, type(rule).__name__)
            create_states(rule, states, rest)
            return None, rest
        if kept is None:
            rest = self._make_plan(rule, groups, states, old)
        else:
            if kept.capturing() and kept not in self.captured:
                self.captured += (kept,)
            chosen = kept.watcher.chosen
            rest = _collect(rule, groups, without=chosen) if kept.watcher.rest else []
            create_states(rule, states, rest)
        plan = self.plan
        return (plan if plan is not None and plan.watcher.has_grads else None), rest

    def _still_holds(
        self, plan: Plan, rule: UpdateRule, groups: list[ParamGroup], states: States
    ) -> bool:
        """Whether this step can be done with the tables of an earlier one."""
        changes = plan.watcher.refresh(rule, groups, states)
        if changes is None:
            return False
        # A graph goes on with the addresses that it was captured with.
        if changes.tables and (plan in self.captured or plan.capturing()):
            return False
        plan.take(changes)
        return True

    def _make_plan(
        self, rule: UpdateRule, groups: list[ParamGroup], states: States, old: Plan | None
    ) -> GroupsWithGrads:
        """Plan for the parameters that kernels step, return the rest; create the state of both."""
        work = _collect(rule, groups)
        seen = None if old is None else old.watcher
        known = {} if seen is None else dict(zip(seen.chosen, seen.grad_dtypes, strict=True))
        # A parameter stays in the plan while it has no gradient, so that experts may come and go.
        backends = {
            param: backend.kernels_of(rule, group, param)
            for group in groups
            for param in group["params"]
            if param.grad is not None or param in states or param in known
        }
        candidates = {
            param: index
            for index, group in enumerate(groups)
            for param in group["params"]
            if backends.get(param) is not None
        }
        if len({param for _, params in work for param in params}) < sum(len(p) for _, p in work):
            raise ValueError("some parameters appear in more than one parameter group")
        if any(is_capturing(device) for device in {param.device for param in candidates}):
            raise RuntimeError(NOT_BEFORE_CAPTURE)
        # Those without a gradient too, if they have begun: an option that was turned on may need
        # more of their state.
        idle = {
            param
            for param, index in candidates.items()
            if param.grad is None and _has_begun(rule, groups[index], param, states.get(param, {}))
        }
        waiting = [(group, [p for p in group["params"] if p in idle]) for group in groups]
        create_states(rule, states, work + waiting)
        chosen = {
            param: index
            for param, index in candidates.items()
            if _states_are_dense(rule, groups[index], param, states.get(param, {}))
        }
        rest = [(group, [p for p in params if p not in chosen]) for group, params in work]
        rest = [(group, params) for group, params in rest if params]
        if chosen:
            others = {param for _, params in rest for param in params}
            watcher = Watcher(rule, backends, groups, chosen, others, states, known)
            self.plan = Plan(watcher, states)
        return rest

    # ---- by how much, and whether at all -------------------------------------------------------

    def _run_plan(
        self, plan: Plan, device: torch.device, own: OptimizerOptions, scaler: Scaler
    ) -> Outcome:
        """Step where kernels on one device do everything, the norm too."""
        skipped = None
        if scaler.found_inf is not None or own.skip_nonfinite:
            if own.outcome.skipped_steps is None and plan.capturing():
                raise RuntimeError(NOT_BEFORE_CAPTURE)  # each replay would set it to 0
            skipped = _counter(own, device)
        grad_norm, launches = plan.run(
            grad_scale=scaler.grad_scale,
            found_inf=scaler.found_inf,
            max_norm=own.max_grad_norm,
            skip_nonfinite=own.skip_nonfinite,
            norm_on=device if own.needs_norm else None,
            skipped=skipped,
        )
        return own.told(
            grad_norm, own.outcome.skipped_steps if skipped is None else skipped, launches
        )

    def _run_both(
        self,
        rule: UpdateRule,
        groups: list[ParamGroup],
        states: States,
        own: OptimizerOptions,
        scaler: Scaler,
        plan: Plan | None,
        rest: GroupsWithGrads,
        has_parts: bool,
    ) -> Outcome:
        """Step where there are several devices, several ranks or the reference path."""
        scale, skip, outcome = self._scale_and_skip(groups, own, scaler, plan, rest)
        squares = _squares_of_parts(rule, states, rest, scale) if has_parts else {}
        over_ranks = partial(_sum_over_ranks, groups, squares) if has_parts else None
        if plan is not None:
            _, launches = plan.run(scale=scale, skip=skip, over_ranks=over_ranks)
            outcome = outcome._replace(launches=launches)
        elif over_ranks is not None:
            over_ranks({})
        for group, params in rest:
            _step_group(rule, group, params, states, scale, skip, squares)
        return outcome

    def _scale_and_skip(
        self,
        groups: list[ParamGroup],
        own: OptimizerOptions,
        scaler: Scaler,
        plan: Plan | None,
        rest: GroupsWithGrads,
    ) -> tuple[Number, Flag, Outcome]:
        """What multiplies every gradient of this step, and whether the step is skipped."""
        stepped = [] if plan is None else plan.watcher.params
        stepped = [*stepped[:1], *(param for _, params in rest for param in params[:1])]
        device = stepped[0].device if stepped else home(groups)
        loss_scale = number(scaler.grad_scale, device)
        found_inf = number(scaler.found_inf, device)
        scale: Number = 1.0 if loss_scale is None else 1.0 / loss_scale
        # GradScaler sums found_inf over devices, so it may be 2.
        skip: Flag = False if found_inf is None else found_inf != 0
        outcome = Outcome(skipped_steps=own.outcome.skipped_steps)
        if own.needs_norm:
            params = [param for _, params in rest for param in params]
            more = [] if plan is None else plan.norms()
            norms = norms_by_sharding(self._shardings(groups), params, more, device)
            norm = dist.total_norm(norms, dist.group_of(own.process_group)) * scale
            outcome = outcome._replace(grad_norm=norm.to(torch.float32))
            if own.skip_nonfinite:
                skip = skip | number(~torch.isfinite(norm), device)
            if own.max_grad_norm is not None and own.max_grad_norm != float("inf"):
                scale = scale * number(clip_factor(norm, own.max_grad_norm), device)
        if skip is not False:
            outcome = outcome._replace(skipped_steps=_counter(own, device).add_(skip))
        return scale, skip, outcome

    # ---- what keeps a norm from being right ----------------------------------------------------

    def _check_norm_is_global(
        self, rule: UpdateRule, groups: list[ParamGroup], own: OptimizerOptions
    ) -> None:
        if own.needs_norm:
            who, shardings = type(rule).__name__, self._shardings(groups)
            check_norm_is_global(who, shardings, own.splitter, own.process_group)

    def _check_tensors_are_whole(self, rule: UpdateRule, groups: list[ParamGroup]) -> None:
        """Raise if per-tensor norms are needed but a shard does not know its full tensor."""
        if rule.layerwise and dist.FLATTENED in self._shardings(groups):
            raise RuntimeError(
                f"{type(rule).__name__} needs the norm of each tensor, but "
                "FullyShardedDataParallel flattens tensors and gives each rank a part of all: use "
                "fully_shard, whose DTensors know what they are parts of"
            )

    def _shardings(self, groups: list[ParamGroup]) -> Iterable[Sharding | None]:
        """How parameters are sharded over ranks, each way once, in the same order on all ranks."""
        if self.plan is not None:
            return self.plan.watcher.shardings
        return dict.fromkeys(map(dist.sharding_of, params_of(groups)))


def params_of(groups: Sequence[ParamGroup]) -> Iterator[Tensor]:
    """All parameters."""
    return (param for group in groups for param in group["params"])


def home(groups: Sequence[ParamGroup]) -> torch.device:
    """Device of the first parameter; a group, even the first, may be empty."""
    return next((param.device for param in params_of(groups)), torch.device("cpu"))


def check_norm_is_global(
    who: str,
    shardings: Iterable[Sharding | None],
    splitter: str | None,
    process_group: object,
) -> None:
    """Raise where the norm that is asked for would be one of some of the gradients."""
    what = "max_grad_norm and skip_nonfinite take the norm over all gradients"
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{what}, which are not there inside a backward pass: call step() after it, or "
            "construct the optimizers of apply_optimizer_in_backward without the two"
        )
    if dist.FLATTENED in shardings:
        splitter = "FullyShardedDataParallel"
    if splitter is not None and process_group is None:
        raise RuntimeError(
            f"{what}, but {splitter} gives each rank a part of the parameters: say which "
            "ranks make a whole with process_group=..., torch.distributed.group.WORLD or, "
            "where parts are replicated, those of one replica (a keyword of the optimizer; in "
            "ZeroRedundancyOptimizer, which has one of that name for itself, "
            f"optimizer_class=functools.partial({who}, process_group=...))"
        )


def _collect(
    rule: UpdateRule, groups: list[ParamGroup], without: Container[Tensor] = ()
) -> GroupsWithGrads:
    """The groups with those of their parameters that have a gradient; raises on bad input."""
    work = []
    problems = [penalty.check_param for penalty in rule.penalties]
    for which, group in enumerate(groups):
        rule.validate(group)
        params: dict[Tensor, None] = {}  # each once, also one that was given twice
        for index, param in enumerate(group["params"]):
            if param.grad is not None and param not in without:
                check_param(problems, groups, which, index)
                check_grad(type(rule).__name__, groups, which, index)
                params[param] = None
        if params:
            work.append((group, list(params)))
    return work


def _has_begun(rule: UpdateRule, group: Settings, param: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether a state has more than what a user put there."""
    planes = planes_of(rule.state_format(group, param), rule.tensor_states)
    return not state.keys().isdisjoint((*planes, *rule.counts))


def _states_are_dense(
    rule: UpdateRule, group: Settings, param: Tensor, state: dict[str, Tensor]
) -> bool:
    """Whether kernels can walk the state along with `param`, which is laid out for that."""
    storage = rule.state_format(group, param)
    names = planes_of(storage, rule.states(group))
    if any(name not in state for name in names):
        return False  # no gradient yet
    counts = [state[name] for name in rule.counts if name in state]
    if not backend.is_dense_with(param, storage, [state[name] for name in names], counts):
        return False
    for name in names:
        if not backend.same_layout(local(param), local(state[name])):
            laid_out = torch.empty_like(param, dtype=state[name].dtype)
            state[name] = laid_out.copy_(state[name])
    return True


def _counter(own: OptimizerOptions, device: torch.device) -> Tensor:
    """How many steps were skipped so far, on a device."""
    if own.outcome.skipped_steps is None:
        return torch.zeros((), dtype=torch.int64, device=device)
    return own.outcome.skipped_steps.to(device)


def _creates_state_for_checkpoint(groups: list[ParamGroup]) -> bool:
    """Whether this step is one of torch.distributed.checkpoint, which must not count.

    Callers are looked at only where lr is 0 in all groups, as there.
    """
    rates = [group["lr"] for group in groups]
    if not all(
        is_zero(lr.item() if isinstance(lr, Tensor) and on_host(lr) else lr) for lr in rates
    ):
        return False
    return dist.checkpoint_creates_state()


# ---- the reference path --------------------------------------------------------------------------


def _step_group(
    rule: UpdateRule,
    group: ParamGroup,
    params: list[Tensor],
    states: States,
    scale: Number,
    skip: Flag,
    squares: Mapping[Tensor, Tensor],
) -> None:
    """Step the parameters of one group on the reference path."""
    settings = settings_of(rule, group, params)
    for param in params:
        device, part = param.device, local(param)
        # A tensor made in inference mode has no version; its own operations count any other's.
        before = None if part is param else part._version
        reference.update(
            rule,
            settings[device],
            _block(rule, group, param, states),
            number(scale, device),
            number(skip, device),
            squares.get(param),
        )
        if before is not None and part._version != before:  # a DTensor has a version of its own
            torch.autograd.graph.increment_version(param)


def _block(rule: UpdateRule, group: Settings, param: Tensor, states: States) -> Block:
    """A parameter and what belongs to it. The local part of a DTensor is stepped like any other."""
    assert param.grad is not None
    state = {name: local(value) for name, value in states.get(param, {}).items()}
    grad = local(dist.sharded_as(param, param.grad))
    return Block(local(param), grad, state, rule.state_format(group, param))


def _squares_of_parts(
    rule: UpdateRule, states: States, rest: GroupsWithGrads, scale: Number
) -> dict[Tensor, Tensor]:
    """The local sums of squares of DTensors that the reference path steps."""
    found = {}
    for group, params in rest:
        settings = settings_of(rule, group, params)
        for param in params:
            if dist.has_parts(dist.sharding_of(param)):
                block = _block(rule, group, param, states)
                scale_here = number(scale, param.device)
                moved = reference.move(rule, settings[param.device], block, scale_here)
                found[param] = reference.squares_of(moved)
    return found


def _sum_over_ranks(
    groups: list[ParamGroup], parts: Mapping[Tensor, Tensor], here: Mapping[Tensor, Tensor]
) -> None:
    """All-reduce local sums of squares: those of the reference path, and `here` of a plan."""
    dist.sum_over_parts(params_of(groups), {**here, **parts})
