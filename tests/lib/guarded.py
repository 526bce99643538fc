"""Steps of tensors that lie directly beside memory which nobody may touch.

A program of its own, because whoever reads or writes beside a tensor ends it with SIGSEGV:

    python tests/lib/guarded.py default  # steps, compares, and prints how many tensors there were
    python tests/lib/guarded.py ends     # how processes end that read in, after and before a tensor
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import torch
from torch import Tensor, nn

if "fused" in sys.argv:
    import environment  # noqa: F401  # which has triton interpret, as in the suite

from fusedreg.cases import DTYPES, PENALTIES, RULES, Case
from fusedreg.kernels.cpu.backend import BACKEND
from fusedreg.kernels.device.rules import RULES as DEVICE_RULES

from cases import program

# Every tail of a vector and of a block of them; around a block (1,024) and a chunk of triton's
# kernels; around a chunk of the CPU's, and of two.
SIZES = [*range(258), 1023, 1024, 1025, 8191, 8192, 8193, 65535, 65536, 65537, 131073]
# Interpreted blocks take long, and interpreter.py makes their chunk 2,048.
FEW_SIZES = [0, 1, 2, 127, 128, 257, 1023, 1024, 1025, 2047, 2048, 2049]
CHOSEN = ["sgd_momentum", "adam_amsgrad", "adamw", "rmsprop_both", "adagrad", "lion", "lamb"]
FEW = ["lamb"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
PROT_NONE = 0


class Guards:
    """Memory in pieces, each between two pages that cannot be touched."""

    def __init__(self) -> None:
        self.free: dict[int, list[int]] = {}
        self.taken: list[tuple[int, int]] = []
        self.maps: list[mmap.mmap] = []  # never closed, for tensors keep addresses alone

    def _piece(self, pages: int) -> int:
        if not self.free.get(pages):
            size = pages * mmap.PAGESIZE
            self.maps.append(mmap.mmap(-1, size + 2 * mmap.PAGESIZE))
            first = ctypes.addressof(ctypes.c_char.from_buffer(self.maps[-1]))
            start = first + mmap.PAGESIZE
            for guard in (first, start + size):
                if _libc.mprotect(guard, mmap.PAGESIZE, PROT_NONE):
                    raise OSError(ctypes.get_errno(), "mprotect")
            self.free.setdefault(pages, []).append(start)
        start = self.free[pages].pop()
        self.taken.append((pages, start))
        return start

    def copy(self, values: Tensor, at_end: bool) -> Tensor:
        """A copy of a vector whose first or last byte lies beside a guard."""
        size = values.numel() * values.itemsize
        if not size:
            return values.clone()
        pages = -(-size // mmap.PAGESIZE)
        start = self._piece(pages) + at_end * (pages * mmap.PAGESIZE - size)
        memory = (ctypes.c_char * size).from_address(start)
        return torch.frombuffer(memory, dtype=values.dtype).copy_(values)

    def release(self) -> None:
        """Give all pieces out anew: their tensors are no longer used."""
        for pages, start in self.taken:
            self.free[pages].append(start)
        self.taken.clear()


def steps_beside_guards(path: str) -> int:
    """Step tensors of every size beside a guard; returns how many there were."""
    guards, count = Guards(), 0
    few = path == "fused"
    for which, rule in enumerate(CHOSEN if path == "default" else FEW):
        cls, options = RULES[rule]
        penalty = {} if cls.__name__ == "Lion" else PENALTIES["elastic_net"]
        case = Case(rule, "elastic_net", cls, {**options, **penalty})
        for number, dtype in enumerate(DTYPES):
            if few and dtype == torch.bfloat16:
                continue  # which triton's interpreter has no numbers for
            clipped = (which + number) % 2 == 1
            # Every other size lies at the end, and with the next rule or dtype the others do.
            ends = [(n, (n + which + number // 2) % 2 == 1) for n in (FEW_SIZES if few else SIZES)]
            count += compare(case, path, dtype, clipped, guards, ends)
            guards.release()
    return count


def compare(
    case: Case,
    path: str,
    dtype: torch.dtype,
    clipped: bool,
    guards: Guards,
    ends: list[tuple[int, bool]],
) -> int:
    """Two steps beside guards and elsewhere, which must be equal to the last bit.

    `ends` has for each tensor its size, and whether its end lies beside a guard, or its start.
    """
    generator = torch.Generator().manual_seed(0)
    # Gradients of another dtype where they are clipped, whose loops have two kinds of addresses.
    wide = torch.float32 if clipped and dtype.itemsize == 2 else dtype
    optimizers = []
    values = [torch.randn(size, generator=generator, dtype=torch.float64) for size, _ in ends]
    for guarded in (True, False):

        def put(x: Tensor, at_end: bool, guarded: bool = guarded) -> Tensor:
            return guards.copy(x, at_end) if guarded else x.clone()

        params = [
            nn.Parameter(put(value.to(dtype), at_end))
            for value, (_, at_end) in zip(values, ends, strict=True)
        ]
        optimizer = case.make(params, path, max_grad_norm=1.0 if clipped else None)
        for sign in (1, -1):
            for param, value, (_, at_end) in zip(params, values, ends, strict=True):
                param.grad_dtype, param.grad = None, None
                param.grad = put((sign * value).to(wide), at_end)
                for name, state in optimizer.state.get(param, {}).items():
                    if name in optimizer.tensor_states:
                        optimizer.state[param][name] = put(state, at_end)
            optimizer.step()
        optimizers.append((optimizer, params))
    (first, ours), (second, others) = optimizers
    assert first.backend == {"default": "llvm", "fused": "triton"}.get(path, "reference")
    for one, two in zip(ours, others, strict=True):
        assert torch.equal(one, two)
        for name, state in first.state[one].items():
            assert torch.equal(state, second.state[two][name])
    return len(ends)


def read_beside(by: int) -> None:
    """Have a kernel take the norm of a gradient that begins `by` elements from where it lies."""
    guards = Guards()
    grad = guards.copy(torch.ones(1000), at_end=by > 0)
    address = grad.data_ptr() + by * grad.itemsize
    table = BACKEND.build([[address]], [grad.numel()], [0], torch.device("cpu"))
    partials = torch.empty(1, dtype=torch.float64)
    sgd = program(DEVICE_RULES["sgd"], torch.float32)
    BACKEND.norms(sgd, table, torch.tensor([address]), partials, 0)()
    assert float(partials) == 1000**0.5


def end_of(by: int) -> int:
    """How a process ends that does that: 0, or minus its signal."""
    child = os.fork()
    if not child:
        read_beside(by)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads that spin take longer than the steps
    if sys.argv[1] == "ends":
        print(*map(end_of, (0, 1, -1)))
    else:
        print(steps_beside_guards(sys.argv[1]))
