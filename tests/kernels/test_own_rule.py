"""An optimizer in a module of one's own: the one of docs/adding-an-optimizer.md, on every path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedreg
from fusedreg.kernels.device.rules import RULES
from fusedreg.scalars import Count

from cases import PATHS, parameters, run, set_grads
from compare import assert_close, assert_rounds_once, frozen, parameters_of, results
from pages import ROOT, examples

BETA = 0.9
SMALL = [(5, 3), (), (0,), (67,)]


@pytest.fixture(scope="module")
def cls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The class of the page, imported from a file as its reader has it."""
    page = ROOT / "docs/adding-an-optimizer.md"
    (example,) = [e for e in examples(page) if "FusedOptimizer" in e.code]
    file: Path = tmp_path_factory.mktemp("own") / "maxprop.py"
    file.write_text(example.code)
    sys.path.insert(0, str(file.parent))
    yield importlib.import_module("maxprop").MaxProp
    sys.path.remove(str(file.parent))
    del sys.modules["maxprop"]


def make(cls: Any, params: Any, path: str, **options: Any) -> Any:
    return cls(params, lr=0.1, beta=BETA, **PATHS[path], **options)


def check_takes(optimizer: Any, path: str, launches: int = 2) -> None:
    """It was really stepped by that path, whatever the number of tensors."""
    backends = {"reference": "reference", "device": "reference", "fused": "triton"}
    assert optimizer.backend == backends.get(path, "llvm")
    assert optimizer.launches == (0 if optimizer.backend == "reference" else launches)


def test_trajectory_is_that_of_torchs_adamax_without_momentum(cls: Any, path: str) -> None:
    """With eps = 0, which torch has inside the maximum."""
    params, others = parameters(shapes=SMALL), parameters(shapes=SMALL)
    optimizer = make(cls, params, path, eps=0.0, weight_decay=0.5)
    twin = torch.optim.Adamax(others, lr=0.1, betas=(0.0, BETA), eps=0.0, weight_decay=0.5)
    run(optimizer, steps=5)
    run(twin, steps=5)
    check_takes(optimizer, path)
    # Decay, quotient, product and difference: at most half an ulp each, in five steps.
    assert_close(params, others, ulps=10)
    states = [
        [o.state[p]["exp_inf"] for p in o.param_groups[0]["params"]] for o in (optimizer, twin)
    ]
    assert_close(*states, ulps=10)


@pytest.mark.parametrize("path", ["reference", "default"])
def test_threshold_solves_the_lasso(cls: Any, path: str) -> None:
    """Of |w - c|^2 / 2, whose solution is c moved towards 0 by l1."""
    c = torch.tensor([3.0, -1.0, 0.31, 0.29, -0.1, 0.0], dtype=torch.float64)
    w = torch.nn.Parameter(torch.ones_like(c))
    optimizer = make(cls, [w], path, l1=0.3)
    for _ in range(300):
        w.grad = w.detach() - c
        optimizer.step()
    # Where |gradient| has come down to l1, a step takes lr / l1, a third, of the distance; before
    # that lr, so 300 steps are many. What is left are the roundings of numbers up to 3.
    expected = c.sign() * torch.relu(c.abs() - 0.3)
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-14)
    assert torch.equal(w == 0, expected == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_once(cls: Any, dtype: torch.dtype, path: str) -> None:
    params = parameters(dtype=dtype, shapes=SMALL)
    optimizer = make(cls, params, path, l1=0.05, weight_decay=0.5)
    run(optimizer, steps=2)
    assert_rounds_once(optimizer, lambda wide: make(cls, wide, path, l1=0.05, weight_decay=0.5))


def test_clipping_skipping_and_checkpoints_come_along(cls: Any, path: str) -> None:
    params, others = parameters(shapes=SMALL), parameters(shapes=SMALL)
    options = {"max_grad_norm": 1.0, "skip_nonfinite": True, "decoupled_weight_decay": True}
    optimizer = make(cls, params, path, weight_decay=0.5, **options)
    run(optimizer, steps=2)
    check_takes(optimizer, path, launches=3)
    before = results(optimizer)
    params[0].grad[0, 0] = torch.inf
    optimizer.step()
    assert results(optimizer) == before
    assert optimizer.skipped_steps == 1

    loaded = make(cls, others, path, **options)
    loaded.load_state_dict(optimizer.state_dict())
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param)
    for each in (optimizer, loaded):
        run(each, steps=2, first_seed=2000)
    assert results(loaded) == results(optimizer)


def test_options_of_every_class_are_known_and_others_refused(cls: Any) -> None:
    with pytest.raises(TypeError, match=r"MaxProp\.__init__\(\) got an unexpected .* 'momentum'"):
        cls(parameters(), momentum=0.9)
    with pytest.raises(ValueError, match="Invalid l1 value"):
        cls(parameters(), l1=-1.0)


def test_a_rule_that_only_the_readable_side_knows_is_refused() -> None:
    """Kernels would go on with the parent's."""
    with pytest.raises(TypeError, match="Half overrides update but not device_rule"):
        type("Half", (fusedreg.SGD,), {"update": fusedreg.SGD.update})


def test_without_a_device_rule_the_reference_steps(path: str) -> None:
    class Doubled(fusedreg.SGD):
        def update(self, settings: Any, state: Any, grad: Tensor) -> Any:
            direction, gain, new = super().update(settings, state, grad)
            return 2 * direction, 2 * gain, new

        def device_rule(self, group: Any) -> None:
            return None

    w = torch.nn.Parameter(torch.ones(3))
    optimizer = Doubled([w], lr=0.25, **PATHS.get(path, {}))
    w.grad = torch.ones(3)
    optimizer.step()
    assert w.tolist() == [0.5] * 3
    assert (optimizer.backend, optimizer.launches) == ("reference", 0)


def own(path: str, **members: Any) -> Any:
    """An optimizer whose second group is of one's own rule, after one that is SGD's."""

    def device_rule(self: Any, group: Any) -> Any:
        return members["rule"] if group["maximize"] else "adagrad"

    def update(self: Any, settings: Any, state: Any, grad: Tensor) -> Any:
        return grad, 1.0, {"step": state["step"] + 1}

    base = {
        "tensor_states": ("sum",),
        "counts": {"step": Count()},
        "device_options": ("a", "b"),
    }
    methods = {"device_rule": device_rule, "update": update}
    cls = type("Own", (fusedreg.FusedOptimizer,), {**base, **methods, **members})
    params = parameters(shapes=SMALL)
    groups = [{"params": params[:2]}, {"params": params[2:], "maximize": True}]
    return cls(groups, {"lr": 0.1, "a": 0.0, "b": 0.1}, **PATHS[path])


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [
        ("adamm", ValueError, "Invalid device rule: 'adamm'"),
        (("adam", "adam", 2), TypeError, "expected a Rule of two @triton.jit functions"),
        (RULES["adam"], ValueError, "unpack"),
        (RULES["adagrad"]._replace(width=1), ValueError, "returns 2 scalars, but the width"),
        (RULES["adagrad"]._replace(tile=RULES["adam"].tile), IndexError, "out of range"),
    ],
    ids=["name", "kind", "options", "width", "states"],
)
def test_a_wrong_rule_is_refused_before_anything_changes(
    rule: Any, error: type[Exception], words: str
) -> None:
    """Also of the groups before it, which have another."""
    optimizer = own("default", rule=rule)
    params = parameters_of(optimizer)
    set_grads(params, seed=1)
    before = frozen(params)
    with pytest.raises(error, match=words):
        optimizer.step()
    assert frozen(params) == before
    for state in optimizer.state.values():
        assert all((value == 0).all() for value in state.values())


def test_what_a_class_forgets_is_named() -> None:
    with pytest.raises(TypeError, match="Own has no option 'a' among its defaults"):
        type("Own", (fusedreg.FusedOptimizer,), {"device_options": ("a",)})(
            parameters(shapes=SMALL), {"lr": 0.1}
        )
    with pytest.raises(TypeError, match="FusedOptimizer has no option 'lr' among its defaults"):
        fusedreg.FusedOptimizer(parameters(shapes=SMALL), {})
    optimizer = own("reference", rule="adagrad", init_state=lambda *_: None)
    set_grads(parameters_of(optimizer), seed=1)
    with pytest.raises(RuntimeError, match=r"Own\.init_state creates no 'step'"):
        optimizer.step()
    bare = fusedreg.FusedOptimizer(parameters(shapes=SMALL), {"lr": 0.1})
    set_grads(bare.param_groups[0]["params"], seed=1)
    with pytest.raises(NotImplementedError, match="FusedOptimizer defines no update"):
        bare.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_page_runs_compiled_on_a_gpu(cls: Any) -> None:
    shapes = [(5, 3), (8193,), (64, 128)]
    params = [torch.nn.Parameter(p.detach().cuda()) for p in parameters(shapes=shapes)]
    others = [torch.nn.Parameter(p.detach().cuda()) for p in parameters(shapes=shapes)]
    made = [
        cls(of, lr=0.1, beta=BETA, l1=0.05, max_grad_norm=1.0, fused=fused)
        for of, fused in ((params, None), (others, False))
    ]
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        for param, other in zip(params, others, strict=True):
            param.grad = torch.randn(
                param.shape, dtype=param.dtype, device="cuda", generator=generator
            )
            other.grad = param.grad.clone()
        for optimizer in made:
            optimizer.step()
    assert [optimizer.backend for optimizer in made] == ["triton", "reference"]
    assert made[0].launches == 3
    # As on a CPU, with the norm, its factor and the threshold, in three steps.
    assert_close(params, others, ulps=12)
