"""The one `step()` of every optimizer here: what is stepped, by how much, and whether at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from fusedreg import checkpoint, reference
from fusedreg.checks import L1_MODES, check_flags, check_grad, check_number, check_param
from fusedreg.norms import clip_factor, global_norm
from fusedreg.reference import Settings, State
from fusedreg.scalars import Flag, Number, number


class FusedOptimizer(Optimizer):
    """Base class: clipping, penalties, loss scaling, skipping and checkpoints around one rule.

    A subclass supplies its signature and docstring, `tensor_states` and `scalar_states`,
    `check_group`, `init_state`, `direction` and `gain`. See docs/semantics.md for the order of a
    step, and :class:`fusedreg.SGD` for the shortest example.
    """

    tensor_states: tuple[str, ...]
    """Names of the states shaped like the parameter."""
    scalar_states: tuple[str, ...]
    """Names of the 0-dim states."""

    # What belongs to the optimizer and not to a param group. Class attributes, so that an optimizer
    # pickled by an older version has them too.
    _max_grad_norm: float | None = None
    _skip_nonfinite: bool = False
    _grad_norm: Tensor | None = None
    _skipped_steps: Tensor | None = None
    _has_stepped: bool = False
    _kept_by_pickle: ClassVar[tuple[str, ...]] = (
        "_max_grad_norm",
        "_skip_nonfinite",
        "_grad_norm",
        "_skipped_steps",
        "_optimizer_step_pre_hooks",
        "_optimizer_step_post_hooks",
        "_optimizer_state_dict_pre_hooks",
        "_optimizer_state_dict_post_hooks",
        "_optimizer_load_state_dict_pre_hooks",
        "_optimizer_load_state_dict_post_hooks",
    )

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
    ) -> None:
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self._check_group(defaults, read_device=True)
        super().__init__(params, defaults)

    # ---- the contract: a subclass overrides all four ---------------------------------------------

    def check_group(self, group: dict[str, Any], read_device: bool) -> None:
        """Raise ValueError where a hyper-parameter of this class is out of range."""
        raise NotImplementedError

    def init_state(
        self, group: Settings, param: Tensor, state: dict[str, Tensor], may_skip: bool
    ) -> None:
        """Create what `state` lacks for the next step of `param`."""
        raise NotImplementedError

    def direction(self, settings: Settings, state: State, grad: Tensor) -> tuple[Tensor, State]:
        """What lr multiplies, and the new state, from the old state and the penalised gradient."""
        raise NotImplementedError

    def gain(self, settings: Settings, state: State) -> Number:
        """Displacement per unit of a constant gradient, over lr, in the new state.

        `lr * gain * l1` is the threshold whose fixed point minimises loss + l1 * |w|.
        """
        raise NotImplementedError

    # ---- what belongs to the optimizer ---------------------------------------------------------

    @property
    def max_grad_norm(self) -> float | None:
        """Clip the global L2 norm of the loss gradient to this; None: do not even compute it.

        `float("inf")` computes `grad_norm` and clips nothing. May be set at any time.
        """
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if isinstance(value, Tensor):
            raise TypeError("Invalid max_grad_norm value: a Tensor (expected a float or None)")
        if value is not None:
            check_number("max_grad_norm", value)
            value = float(value)
        self._max_grad_norm = value

    @property
    def skip_nonfinite(self) -> bool:
        """Whether a step whose gradient norm is inf or NaN changes nothing. May be set any time."""
        return self._skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, value: bool) -> None:
        self._skip_nonfinite = bool(value)

    @property
    def grad_norm(self) -> Tensor | None:
        """Global L2 norm of the last step's loss gradient, unscaled, before clipping.

        A 0-dim float32 tensor on the device of the first parameter that had a gradient (a norm
        above 3.4e38 reads inf, while the clip factor is still right). None if the last step did not
        compute it, which takes `max_grad_norm` (`float("inf")` will do) or `skip_nonfinite`.
        """
        return self._grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps changed nothing because of `skip_nonfinite` or `found_inf`.

        GradScaler sets `found_inf` where fused=True; else it leaves the whole step out by itself.
        A live 0-dim int64 tensor on the device of the first parameter that had a gradient; reading
        its value waits for that device.
        """
        if self._skipped_steps is None:
            self._skipped_steps = torch.zeros((), dtype=torch.int64, device=self._home())
        return self._skipped_steps

    def _home(self) -> torch.device:
        """Device of the first parameter; a group, even the first, may be empty."""
        params = (param for group in self.param_groups for param in group["params"])
        return next((param.device for param in params), torch.device("cpu"))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells torch.amp.GradScaler to leave unscaling and skipping to `step`, as fused=True does.

        Read from the groups, so that a copy or an unpickled optimizer has it too.
        """
        return any(group["fused"] for group in self.param_groups)

    # ---- one step ------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch._disable_dynamo  # type: ignore[attr-defined]  # private, but what torch.optim itself uses
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss. Called first, with grad enabled.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError, TypeError: a hyper-parameter in a group is out of range.
            RuntimeError: a gradient is sparse, integer, on another device, or of another shape.
            All are raised before anything changes. No `.grad` is ever written.
        """
        self._opt_called = True
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = self._collect()
        self._grad_norm = None
        if work:
            scale, skip = self._scale_and_skip([param for _, params in work for param in params])
            for group, params in work:
                self._update(group, params, scale, skip)
            self._has_stepped = True
        elif self._needs_norm():
            self._grad_norm = torch.zeros((), dtype=torch.float32, device=self._home())
        return loss

    # Schedulers wrap `step` to learn whether it was called, and fail to wrap a compiled one. This
    # name tells them that `step` reports by itself, through `_opt_called`.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # a mark on a function

    def _collect(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The groups with those of their parameters that have a gradient; raises on bad input."""
        work = []
        for which, group in enumerate(self.param_groups):
            self._check_group(group)
            params: dict[Tensor, None] = {}  # each once, also one that was given twice
            for index, param in enumerate(group["params"]):
                if param.grad is not None:
                    check_param(self.param_groups, which, index)
                    check_grad(type(self).__name__, self.param_groups, which, index)
                    params[param] = None
            if params:
                work.append((group, list(params)))
        return work

    def _needs_norm(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    def _scale_and_skip(self, params: list[Tensor]) -> tuple[Number, Flag]:
        """What multiplies every gradient of this step, and whether the step is skipped."""
        device = params[0].device
        loss_scale = number(getattr(self, "grad_scale", None), device)
        found_inf = number(getattr(self, "found_inf", None), device)
        scale: Number = 1.0 if loss_scale is None else 1.0 / loss_scale
        # GradScaler sums found_inf over devices, so it may be 2.
        skip: Flag = False if found_inf is None else found_inf != 0
        if self._needs_norm():
            norm = _grad_norm(params) * scale
            self._grad_norm = norm.to(torch.float32)
            if self.skip_nonfinite:
                skip = skip | number(~torch.isfinite(norm), device)
            if self.max_grad_norm is not None and self.max_grad_norm != float("inf"):
                scale = scale * number(clip_factor(norm, self.max_grad_norm), device)
        if skip is not False:
            self._skipped_steps = self.skipped_steps.to(device).add_(skip)
        return scale, skip | self._only_creates_state(params)

    def _only_creates_state(self, params: list[Tensor]) -> Flag:
        """Whether this first step is there to create state, and must not count as one.

        torch.distributed.checkpoint makes an optimizer create its state by a step with lr 0 and
        gradients of zeros. Counting it would change the bias correction of every later step.
        """
        if self.state or self._has_stepped:
            return False
        lrs = [number(group["lr"], params[0].device) for group in self.param_groups]
        if any(not isinstance(lr, Tensor) and lr != 0 for lr in lrs):
            return False
        only: Flag = number(_grad_norm(params), params[0].device) == 0
        for lr in lrs:
            only = only & (lr == 0)
        return only

    def _update(
        self, group: dict[str, Any], params: list[Tensor], scale: Number, skip: Flag
    ) -> None:
        """Step the parameters of one group."""
        settings: dict[torch.device, Settings] = {}
        for param in params:
            device = param.device
            if device not in settings:
                settings[device] = {name: number(group[name], device) for name in self.defaults}
            state = self.state.get(param, {})
            self.init_state(settings[device], param, state, may_skip=skip is not False)
            reference.update(
                self, settings[device], param, state, number(scale, device), number(skip, device)
            )
            if state:
                self.state[param] = state

    # ---- groups, copies and checkpoints --------------------------------------------------------

    def _check_group(self, group: dict[str, Any], read_device: bool = False) -> None:
        check_flags(group)
        check_number("lr", group["lr"], read_device=read_device)
        check_number("weight_decay", group["weight_decay"], read_device=read_device)
        check_number("l1", group["l1"], below=float("inf"), read_device=read_device)
        if group["l1_mode"] not in L1_MODES:
            raise ValueError(
                f"Invalid l1_mode value: {group['l1_mode']!r} (expected one of {L1_MODES})"
            )
        self.check_group(group, read_device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as torch does; options it lacks take the constructor's values."""
        super().add_param_group(param_group)
        try:
            self._check_group(param_group, read_device=True)
            for index in range(len(param_group["params"])):
                check_param(self.param_groups, len(self.param_groups) - 1, index)
        except Exception:  # whatever it was, the group must not stay
            self.param_groups.pop()
            raise

    @torch._disable_dynamo  # type: ignore[attr-defined]  # as above
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict()` of this class or of its torch.optim namesake returned.

        Saved hyper-parameters win; those that the file lacks (`l1` in a torch checkpoint) keep
        their present values, and so do `foreach`, `fused`, `capturable` and `differentiable`, which
        say how to run here and not what was trained. Tensors are copied, moved to their parameter's
        device and never narrowed.

        Raises:
            ValueError: other groups, sizes or shapes than this optimizer's. Nothing has changed.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        groups = checkpoint.merge_groups(self.param_groups, state_dict["param_groups"])
        for group in groups:
            self._check_group(group, read_device=True)
        state = checkpoint.restore_state(groups, state_dict, self.scalar_states)
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle keep: unlike torch's, also own attributes and hooks."""
        own = {name: getattr(self, name) for name in self._kept_by_pickle}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)


def _grad_norm(params: list[Tensor]) -> Tensor:
    grads = (param.grad for param in params if param.grad is not None)
    return global_norm(grads, params[0].device)
