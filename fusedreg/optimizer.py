"""The one `step()` of every optimizer here: what is stepped, by how much, and whether at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import wraps
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

from fusedreg import backend, checkpoint, dist
from fusedreg.checks import (
    L1_MODES,
    check_flags,
    check_keys,
    check_lr_independent_decay,
    check_number,
    check_param,
    check_state_dtype,
)
from fusedreg.dist import Group, ProcessGroup
from fusedreg.formats import Format, Plain, planes_of
from fusedreg.penalties import L1, L2, Penalty
from fusedreg.scalars import Count, Number, pair, settled
from fusedreg.stepper import (
    NOTHING,
    Outcome,
    Stepper,
    Wishes,
    check_norm_is_global,
    home,
    params_of,
)
from fusedreg.types import Settings, State, Update


@dataclass
class Own:
    """What belongs to the optimizer and not to a param group.

    One object of the instance, because a wrapper may share the class and forward what it lacks, as
    Lightning's do: its properties then read and write what is the optimizer's.
    """

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    process_group: Group | None = None
    outcome: Outcome = NOTHING
    """Of the last step."""
    warned: set[str] = field(default_factory=set)
    """Keys of groups that look like a misspelt option and were named once."""


OPTIONS: dict[str, Any] = {
    "weight_decay": 0.0,
    "decoupled_weight_decay": False,
    "lr_independent_decay": False,
    "decay_lr": None,
    "l1": 0.0,
    "l1_mode": "prox",
    "maximize": False,
    "foreach": None,
    "fused": None,
    "differentiable": False,
    "state_dtype": None,
}
"""Options of every param group, with the defaults of a class that does not say otherwise."""
OWN_OPTIONS = {"max_grad_norm": None, "skip_nonfinite": False, "process_group": None}
"""Those that belong to the optimizer, each a property of it."""

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
        defaults: `lr` and the options of the subclass, which may differ between groups.
        options: those that every class has, as in :class:`fusedreg.SGD`: weight_decay,
            decoupled_weight_decay, lr_independent_decay, l1, l1_mode, maximize, foreach, fused,
            differentiable, state_dtype, max_grad_norm, skip_nonfinite and process_group. They may
            stand in `defaults` too.

    Raises:
        TypeError: there is no such option.
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
    fixed_options: Mapping[str, Any] = MappingProxyType({})
    """Options that every group has, whatever a checkpoint of another class says."""
    neutral_options: Mapping[str, Any] = MappingProxyType(OPTIONS)
    """Options that every class has, with values that have no effect."""
    own_options = frozenset(OWN_OPTIONS)
    """Options that belong to the optimizer, so that no group may have them."""
    penalties: tuple[Penalty, ...] = (L1(), L2())
    """What a step adds to the rule, in this order at each stage; see penalties/base.py."""
    layerwise: bool = False
    """Whether lr is multiplied by the trust ratio of each tensor, ||w|| / ||update||."""

    # Class attributes, so that an optimizer pickled by an older version has them too.
    _splitter: str | None = None
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
        defaults: Mapping[str, Any],
        **options: Any,
    ) -> None:
        who = type(self).__name__
        for name in options.keys() - OPTIONS.keys() - OWN_OPTIONS.keys():
            raise TypeError(f"{who}.__init__() got an unexpected keyword argument {name!r}")
        defaults = {**OPTIONS, **OWN_OPTIONS, **defaults, **options}
        own = {name: defaults.pop(name) for name in OWN_OPTIONS}
        for name in ("lr", *self.device_options):
            if name not in defaults:
                raise TypeError(f"{who} has no option {name!r} among its defaults")
        self._own = Own()
        for name, value in own.items():
            setattr(self, name, value)
        self._splitter = dist.constructing_splitter()
        self._stepper = Stepper()
        self.defaults = {name: settled(value) for name, value in defaults.items()}
        self.validate({**self.defaults}, read_device=True)
        Optimizer.__init__(self, params, self.defaults)  # not that of a class of torch.optim
        if self._wishes().norm:
            spreads = map(dist.spread_of, params_of(self.param_groups))
            check_norm_is_global(who, spreads, self._splitter, self.process_group)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise where kernels would not run what a subclass says."""
        super().__init_subclass__(**kwargs)
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

    def check_group(self, group: dict[str, Any], read_device: bool) -> None:
        """Raise ValueError where an option of this class is out of range.

        Args:
            group: the options.
            read_device: whether numbers on an accelerator may be read, which waits for it.
        """

    def states(self, group: Settings) -> tuple[str, ...]:
        """Those of `tensor_states` that a step of this group moves, in their order: here all."""
        return self.tensor_states

    def first_value(self, group: Settings, name: str) -> Number:
        """What every entry of a tensor state is before the first step: here 0."""
        return 0.0

    def state_format(self, group: Settings, param: Tensor) -> Format:
        """How the tensor states of a parameter are stored: here as `state_dtype` says."""
        return Plain(group["state_dtype"])

    def init_state(self, group: Settings, param: Tensor, state: dict[str, Tensor]) -> None:
        """Create what `state` lacks for the next step of `param`: counts, and zeros for `states`.

        Counts in `late_states` are not created.
        """
        for name, count in self.counts.items():
            if name not in state and name not in self.late_states:
                state[name] = count.create(param)
        storage = self.state_format(group, param)
        for name in self.states(group):
            planes = planes_of(storage, [name])
            if planes[0] not in state:
                created = storage.create(param, self.first_value(group, name))
                state.update(zip(planes, created, strict=True))

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
        return self._own.outcome.grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps changed nothing because of `skip_nonfinite` or `found_inf`.

        GradScaler sets `found_inf` where fused=True; else it leaves the whole step out by itself.
        A live 0-dim int64 tensor on the device of the first parameter that had a gradient; reading
        its value waits for that device.
        """
        skipped = self._own.outcome.skipped_steps
        if skipped is None:
            skipped = torch.zeros((), dtype=torch.int64, device=home(self.param_groups))
            self._own.outcome = self._own.outcome._replace(skipped_steps=skipped)
        return skipped

    @property
    def backend(self) -> str:
        """What steps the parameters: "triton", "llvm", "reference", or several, with "and".

        Kernels step a floating-point parameter that fills its memory without gaps, triton's on a
        GPU and LLVM's on a CPU, unless its group says fused=False or triton or llvmlite is missing.
        All others take the reference path.
        """
        backends = (
            backend.kernels_of(self, group, param)
            for group in self.param_groups
            for param in group["params"]
        )
        found = {"reference" if kernels is None else kernels.name for kernels in backends}
        order = ("triton", "llvm", "reference")
        return " and ".join(name for name in order if name in found) or "reference"

    @property
    def launches(self) -> int:
        """How many kernels the last step called on all devices; 0 on the reference path."""
        return self._own.outcome.launches

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
        if dist.FLATTENED in map(dist.spread_of, params_of(self.param_groups)):
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
                self._own.outcome = self._stepper.step(
                    self, self.param_groups, self.state, self._wishes()
                )
            except BaseException:
                self._stepper.forget()  # its plan may not say any more what its tables hold
                raise
            finally:
                torch._C._set_grad_enabled(grad_mode)
        finally:
            torch._C._set_grad_enabled(grad_mode)
        return loss

    # Schedulers wrap `step` to learn whether it was called, and fail to wrap a compiled one. This
    # name tells them that `step` reports by itself, through `_opt_called`.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # a mark on a function

    def _wishes(self) -> Wishes:
        """What is asked of a step for all groups together."""
        own = self._own
        return Wishes(
            own.max_grad_norm,
            own.skip_nonfinite,
            dist.group_of(own.process_group),
            self._splitter,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            own.outcome.skipped_steps,
        )

    # ---- groups, copies and checkpoints --------------------------------------------------------

    def validate(self, group: dict[str, Any], read_device: bool = False) -> None:
        """Raise where an option is out of range; make plain what is a number or a pair."""
        own = {name: getattr(self, name) for name in self.own_options}
        check_keys(group, self.defaults, own, self._own.warned)
        for name, default in self.defaults.items():
            if type(group[name]) not in PLAIN:  # an array, say, which a schedule made
                of = pair if isinstance(default, tuple) else settled
                group[name] = of(group[name])
        if group["decay_lr"] is None:
            group["decay_lr"] = _copy_of(group["lr"])
        check_flags(group)
        check_number("lr", group["lr"], read_device=read_device)
        check_number("weight_decay", group["weight_decay"], read_device=read_device)
        check_number("l1", group["l1"], below=float("inf"), read_device=read_device)
        if group["l1_mode"] not in L1_MODES:
            raise ValueError(
                f"Invalid l1_mode value: {group['l1_mode']!r} (expected one of {L1_MODES})"
            )
        check_state_dtype(group["state_dtype"])
        check_lr_independent_decay(group, read_device)
        self.check_group(group, read_device)

    def _make_pairs(self, group: dict[str, Any]) -> None:
        """Make tuples of pairs: a list would have to be read in every step, as it may change."""
        for name, default in self.defaults.items():
            if isinstance(default, tuple) and name in group:
                group[name] = pair(group[name])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as torch does; options it lacks take the constructor's values."""
        super().add_param_group(param_group)
        try:
            self._make_pairs(param_group)
            self.validate(param_group, read_device=True)
            for index in range(len(param_group["params"])):
                check_param(self.penalties, self.param_groups, len(self.param_groups) - 1, index)
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
        checkpoint.check_states(state_dict, type(self))
        for group in groups:
            group.update(self.fixed_options)
            self._make_pairs(group)
            self.validate(group, read_device=True)
        state = checkpoint.restore_state(groups, state_dict, type(self))
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle keep: unlike torch's, also own attributes and hooks."""
        kept = {name: getattr(self, name) for name in self._kept_by_pickle}
        outcome = self._own.outcome
        if outcome.skipped_steps is not None:  # which counts in place
            outcome = outcome._replace(skipped_steps=outcome.skipped_steps.clone())
        own = replace(self._own, outcome=outcome)
        return {**super().__getstate__(), **kept, "_own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Optimizer.__setstate__(self, state)  # not that of a class of torch.optim
        # Addresses are of this process and these tensors: a copy makes its own plan. One that
        # loads a file keeps those that CUDA graphs were captured with, which may be replayed.
        if "_stepper" in vars(self):
            self._stepper.forget()
        else:
            self._stepper = Stepper()
        # Of an older version, which lacked some.
        self.defaults = {**OPTIONS, **self.defaults}
        for group in self.param_groups:
            group.update(self.fixed_options)
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            if group["decay_lr"] is None:
                group["decay_lr"] = _copy_of(group["lr"])


def named(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The `locals()` of a constructor as options: an argument has the name of its option."""
    return {
        name: value
        for name, value in arguments.items()
        if name not in ("self", "__class__", "params")
    }


def _copy_of(lr: Any) -> Any:
    """A learning rate as it is now, whatever is written into it later."""
    return lr.detach().clone() if isinstance(lr, Tensor) else lr
