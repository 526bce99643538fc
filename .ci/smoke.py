"""What an installed wheel must do: `make wheel` runs this outside the repository and pytest."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import fusedreg
import fusedreg.kernels

# A CPU needs no triton for its kernels, and does without llvmlite on the reference path.
step = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # what is None there cannot be imported
import torch
import fusedreg

w = torch.nn.Parameter(torch.ones(3))
w.grad = torch.ones(3)
optimizer = fusedreg.AdamW([w], l1=0.1)
optimizer.step()
print(optimizer.backend, optimizer.launches)
"""
TORCHS_OWN = "ignore:Failed to initialize NumPy"  # which is not here
for missing, path in (((), "llvm 2"), (("llvmlite",), "reference 0")):
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-W", TORCHS_OWN, "-c", step, *missing],
        capture_output=True,
        text=True,
        check=False,
    )
    if (ran.returncode, ran.stdout.strip(), ran.stderr) != (0, path, ""):
        raise SystemExit(f"without {missing}: {ran.stdout}{ran.stderr}, not {path}")

if Path(__file__).parent.parent in Path(fusedreg.__file__).parents[1:2]:
    raise SystemExit(f"this is the repository, not the wheel: {fusedreg.__file__}")

for cls in (fusedreg.SGD, fusedreg.Adam, fusedreg.AdamW):
    w = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
    optimizer = cls([w], lr=0.1, l1=0.5, max_grad_norm=1.0)
    w.grad = torch.tensor([3.0, 1e-3])
    optimizer.step()
    if not (0 < w[0] < 1 and w[1] == 0):
        raise SystemExit(f"{cls.__name__} gave {w.tolist()}")

# Without its extra the demo says so.
demo = subprocess.run(
    [sys.executable, "-m", "fusedreg", "demo"], capture_output=True, text=True, check=False
)
if demo.returncode != 2 or "pip install 'fusedreg[demo]'" not in demo.stderr:
    raise SystemExit(f"fusedreg demo: exit {demo.returncode}, {demo.stderr}")

# Every step is right on a CPU, with triton and without.
with tempfile.TemporaryDirectory() as folder:
    found = Path(folder, "check.json")
    command = [sys.executable, "-m", "fusedreg", "check", "--device", "cpu", "--json", str(found)]
    check = subprocess.run(command, capture_output=True, text=True, check=False)
    if check.returncode != 0:
        raise SystemExit(f"fusedreg check: exit {check.returncode}\n{check.stdout}{check.stderr}")
    record = json.loads(found.read_text(encoding="utf-8"))
    steps = record["steps"]
    if not steps or any(step["failures"] for step in steps):
        raise SystemExit(f"fusedreg check: {len(steps)} steps\n{check.stdout}")
    if {step["backend"] for step in steps} != {"reference", "llvm"}:
        raise SystemExit(f"fusedreg check: not both paths of a CPU\n{check.stdout}")
    if record["versions"]["llvmlite"] is None:
        raise SystemExit("fusedreg check: no version of llvmlite")

print(f"fusedreg {fusedreg.__version__} from a wheel, torch {torch.__version__}")
