"""Hugging Face Trainer with a fusedreg class in the place of torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fusedreg

from training import CLIP, OPTIONS, STEPS, Make, assert_same_training, decay, ours, torchs


def bert() -> nn.Module:
    """A BERT of 1,000 parameters: weights, biases, norms, embeddings with rows that nobody uses."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=1,
    )
    return BertForSequenceClassification(config).double()


def sentences() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(20, (64, 6), generator=generator)
    # Labels that the untrained network is far from, so that CLIP clips.
    return [{"input_ids": row, "labels": 3 + row.double().mean() / 10} for row in words]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """The two param groups that Trainer makes: biases and norms are not decayed."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    named = list(model.named_parameters())
    return [
        {"params": [param for name, param in named if name in decayed], "weight_decay": 0.1},
        {"params": [param for name, param in named if name not in decayed], "weight_decay": 0.0},
    ]


def trainer_of(folder: Path, model: nn.Module, steps: int, kwargs: Any, **options: Any) -> Trainer:
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    on_cpu = {"use_cpu": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        **{"max_grad_norm": 0.0, "weight_decay": 0.1, **quiet, **on_cpu, **options},
    )
    return Trainer(model=model, args=arguments, train_dataset=sentences(), **kwargs)


def handed_over(folder: Path, make: Make, steps: int = STEPS, **options: Any) -> Trainer:
    """A Trainer that is given optimizer and scheduler."""
    model = bert()
    optimizer = make(groups(model))
    kwargs = {"optimizers": (optimizer, decay(optimizer))}
    return trainer_of(folder, model, steps, kwargs, **options)


def trained(trainer: Trainer, **options: Any) -> nn.Module:
    trainer.train(**options)
    assert trainer.state.global_step == trainer.args.max_steps
    return trainer.model


def norms(trainer: Trainer) -> list[float]:
    """Gradient norms that Trainer logged, before its clip."""
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


@pytest.mark.parametrize("name", OPTIONS)
def test_optimizer_and_scheduler_handed_over_train_as_torchs(name: str, tmp_path: Path) -> None:
    """With Trainer's gradient accumulation and its clip."""
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": CLIP}
    mine = handed_over(tmp_path, ours(name), **options)
    torchs_own = handed_over(tmp_path, torchs(name), **options)
    assert_same_training(trained(mine), trained(torchs_own))
    assert min(norms(torchs_own)) > 2 * CLIP
    assert norms(mine) == pytest.approx(norms(torchs_own))


def test_class_and_kwargs_train_as_torchs(tmp_path: Path) -> None:
    """Trainer makes the groups, the optimizer and its scheduler."""
    ends = []
    for library in (fusedreg, torch.optim):
        kwargs = {"optimizer_cls_and_kwargs": (library.AdamW, OPTIONS["AdamW"])}
        trainer = trainer_of(tmp_path, bert(), STEPS, kwargs, max_grad_norm=CLIP)
        ends.append(trained(trainer))
        assert type(trainer.optimizer.optimizer) is library.AdamW
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert_same_training(*ends)


@pytest.mark.parametrize("name", OPTIONS)
def test_own_clip_equals_trainers(name: str, tmp_path: Path) -> None:
    mine = handed_over(tmp_path, ours(name, max_grad_norm=CLIP), max_grad_norm=0.0)
    torchs_own = handed_over(tmp_path, torchs(name), max_grad_norm=CLIP)
    assert_same_training(trained(mine), trained(torchs_own))
    assert min(norms(torchs_own)) > 2 * CLIP
    assert mine.optimizer.optimizer.grad_norm.item() == pytest.approx(norms(torchs_own)[-1])


def resumed(folder: Path, before: Make, after: Make) -> nn.Module:
    """Trained by `before`, saved after 5 steps, and trained on by `after`."""
    trained(handed_over(folder, before, steps=5, save_strategy="steps", save_steps=5))
    checkpoint = str(folder / "checkpoint-5")
    return trained(handed_over(folder, after), resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("name", OPTIONS)
def test_resuming_from_a_checkpoint_continues_the_training(name: str, tmp_path: Path) -> None:
    """Bit for bit, although `l1` comes from the file alone."""
    with_l1 = ours(name, l1=0.01, max_grad_norm=CLIP)
    uninterrupted = trained(handed_over(tmp_path, with_l1))
    after = resumed(tmp_path, with_l1, ours(name, max_grad_norm=CLIP))
    assert_same_training(after, uninterrupted, tolerance=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_resuming_from_a_checkpoint_of_torch_continues_its_training(
    name: str, tmp_path: Path
) -> None:
    after = resumed(tmp_path, torchs(name), ours(name))
    assert_same_training(after, trained(handed_over(tmp_path, torchs(name))))
