"""What surrounds a step: hooks and profilers, which torch runs, and the mode of autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.autograd import profiler
from torch.optim.optimizer import (
    Optimizer,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

Step = TypeVar("Step", bound=Callable[..., Any])
T = TypeVar("T")


def with_hooks(step: Step) -> Step:
    """`step` with hooks and a profiler's record, as torch has it, entered only where there is one.

    torch's wrapper takes 5 us, as long as the rest of a small step.
    """
    whole = Optimizer.profile_hook_step(step)

    @wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
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
    hooked: Step = wrapper  # type: ignore[assignment]  # with the mark it is a Step
    return hooked


def with_grad_mode(enabled: bool, function: Callable[[], T]) -> T:
    """Call a function with autograd on or off, and leave it as it was.

    No context manager: an interrupt inside its entry would leave the mode changed. And the mode is
    restored twice, because an interrupt may come just before either of two statements.
    """
    grad_mode = torch.is_grad_enabled()
    try:
        try:
            torch._C._set_grad_enabled(enabled)
            return function()
        finally:
            torch._C._set_grad_enabled(grad_mode)
    finally:
        torch._C._set_grad_enabled(grad_mode)
