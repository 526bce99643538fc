"""A few steps over tensors of odd sizes, small enough for compute-sanitizer; see gpu.sh."""

from __future__ import annotations

import torch
from torch import nn

import fusedreg

SIZES = [0, 1, 5, 1023, 1025, 8193]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Tensors of their own, and one that begins off every alignment."""
    params = [nn.Parameter(torch.randn(size, device=DEVICE).to(dtype)) for size in SIZES]
    params.append(nn.Parameter(torch.randn(1500, device=DEVICE).to(dtype)[1:]))
    return params


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for make in (
            lambda params: fusedreg.AdamW(params, l1=0.01, max_grad_norm=1.0, fused=True),
            lambda params: fusedreg.SGD(params, lr=0.1, momentum=0.9, fused=True),
            lambda params: fusedreg.LAMB(params, l1=0.01, max_grad_norm=1.0, fused=True),
        ):
            params = parameters(dtype)
            optimizer = make(params)
            for _ in range(3):
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step()
            finite = all(param.isfinite().all() for param in params)
            print(f"{type(optimizer).__name__} {dtype} {optimizer.backend} finite: {finite}")
            if not finite:
                raise SystemExit(1)


if __name__ == "__main__":
    main()
