"""The one `step()` of every optimizer here: what is stepped, by how much, and whether at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict
from typing_extensions import Unpack

from fusedreg import backend, checkpoint, dist
from fusedreg.amp import supports_amp_scaling
from fusedreg.checks import check_keys, check_number, check_param
from fusedreg.contract import AllOptions, UpdateRule
from fusedreg.dist import ProcessGroup
from fusedreg.hooks import with_grad_mode, with_hooks
from fusedreg.options import copy_options, make_pairs, make_plain
from fusedreg.scalars import settled
from fusedreg.stepper import (
    OptimizerOptions,
    Stepper,
    check_norm_is_global,
    home,
    params_of,
    scaler_of,
)
from fusedreg.types import ParamGroup


class FusedOptimizer(UpdateRule, Optimizer):
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

    _kept_by_pickle: ClassVar[tuple[str, ...]] = (
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
        values = self._with_class_defaults(defaults, options)
        self._own = OptimizerOptions()
        for name in self.own_options:
            setattr(self, name, values.pop(name))
        self._own.splitter = dist.constructing_splitter()
        self._stepper = Stepper()
        self.defaults = {name: settled(value) for name, value in values.items()}
        self.validate({**self.defaults}, read_device=True)
        Optimizer.__init__(self, params, self.defaults)  # not that of a class of torch.optim
        if self._own.needs_norm:
            shardings = map(dist.sharding_of, params_of(self.param_groups))
            check_norm_is_global(
                type(self).__name__, shardings, self._own.splitter, self.process_group
            )

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

        For plain tensors that are split over ranks, as by ZeroRedundancyOptimizer,
        FullyShardedDataParallel and pipeline stages. DTensors need none, and under
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
        return backend.names_of(self, self.param_groups)

    @property
    def launches(self) -> int:
        """How many kernels the last step called on all devices; 0 on the reference path."""
        return self._own.outcome.launches

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells torch.amp.GradScaler to leave unscaling and skipping to `step`, as fused=True does.

        Read from the groups, so that a copy or an unpickled optimizer has it too.
        """
        split = self._own.process_group is not None or self._own.splitter is not None
        return supports_amp_scaling(self.param_groups, split, asked_by=sys._getframe(1))

    # ---- one step ------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch._disable_dynamo  # type: ignore[attr-defined]  # private, but what torch.optim itself uses
    @with_hooks
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
        try:
            loss = None if closure is None else with_grad_mode(True, closure)
            with_grad_mode(False, self._step)
        except BaseException:
            self._stepper.forget()  # its plan may not say any more what its tables hold
            raise
        return loss

    # Schedulers wrap `step` to learn whether it was called, and fail to wrap a compiled one. This
    # name tells them that `step` reports by itself, through `_opt_called`.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # a mark on a function

    def _step(self) -> None:
        """Step, without autograd."""
        own = self._own
        own.outcome = self._stepper.step(self, self.param_groups, self.state, own, scaler_of(self))

    # ---- groups, copies and checkpoints --------------------------------------------------------

    def validate(self, group: ParamGroup, read_device: bool = False, new: bool = False) -> None:
        """Raise if an option is out of range; make numbers and pairs plain ones.

        Args:
            group: the options.
            read_device: whether numbers on an accelerator may be read, which waits for it.
            new: whether a user has just passed the group, so that a misspelt option is an error.
        """
        own = {name: getattr(self, name) for name in self.own_options}
        check_keys(group, self.defaults, own, self._own.warned, new=new)
        make_plain(group, self.defaults)
        self.check_fixed(group)
        copy_options(group, self.declared_options)
        check_number("lr", group["lr"], read_device=read_device)
        for name, option in self.declared_options.items():
            if option.check is not None:
                option.check(group, name, read_device)
        self.check_group(group, read_device)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a param group, as torch does; options it lacks take the constructor's values."""
        super().add_param_group(param_group)
        try:
            make_pairs(param_group, self.defaults)
            self.validate(param_group, read_device=True, new=True)
            for index in range(len(param_group["params"])):
                check_param(
                    [penalty.check_param for penalty in self.penalties],
                    self.param_groups,
                    len(self.param_groups) - 1,
                    index,
                )
        except Exception:  # whatever it was, the group must not stay
            self.param_groups.pop()
            raise

    @torch._disable_dynamo  # type: ignore[attr-defined]  # as above
    def state_dict(self) -> StateDict:
        """State and param groups, as torch.optim writes them; see docs/recipes.md."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        packed = checkpoint.pack(self, self.param_groups, self.state)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, packed)
            packed = packed if replaced is None else replaced
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
            group.update(self.fixed_among(self.defaults))
            make_pairs(group, self.defaults)
            self.validate(group, read_device=True)
        state = checkpoint.restore_state(groups, state_dict, self)
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
        # What a subclass declares beyond ours is an attribute of it.
        declared = self.own_options - FusedOptimizer.own_options
        attributes = {name: getattr(self, name) for name in declared}
        return {**super().__getstate__(), **kept, "_own": own, "_attributes": attributes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {**state}
        attributes = state.pop("_attributes", {})
        Optimizer.__setstate__(self, state)  # not that of a class of torch.optim
        for name in self.own_options - FusedOptimizer.own_options:
            if name in attributes or not hasattr(self, name):  # an older version lacked it
                setattr(self, name, attributes.get(name, self.declared_options[name].default))
        # Addresses are of this process and these tensors: a copy makes its own plan. Where this one
        # has loaded a file, a CUDA graph may still read the tables that it was captured with.
        if "_stepper" in vars(self):
            self._stepper.forget()
        else:
            self._stepper = Stepper()
        options = self.declared_options.items()
        declared = {name: option.default for name, option in options if option.of_group}
        self.defaults = {**declared, **self.defaults}  # an older version lacked some
        for group in self.param_groups:
            group.update(self.fixed_among(self.defaults))
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            copy_options(group, self.declared_options)
