"""What holds on an accelerator, shown on a CPU whose numbers are taken for a device's."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedreg

from cases import CASES, Case, each_case, parameters, set_grads


class NoHostRead(TorchDispatchMode):
    """Raises where the host reads a tensor's value, which on an accelerator waits for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the step reads a value"
        return func(*args, **(kwargs or {}))


@each_case(CASES, paths=("device",))
def test_step_never_waits_for_the_device(case: Case, path: str) -> None:
    params = parameters()
    lr = torch.tensor(case.kwargs["lr"])
    optimizer = case.make(params, path, lr=lr, max_grad_norm=1.0, skip_nonfinite=True)
    for found_inf in (0.0, 1.0, 0.0):
        set_grads(params, seed=int(found_inf))
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found_inf)
        with NoHostRead():
            optimizer.step()
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("path", ["device"], indirect=True)
def test_waiting_would_be_noticed(path: str) -> None:
    with NoHostRead(), pytest.raises(AssertionError, match="reads a value"):
        torch.ones(()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_right_where_float64_is_missing(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(fusedreg.norms, "wide_dtype", lambda device: torch.float32)
    for magnitude in (1e-30, 1.0, 1e37):
        grads = [torch.full((4,), magnitude, dtype=dtype) for _ in range(4)]
        norm = fusedreg.norms.global_norm(grads, torch.device("cpu"))
        expected = 4 * grads[0][0].double().item()
        # Sixteen equal entries: every sum is exact, two divisions and two products round.
        assert norm.item() == pytest.approx(expected, rel=4 * torch.finfo(torch.float32).eps)
