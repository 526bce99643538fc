"""A format that the package does not have, written as a user would, on the table of cases.

It stores moments as the bits of bfloat16 numbers, in int16. So every step must give the bits that
`state_dtype=torch.bfloat16` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedreg
from fusedreg.formats import Format, Plain
from fusedreg.kernels.contract import Codec
from fusedreg.kernels.language import tl, triton
from fusedreg.scalars import Number

from cases import CASES, DTYPES, PATHS, Case, each_case, parameters


@triton.jit
def decode(planes, which: tl.constexpr):
    """The number that begins with these bits."""
    return (planes[0].to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def encode(value, which: tl.constexpr):
    """The first half of its bits, rounded to nearest even."""
    value = value.to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = value != value  # noqa: PLR0124  # only NaN is not itself
    return (tl.where(is_nan, 0x7FC0, rounded).to(tl.int16),)


class Bits(Format):
    """bfloat16 numbers as int16."""

    suffixes = ("_bits",)
    codec = Codec(decode, encode)

    def create(self, param: Tensor, value: Number) -> Sequence[Tensor]:
        numbers = torch.zeros_like(param, dtype=torch.bfloat16, memory_format=torch.preserve_format)
        return (numbers.fill_(value).view(torch.int16),)

    def load(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return planes[0].view(torch.bfloat16).to(dtype)

    def store(self, value: Tensor, planes: Sequence[Tensor]) -> Sequence[Tensor]:
        return (value.to(torch.bfloat16).view(torch.int16),)

    def to_checkpoint(self, planes: Sequence[Tensor]) -> Tensor:
        return planes[0].view(torch.bfloat16)

    def from_checkpoint(self, value: Tensor) -> Sequence[Tensor]:
        return (value.to(torch.bfloat16).view(torch.int16),)


BITS = Bits()


@cache
def stored_as_bits(cls: type[fusedreg.FusedOptimizer]) -> Any:
    """A class whose moments are stored so."""
    return type(f"{cls.__name__}AsBits", (cls,), {"state_format": lambda self, group, param: BITS})


def states_of(optimizer: Any) -> dict[Any, dict[str, Tensor]]:
    """The numbers that a checkpoint holds, by parameter and name."""
    return optimizer.state_dict()["state"]


def assert_equal(ours: Any, plain: Any) -> None:
    """Parameters and states have the same bits."""
    for group, other in zip(ours.param_groups, plain.param_groups, strict=True):
        for param, expected in zip(group["params"], other["params"], strict=True):
            assert torch.equal(param, expected)
    assert states_of(ours).keys() == states_of(plain).keys()
    for key, expected in states_of(plain).items():
        state = states_of(ours)[key]
        assert state.keys() == expected.keys()
        for name in expected:
            assert state[name].dtype == expected[name].dtype
            assert torch.equal(state[name], expected[name])


def step(optimizers: Sequence[Any], steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for i, param in enumerate(optimizers[0].param_groups[0]["params"]):
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            for optimizer in optimizers:
                optimizer.param_groups[0]["params"][i].grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case(CASES, paths=("reference", "default", "fused"))
def test_steps_and_checkpoints_are_those_of_bfloat16(
    case: Case, path: str, dtype: torch.dtype
) -> None:
    shapes = [(5, 3), (1,), (1030,)]
    options = {**case.kwargs, **PATHS[path]}
    ours = stored_as_bits(case.cls)(parameters(dtype=dtype, shapes=shapes), **options)
    plain = case.cls(parameters(dtype=dtype, shapes=shapes), state_dtype=torch.bfloat16, **options)
    step([ours, plain], 3, seed=1)
    assert_equal(ours, plain)
    assert ours.backend == plain.backend == {"default": "llvm", "fused": "triton"}.get(path, path)
    for param in ours.param_groups[0]["params"]:
        stored = ours.state.get(param, {}).items()
        moments = {name: value for name, value in stored if name not in case.cls.counts}
        assert {value.dtype for value in moments.values()} <= {torch.int16}
        assert all(name.endswith("_bits") for name in moments)

    # Either loads the file of the other.
    again = stored_as_bits(case.cls)(parameters(dtype=dtype, shapes=shapes), **options)
    other = case.cls(parameters(dtype=dtype, shapes=shapes), state_dtype=torch.bfloat16, **options)
    for new, old in ((again, plain), (other, ours)):
        new.load_state_dict(old.state_dict())
        with torch.no_grad():
            for param, value in zip(
                new.param_groups[0]["params"], old.param_groups[0]["params"], strict=True
            ):
                param.copy_(value)
    step([ours, plain, again, other], 2, seed=2)
    assert_equal(ours, plain)
    assert_equal(again, plain)
    assert_equal(other, plain)


@pytest.mark.parametrize("how", ["reference", "default", "fused"])
def test_a_skipped_step_leaves_every_bit(how: str) -> None:
    cls = stored_as_bits(fusedreg.AdamW)
    optimizer = cls(parameters(shapes=[(7,)]), skip_nonfinite=True, **PATHS[how])
    step([optimizer], 1, seed=1)
    (param,) = optimizer.param_groups[0]["params"]
    before = [x.clone() for x in (param, *optimizer.state[param].values())]
    param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    after = [param, *optimizer.state[param].values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert optimizer.skipped_steps == 1


def test_a_format_without_codec_takes_the_reference_path() -> None:
    class Slow(Bits):
        codec = None

    class Adam(fusedreg.Adam):
        def state_format(self, group: Any, param: Tensor) -> Format:
            return Slow()

    slow = Adam(parameters(shapes=[(9,)]), lr=0.1)
    plain = fusedreg.Adam(
        parameters(shapes=[(9,)]), lr=0.1, state_dtype=torch.bfloat16, fused=False
    )
    step([slow, plain], 2, seed=1)
    assert_equal(slow, plain)
    assert (slow.backend, slow.launches) == ("reference", 0)


@pytest.mark.parametrize("how", ["reference", "default"])
def test_a_subclass_of_plain_is_no_plain_format(how: str) -> None:
    """Kernels would read its numbers as they are, and a file would hold them so."""

    class Doubled(Plain):
        def load(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
            return super().load(planes, dtype) / 2

        def store(self, value: Tensor, planes: Sequence[Tensor]) -> Sequence[Tensor]:
            return (value * 2,)

        def to_checkpoint(self, planes: Sequence[Tensor]) -> Tensor:
            return planes[0] / 2

        def from_checkpoint(self, value: Tensor) -> Sequence[Tensor]:
            return (value * 2,)

    class Adam(fusedreg.Adam):
        def state_format(self, group: Any, param: Tensor) -> Format:
            return Doubled()

    doubled = Adam(parameters(shapes=[(9,)]), lr=0.1, **PATHS[how])
    plain = fusedreg.Adam(parameters(shapes=[(9,)]), lr=0.1, fused=False)
    step([doubled, plain], 2, seed=1)
    assert_equal(doubled, plain)
    assert doubled.launches == 0
    doubled.load_state_dict(plain.state_dict())
    step([doubled, plain], 1, seed=2)
    assert_equal(doubled, plain)


class Halves(Bits):
    """The same numbers in two planes."""

    suffixes = ("_high", "_low")
    codec = None

    def create(self, param: Tensor, value: Number) -> Sequence[Tensor]:
        return self.from_checkpoint(torch.full_like(param, value))

    def load(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return (planes[0] + planes[1]).to(dtype)

    def store(self, value: Tensor, planes: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.from_checkpoint(value)

    def to_checkpoint(self, planes: Sequence[Tensor]) -> Tensor:
        return planes[0] + planes[1]

    def from_checkpoint(self, value: Tensor) -> Sequence[Tensor]:
        high = value.to(torch.bfloat16).to(value.dtype)
        return high, value - high


@cache
def in_halves(cls: type[fusedreg.FusedOptimizer]) -> Any:
    return type(f"{cls.__name__}InHalves", (cls,), {"state_format": lambda *_: Halves()})


def test_a_state_of_which_a_part_is_missing_is_named() -> None:
    optimizer = in_halves(fusedreg.Adam)(parameters(shapes=[(9,)]))
    step([optimizer], 1, seed=1)
    (param,) = optimizer.param_groups[0]["params"]
    del optimizer.state[param]["exp_avg_low"]
    with pytest.raises(RuntimeError, match=r"'exp_avg' lacks 'exp_avg_low'.*to begin anew"):
        step([optimizer], 1, seed=2)
    optimizer.state[param]["exp_avg_high"] = None  # which begins anew too
    step([optimizer], 1, seed=2)
    assert optimizer.state[param]["exp_avg_low"].shape == (9,)


def test_adagrad_shares_what_its_sum_is_stored_in() -> None:
    params = parameters(shapes=[(9,), (4,)])
    optimizer = in_halves(fusedreg.Adagrad)(params)
    optimizer.share_memory()
    for param in params:
        assert all(optimizer.state[param][f"sum_{half}"].is_shared() for half in ("high", "low"))


@pytest.mark.parametrize("stored", [stored_as_bits, in_halves, lambda cls: cls])
def test_hooks_see_the_state_dict_that_is_returned(stored: Any) -> None:
    """They see states, not planes, may write into it, and may return something else."""
    optimizer = stored(fusedreg.Adam)(parameters(shapes=[(9,)]))
    step([optimizer], 1, seed=1)
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(saved))
    saved = optimizer.state_dict()
    assert saved is seen[0]
    assert {*saved["state"][0]} == {"step", "exp_avg", "exp_avg_sq"}
    optimizer.register_state_dict_post_hook(lambda _, saved: saved["state"].clear())
    assert optimizer.state_dict()["state"] == {}
    optimizer.register_state_dict_post_hook(lambda _, saved: {"optimizer": saved})
    assert {*optimizer.state_dict()} == {"optimizer"}
