"""The one `step()` of every optimizer here: what is stepped, by how much, and whether at all."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import partial, wraps
from types import MappingProxyType
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    StateDict,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)
from typing_extensions import Unpack

from fusedreg import backend, checkpoint, dist, reference
from fusedreg.checks import (
    ParamGroup,
    check_count,
    check_grad,
    check_is_fake,
    check_keys,
    check_moment,
    check_number,
    check_param,
    misspelt,
)
from fusedreg.dist import Group, ProcessGroup, Spread, local
from fusedreg.engine.plan import NOT_BEFORE_CAPTURE, Plan, is_capturing
from fusedreg.engine.watch import Inventory
from fusedreg.norms import clip_factor, norms_by_spread
from fusedreg.options import AllOptions, Option, complete_signature, declarations, nearest
from fusedreg.reference import Settings, State, Update
from fusedreg.scalars import Count, Flag, Number, is_traced, is_zero, number, on_host, pair, settled

Work = list[tuple[ParamGroup, list[Tensor]]]
"""Groups, each with those of its parameters that are stepped."""


@dataclass
class OptimizerOptions:
    """Options that belong to the optimizer and not to a param group, and what its steps report.

    All in one object, because a wrapper may share the class and forward the attributes that it
    lacks, as Lightning's wrappers do. Its properties then read and write those of the optimizer.
    """

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    process_group: Group | None = None
    grad_norm: Tensor | None = None
    skipped_steps: Tensor | None = None
    launches: int = 0
    warned: set[str] = field(default_factory=set)
    """Keys of groups that look like a misspelt option and that there was a warning of."""


PLAIN = frozenset((float, int, bool, str, tuple, list, type(None), torch.dtype))
"""Types of options that stay as they are."""

LIGHTNING = ("lightning_fabric.plugins.precision.amp", "lightning.fabric.plugins.precision.amp")
"""Where Lightning, under either name, asks whether an optimizer unscales gradients by itself."""


def _with_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step` with hooks and a profiler's record, as torch has it, entered only where there is one.

    torch's wrapper takes 5 us, as long as the rest of a small step.
    """
    whole = Optimizer.profile_hook_step(step)

    @wraps(step)
    def wrapper(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
        watched = (
            profiler._is_profiler_enabled
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )
        # Where torch has wrapped the step of a subclass, the hooks have been called.
        called = getattr(type(self).step, "__code__", None) is whole.__code__
        return (step if called or not watched else whole)(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # tells torch not to wrap it again
    return wrapper


class _Names:
    """The names of a class's `counts`, also where it is read from the class."""

    def __get__(self, _: object, owner: type[FusedOptimizer]) -> tuple[str, ...]:
        return tuple(owner.counts)


class FusedOptimizer(Optimizer):
    """Base class: clipping, penalties, loss scaling, skipping and checkpoints around one rule.

    A subclass supplies a signature, the names of its states, `update` and `device_rule`;
    docs/adding-an-optimizer.md goes through two. See docs/semantics.md for the order of a step and
    docs/engine.md for how a device runs it.

    Args:
        params: as every optimizer takes them.
        defaults: `lr` and the options of the subclass, which may differ between groups. Options
            that every class has may be among them.
        options: those that every class has, as in :class:`fusedreg.SGD`: weight_decay,
            decoupled_weight_decay, lr_independent_decay, decay_lr, l1, l1_mode, maximize, foreach,
            fused, differentiable, state_dtype, max_grad_norm, skip_nonfinite and process_group.

    Raises:
        TypeError: there is no such option, or a name in `defaults` is a misspelt one.
        ValueError: an option is out of range.
    """

    tensor_states: tuple[str, ...] = ()
    """Names of the states shaped like the parameter."""
    counts: Mapping[str, Count] = MappingProxyType({})
    """The states of one number by name, such as `{"step": Count()}`, in the device rule's order."""
    scalar_states = _Names()
    """Names of `counts`."""
    late_states: tuple[str, ...] = ()
    """Names of those that an option turned on later adds, so that a checkpoint may lack them."""
    device_options: tuple[str, ...] = ()
    """Names of the options that the device rule takes, in its order; a pair counts as two."""
    option_sets: ClassVar[tuple[type, ...]] = (AllOptions,)
    """TypedDicts that declare the options of the class, except `lr` and the rule's own."""
    option_defaults: Mapping[str, object] = MappingProxyType({})
    """Defaults of this class for declared options; the others have those of their declaration."""
    fixed_options: Mapping[str, object] = MappingProxyType({})
    """Options that every group has, whatever a checkpoint of another class says."""
    declared_options: ClassVar[Mapping[str, Option]] = MappingProxyType({})
    """All of `option_sets` by name."""
    own_options: frozenset[str] = frozenset()
    """Options that belong to the optimizer, so that no group may have them."""
    layerwise: bool = False
    """Whether lr is multiplied by the trust ratio of each tensor, ||w|| / ||update||."""

    # Class attributes, so that an optimizer pickled by an older version has them too.
    _splitter: str | None = None
    # Addresses are of this process and these tensors: a copy makes its own plan.
    _plan: Plan | None = None
    _captured: tuple[Plan, ...] = ()
    _kept_by_pickle: ClassVar[tuple[str, ...]] = (
        "_splitter",
        "_optimizer_step_pre_hooks",
        "_optimizer_step_post_hooks",
        "_optimizer_state_dict_pre_hooks",
        "_optimizer_state_dict_post_hooks",
        "_optimizer_load_state_dict_pre_hooks",
        "_optimizer_load_state_dict_post_hooks",
    )

    @torch._disable_dynamo  # type: ignore[attr-defined]  # private, but what torch.optim itself uses
    def __init__(
        self,
        params: ParamsT,
        defaults: Mapping[str, object],
        **options: Unpack[AllOptions],
    ) -> None:
        self._check_names(defaults, options)
        values = {**self._class_defaults(), **defaults, **options}
        self._own = OptimizerOptions()
        for name in self.own_options:
            setattr(self, name, values.pop(name))
        self._splitter = dist.constructing_splitter()
        self.defaults = {name: settled(value) for name, value in values.items()}
        self._check_group({**self.defaults}, read_device=True)
        Optimizer.__init__(self, params, self.defaults)  # not that of a class of torch.optim
        self._check_norm_is_global()

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Complete the signature, and raise if kernels would run another rule than `update`."""
        super().__init_subclass__(**kwargs)
        cls._declare_options()
        owner = {
            name: next(index for index, base in enumerate(cls.__mro__) if name in vars(base))
            for name in ("update", "device_rule")
        }
        if owner["update"] < owner["device_rule"]:
            raise TypeError(
                f"{cls.__name__} overrides update but not device_rule, so kernels would still "
                "run the rule that it inherits: return the Rule that computes the same from "
                "device_rule, or None for the reference path"
            )

    @classmethod
    def _declare_options(cls) -> None:
        """Gather the options of `option_sets`, and show them in the constructor's signature."""
        cls.declared_options = MappingProxyType(declarations(*cls.option_sets))
        options = cls.declared_options.items()
        cls.own_options = frozenset(name for name, option in options if not option.of_group)
        changed = {**cls.option_defaults, **cls.fixed_options}
        complete_signature(cls, changed, cls.option_sets)

    @classmethod
    def _class_defaults(cls) -> dict[str, object]:
        """The values of declared options where the constructor is given none."""
        declared = {name: option.default for name, option in cls.declared_options.items()}
        return {**declared, **cls.option_defaults, **cls.fixed_options}

    @classmethod
    def _check_names(cls, defaults: Mapping[str, object], options: Mapping[str, object]) -> None:
        """Raise TypeError for a name that is no option, or if one that is needed is missing."""
        who, declared = cls.__name__, cls.declared_options
        parameters = inspect.signature(cls).parameters
        for name in options:
            if name not in declared:
                raise TypeError(
                    f"{who}.__init__() got an unexpected keyword argument {name!r}"
                    f"{nearest(name, parameters)}"
                )
        for name in defaults:
            own = name in parameters or name in ("lr", *cls.device_options)
            near = misspelt(name, declared)
            if near is not None and not own and name not in declared:
                raise TypeError(
                    f"{who} has no option {name!r}, which is among its defaults. "
                    f"Did you mean {near!r}?"
                )
        for name in ("lr", *cls.device_options):
            if name not in declared and name not in defaults and name not in options:
                raise TypeError(f"{who} has no option {name!r} among its defaults")

    @classmethod
    def __subclasses__(cls) -> list[type]:
        """Those below this class that no class of torch.optim has below it too.

        Registries walk down from torch.optim.Optimizer and would meet them twice.
        """
        return [
            below
            for below in type.__subclasses__(cls)
            if not any(base.__module__.startswith("torch.optim.") for base in below.__bases__)
        ]

    # ---- the contract: a subclass overrides the last two, and the others where they differ -------

    def check_group(self, group: ParamGroup, read_device: bool) -> None:
        """Raise ValueError where an option of this class is out of range.

        Args:
            group: the options.
            read_device: whether numbers on an accelerator may be read, which waits for it.
        """

    def states(self, group: Settings) -> tuple[str, ...]:
        """Those of `tensor_states` that a step of this group moves, in their order: here all."""
        return self.tensor_states

    def init_state(self, group: Settings, param: Tensor, state: dict[str, Tensor]) -> None:
        """Create what `state` lacks for the next step of `param`: counts, and zeros for `states`.

        Counts in `late_states` are not created.
        """
        for name, count in self.counts.items():
            if name not in state and name not in self.late_states:
                state[name] = count.create(param)
        dtype = group["state_dtype"]
        if dtype is not None and param.is_complex():
            dtype = dtype.to_complex()
        for name in self.states(group):
            if name not in state:
                state[name] = torch.zeros_like(
                    param, dtype=dtype, memory_format=torch.preserve_format
                )

    def device_rule(self, group: Settings) -> Any:
        """The rule for kernels: a `fusedreg.kernels.device.rules.Rule`, or the name of one there.

        None, as here, leaves all parameters of the group to the reference path.
        """
        return None

    def update(self, settings: Settings, state: State, grad: Tensor) -> Update:
        """The rule in torch operations: (direction, gain, new state). It writes into no tensor.

        Args:
            settings: the options of the group, each number as a float or a 0-dim tensor.
            state: the old state. Moments have the dtype of the arithmetic and counts are numbers. A
                count of `late_states` may be missing.
            grad: the gradient after loss scale, clipping and coupled penalties.

        Returns:
            The direction, which lr multiplies. The gain, a number or a tensor: what a constant
            gradient of 1 makes of the direction. With l1_mode="prox" the threshold is
            lr * gain * l1, whose fixed point minimises loss + l1 * |w|. And the states that have
            changed, by name.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no update")

    # ---- what belongs to the optimizer ---------------------------------------------------------

    @property
    def max_grad_norm(self) -> float | None:
        """Clip the global L2 norm of the loss gradient to this; None: do not even compute it.

        `float("inf")` computes `grad_norm` and clips nothing. May be set at any time.
        """
        return self._own.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if isinstance(value, Tensor):
            raise TypeError("Invalid max_grad_norm value: a Tensor (expected a float or None)")
        if value is not None:
            check_number("max_grad_norm", value)
            value = float(value)
            if value == 0:
                raise ValueError(
                    "Invalid max_grad_norm value: 0.0 (a norm of 0 would leave all parameters as "
                    "they are: None turns clipping off)"
                )
        self._own.max_grad_norm = value

    @property
    def skip_nonfinite(self) -> bool:
        """Whether a step whose gradient norm is inf or NaN changes nothing. May be set any time."""
        return self._own.skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, value: bool) -> None:
        self._own.skip_nonfinite = bool(value)

    @property
    def process_group(self) -> ProcessGroup | None:
        """Ranks over which squared gradient norms are summed; None: this rank has all gradients.

        For plain tensors of which each rank has another part, as ZeroRedundancyOptimizer,
        FullyShardedDataParallel and pipeline stages have them. DTensors need none, and under
        DistributedDataParallel, where every rank has every gradient, the norm would be too large. A
        parameter that several ranks of the group have is counted once for each; only beside
        parameters of FullyShardedDataParallel all others are taken as copies. May be set at any
        time, on all ranks; every rank of the group must then step.
        """
        group: ProcessGroup | None = dist.group_of(self._own.process_group)
        return group

    @process_group.setter
    def process_group(self, value: ProcessGroup | None) -> None:
        self._own.process_group = dist.description_of(value)

    @property
    def grad_norm(self) -> Tensor | None:
        """Global L2 norm of the last step's loss gradient, unscaled, before clipping.

        A 0-dim float32 tensor on the device of the first parameter that had a gradient (a norm
        above 3.4e38 reads inf, while the clip factor is still right). None if the last step did not
        compute it, which takes `max_grad_norm` (`float("inf")` will do) or `skip_nonfinite`.
        """
        return self._own.grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps changed nothing because of `skip_nonfinite` or `found_inf`.

        GradScaler sets `found_inf` where fused=True; else it leaves the whole step out by itself.
        A live 0-dim int64 tensor on the device of the first parameter that had a gradient; reading
        its value waits for that device.
        """
        if self._own.skipped_steps is None:
            self._own.skipped_steps = torch.zeros((), dtype=torch.int64, device=self._home())
        return self._own.skipped_steps

    @property
    def backend(self) -> str:
        """What steps the parameters: "triton", "llvm", "reference", or several, with "and".

        Kernels step a floating-point parameter that fills its memory without gaps, triton's on a
        GPU and LLVM's on a CPU, unless its group says fused=False or triton or llvmlite is missing.
        All others take the reference path.
        """
        kernels = (
            self._kernels_for(param, group)
            for group in self.param_groups
            for param in group["params"]
        )
        found = {"reference" if launch is None else launch.NAME for launch in kernels}
        order = ("triton", "llvm", "reference")
        return " and ".join(name for name in order if name in found) or "reference"

    def _kernels_for(self, param: Tensor, group: ParamGroup) -> Any:
        """The kernels that step a parameter, None for the reference path."""
        if self.device_rule(group) is None:
            return None
        return backend.kernels_for(param, group["fused"])

    @property
    def launches(self) -> int:
        """How many kernels the last step called on all devices; 0 on the reference path."""
        return self._own.launches

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _home(self) -> torch.device:
        """Device of the first parameter; a group, even the first, may be empty."""
        return next((param.device for param in self._params()), torch.device("cpu"))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells torch.amp.GradScaler to leave unscaling and skipping to `step`, as fused=True does.

        Read from the groups, so that a copy or an unpickled optimizer has it too.
        """
        if not any(group["fused"] for group in self.param_groups):
            return False
        # What overflowed here is not all that did. Only a scaler that unscales sums it over ranks,
        # and of the two only ShardedGradScaler does.
        if self._own.process_group is not None or self._splitter is not None:
            return False
        if dist.FLATTENED in map(dist.spread_of, self._params()):
            return False
        # Lightning clips no gradients where it sees this, though GradScaler lets such an optimizer
        # step with gradients that were unscaled before. So it unscales and clips, and this skips.
        return sys._getframe(1).f_globals.get("__name__") not in LIGHTNING

    # ---- one step ------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch._disable_dynamo  # type: ignore[attr-defined]  # private, but what torch.optim itself uses
    @_with_hooks
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss. Called first, with grad enabled.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError, TypeError: a hyper-parameter in a group is out of range.
            RuntimeError: a gradient is sparse, integer, on another device, or of another shape; a
                state does not fit its parameter; a gradient norm is asked for inside a backward
                pass, or where each rank has a part of the parameters and there is no
                `process_group`; another rank has died.

        All are raised before anything changes. No `.grad` is ever written. Whatever interrupts a
        step, each parameter and its state are those of before it or of after it.
        """
        self._opt_called = True
        loss = None
        grad_mode = torch.is_grad_enabled()
        # No context manager: an interrupt inside its entry would leave the mode changed. And twice:
        # one may come before the first of two statements, or between them.
        try:
            try:
                if closure is not None:
                    torch._C._set_grad_enabled(True)
                    loss = closure()
                torch._C._set_grad_enabled(False)
                self._step()
            except BaseException:
                self._plan = None  # it may not say any more what its tables hold
                raise
            finally:
                torch._C._set_grad_enabled(grad_mode)
        finally:
            torch._C._set_grad_enabled(grad_mode)
        return loss

    # Schedulers wrap `step` to learn whether it was called, and fail to wrap a compiled one. This
    # name tells them that `step` reports by itself, through `_opt_called`.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # a mark on a function

    def _step(self) -> None:
        """Step, without autograd."""
        fresh = not self.state
        plan, rest = self._gather()
        self._own.grad_norm = None
        self._own.launches = 0
        if fresh and self.state and self._creates_state_for_checkpoint():
            return
        needs_norm = self._needs_norm()
        has_parts = self.layerwise and any(map(dist.has_parts, self._spreads()))
        if plan is None and not rest and not (needs_norm or has_parts):
            return
        device = None if plan is None or rest else plan.device
        over_ranks = has_parts or (needs_norm and self._own.process_group is not None)
        if plan is not None and device is not None and not over_ranks:
            self._run_plan(plan, device)
        else:
            scale, skip = self._scale_and_skip(plan, rest)
            squares = self._squares_of_parts(rest, scale) if has_parts else {}
            exchange = partial(self._exchange, squares) if has_parts else None
            if plan is not None:
                plan.run(scale=scale, skip=skip, exchange=exchange)
            elif exchange is not None:
                exchange({})
            for group, params in rest:
                self._update(group, params, scale, skip, squares)
        if plan is not None:
            self._own.launches = len(plan.launched)

    def _creates_state_for_checkpoint(self) -> bool:
        """Whether this step is one of torch.distributed.checkpoint, which must not count.

        Callers are looked at only where lr is 0 in all groups, as there.
        """
        rates = [group["lr"] for group in self.param_groups]
        if not all(
            is_zero(lr.item() if isinstance(lr, Tensor) and on_host(lr) else lr) for lr in rates
        ):
            return False
        return dist.checkpoint_creates_state()

    def _gather(self) -> tuple[Plan | None, Work]:
        """The plan of what kernels step, and the rest; all checked, their state created.

        Where it raises, nothing has changed but that state may have been created, of zeros.
        """
        if is_traced():  # kernels would go past it: it sees operations, not memory
            self._check_norm_is_global()
            self._check_tensors_are_whole()
            work = self._collect()
            for param in (param for _, params in work for param in params):
                check_is_fake(param, type(self).__name__)
            self._init_states(work)
            return None, work
        plan = old = self._plan
        if old is None or not self._still_holds(old):
            plan = self._plan = None  # so that nothing of the old one is believed
        self._check_norm_is_global()
        self._check_tensors_are_whole()
        if plan is None:
            rest = self._make_plan(old)
            plan = self._plan
        else:
            if plan.capturing() and plan not in self._captured:
                self._captured += (plan,)  # a graph reads its tables as long as it lives
            plan.launched.clear()
            inventory = plan.inventory
            rest = self._collect(without=inventory.chosen) if inventory.rest else []
            self._init_states(rest)
        return (plan if plan is not None and plan.inventory.has_grads else None), rest

    def _still_holds(self, plan: Plan) -> bool:
        """Whether this step can be done with the tables of an earlier one."""
        if not plan.inventory.refresh(self, self.param_groups, self.state):
            return False
        # A graph goes on with the addresses that it was captured with.
        moved = plan.inventory.stale_tables
        return not (moved and (plan in self._captured or plan.capturing()))

    def _make_plan(self, old: Plan | None) -> Work:
        """Plan for the parameters that kernels step, return the rest; create the state of both."""
        work = self._collect()
        seen = None if old is None else old.inventory
        known = {} if seen is None else dict(zip(seen.chosen, seen.grad_dtypes, strict=True))
        # A parameter stays in the plan while it has no gradient, so that experts may come and go.
        kernels = {
            param: self._kernels_for(param, group)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None or param in self.state or param in known
        }
        candidates = {
            param: index
            for index, group in enumerate(self.param_groups)
            for param in group["params"]
            if kernels.get(param) is not None
        }
        if len({param for _, params in work for param in params}) < sum(len(p) for _, p in work):
            raise ValueError("some parameters appear in more than one parameter group")
        if any(is_capturing(device) for device in {param.device for param in candidates}):
            raise RuntimeError(NOT_BEFORE_CAPTURE)
        # Those without a gradient too, if they have begun: an option that was turned on may need
        # more of their state.
        names = {*self.tensor_states, *self.counts}
        idle = {p for p in candidates if p.grad is None and names & self.state.get(p, {}).keys()}
        waiting = [(g, [p for p in g["params"] if p in idle]) for g in self.param_groups]
        self._init_states(work + waiting)
        chosen = {
            param: index
            for param, index in candidates.items()
            if self._states_are_walkable(self.param_groups[index], param)
        }
        rest = [(group, [p for p in params if p not in chosen]) for group, params in work]
        rest = [(group, params) for group, params in rest if params]
        if chosen:
            others = {param for _, params in rest for param in params}
            groups, state = self.param_groups, self.state
            inventory = Inventory(self, kernels, groups, chosen, others, state, known)
            self._plan = Plan(inventory, state)
        return rest

    def _states_are_walkable(self, group: Settings, param: Tensor) -> bool:
        """Whether kernels can walk the state along with `param`, which is laid out for that."""
        state = self.state.get(param, {})
        names = self.states(group)
        if any(name not in state for name in names):
            return False  # no gradient yet
        counts = [state[name] for name in self.counts if name in state]
        if not backend.is_walkable_with(param, [state[name] for name in names], counts):
            return False
        for name in names:
            if not backend.same_layout(local(param), local(state[name])):
                laid_out = torch.empty_like(param, dtype=state[name].dtype)
                state[name] = laid_out.copy_(state[name])
        return True

    def _collect(self, without: Container[Tensor] = ()) -> Work:
        """The groups with those of their parameters that have a gradient; raises on bad input."""
        work = []
        for which, group in enumerate(self.param_groups):
            self._check_group(group)
            params: dict[Tensor, None] = {}  # each once, also one that was given twice
            for index, param in enumerate(group["params"]):
                if param.grad is not None and param not in without:
                    check_param(self.param_groups, which, index)
                    check_grad(type(self).__name__, self.param_groups, which, index)
                    params[param] = None
            if params:
                work.append((group, list(params)))
        return work

    def _init_states(self, work: Work) -> None:
        for group, params in work:
            for param in params:
                if param in self.state:
                    self._tidy_state(group, param)
            for device, settings in self._settings(group, params).items():
                for param in params:
                    if param.device == device:
                        state = self.state.get(param, {})
                        self.init_state(settings, param, state)
                        self._check_counts(state)
                        if dist.where_of(param) is not None:
                            self._shard_alike(param, state)
                        if state:
                            self.state[param] = state

    def _tidy_state(self, group: ParamGroup, param: Tensor) -> None:
        """Take what a user wrote into the state of a parameter: None forgets, a number counts."""
        state = self.state[param]
        for name in self.tensor_states:
            if name in state:
                check_moment(group, param, name, state[name])
        for name in self.counts:
            if name in state:
                check_count(group, param, name, state[name])
        for name in (*self.tensor_states, *self.counts):
            value = state.get(name)
            if value is None:
                state.pop(name, None)
            elif name in self.counts and not isinstance(value, Tensor):
                state[name] = self.counts[name].create(param, value)

    def _check_counts(self, state: dict[str, Tensor]) -> None:
        """Raise where a count is missing, which kernels would take for 1."""
        for name in self.counts:
            if name not in state and name not in self.late_states:
                raise RuntimeError(
                    f"{type(self).__name__}.init_state creates no {name!r}: call "
                    "super().init_state, which creates all counts that are not in late_states"
                )

    def _shard_alike(self, param: Tensor, state: dict[str, Tensor]) -> None:
        """Give the moments of a DTensor its placements, so that their parts belong together."""
        for name in self.tensor_states:
            if name in state:
                state[name] = dist.sharded_as(param, state[name])

    def _settings(
        self, group: ParamGroup, params: Iterable[Tensor]
    ) -> dict[torch.device, Settings]:
        """The numbers of a group on every device of its parameters."""
        return {
            device: {name: number(group[name], device) for name in self.defaults}
            for device in {param.device: None for param in params}
        }

    def _needs_norm(self) -> bool:
        return self._own.max_grad_norm is not None or self._own.skip_nonfinite

    def _check_norm_is_global(self) -> None:
        """Raise where the norm that is asked for would be one of some of the gradients."""
        if not self._needs_norm():
            return
        what = "max_grad_norm and skip_nonfinite take the norm over all gradients"
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{what}, which are not there inside a backward pass: call step() after it, or "
                "construct the optimizers of apply_optimizer_in_backward without the two"
            )
        fsdp = dist.FLATTENED in self._spreads()
        splitter = "FullyShardedDataParallel" if fsdp else self._splitter
        if splitter is not None and self._own.process_group is None:
            raise RuntimeError(
                f"{what}, but {splitter} gives each rank a part of the parameters: say which "
                "ranks make a whole with process_group=..., torch.distributed.group.WORLD or, "
                "where parts are replicated, those of one replica (a keyword of the optimizer; in "
                "ZeroRedundancyOptimizer, which has one of that name for itself, "
                f"optimizer_class=functools.partial({type(self).__name__}, process_group=...))"
            )

    def _check_tensors_are_whole(self) -> None:
        """Raise if per-tensor norms are needed but a shard does not know its full tensor."""
        if self.layerwise and dist.FLATTENED in self._spreads():
            raise RuntimeError(
                f"{type(self).__name__} needs the norm of each tensor, but "
                "FullyShardedDataParallel flattens tensors and gives each rank a part of all: use "
                "fully_shard, whose DTensors know what they are parts of"
            )

    def _spreads(self) -> Iterable[Spread | None]:
        """How parameters are spread over ranks, each way once, in the same order on all ranks."""
        if self._plan is not None:
            return self._plan.inventory.spreads
        return dict.fromkeys(map(dist.spread_of, self._params()))

    def _run_plan(self, plan: Plan, device: torch.device) -> None:
        """Step where kernels on one device do everything, the norm too."""
        found_inf = getattr(self, "found_inf", None)
        skipped = grad_norm = None
        if found_inf is not None or self.skip_nonfinite:
            if self._own.skipped_steps is None and plan.capturing():
                raise RuntimeError(NOT_BEFORE_CAPTURE)  # each replay would set it to 0
            if self._own.skipped_steps is None:
                self._own.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
            skipped = self._own.skipped_steps = self._own.skipped_steps.to(device)
        if self._needs_norm():
            grad_norm = torch.empty((), dtype=torch.float32, device=device)
        plan.run(
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=found_inf,
            max_norm=self.max_grad_norm,
            skip_nonfinite=self.skip_nonfinite,
            grad_norm=grad_norm,
            skipped=skipped,
        )
        self._own.grad_norm = grad_norm

    def _scale_and_skip(self, plan: Plan | None, rest: Work) -> tuple[Number, Flag]:
        """What multiplies every gradient of this step, and whether the step is skipped."""
        stepped = [] if plan is None else plan.inventory.params
        stepped = [*stepped[:1], *(param for _, params in rest for param in params[:1])]
        device = stepped[0].device if stepped else self._home()
        loss_scale = number(getattr(self, "grad_scale", None), device)
        found_inf = number(getattr(self, "found_inf", None), device)
        scale: Number = 1.0 if loss_scale is None else 1.0 / loss_scale
        # GradScaler sums found_inf over devices, so it may be 2.
        skip: Flag = False if found_inf is None else found_inf != 0
        if self._needs_norm():
            params = [param for _, params in rest for param in params]
            more = [] if plan is None else plan.norms()
            norms = norms_by_spread(self._spreads(), params, more, device)
            norm = dist.total_norm(norms, self.process_group) * scale
            self._own.grad_norm = norm.to(torch.float32)
            if self.skip_nonfinite:
                skip = skip | number(~torch.isfinite(norm), device)
            if self.max_grad_norm is not None and self.max_grad_norm != float("inf"):
                scale = scale * number(clip_factor(norm, self.max_grad_norm), device)
        if skip is not False:
            self._own.skipped_steps = self.skipped_steps.to(device).add_(skip)
        return scale, skip

    def _squares_of_parts(self, rest: Work, scale: Number) -> dict[Tensor, Tensor]:
        """The local sums of squares of DTensors that the reference steps."""
        found = {}
        for group, params in rest:
            settings = self._settings(group, params)
            for param in filter(lambda param: dist.has_parts(dist.spread_of(param)), params):
                device = param.device
                part = self._reference_arguments(param, settings[device], number(scale, device))
                found[param] = reference.squares_of(reference.move(self, *part))
        return found

    def _exchange(self, parts: dict[Tensor, Tensor], here: Mapping[Tensor, Tensor]) -> None:
        """Sum squares of parts over ranks: those on the reference path, and `here` of a plan."""
        dist.sum_over_parts(self._params(), {**here, **parts})

    def _update(
        self,
        group: ParamGroup,
        params: list[Tensor],
        scale: Number,
        skip: Flag,
        squares: Mapping[Tensor, Tensor],
    ) -> None:
        """Step the parameters of one group on the reference path."""
        settings = self._settings(group, params)
        for param in params:
            device = param.device
            part = local(param)
            # A tensor made in inference mode has no version; its own operations count any other's.
            before = None if part is param else part._version
            reference.update(
                self,
                *self._reference_arguments(param, settings[device], number(scale, device)),
                number(skip, device),
                squares.get(param),
            )
            if before is not None and part._version != before:  # a DTensor does not notice
                torch.autograd.graph.increment_version(param)

    def _reference_arguments(
        self, param: Tensor, settings: Settings, scale: Number
    ) -> tuple[Settings, Tensor, Tensor, dict[str, Tensor], Number]:
        """What `reference.move` takes; of a DTensor the part that is here is stepped like any."""
        assert param.grad is not None
        grad = local(dist.sharded_as(param, param.grad))
        state = {name: local(value) for name, value in self.state.get(param, {}).items()}
        return settings, local(param), grad, state, scale

    # ---- groups, copies and checkpoints --------------------------------------------------------

    def _check_group(self, group: ParamGroup, read_device: bool = False, new: bool = False) -> None:
        """Raise if an option is out of range; make numbers and pairs plain ones.

        Args:
            group: the options.
            read_device: whether numbers on an accelerator may be read, which waits for it.
            new: whether a user has just passed the group, so that a misspelt option is an error.
        """
        own = {name: getattr(self, name) for name in self.own_options}
        check_keys(group, self.defaults, own, self._own.warned, new=new)
        for name, default in self.defaults.items():
            if type(group[name]) not in PLAIN:  # an array, say, which a schedule made
                of = pair if isinstance(default, tuple) else settled
                group[name] = of(group[name])
        self._copy_options(group)
        check_number("lr", group["lr"], read_device=read_device)
        for name, option in self.declared_options.items():
            if option.check is not None:
                option.check(group, name, read_device)
        self.check_group(group, read_device)

    def _copy_options(self, group: ParamGroup) -> None:
        """Replace None in options that are then a copy of another one."""
        for name, option in self.declared_options.items():
            if option.copied_from is not None and group[name] is None:
                value = group[option.copied_from]  # may be a tensor that is written into later
                group[name] = value.detach().clone() if isinstance(value, Tensor) else value

    def _make_pairs(self, group: ParamGroup) -> None:
        """Make tuples of pairs: a list would have to be read in every step, as it may change."""
        for name, default in self.defaults.items():
            if isinstance(default, tuple) and name in group:
                group[name] = pair(group[name])

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a param group, as torch does; options it lacks take the constructor's values."""
        super().add_param_group(param_group)
        try:
            self._make_pairs(param_group)
            self._check_group(param_group, read_device=True, new=True)
            for index in range(len(param_group["params"])):
                check_param(self.param_groups, len(self.param_groups) - 1, index)
        except Exception:  # whatever it was, the group must not stay
            self.param_groups.pop()
            raise

    @torch._disable_dynamo  # type: ignore[attr-defined]  # as above
    def state_dict(self) -> StateDict:
        """State and param groups, as torch.optim writes them; see docs/recipes.md.

        Where torch.distributed.checkpoint asks, options that torch.optim does not know are left out
        if none of them has an effect: it loads only files that have every key.
        """
        packed: StateDict = Optimizer.state_dict(self)
        if dist.checkpoint_reads_keys():
            unknown = checkpoint.keys_beyond_torch(self)
            for group in packed["param_groups"]:
                for name in unknown:
                    group.pop(name, None)
        return packed

    @torch._disable_dynamo  # type: ignore[attr-defined]  # as above
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict()` of this class or of its torch.optim namesake returned.

        Saved hyper-parameters win; those that the file lacks (`l1` in a torch checkpoint) keep
        their present values, and so do `foreach`, `fused`, `capturable` and `differentiable`, which
        say how to run here and not what was trained. Tensors are copied, moved to their parameter's
        device and never narrowed.

        Raises:
            ValueError: no `state_dict`, or one with other groups, sizes, shapes or names of states
                than this optimizer's, or one that lacks states.
            TypeError: an option that is not a number.

        Where it raises, nothing has changed.
        """
        state_dict = copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        checkpoint.check_keys(state_dict)
        groups = checkpoint.merge_groups(self.param_groups, state_dict["param_groups"])
        checkpoint.check_states(state_dict, self)
        for group in groups:
            group.update(self.fixed_options)
            self._make_pairs(group)
            self._check_group(group, read_device=True)
        state = checkpoint.restore_state(groups, state_dict, self)
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle keep: unlike torch's, also own attributes and hooks."""
        kept = {name: getattr(self, name) for name in self._kept_by_pickle}
        skipped = self._own.skipped_steps  # which counts in place
        own = replace(self._own, skipped_steps=None if skipped is None else skipped.clone())
        return {**super().__getstate__(), **kept, "_own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Optimizer.__setstate__(self, state)  # not that of a class of torch.optim
        if not hasattr(self, "_own"):  # a wrapper has its optimizer's
            names = [field.name for field in fields(OptimizerOptions)]
            old = {name: state[f"_{name}"] for name in names if f"_{name}" in state}  # before 0.2
            self._own = OptimizerOptions(**old)
        self._plan = None
        options = self.declared_options.items()
        declared = {name: option.default for name, option in options if option.of_group}
        self.defaults = {**declared, **self.defaults}  # an older version lacked some
        for group in self.param_groups:
            group.update(self.fixed_options)
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            self._copy_options(group)


FusedOptimizer._declare_options()
