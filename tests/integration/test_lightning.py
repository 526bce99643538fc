"""PyTorch Lightning with a fusedreg optimizer from `configure_optimizers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision as FabricMixedPrecision
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
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


class Automatic(LightningModule):
    """Lightning does everything."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.model = regression()
        self.make = make

    def training_step(self, batch: list[Tensor]) -> Tensor | None:
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        scheduler = {"scheduler": decay(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Manual(Automatic):
    """Everything by hand, through the wrapper that `self.optimizers()` gives."""

    def __init__(self, make: Make, clip: float | None = None) -> None:
        super().__init__(make)
        self.automatic_optimization = False
        self.clip = clip

    def training_step(self, batch: list[Tensor]) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.model, batch))
        if self.clip is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip)
        self.step(optimizer)
        self.lr_schedulers().step()

    def step(self, optimizer: LightningOptimizer) -> None:
        optimizer.step()


def trainer(epochs: int = 1, **options: Any) -> Trainer:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, **dict.fromkeys(off, False), **options
    )


def trained(module: Automatic, **options: Any) -> nn.Module:
    trainer(**options).fit(module, loader())
    return module.model


def trained_16_mixed(make: Make, **options: Any) -> nn.Module:
    """Train with a GradScaler on batches of which one overflows."""
    scaler = GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    module = Automatic(make)
    trainer(plugins=[plugin], **options).fit(module, loader(overflow=True))
    assert scaler.get_scale() == 2.0**9
    return module.model


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, CLIP], ids=["free", "clipped"])
@pytest.mark.parametrize("name", OPTIONS)
def test_automatic_optimization_trains_as_torchs_by_hand(
    name: str, clip: float | None, accumulate: int
) -> None:
    """With `gradient_clip_val`, `accumulate_grad_batches` and a scheduler."""
    options = {"gradient_clip_val": clip, "accumulate_grad_batches": accumulate}
    model = trained(Automatic(ours(name)), **options)
    assert_same_training(model, by_hand(torchs(name), clip=clip, accumulate=accumulate))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_own_clip_equals_clipping_by_hand(name: str, accumulate: int) -> None:
    model = trained(Automatic(ours(name, max_grad_norm=CLIP)), accumulate_grad_batches=accumulate)
    assert_same_training(model, by_hand(torchs(name), clip=CLIP, accumulate=accumulate))


@pytest.mark.parametrize("clip", [None, CLIP], ids=["free", "clipped"])
@pytest.mark.parametrize("name", OPTIONS)
def test_manual_optimization_trains_as_torchs_by_hand(name: str, clip: float | None) -> None:
    model = trained(Manual(ours(name), clip))
    assert_same_training(model, by_hand(torchs(name), clip=clip))


@pytest.mark.parametrize("name", OPTIONS)
def test_checkpoint_continues_the_training_bit_for_bit(name: str, tmp_path: Path) -> None:
    make = ours(name, l1=0.01, max_grad_norm=CLIP)
    file = tmp_path / "half.ckpt"
    first = trainer(epochs=1)
    first.fit(Automatic(make), loader())
    first.save_checkpoint(file)
    resumed = Automatic(ours(name, max_grad_norm=CLIP))  # l1 comes from the file
    trainer(epochs=2).fit(resumed, loader(), ckpt_path=file)
    uninterrupted = trained(Automatic(make), epochs=2)
    assert_same_training(resumed.model, uninterrupted, tolerance=0)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize(
    ("own", "lightnings"), [(None, None), (CLIP, None), (None, CLIP)], ids=["free", "own", "clip"]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_16_mixed_trains_as_torchs_by_hand(
    name: str, own: float | None, lightnings: float | None, fused: bool | None
) -> None:
    """Skips the overflow; unclipped, with `max_grad_norm`, and with `gradient_clip_val`.

    The last with fused=True too, where Lightning refuses torch's classes.
    """
    make = ours(name, max_grad_norm=own, fused=fused)
    model = trained_16_mixed(make, gradient_clip_val=lightnings)
    assert_same_training(model, by_hand(torchs(name), clip=own or lightnings, overflow=True))


@pytest.mark.parametrize("fused", [None, True])
def test_fabric_16_mixed_with_its_clip_trains_as_torchs_by_hand(fused: bool | None) -> None:
    scaler = GradScaler("cpu", init_scale=2.0**10)
    plugin = FabricMixedPrecision("16-mixed", device="cpu", scaler=scaler)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    model = regression()
    inner = ours("AdamW", fused=fused)(model.parameters())
    scheduler = decay(inner)
    wrapped, optimizer = fabric.setup(model, inner)
    for batch in fabric.setup_dataloaders(loader(overflow=True)):
        # Not through `wrapped`, which would make the float64 inputs half. The order is the same.
        fabric.backward(loss_of(model, batch))
        fabric.clip_gradients(wrapped, optimizer, max_norm=CLIP, error_if_nonfinite=False)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert_same_training(model, by_hand(torchs("AdamW"), clip=CLIP, overflow=True))


def test_manual_optimization_reaches_what_belongs_to_the_optimizer() -> None:
    """What is read and set on `self.optimizers()`, a wrapper, is the optimizer's own."""
    seen = []

    class Watching(Manual):
        def step(self, optimizer: LightningOptimizer) -> None:
            inner = optimizer.optimizer
            optimizer.max_grad_norm = CLIP
            optimizer.skip_nonfinite = True
            if self.global_step == OVERFLOW:
                self.model[0].bias.grad[0] = torch.nan
            optimizer.step()
            assert (inner.max_grad_norm, inner.skip_nonfinite) == (CLIP, True)
            assert (optimizer.max_grad_norm, optimizer.skip_nonfinite) == (CLIP, True)
            assert optimizer.grad_norm is inner.grad_norm
            assert optimizer.skipped_steps is inner.skipped_steps
            seen.append((optimizer.grad_norm.item(), optimizer.skipped_steps.item()))

    model = trained(Watching(ours("AdamW")))
    assert_same_training(model, by_hand(torchs("AdamW"), clip=CLIP, overflow=True))
    assert [skipped for _, skipped in seen] == [int(index >= OVERFLOW) for index in range(STEPS)]
    assert [norm > 2 * CLIP for norm, _ in seen] == [index != OVERFLOW for index in range(STEPS)]
