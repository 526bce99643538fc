"""A program around an optimizer, and all that must hold of it.

A `Program` holds parameters, an optimizer and what both must contain. Its methods are what users
do: step, move a parameter's memory, edit a group or a state, save and load, interrupt. Each leaves
the program as the method says, which is compared bit by bit, and every step is judged by
stateful_model.py.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fusedreg
from fusedreg.cases import PATHS

import environment  # noqa: F401  # by itself too, triton interprets as in the suite
import stateful_model as model
from compare import frozen, parameters_of

ERRORS = (RuntimeError, ValueError, TypeError)
SHAPES = [(), (0,), (1,), (3,), (5, 3), (4, 4), (2, 3, 4, 5), (67,), (3, 0, 2), (1025,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
MEMORY = ["plain", "permuted", "odd", "gaps"]
GRADS = ["same", "same", "same", "wide", "permuted", "gaps", "expanded", "zeros", "neg", "none"]
SIZES = [1.0, 1.0, 1e-3, 1e-12, 1e-25, 1e4, 1e19, 1e20, 1e20]

COUNTS: Counter[str] = Counter()
"""Of this process: programs, actions, steps, refused steps, elements, and those judged."""


# ---- tensors of every kind -----------------------------------------------------------------------


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers, an eighth of them 0."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.complex128 if dtype.is_complex else torch.float64
    x = torch.randn(shape, generator=generator, dtype=kind)
    kept = torch.rand(shape, generator=generator) > 1 / 8
    return (x * kept).to(dtype)


def place(x: Tensor, memory: str) -> Tensor:
    """A copy of `x` that lies in memory in one of the ways of `MEMORY`; around it lies NaN."""
    if memory == "permuted":
        order = list(reversed(range(x.dim())))
        return x.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
    step = 2 if memory == "gaps" else 1
    start = 1 if memory == "odd" else 0
    flat = torch.full((start + step * x.numel() + 1,), math.nan, dtype=x.dtype)
    if memory == "plain":
        return x.clone(memory_format=torch.contiguous_format)
    strides, stride = [], step
    for size in reversed(x.shape):
        strides.insert(0, stride)
        stride *= max(size, 1)
    placed = flat.as_strided(x.shape, strides, start)
    return placed.copy_(x)


def number_of(value: Any, kind: str) -> Any:
    """A number as some users write it."""
    if isinstance(value, bool) or not isinstance(value, float):
        return value
    kinds: dict[str, Callable[[float], Any]] = {
        "float": float,
        "int": lambda x: int(x) if x == int(x) else x,
        "tensor": lambda x: torch.tensor(x, dtype=torch.float64),
        "tensor32": lambda x: torch.tensor(x, dtype=torch.float32),
        "numpy": np.float64,
        "numpy32": np.float32,
    }
    return kinds[kind](value)


def is_shared(params: list[nn.Parameter], param: nn.Parameter) -> list[nn.Parameter]:
    """The parameters in the storage of `param`."""
    where = param.untyped_storage().data_ptr()
    return [p for p in params if p.untyped_storage().data_ptr() == where]


def around(params: list[nn.Parameter]) -> list[Any]:
    """The bits of what lies in the storages of parameters and belongs to none."""
    found = []
    for param in params:
        raw = torch.empty(0, dtype=torch.uint8).set_(param.untyped_storage())  # type: ignore[call-overload]
        raw = raw.clone()
        for other in is_shared(params, param):
            there = raw.view(other.dtype)
            there.as_strided(other.shape, other.stride(), other.storage_offset()).fill_(0)
        found.append(frozen(raw))
    return found


# ---- interrupts ----------------------------------------------------------------------------------

DEVICE_CODE = tuple(
    f"{os.sep}kernels{os.sep}{name}.py"
    for name in ("engine", "rows", "norms", "memory", "rules", "penalty")
)
"""What a GPU runs in one piece, without interrupts. Only the interpreter takes it by lines."""
PACKAGE = tuple(
    str(Path(module.__file__ or "").parent) + "/"
    for module in (fusedreg, __import__("fusedreg.kernels", fromlist=["kernels"]))
)


@contextmanager
def interrupted(at: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt before line number `at` that the package executes in the block.

    Yields a list with the number of lines so far.
    """
    lines = [0]

    def trace(frame: Any, event: str, _: Any) -> Any:
        if event == "call":
            file = frame.f_code.co_filename
            return trace if file.startswith(PACKAGE) and not file.endswith(DEVICE_CODE) else None
        if event == "line":
            lines[0] += 1
            if lines[0] == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


# ---- a program -----------------------------------------------------------------------------------


class Program:
    """Parameters, their optimizer, and what both must contain."""

    def __init__(
        self,
        path: str,
        cls: Any,
        options: dict[str, Any],
        specs: list[tuple[tuple[int, ...], torch.dtype, str, int]],
    ) -> None:
        self.path, self.cls = path, cls
        self.params = [
            nn.Parameter(place(normal(shape, dtype, number), memory))
            for number, (shape, dtype, memory, _) in enumerate(specs)
        ]
        groups: dict[int, list[Tensor]] = {}
        for param, (*_, group) in zip(self.params, specs, strict=True):
            groups.setdefault(group, []).append(param)
        self.optimizer = cls(
            [{"params": params} for params in groups.values()], **PATHS[path], **options
        )
        self.params = parameters_of(self.optimizer)  # type: ignore[assignment]
        self.irregular = False
        self.remember()
        COUNTS["programs"] += 1

    # ---- what it contains --------------------------------------------------------------------

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """Its state, without making an entry."""
        return dict(self.optimizer.state.get(param, {}))

    def contents(self) -> list[Any]:
        """The bits of each parameter and of its state."""
        return [(frozen(p), frozen(self.state_of(p))) for p in self.params]

    def remember(self) -> None:
        """Take over what a method has changed by design."""
        self.known = self.contents()

    def assert_as_known(self) -> None:
        """Nothing has changed behind the program's back."""
        assert self.contents() == self.known, "something changed between two steps"
        assert all(a is b for a, b in zip(self.params, parameters_of(self.optimizer), strict=True))

    def group_of(self, param: Tensor) -> dict[str, Any]:
        return next(g for g in self.optimizer.param_groups if any(p is param for p in g["params"]))

    def options_of(self, param: Tensor) -> dict[str, Any]:
        return model.options_of(self.group_of(param))

    # ---- invariants --------------------------------------------------------------------------

    def check_states(self) -> None:
        """Each state has its parameter, names of its class, and counts that are whole numbers."""
        allowed = {*self.cls.tensor_states, *self.cls.counts}
        assert {id(p) for p in self.optimizer.state} <= {id(p) for p in self.params}
        for param in self.params:
            state = self.state_of(param)
            assert state.keys() <= allowed
            if "step" in state:
                assert float(state["step"]) == int(state["step"]) >= 0

    def check_backend(self) -> None:
        """`backend` says what is expected from the outside."""
        found = {self.backend_of(param) for param in self.params}
        order = ("triton", "llvm", "reference")
        expected = " and ".join(name for name in order if name in found)
        assert self.optimizer.backend == expected, f"{self.optimizer.backend}, not {expected}"

    def backend_of(self, param: Tensor) -> str:
        grad, fused = param.grad, self.group_of(param)["fused"]
        walks = (
            fused is not False
            and not param.is_complex()
            and torch.ops.aten.is_non_overlapping_and_dense.default(param)
            and not (grad is not None and grad.is_neg())
        )
        if not walks:
            return "reference"
        return "triton" if fused else "llvm"

    def is_regular(self, param: Tensor) -> bool:
        """Whether kernels can walk its gradient and moments, and read its counts."""
        state = self.state_of(param)
        moments = [state[name] for name in self.cls.tensor_states if name in state]
        moments = [x for x in moments if x is not None]  # as after a reset
        counts = [state[name] for name in self.cls.counts if name in state]
        return (
            not (param.grad is not None and param.grad.is_neg())
            and len({x.dtype for x in moments}) <= 1
            and all(torch.ops.aten.is_non_overlapping_and_dense.default(x) for x in moments)
            and all(isinstance(x, Tensor) and x.is_floating_point() for x in counts)
        )

    def check_loads(self) -> None:
        """Its state_dict loads into a new optimizer, which then contains the same."""
        saved = self.optimizer.state_dict()
        fresh, params = self.fresh()
        fresh.load_state_dict(saved)
        for param, new in zip(self.params, params, strict=True):
            self.assert_loaded(param, self.state_of(param), fresh.state.get(new, {}))
        for ours, theirs in zip(self.optimizer.param_groups, fresh.param_groups, strict=True):
            assert frozen({**ours, "params": 0}) == frozen({**theirs, "params": 0})

    def assert_loaded(self, param: Tensor, saved: dict[str, Any], loaded: dict[str, Any]) -> None:
        assert saved.keys() == loaded.keys()
        for name, value in saved.items():
            if name in self.cls.tensor_states:
                wanted = self.group_of(param)["state_dtype"]
                wider = torch.promote_types(value.dtype, param.dtype)
                if wanted is not None and param.is_complex():
                    wanted = wanted.to_complex()
                assert frozen(loaded[name]) == frozen(value.to(wanted or wider))
            else:
                assert float(loaded[name]) == float(value)
                assert loaded[name].dim() == value.dim()

    def fresh(self) -> tuple[Any, list[nn.Parameter]]:
        """A new optimizer of the class with other options over copies of the parameters."""
        copies = {p: nn.Parameter(p.detach().clone()) for p in self.params}
        kept = ("state_dtype", "fused", "foreach")
        groups = [
            {"params": [copies[p] for p in g["params"]], **{name: g[name] for name in kept}}
            for g in self.optimizer.param_groups
        ]
        own = {n: getattr(self.optimizer, n) for n in ("max_grad_norm", "skip_nonfinite")}
        return self.cls(groups, **own), list(copies.values())

    @property
    def is_whole(self) -> bool:
        """Whether each parameter has all states that its class asks of a file, or none."""
        needed = {*self.cls.tensor_states, *self.cls.counts} - {*self.cls.late_states}
        states = [self.state_of(p).keys() for p in self.params]
        return all(needed <= state or not state for state in states)

    @property
    def keeps_mass(self) -> bool:
        return any("momentum_mass" in self.state_of(p) for p in self.params)

    # ---- gradients ---------------------------------------------------------------------------

    def set_grad(self, param: nn.Parameter, kind: str, size: float, seed: int) -> None:
        """Give a parameter a gradient of one of `GRADS`."""
        dtype = param.dtype
        limit = torch.finfo(dtype).max / 2**4
        value = normal(tuple(param.shape), dtype, seed) * min(size, limit)
        param.grad, param.grad_dtype = None, None
        if kind == "none":
            return
        if kind == "wide":
            wider = {torch.float32: torch.float64, torch.complex64: torch.complex128}
            value = value.to(wider.get(dtype, torch.float32))
        elif kind == "zeros":
            value = torch.zeros_like(value)
        elif kind == "expanded":
            value = value.flatten()[:1].sum().expand(param.shape)
        elif kind == "neg" and dtype in (torch.float32, torch.float64):
            value = torch.complex(torch.zeros_like(value), -value).conj().imag  # lazily negated
        elif kind == "neg" and dtype.is_complex:
            value = value.conj()
        elif kind in ("nan", "inf") and value.numel():
            value.view(-1)[seed % value.numel()] = float(kind)
        elif kind in MEMORY:
            value = place(value, kind)
        param.grad = value

    def set_grads(self, kinds: list[str], size: float, seed: int) -> None:
        for number, (param, kind) in enumerate(zip(self.params, kinds, strict=False)):
            self.set_grad(param, kind, size, seed + number)

    def write_grads(self, seed: int) -> None:
        """Other numbers in the gradients that are there, as of a loop that never frees them."""
        for number, param in enumerate(self.params):
            grad = param.grad
            if grad is None:
                self.set_grad(param, "same", 1.0, seed + number)
            elif not (0 in grad.stride() or grad.is_neg() or grad.is_conj()):
                grad.copy_(normal(tuple(param.shape), grad.dtype, seed + number))

    # ---- a step ------------------------------------------------------------------------------

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: float = 1.0,
        found_inf: float = 0.0,
    ) -> Any:
        """A step that must be right."""
        self.assert_as_known()
        expected = Expectation(self, grad_scale, found_inf)
        returned = self.optimizer.step(closure)
        expected.check()
        self.finish()
        return returned

    def finish(self) -> None:
        """After a step: count it, and give back numbers to what has none any more."""
        COUNTS["steps"] += 1
        self.repair()
        self.remember()

    def refused(self) -> bool:
        """Try a step; whether it was refused, and then nothing has changed."""
        before = Before(self)
        try:
            self.optimizer.step()
        except ERRORS:
            before.check_unchanged()
            COUNTS["refused"] += 1
            self.remember()  # states of zeros may be new
            return True
        return False

    @torch.no_grad()
    def repair(self) -> None:
        """Values that are infinite or NaN would say nothing in the next step."""
        for number, param in enumerate(self.params):
            tensors = [x for n, x in self.state_of(param).items() if n in self.cls.tensor_states]
            limit = 1e25 if torch.finfo(param.dtype).max > 1e30 else 1e3
            if not bool((param.abs() < limit).all()):
                param.copy_(normal(tuple(param.shape), param.dtype, number))
            for x in tensors:
                if not bool(x.isfinite().all()):
                    x.zero_()

    # ---- what users do with parameters -------------------------------------------------------

    def move(self, index: int, memory: str) -> None:
        """The same values elsewhere."""
        param = self.params[index]
        param.data = place(param.data, memory)
        self.remember()

    @torch.no_grad()
    def write(self, index: int) -> None:
        """Other values in the same memory."""
        self.params[index].mul_(-0.5).add_(0.25)
        self.remember()

    def flatten(self) -> None:
        """All parameters of a dtype become views of one storage, one after the other."""
        for dtype in {param.dtype for param in self.params}:
            params = [param for param in self.params if param.dtype == dtype]
            flat = torch.cat([param.detach().flatten() for param in params])
            for param, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
                param.data = part.view(param.shape)
        self.remember()

    def retype(self, index: int, dtype: torch.dtype) -> None:
        """Convert a parameter, which leaves its state as it is."""
        param = self.params[index]
        if param.is_complex() or self.state_is_narrow(param, dtype):
            return
        param.grad = None
        param.data = param.data.to(dtype)
        self.repair()
        self.remember()

    def state_is_narrow(self, param: Tensor, dtype: torch.dtype) -> bool:
        """Whether values or moments would overflow when they are read in the arithmetic."""
        tensors = [x for n, x in self.state_of(param).items() if n in self.cls.tensor_states]
        limit = torch.finfo(dtype if dtype == torch.float16 else torch.float32).max / 2
        return any(bool((x.abs() > limit).any()) for x in [param.detach(), *tensors])

    def expand(self, index: int) -> None:
        """A parameter is refused if several indices have one location."""
        param = self.params[index]
        if param.dim() and param.shape[0] > 1 and param.numel():
            self.refuse_reshaped(param, param.data[:1].expand(param.shape), {}, must=True)

    def resize(self, index: int) -> None:
        """More elements than the state has: refused where there is a moment."""
        param, state = self.params[index], self.state_of(self.params[index])
        moved = model.names_of(self.cls, self.options_of(param))
        more = normal((2, *param.shape), param.dtype, index)
        self.refuse_reshaped(param, more, {}, must=any(name in state for name in moved))

    def reshape(self, index: int, how: str) -> None:
        """Another shape of the same memory: refused, or stepped with a state of that shape."""
        param = self.params[index]
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "flat": lambda x: x.reshape(-1),
            "transpose": lambda x: x.permute(tuple(reversed(range(x.dim())))),
            "reversed": lambda x: x.reshape(tuple(reversed(x.shape))),
        }
        new = ways[how](param.data)
        if new.shape == param.shape:  # the state belongs to it, index by index
            param.grad = None
            param.data = new
            self.remember()
            return
        state = {
            name: ways[how](x) if name in self.cls.tensor_states else x
            for name, x in self.state_of(param).items()
        }
        self.refuse_reshaped(param, new, state, must=False)

    def refuse_reshaped(
        self, param: nn.Parameter, new: Tensor, state: dict[str, Any], must: bool
    ) -> None:
        """Step with other memory, which may or `must` be refused; then the old one is back."""
        old = param.data
        param.grad = None
        param.data = new
        self.remember()
        self.set_grads(["same"] * len(self.params), 1.0, 7)
        before = Before(self)
        expected = None if must else Expectation(self, states={param: state} if state else None)
        try:
            self.optimizer.step()
        except ERRORS:
            before.check_unchanged()
            COUNTS["refused"] += 1
            param.grad = None
            param.data = old
        else:
            assert expected is not None, "a parameter that does not fit its state was stepped"
            expected.check()
        self.finish()

    def reinterpret(self, index: int) -> None:
        """Other numbers of the same size in the same memory."""
        other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}
        param = self.params[index]
        if param.dtype in other:
            param.grad = None
            param.data = param.data.zero_().view(other[param.dtype])
            self.remember()

    # ---- what users do with groups and states ------------------------------------------------

    def edit(self, group: int, name: str, value: Any) -> None:
        """Set an option; one that does not go with the others is refused and set back."""
        options = self.optimizer.param_groups[group % len(self.optimizer.param_groups)]
        if name not in options or self.would_spoil(options, name, value):
            return
        old, options[name] = options[name], value
        if is_refused(self.cls, options):
            self.refuse(self.optimizer.step)
            options[name] = old
        self.remember()

    def would_spoil(self, options: dict[str, Any], name: str, value: Any) -> bool:
        """Whether an edit leads where another property is tested."""
        if name == "l1" and value:
            return any(p.is_complex() for p in options["params"])
        return name == "fused" and self.path == "fused" and value is None

    def refuse(self, act: Callable[[], Any]) -> None:
        """Something that raises and changes nothing."""
        self.set_grads(["same"] * len(self.params), 1.0, 5)
        before = Before(self)
        groups = frozen(self.optimizer.param_groups)
        try:
            act()
        except ERRORS:
            before.check_unchanged()
            assert frozen(self.optimizer.param_groups) == groups
            COUNTS["refused"] += 1
            self.remember()
        else:
            raise AssertionError("what must be refused was accepted")

    def forget(self, index: int, how: str) -> None:
        """Take away states."""
        state, param = self.optimizer.state, self.params[index]
        if how == "all":
            state.clear()
        elif param in state and how == "clear":
            state[param].clear()
        elif param in state and how == "del":
            del state[param]
        elif state.get(param):
            names = sorted(state[param])
            del state[param][names[index % len(names)]]
        self.remember()

    def restate(self, index: int, which: int, how: str) -> None:
        """Replace a state by an equal one of another kind."""
        param = self.params[index]
        state = self.optimizer.state.get(param, {})
        if not state:
            return
        name = sorted(state)[which % len(state)]
        value = state[name]
        if name in self.cls.tensor_states:
            wide = torch.complex128 if value.is_complex() else torch.float64
            narrow = torch.complex64 if value.is_complex() else torch.float32
            if how in MEMORY:
                state[name] = place(value, how)
            elif how == "double" or float(value.abs().max() if value.numel() else 0) > 1e38:
                state[name] = value.to(wide)
            else:
                state[name] = value.to(narrow)
        elif name == "step":
            steps = {"double": torch.float64, "gaps": torch.int64}.get(how, torch.float32)
            state[name] = torch.tensor(3 + which, dtype=steps)
        self.remember()

    def spoil(self, index: int, which: int, value: Any) -> None:
        """None, a number or two numbers in the place of a state: refused, or understood."""
        param = self.params[index]
        state = self.optimizer.state.get(param, {})
        names = [n for n in sorted(state) if value is None or n in self.cls.counts]
        if not names:
            return
        name = names[which % len(names)]
        old, state[name] = state[name], value
        meant = {n: x for n, x in state.items() if x is not None}
        if isinstance(value, (int, float)):
            meant[name] = torch.tensor(float(value))
        self.known = self.contents()
        self.set_grads(["same"] * len(self.params), 1.0, 9)
        two = isinstance(value, Tensor)
        before, expected = Before(self), None if two else Expectation(self, states={param: meant})
        try:
            self.optimizer.step()
        except ERRORS as error:
            if name not in str(error):
                raise AssertionError(f"an error that does not name {name!r}") from error
            before.check_unchanged()
            COUNTS["refused"] += 1
            state[name] = old
        else:
            assert expected is not None, "two counts of one parameter were stepped with"
            expected.check()
        self.finish()

    def add_group(self, shape: tuple[int, ...], dtype: torch.dtype, memory: str) -> None:
        """One parameter more."""
        if len(self.params) >= 6:
            return
        param = nn.Parameter(place(normal(shape, dtype, len(self.params)), memory))
        self.optimizer.add_param_group({"params": [param]})
        self.params = parameters_of(self.optimizer)  # type: ignore[assignment]
        self.remember()

    # ---- files and copies --------------------------------------------------------------------

    def reload(self) -> None:
        """Go on in a new optimizer, from a file."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        fresh, params = self.fresh()
        fresh.load_state_dict(torch.load(file, weights_only=False))  # of numpy's numbers too
        for param, new in zip(self.params, params, strict=True):
            assert frozen(new) == frozen(param)
            self.assert_loaded(param, self.state_of(param), dict(fresh.state.get(new, {})))
        self.adopt(fresh, params)

    def copy(self, how: str) -> None:
        """Go on in a copy."""
        both = (self.optimizer, self.params)
        optimizer, params = (
            copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
        )
        known, skipped = self.contents(), int(self.optimizer.skipped_steps)
        self.adopt(optimizer, params)
        assert self.contents() == known
        assert int(self.optimizer.skipped_steps) == skipped

    def adopt(self, optimizer: Any, params: list[nn.Parameter]) -> None:
        self.optimizer, self.params = optimizer, params
        assert all(a is b for a, b in zip(params, parameters_of(optimizer), strict=True))
        self.remember()

    def step_as_torch(self) -> None:
        """A step of torch's class from our file, and on from its file."""
        torchs = getattr(torch.optim, self.cls.__name__, None)
        if torchs is None or not self.torch_has_an_equal():
            return
        copies = [nn.Parameter(p.detach().clone()) for p in self.params]
        fresh = iter(copies)
        theirs = torchs(
            [{"params": [next(fresh) for _ in g["params"]]} for g in self.optimizer.param_groups]
        )
        theirs.load_state_dict(self.optimizer.state_dict())
        for group in theirs.param_groups:
            group.update(foreach=False, fused=False)
        self.set_grads(["same"] * len(self.params), 1.0, 11)
        for param, new in zip(self.params, copies, strict=True):
            new.grad = param.grad
        theirs.step()
        saved = theirs.state_dict()
        for group in saved["param_groups"]:
            group.update(foreach=None, fused=PATHS[self.path].get("fused"))
        ours, params = self.fresh()
        ours.load_state_dict(saved)
        with torch.no_grad():
            for param, new in zip(params, copies, strict=True):
                param.copy_(new)
        self.adopt(ours, params)
        for param, new in zip(params, copies, strict=True):
            self.assert_loaded(param, dict(theirs.state[new]), self.state_of(param))

    def torch_has_an_equal(self) -> bool:
        groups = [model.options_of(group) for group in self.optimizer.param_groups]
        needed = model.always_counted(self.cls)
        begun = all(
            needed | {*model.names_of(self.cls, self.options_of(p))} <= self.state_of(p).keys()
            for p in self.params
        )
        dtypes = {param.dtype for param in self.params}
        return begun and dtypes <= {torch.float32, torch.float64} and not any(
            group["l1"] or group["lr_independent_decay"] or group["state_dtype"]
            or (group["decoupled_weight_decay"] and self.cls.__name__ not in ("Adam", "AdamW"))
            for group in groups
        )  # fmt: skip

    # ---- kinds of steps ----------------------------------------------------------------------

    def step_with_closure(self) -> None:
        """The closure sees the old values, and grad is enabled in it."""

        def closure() -> float:
            assert torch.is_grad_enabled()
            assert self.contents() == self.known
            return 0.5

        assert self.step(closure) == 0.5

    def step_scaled(self, scale: float, found_inf: float | None) -> None:
        """As GradScaler has it with fused=True, and without its word on overflows."""
        self.optimizer.grad_scale = torch.tensor(scale)
        if found_inf is not None:
            self.optimizer.found_inf = torch.tensor(found_inf)
        try:
            self.step(grad_scale=scale, found_inf=found_inf or 0.0)
        finally:
            for name in {"grad_scale", "found_inf"} & vars(self.optimizer).keys():
                delattr(self.optimizer, name)

    def step_with_hooks(self, lr: float) -> None:
        """A hook before the step that sets lr, and one after it that raises."""

        class StopError(Exception):
            pass

        def before(optimizer: Any, *_: Any) -> None:
            assert self.contents() == self.known
            optimizer.param_groups[0]["lr"] = lr

        def after(*_: Any) -> None:
            raise StopError

        old = self.optimizer.param_groups[0]["lr"]
        self.optimizer.param_groups[0]["lr"] = lr
        expected = Expectation(self)
        self.optimizer.param_groups[0]["lr"] = old
        hooks = [
            self.optimizer.register_step_pre_hook(before),
            self.optimizer.register_step_post_hook(after),
        ]
        stopped = False
        try:
            self.optimizer.step()
        except StopError:
            stopped = True
        for hook in hooks:
            hook.remove()
        assert stopped, "the exception of a hook was lost"
        expected.check()
        self.finish()

    def raise_in(self, where: str) -> None:
        """An exception before the step changes nothing."""

        class StopError(RuntimeError):
            pass

        def stop(*_: Any) -> None:
            raise StopError

        if where == "closure":
            self.refuse(lambda: self.optimizer.step(stop))
            return
        hook = self.optimizer.register_step_pre_hook(stop)
        try:
            self.refuse(self.optimizer.step)
        finally:
            hook.remove()

    def hook_files(self) -> None:
        """Hooks of state_dict and of loading it are called, and see what is there."""
        called: list[str] = []
        hooks = [
            self.optimizer.register_state_dict_pre_hook(lambda *_: called.append("before")),
            self.optimizer.register_state_dict_post_hook(lambda *_: called.append("after")),
            self.optimizer.register_load_state_dict_pre_hook(lambda *_: called.append("load")),
            self.optimizer.register_load_state_dict_post_hook(lambda *_: called.append("loaded")),
        ]
        self.optimizer.load_state_dict(self.optimizer.state_dict())
        assert called == ["before", "after", "load", "loaded"]
        for hook in hooks:
            hook.remove()
        self.remember()  # loading widens moments

    def interrupt(self, share: float) -> None:
        """Raise KeyboardInterrupt at one of the lines that a step executes."""
        twin, params = copy.deepcopy((self.optimizer, self.params))
        for param, new in zip(self.params, params, strict=True):
            new.grad_dtype, new.grad = None, param.grad
        with interrupted(at=-1) as lines:
            twin.step()
        expected = Expectation(self)
        grad_mode = torch.is_grad_enabled()
        try:
            with interrupted(at=1 + int(share * lines[0])):
                self.optimizer.step()
        except KeyboardInterrupt:
            COUNTS["interrupts"] += 1
        assert torch.is_grad_enabled() == grad_mode
        expected.check_untouched()
        for index, param in enumerate(self.params):
            problem = expected.why_not_still(index)
            if problem is not None and param in expected.of and not expected.wholly.skip:
                problem = expected.why_not_moved(index)
            assert problem is None, f"parameter {index}, after an interrupt: {problem}"
        self.finish()

    # ---- what is refused ---------------------------------------------------------------------

    def misuse(self, which: str) -> None:
        """A mistake of a user, which changes nothing."""
        optimizer, group = self.optimizer, self.optimizer.param_groups[0]
        saved = optimizer.state_dict()
        mistakes: dict[str, Callable[[], Any]] = {
            "a parameter twice": lambda: optimizer.add_param_group({"params": [self.params[0]]}),
            "no state_dict": lambda: optimizer.load_state_dict({}),
            "no groups": lambda: optimizer.load_state_dict({**saved, "param_groups": []}),
            "state of nobody": lambda: optimizer.load_state_dict({**saved, "state": {99: {}}}),
            "sparse": self.step_sparse,
        }
        options = {"lr": -0.1, "weight_decay": math.nan, "l1_mode": "l2", "differentiable": True}
        if which in mistakes:
            self.refuse(mistakes[which])
            return
        old, group[which] = group[which], options[which]
        self.refuse(optimizer.step)
        group[which] = old

    def step_sparse(self) -> None:
        param = self.params[0]
        dense, param.grad = param.grad, None
        param.grad = torch.ones(param.shape, dtype=param.dtype).to_sparse()
        try:
            self.optimizer.step()
        finally:
            param.grad = dense


class Before:
    """A program before a step, to compare with what it is after it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.contents = program.contents()
        self.states = [program.state_of(p) for p in program.params]
        self.around = around(program.params)
        self.grads = [(p.grad, _bits(p.grad)) for p in program.params]
        self.skipped = int(program.optimizer.skipped_steps)

    def check_unchanged(self) -> None:
        """Nothing has changed, but that states may have been created."""
        self.check_untouched()
        for index in range(len(self.program.params)):
            problem = self.why_not_still(index)
            assert problem is None, problem
        assert int(self.program.optimizer.skipped_steps) == self.skipped

    def check_untouched(self) -> None:
        """What no step may write is as it was."""
        params = self.program.params
        for param, (grad, bits) in zip(params, self.grads, strict=True):
            assert param.grad is grad, ".grad was replaced"
            assert _bits(param.grad) == bits, ".grad was written"
        assert around(params) == self.around, "memory around a parameter was written"

    def why_not_still(self, index: int) -> str | None:
        """Why a parameter is not what it was, None if it is; new states may have been created."""
        program = self.program
        param, (w, state) = program.params[index], self.contents[index]
        if frozen(param) != w:
            return "a parameter was written that must stay"
        created = model.initial(program.cls, program.options_of(param), self.states[index])
        for name, value in program.state_of(param).items():
            if name in state:
                if frozen(value) != state[name]:
                    return f"{name} was written of a parameter that must stay"
            elif name not in created or bool((model.real(value) != created[name]).any()):
                return f"{name} was created as {value}"
        return None


class Expectation(Before):
    """What a program must contain after a step.

    Args:
        program: it, before the step.
        grad_scale, found_inf: what a GradScaler sets.
        states: of some parameters, where another state than the stored one is meant.
    """

    def __init__(
        self,
        program: Program,
        grad_scale: float = 1.0,
        found_inf: float = 0.0,
        states: dict[Tensor, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(program)
        optimizer = program.optimizer
        program.irregular |= not all(map(program.is_regular, program.params))
        self.meant = states or {}
        self.needs_norm = optimizer.max_grad_norm is not None or optimizer.skip_nonfinite
        grads = [p.grad for p in program.params if p.grad is not None]
        own = (optimizer.max_grad_norm, optimizer.skip_nonfinite)
        self.wholly = model.wholly(grads, *own, grad_scale, found_inf)
        self.of = {
            param: model.step(
                program.cls,
                program.options_of(param),
                param,
                param.grad,
                self.state_before(index),
                self.wholly,
            )
            for index, param in enumerate(program.params)
            if param.grad is not None
        }

    def state_before(self, index: int) -> dict[str, Any]:
        return self.meant.get(self.program.params[index], self.states[index])

    def check(self) -> None:
        """Raise AssertionError where the program contains anything else."""
        program = self.program
        self.check_untouched()
        for index, param in enumerate(program.params):
            moves = param in self.of and not self.wholly.skip
            problem = self.why_not_moved(index) if moves else self.why_not_still(index)
            assert problem is None, f"parameter {index}: {problem}"
        if self.of:
            self.check_own()
        kernels = any(program.backend_of(param) != "reference" for param in self.of)
        launches = program.optimizer.launches
        # A plan made beside what kernels cannot walk leaves that to the reference while it holds.
        # A moment that the step created may have another dtype than those that were there.
        regular = not program.irregular and all(map(program.is_regular, program.params))
        assert (launches > 0) == kernels or not regular, f"{launches} launches"

    def check_own(self) -> None:
        """grad_norm and skipped_steps."""
        optimizer = self.program.optimizer
        assert int(optimizer.skipped_steps) == self.skipped + self.wholly.skip
        if not self.needs_norm:
            assert optimizer.grad_norm is None
            return
        norm, found = self.wholly.norm, float(optimizer.grad_norm)
        if math.isnan(norm):
            assert math.isnan(found)
            return
        ends = [norm * (1 + side * self.wholly.slack) for side in (-1, 1)]
        low, high = torch.tensor(ends, dtype=torch.float64).to(torch.float32).tolist()
        assert low <= found <= high, f"grad_norm is {found}, not {norm}"

    def why_not_moved(self, index: int) -> str | None:
        """Why a parameter is not what it is after the step, None if it is."""
        program, old = self.program, self.state_before(index)
        param = program.params[index]
        expected, state = self.of[param], program.state_of(param)
        created = model.initial(program.cls, program.options_of(param), old)
        if state.keys() != old.keys() | created.keys():
            return f"its states are {[*state]}"
        for name, value in state.items():
            if name in expected.moved:
                problem = self.why_not_state(name, value, param, old)
            else:
                bits = self.contents[index][1].get(name)
                problem = None if frozen(value) == bits else "written, which nothing asks for"
            if problem is not None:
                return f"{name} is {problem}"
        wrong, judged = model.outside(param, expected.w), model.is_judged(expected.w)
        COUNTS["elements"] += judged.numel()
        COUNTS["judged"] += int(judged.sum())
        return f"its value is {_first(param, expected.w, wrong)}" if wrong.any() else None

    def why_not_state(
        self, name: str, value: Tensor, param: Tensor, old: dict[str, Any]
    ) -> str | None:
        """Why a state is not what it is after the step, None if it is."""
        wanted = self.of[param].moved[name]
        if isinstance(wanted, float):
            wrong = model.number_is_wrong(value, wanted)
            return f"{float(value)}, not {wanted}" if wrong else None
        if value.shape != param.shape or value.dtype != self.dtype_of(name, param, old):
            return f"of shape {tuple(value.shape)} and {value.dtype}"
        outside = model.outside(value, wanted)
        return _first(value, wanted, outside) if outside.any() else None

    def dtype_of(self, name: str, param: Tensor, old: dict[str, Any]) -> torch.dtype:
        """That of a moment: what it had, or what a new one is given."""
        wanted: torch.dtype
        if name in old:
            wanted = old[name].dtype
            return wanted
        wanted = self.program.group_of(param)["state_dtype"] or param.dtype
        return wanted.to_complex() if param.is_complex() and not wanted.is_complex else wanted


def _bits(grad: Tensor | None) -> Any:
    return None if grad is None else frozen(grad)


def _first(found: Tensor, wanted: Any, wrong: Tensor) -> str:
    """The first wrong number and what it must be."""
    numbers = model.real(found)
    low, high = (end.expand_as(numbers)[wrong] for end in (wanted.low, wanted.high))
    return (
        f"{float(numbers[wrong][0])!r}, which is not in [{float(low[0])!r}, {float(high[0])!r}], "
        f"and {int(wrong.sum()) - 1} of {wrong.numel()} more"
    )


def is_refused(cls: Any, group: dict[str, Any]) -> bool:
    """Whether options exclude each other."""
    options = model.options_of(group)
    momentum, dampening = options.get("momentum", 0), options.get("dampening", 0)
    return bool(
        (options.get("nesterov") and (not momentum or dampening))
        or (options["lr_independent_decay"] and not options["decoupled_weight_decay"])
        or (options["lr_independent_decay"] and options["decay_lr"] == 0)
        or (cls is fusedreg.Lion and options["l1_mode"] == "prox")
    )
