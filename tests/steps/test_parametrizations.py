"""param_groups and sparsity where modules form their weights from other parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_groups import NO_PENALTY, Groups, options, penalised
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fusedreg

from claims import distance, normal_equations, ridge
from compare import frozen

Wrap = Callable[..., nn.Module]


def old_weight_norm(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """torch.nn.utils.weight_norm, without its advice to take the new one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*weight_norm.* is deprecated", FutureWarning)
        return nn.utils.weight_norm(module, *args, **kwargs)


NORMED: dict[str, tuple[Wrap, str, str]] = {
    "new": (
        parametrizations.weight_norm,
        "parametrizations.{}.original0",
        "parametrizations.{}.original1",
    ),
    "old": (old_weight_norm, "{}_g", "{}_v"),
}
generations = pytest.mark.parametrize(("wrap", "size", "direction"), NORMED.values(), ids=NORMED)


def orthogonal(orthogonal_map: str, trivial: bool) -> Wrap:
    def wrap(module: nn.Module, name: str = "weight") -> nn.Module:
        return parametrizations.orthogonal(module, name, orthogonal_map, use_trivialization=trivial)

    return wrap


# Each fixes the length of the weight; with the name of what it is formed from.
FIXED: dict[str, tuple[Wrap, str]] = {
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.{}.original"),
    "old_spectral_norm": (nn.utils.spectral_norm, "{}_orig"),
    **{
        f"{kind}_{'trivial' if trivial else 'plain'}": (
            orthogonal(kind, trivial),
            "parametrizations.{}.original",
        )
        for kind in ("matrix_exp", "cayley", "householder")
        for trivial in (True, False)
    },
}

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "embedding": lambda: nn.Embedding(5, 3),
    "conv1d": lambda: nn.Conv1d(2, 4, 3),
    "conv2d": lambda: nn.Conv2d(2, 4, 3),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(2, 4, 3),
    "bilinear": lambda: nn.Bilinear(3, 3, 2),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


class Upper(nn.Module):
    """A parametrization that nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu()


class LowRank(nn.Module):
    """LoRA: the original is frozen, and its change is the product of two factors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(3, 1))
        self.b = nn.Parameter(torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a @ self.b


class Tired(nn.Module):
    """Draws random numbers in training mode, and counts in any."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.dropout(x, 0.5, self.training)


def upper(module: nn.Module, name: str = "weight") -> nn.Module:
    return parametrize.register_parametrization(module, name, Upper())


def halved(module: nn.Module, name: str = "weight") -> nn.Module:
    return prune.random_unstructured(module, name, 0.5)


ORIGINAL = "0.parametrizations.weight.original"


def of(name: str, groups: Groups) -> dict[str, Any]:
    return options(groups)[name]


# ---- weight_norm -------------------------------------------------------------------------------


@generations
@layers
@pytest.mark.parametrize("dim", [0, 1, None])
def test_the_size_of_a_normed_weight_is_penalised_and_not_its_direction(
    wrap: Wrap, size: str, direction: str, layer: Callable[[], nn.Module], dim: int | None
) -> None:
    model = nn.Sequential(nn.Sequential(wrap(layer(), dim=dim)), nn.ReLU())
    size, direction = f"0.0.{size.format('weight')}", f"0.0.{direction.format('weight')}"
    groups = fusedreg.param_groups(model, weight_decay=0.1, l1=0.01)
    assert penalised(groups) == {size}
    assert of(size, groups) == {"weight_decay": 0.1, "l1": 0.01}
    left_open = fusedreg.param_groups(model)
    assert of(size, left_open) == {}
    assert of(direction, left_open) == NO_PENALTY


@generations
def test_recurrent_weights_may_be_normed(wrap: Wrap, size: str, direction: str) -> None:
    groups = fusedreg.param_groups(wrap(nn.LSTM(2, 3), "weight_hh_l0"), l1=0.1)
    assert penalised(groups) == {"weight_ih_l0", size.format("weight_hh_l0")}


@generations
def test_a_weight_that_has_no_penalty_has_none_when_it_is_normed(
    wrap: Wrap, size: str, direction: str
) -> None:
    odd = nn.Module()
    odd.bias = nn.Parameter(torch.ones(2, 3))
    model = nn.ModuleList(
        [wrap(nn.LayerNorm((5, 4))), wrap(odd, "bias"), wrap(nn.BatchNorm1d(3)), nn.PReLU(2)]
    )
    wrap(model[3])
    assert not penalised(fusedreg.param_groups(model, weight_decay=0.1, l1=0.1))


@generations
def test_names_win_over_what_is_known_of_a_norm(wrap: Wrap, size: str, direction: str) -> None:
    model = wrap(nn.Linear(4, 3))
    size, direction = size.format("weight"), direction.format("weight")
    assert not penalised(fusedreg.param_groups(model, l1=0.1, no_decay=[size]))
    assert not penalised(fusedreg.param_groups(model, l1=0.1, no_decay=[nn.Linear]))
    groups = fusedreg.param_groups(model, l1=0.1, overrides={direction: {"weight_decay": 0.5}})
    assert of(direction, groups) == {"weight_decay": 0.5, "l1": 0.0}


@generations
@pytest.mark.parametrize(
    ("cls", "lr"),
    [
        (fusedreg.SGD, 0.1),
        (fusedreg.Adam, 0.01),
        (fusedreg.RMSprop, 0.01),
        (fusedreg.Adagrad, 0.1),
    ],
)
def test_l1_of_a_normed_layer_trains(
    cls: Any, lr: float, wrap: Wrap, size: str, direction: str
) -> None:
    """An L1 on directions makes whole rows of them 0, and the weight 0 / 0."""
    model = nn.Sequential(wrap(nn.Linear(10, 16)), nn.ReLU(), wrap(nn.Linear(16, 1)))
    x = torch.randn(100, 10)
    y = x[:, :3].sum(1, keepdim=True)
    optimizer = cls(fusedreg.param_groups(model, l1=3e-2), lr=lr)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert torch.stack(losses).isfinite().all()
    assert losses[-1] < losses[0]
    zeros = fusedreg.sparsity(model)["0.weight"].zeros
    assert zeros > 0
    assert zeros % 10 == 0  # whole rows


def fit(
    wrap: Wrap, start: Tensor, hessian: Tensor, c: Tensor, steps: int, **penalty: float
) -> Tensor:
    """The weight after SGD on W H W' / 2 - c W' with a penalty of a normed layer."""
    outputs, inputs = start.shape
    model = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(start)
    wrap(model)
    optimizer = fusedreg.SGD(fusedreg.param_groups(model, **penalty), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        weight = _weight(model)
        ((weight @ hessian * weight).sum() / 2 - (weight * c).sum()).backward()
        optimizer.step()
    return _weight(model).detach()


def _weight(model: nn.Module) -> Tensor:
    """The weight of a layer, which an old weight_norm forms when the layer is called."""
    model(torch.zeros(1, model.in_features, dtype=torch.float64))
    weight: Tensor = model.weight
    return weight


@generations
def test_decay_of_the_size_is_ridge(wrap: Wrap, size: str, direction: str) -> None:
    """Decay of |g|^2 is decay of |W|^2, so that the minimum is scikit-learn's: there it stays."""
    H, c = normal_equations()

    def moved(start: Tensor) -> float:
        found = fit(wrap, start[None], H, c[None], 100, weight_decay=0.1)
        return distance(found[0], start)

    # 100 steps, each off by some ten roundings of numbers below 1, times lr and the gain of
    # momentum, which together are 1.
    assert moved(ridge(0.1)) < 100 * 10 * 2**-53
    assert moved(ridge(0.2)) > 0.01


@generations
def test_l1_of_the_size_is_the_group_lasso(wrap: Wrap, size: str, direction: str) -> None:
    """The minimum of |W - T|^2 / 2 + l1 * (sum of the norms of rows) takes l1 off each norm."""
    T = torch.tensor([[3.0, 4.0, 0.0], [0.6, 0.0, -0.8], [0.1, 0.1, 0.1]], dtype=torch.float64)
    norms = T.norm(dim=1, keepdim=True)
    expected = T * (1 - 0.5 / norms).clamp(min=0)
    start = T + torch.tensor([[0.1], [-0.1], [0.1]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    found = fit(wrap, start, eye, T, 1000, l1=0.5)
    # Momentum contracts by sqrt(0.9): 0.949^1000 is 1e-23, so that roundings of numbers below 8
    # remain, ten a step, of which a gain of 10 and lr make 10 / (1 - 0.949) at most.
    assert distance(found, expected) < 200 * 8 * 2**-53
    assert (found[2] == 0).all()


@generations
def test_decoupled_decay_of_the_size_is_that_of_the_weight(
    wrap: Wrap, size: str, direction: str
) -> None:
    model = wrap(nn.Linear(4, 3, dtype=torch.float64))
    before = model.weight.detach().clone()
    optimizer = fusedreg.AdamW(fusedreg.param_groups(model, weight_decay=0.5), lr=0.1)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    model(torch.zeros(1, 4, dtype=torch.float64))
    # Three roundings on either side: of a product, of a quotient and of the norm's row.
    torch.testing.assert_close(model.weight.detach(), before * 0.95, rtol=8 * 2**-53, atol=0)


# ---- what fixes the length of a weight -----------------------------------------------------------


@pytest.mark.parametrize(("wrap", "original"), FIXED.values(), ids=FIXED)
def test_a_weight_of_fixed_length_has_no_penalty(wrap: Wrap, original: str) -> None:
    model = nn.Sequential(wrap(nn.Linear(3, 3)), nn.Sequential(wrap(nn.Linear(4, 3))))
    assert not penalised(fusedreg.param_groups(model, weight_decay=0.1, l1=0.1))
    name = f"1.0.{original.format('weight')}"
    assert of(name, fusedreg.param_groups(model)) == NO_PENALTY
    groups = fusedreg.param_groups(model, l1=0.1, overrides={name: {"l1": 0.2}})
    assert of(name, groups) == {"weight_decay": 0.0, "l1": 0.2}


@pytest.mark.parametrize(
    "wrap", [parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"]
)
def test_convolutions_of_fixed_length_have_no_penalty(wrap: Wrap) -> None:
    model = nn.Sequential(wrap(nn.Conv2d(2, 4, 3)), wrap(nn.ConvTranspose1d(2, 4, 3)))
    assert not penalised(fusedreg.param_groups(model, weight_decay=0.1, l1=0.1))


# ---- other parametrizations ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"weight_decay": 0.1},
        {"l1": 0.1, "weight_decay": 0.0},
        {},  # the optimizer's constructor may have one
        {"weight_decay": 0.0},
        {"l1": 0.1, "overrides": {ORIGINAL: {"lr": 0.1}}},
        {"l1": 0.1, "no_decay": ["1.*"]},
    ],
    ids=str,
)
def test_an_unknown_parametrization_is_refused_by_name(arguments: dict[str, Any]) -> None:
    model = nn.Sequential(upper(nn.Linear(4, 3)), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=f"'{ORIGINAL}'.*no_decay.*overrides"):
        fusedreg.param_groups(model, **arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"l1": 0.1, "no_decay": [ORIGINAL]}, NO_PENALTY),
        ({"l1": 0.1, "no_decay": ["*original*"]}, NO_PENALTY),
        ({"no_decay": [nn.Linear]}, NO_PENALTY),
        ({"l1": 0.1, "overrides": {ORIGINAL: {"l1": 0.2}}}, {"l1": 0.2}),
        ({"overrides": {ORIGINAL: {"weight_decay": 0.2}}}, {"weight_decay": 0.2}),
        ({"weight_decay": 0.0, "l1": 0.0}, NO_PENALTY),
    ],
    ids=str,
)
def test_who_says_what_an_unknown_parametrization_gets_gets_it(
    arguments: dict[str, Any], expected: dict[str, Any]
) -> None:
    model = nn.Sequential(upper(nn.Linear(4, 3)))
    assert of(ORIGINAL, fusedreg.param_groups(model, **arguments)) == expected


def test_all_that_are_refused_are_named() -> None:
    model = nn.Sequential(upper(nn.Linear(4, 3)), nn.Linear(3, 2), upper(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"'0\.param.*original', '2\.param.*original' \("):
        fusedreg.param_groups(model, l1=0.1)


def test_an_unknown_parametrization_of_what_has_no_penalty_is_not_refused() -> None:
    odd = nn.Module()
    odd.bias = nn.Parameter(torch.ones(2, 3))
    model = nn.ModuleList(
        [upper(nn.LayerNorm((5, 4))), upper(odd, "bias"), nn.Linear(4, 3).requires_grad_(False)]
    )
    upper(model[2])  # frozen
    groups = fusedreg.param_groups(model, weight_decay=0.1)
    assert not penalised(groups)
    assert "2.parametrizations.weight.original" in options(groups)


def test_parameters_of_a_parametrization_itself_are_like_all_others() -> None:
    layer = nn.Linear(4, 3).requires_grad_(False)
    model = nn.Sequential(parametrize.register_parametrization(layer, "weight", LowRank()))
    groups = fusedreg.param_groups(model, weight_decay=0.1)
    inner = "0.parametrizations.weight.0."
    assert penalised(groups) == {inner + "a", inner + "b"}


def test_in_a_chain_what_is_known_of_a_part_counts() -> None:
    normed_then_unknown = nn.Sequential(upper(parametrizations.weight_norm(nn.Linear(4, 3))))
    with pytest.raises(ValueError, match=f"penalise '{ORIGINAL}0' "):
        fusedreg.param_groups(normed_then_unknown, l1=0.1)
    for chain in (
        parametrizations.spectral_norm(upper(nn.Linear(4, 3))),
        upper(parametrizations.spectral_norm(nn.Linear(4, 3))),
        parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(4, 3))),
    ):
        assert not penalised(fusedreg.param_groups(chain, l1=0.1))


def test_a_parametrized_buffer_is_no_parameter() -> None:
    model = nn.BatchNorm1d(3)
    parametrize.register_parametrization(model, "running_mean", Tired())
    assert len(options(fusedreg.param_groups(model, l1=0.1))) == 2
    assert set(fusedreg.sparsity(model)) == {"weight", "bias"}


# ---- pruning -------------------------------------------------------------------------------------


def test_a_masked_weight_is_penalised_as_without_the_mask() -> None:
    odd = nn.Module()
    odd.bias = nn.Parameter(torch.ones(2, 3))
    model = nn.ModuleList([nn.Linear(4, 3), nn.LayerNorm((5, 4)), odd])
    for module, name in ((model[0], "weight"), (model[0], "bias"), (model[1], "weight")):
        prune.l1_unstructured(module, name, 0.5)
    prune.l1_unstructured(odd, "bias", 0.5)
    assert penalised(fusedreg.param_groups(model, l1=0.1)) == {"0.weight_orig"}


def masked_direction(old: bool) -> nn.Module:
    if old:
        layer = old_weight_norm(nn.Linear(4, 3))
        prune.l1_unstructured(layer, "weight_v", 5)
    else:
        layer = parametrizations.weight_norm(nn.Linear(4, 3))
        prune.l1_unstructured(layer.parametrizations.weight, "original1", 5)
    return nn.Sequential(layer)


@pytest.mark.parametrize("old", [False, True])
def test_a_masked_direction_is_one(old: bool) -> None:
    model = masked_direction(old)
    size = "0.weight_g" if old else f"{ORIGINAL}0"
    assert penalised(fusedreg.param_groups(model, l1=0.1)) == {size}
    report = fusedreg.sparsity(model)
    assert set(report) == {"0.weight", "0.bias"}
    assert report["0.weight"] == (5, 12)


# ---- sparsity ------------------------------------------------------------------------------------


WAYS: dict[str, Wrap] = {
    **{f"{name}_weight_norm": wrap for name, (wrap, *_) in NORMED.items()},
    **{name: wrap for name, (wrap, _) in FIXED.items()},
    "upper": upper,
    "masked": halved,
    "masked_twice": lambda module: halved(halved(module)),
    "low_rank": lambda module: parametrize.register_parametrization(module, "weight", LowRank()),
    "tired": lambda module: parametrize.register_parametrization(module, "weight", Tired()),
    "chain": lambda module: parametrizations.spectral_norm(upper(module)),
}
ways = pytest.mark.parametrize("wrap", WAYS.values(), ids=WAYS)


def made(wrap: Wrap) -> nn.Module:
    """Three layers in two containers, the first in both, with some zeros."""
    first = nn.Linear(4, 3)
    with torch.no_grad():
        first.weight[1:, 0] = 0.0
    wrap(first)
    return nn.Sequential(nn.Sequential(first, nn.ReLU()), nn.Linear(3, 2), first)


@ways
@pytest.mark.parametrize("training", [True, False])
def test_sparsity_counts_the_weight_of_a_forward(wrap: Wrap, training: bool) -> None:
    model = made(wrap).train(training)
    report = fusedreg.sparsity(model)
    assert set(report) == {"0.0.weight", "0.0.bias", "1.weight", "1.bias"}
    assert report.total.numel == 12 + 3 + 6 + 2
    model.eval()
    model[0](torch.zeros(1, 4))  # the older ways form the weight here
    assert report["0.0.weight"].zeros == (model[0][0].weight == 0).sum().item()


@pytest.mark.parametrize("wrap", [halved, old_weight_norm], ids=["masked", "old_weight_norm"])
def test_sparsity_counts_the_weight_as_it_is_now(wrap: Wrap) -> None:
    """What a hook formed before the last step is not the weight of the next forward."""
    model = wrap(nn.Linear(4, 3))
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
        if wrap is old_weight_norm:
            model.weight_v.fill_(1.0)
    assert fusedreg.sparsity(model)["weight"] == (12, 12)


@ways
def test_sparsity_leaves_a_module_alone(wrap: Wrap) -> None:
    """Also in training mode, where spectral_norm moves on whenever its weight is formed."""
    model = made(wrap).train()
    before = frozen(model.state_dict()), [module.training for module in model.modules()]
    held = vars(model[0][0]).get("weight")
    random = torch.get_rng_state()
    buffers = [*model.buffers()]
    fusedreg.sparsity(model)
    assert (frozen(model.state_dict()), [m.training for m in model.modules()]) == before
    assert vars(model[0][0]).get("weight") is held
    assert torch.equal(torch.get_rng_state(), random)
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    assert all(param.grad is None and param.grad_fn is None for param in model.parameters())


def test_training_mode_comes_back_after_a_parametrization_failed() -> None:
    class Failing(Upper):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("of the parametrization")

    model = upper(nn.Linear(2, 2))
    model.parametrizations.weight.append(Failing())
    with pytest.raises(KeyError, match="of the parametrization"):
        fusedreg.sparsity(model)
    assert all(module.training for module in model.modules())


def test_sparsity_forms_weights_without_a_graph() -> None:
    class Watching(Upper):
        def forward(self, x: Tensor) -> Tensor:
            recorded.append(torch.is_grad_enabled())
            return super().forward(x)

    recorded: list[bool] = []
    model = parametrize.register_parametrization(nn.Linear(2, 2), "weight", Watching())
    recorded.clear()
    fusedreg.sparsity(model)
    assert recorded == [False]


def test_weights_that_are_masked_apart_are_two() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert set(fusedreg.sparsity(model)) == {"0.weight"}
    prune.l1_unstructured(model[0], "weight", 4)
    report = fusedreg.sparsity(model)
    assert report == {"0.weight": (4, 16), "1.weight": (0, 16)}
    prune.l1_unstructured(model[1], "weight", 8)
    assert fusedreg.sparsity(model) == {"0.weight": (4, 16), "1.weight": (8, 16)}


def test_sparsity_reads_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(wrap(nn.Linear(4, 3)) for wrap in WAYS.values()))
    reads = []

    def counted(name: str) -> Callable[[Tensor], Any]:
        read = getattr(Tensor, name)

        def reading(tensor: Tensor) -> Any:
            reads.append(name)
            return read(tensor)

        return reading

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, counted(name))
    fusedreg.sparsity(model)
    assert reads == ["tolist"]
