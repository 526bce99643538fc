"""What an installed wheel must do: `make wheel` runs this outside the repository and pytest."""

import fusedreg.kernels
import torch

import fusedreg

for cls in (fusedreg.SGD, fusedreg.Adam, fusedreg.AdamW):
    w = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
    optimizer = cls([w], lr=0.1, l1=0.5, max_grad_norm=1.0)
    w.grad = torch.tensor([3.0, 1e-3])
    optimizer.step()
    if not (0 < w[0] < 1 and w[1] == 0):
        raise SystemExit(f"{cls.__name__} gave {w.tolist()}")
print(f"fusedreg {fusedreg.__version__} from a wheel, torch {torch.__version__}")
