"""Accelerate's wrappers around a fusedreg optimizer."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.amp import GradScaler

from training import (
    CLIP,
    OPTIONS,
    OVERFLOW,
    STEPS,
    Make,
    assert_same_training,
    by_hand,
    decay,
    loader,
    loss_of,
    ours,
    regression,
    torchs,
)


class Training:
    """What `prepare` returns, and the loop of its manual."""

    def __init__(self, make: Make, *, accumulate: int = 1, scaled: bool = False) -> None:
        # Singletons: without this the first test would decide for all.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(
            cpu=True,
            mixed_precision="fp16" if scaled else "no",
            gradient_accumulation_steps=accumulate,
        )
        if scaled:  # on a GPU, fp16 sets these two; on a CPU accelerate leaves them out
            self.accelerator.native_amp = True
            self.accelerator.scaler = GradScaler("cpu", init_scale=2.0**10)
        self.inner: Any = make((model := regression()).parameters())
        data = loader(overflow=scaled)
        self.model, self.optimizer, self.data, self.scheduler = self.accelerator.prepare(
            model, self.inner, data, decay(self.inner)
        )
        self.skipped: list[bool] = []
        self.rates: list[float] = []

    def run(self, *, first: int = 0, stop: int = STEPS, clip: float | None = None) -> nn.Module:
        """Train on the batches from `first` up to `stop`."""
        data = self.accelerator.skip_first_batches(self.data, first)
        for batch in islice(data, stop - first):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss_of(self.model, batch))
                if clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.skipped.append(self.accelerator.optimizer_step_was_skipped)
            self.rates += self.scheduler.get_last_lr()
        return self.model


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_prepared_optimizer_trains_as_torchs_by_hand(name: str, accumulate: int) -> None:
    """With `prepare`, `accumulate`, `clip_grad_norm_` and a scheduler."""
    training = Training(ours(name), accumulate=accumulate)
    assert isinstance(training.optimizer, AcceleratedOptimizer)
    assert isinstance(training.scheduler, AcceleratedScheduler)
    expected = by_hand(torchs(name), clip=CLIP, accumulate=accumulate)
    assert_same_training(training.run(clip=CLIP), expected)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_own_clip_equals_accelerates(name: str, accumulate: int) -> None:
    model = Training(ours(name, max_grad_norm=CLIP), accumulate=accumulate).run()
    assert_same_training(model, Training(torchs(name), accumulate=accumulate).run(clip=CLIP))


@pytest.mark.parametrize("name", OPTIONS)
def test_saved_state_continues_the_training_bit_for_bit(name: str, tmp_path: Path) -> None:
    make = ours(name, l1=0.01, max_grad_norm=CLIP)
    before = Training(make)
    before.run(stop=5)
    before.accelerator.save_state(str(tmp_path))
    after = Training(ours(name, max_grad_norm=CLIP))  # l1 comes from the file
    after.accelerator.load_state(str(tmp_path))
    assert_same_training(after.run(first=5), Training(make).run(), tolerance=0)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("clip", [None, CLIP], ids=["free", "clipped"])
@pytest.mark.parametrize("name", OPTIONS)
def test_scaled_training_skips_an_overflow_as_with_torchs(
    name: str, clip: float | None, fused: bool | None
) -> None:
    """Accelerate finds a skipped step by whether GradScaler called `step`, and then keeps lr.

    With fused=True GradScaler calls it always, so Accelerate sees no skip, from torch neither.
    """
    mine = Training(ours(name, fused=fused), scaled=True)
    model = mine.run(clip=clip)
    torchs_own = Training(torchs(name, fused=fused), scaled=True)
    assert_same_training(model, torchs_own.run(clip=clip))
    assert mine.skipped == torchs_own.skipped
    assert mine.skipped == [index == OVERFLOW and not fused for index in range(STEPS)]
    assert mine.rates == torchs_own.rates
    assert mine.inner.skipped_steps == (1 if fused else 0)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_own_clip_equals_accelerates_of_scaled_gradients(name: str, fused: bool | None) -> None:
    model = Training(ours(name, fused=fused, max_grad_norm=CLIP), scaled=True).run()
    assert_same_training(model, Training(torchs(name, fused=fused), scaled=True).run(clip=CLIP))
