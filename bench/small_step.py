"""A few steps over tensors of odd sizes, small enough for compute-sanitizer; see gpu.sh."""

from __future__ import annotations

import torch

import fusedreg

SIZES = [0, 1, 5, 1023, 1025, 8193]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PENALISED = {"l1": 0.01, "max_grad_norm": 1.0}
OPTIMIZERS = [
    (fusedreg.AdamW, PENALISED),
    (fusedreg.SGD, {"lr": 0.1, "momentum": 0.9}),
    (fusedreg.LAMB, PENALISED),
]


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for cls, options in OPTIMIZERS:
            values = [torch.randn(size, device=DEVICE).to(dtype) for size in SIZES]
            values.append(torch.randn(1500, device=DEVICE).to(dtype)[1:])  # off every alignment
            params = list(map(torch.nn.Parameter, values))
            optimizer = cls(params, fused=True, **options)
            for _ in range(3):
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step()
            finite = all(param.isfinite().all() for param in params)
            print(f"{cls.__name__} {dtype} {optimizer.backend} finite: {finite}")
            if not finite:
                raise SystemExit(1)


if __name__ == "__main__":
    main()
