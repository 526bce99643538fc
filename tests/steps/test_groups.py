"""Param groups by role and by name, and the report of exact zeros."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import fusedreg

from compare import frozen
from ranks import on_every_rank

Groups = list[dict[str, Any]]


class Net(nn.Module):
    """Every kind of parameter that the split tells apart, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.batch_norm = nn.BatchNorm1d(4)
        self.layer_norm = nn.LayerNorm((5, 4))  # scale and shift are matrices
        self.attention = nn.MultiheadAttention(4, 2)
        self.temperature = nn.Parameter(torch.ones(()))
        self.pair = nn.Bilinear(4, 4, 2)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


MATRICES = {
    "embed.weight",
    "conv.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "pair.weight",
    "frozen.weight",
}
NO_PENALTY = {"weight_decay": 0.0, "l1": 0.0}


def names(groups: Groups) -> list[str]:
    return [name for group in groups for name, _ in group["params"]]


def settings(groups: Groups) -> list[dict[str, Any]]:
    """The options of each group."""
    return [{key: value for key, value in g.items() if key != "params"} for g in groups]


def options(groups: Groups) -> dict[str, dict[str, Any]]:
    """The options of each parameter."""
    pairs = zip(groups, settings(groups), strict=True)
    return {name: chosen for group, chosen in pairs for name, _ in group["params"]}


def penalised(groups: Groups) -> set[str]:
    return {name for name, chosen in options(groups).items() if chosen != NO_PENALTY}


def test_split_by_role() -> None:
    groups = fusedreg.param_groups(Net(), weight_decay=0.1, l1=0.01)
    assert penalised(groups) == MATRICES
    assert settings(groups) == [NO_PENALTY, {"weight_decay": 0.1, "l1": 0.01}]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"weight_decay": 0.1, "no_decay": [nn.Embedding, "pair.*"]},
        {"l1": 0.1, "overrides": {"*": {"lr": 0.1}, "conv.*": {"lr": 0.2}, "*bias": {"l1": 1.0}}},
    ],
    ids=["plain", "no_decay", "overrides"],
)
def test_every_parameter_is_grouped_exactly_once(arguments: dict[str, Any]) -> None:
    model = Net()
    groups = fusedreg.param_groups(model, **arguments)
    assert sorted(names(groups)) == sorted(name for name, _ in model.named_parameters())
    for name, param in [named for group in groups for named in group["params"]]:
        assert param is model.get_parameter(name)
    order = [name for name, _ in model.named_parameters()]
    for group in groups:
        assert names([group]) == sorted(names([group]), key=order.index)


def test_groups_with_equal_options_are_one() -> None:
    overrides = {"conv.*": {"lr": 0.2}, "pair.*": {"lr": 0.2}}
    chosen = settings(fusedreg.param_groups(Net(), l1=0.1, overrides=overrides))
    assert all(one != other for i, one in enumerate(chosen) for other in chosen[:i])
    assert len(chosen) == 4


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm((2, 3)),
        nn.RMSNorm((2, 3)),
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(3),
        nn.SyncBatchNorm(3),
        nn.InstanceNorm1d(3, affine=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_norm_layers_are_not_penalised(layer: nn.Module) -> None:
    assert not penalised(fusedreg.param_groups(nn.Sequential(layer), weight_decay=0.1))


def test_a_bias_is_not_penalised_whatever_its_shape() -> None:
    model = nn.Module()
    model.bias = nn.Parameter(torch.ones(2, 3))
    model.weight_of_bias = nn.Parameter(torch.ones(2, 3))
    assert penalised(fusedreg.param_groups(model, weight_decay=0.1)) == {"weight_of_bias"}


@pytest.mark.parametrize(
    ("no_decay", "spared"),
    [
        (["conv.weight"], {"conv.weight"}),
        (["*.weight"], MATRICES - {"attention.in_proj_weight"}),
        (["conv.?eight", "p[aeiou]ir.*"], {"conv.weight", "pair.weight"}),
        (["head.weight"], {"embed.weight"}),  # the other name of the tied weight
        ([nn.Embedding], {"embed.weight"}),
        ([nn.Linear], {"embed.weight", "attention.out_proj.weight", "frozen.weight"}),
        ([nn.Module], MATRICES),
        (("conv.weight", nn.Bilinear), {"conv.weight", "pair.weight"}),
    ],
    ids=["name", "all", "patterns", "tied", "class", "base_class", "every_class", "mixed"],
)
def test_no_decay_takes_names_patterns_and_classes(no_decay: Any, spared: set[str]) -> None:
    groups = fusedreg.param_groups(Net(), weight_decay=0.1, no_decay=no_decay)
    assert penalised(groups) == MATRICES - spared


def test_no_decay_takes_modules_and_iterators() -> None:
    model = Net()
    groups = fusedreg.param_groups(model, l1=0.1, no_decay=iter([model.attention, model.head]))
    spared = {"attention.in_proj_weight", "attention.out_proj.weight", "embed.weight"}
    assert penalised(groups) == MATRICES - spared


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"no_decay": ["con.weight"]},
            ValueError,
            "'con.weight' matches no parameter.*conv.weight",
        ),
        ({"no_decay": ["Conv.weight"]}, ValueError, "'Conv.weight' matches no parameter"),
        ({"no_decay": [nn.LSTM]}, ValueError, "LSTM.* matches no parameter"),
        ({"no_decay": [nn.Linear(1, 1)]}, ValueError, "Linear.* matches no parameter"),
        ({"overrides": {"heads.*": {"lr": 1.0}}}, ValueError, r"'heads\.\*' matches no parameter"),
        ({"no_decay": [3]}, TypeError, "names, modules and module classes, got <class 'int'>"),
        ({"no_decay": [int]}, TypeError, "names, modules and module classes"),
    ],
    ids=str,
)
def test_what_matches_nothing_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fusedreg.param_groups(Net(), **arguments)


def test_overrides_win_and_the_later_wins_over_the_earlier() -> None:
    overrides = {
        "*": {"lr": 1.0},
        "conv.*": {"lr": 2.0, "weight_decay": 0.5},
        "conv.bias": {"l1": 0.25},
        "head.weight": {"lr": 3.0},  # a tied weight is matched by every one of its names
    }
    found = options(fusedreg.param_groups(Net(), weight_decay=0.1, overrides=overrides))
    assert found["pair.weight"] == {"weight_decay": 0.1, "lr": 1.0}
    assert found["conv.weight"] == {"weight_decay": 0.5, "lr": 2.0}
    assert found["conv.bias"] == {"weight_decay": 0.5, "l1": 0.25, "lr": 2.0}
    assert found["embed.weight"] == {"weight_decay": 0.1, "lr": 3.0}
    assert overrides["*"] == {"lr": 1.0}


def test_options_left_out_come_from_the_optimizer() -> None:
    model = Net()
    optimizer = fusedreg.AdamW(fusedreg.param_groups(model), weight_decay=0.3, l1=0.2)
    for group in optimizer.param_groups:
        for name in group["param_names"]:
            expected = (0.3, 0.2) if name in MATRICES else (0.0, 0.0)
            assert (group["weight_decay"], group["l1"]) == expected


def test_groups_work_in_torch_too() -> None:
    optimizer = torch.optim.AdamW(fusedreg.param_groups(Net(), weight_decay=0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.3]


def test_only_the_penalised_group_shrinks() -> None:
    model = Net()
    groups = fusedreg.param_groups(model, weight_decay=0.5, l1=0.1)
    optimizer = fusedreg.SGD(groups, lr=0.1, decoupled_weight_decay=True)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        assert (frozen(param) != frozen(before[name])) == (name in MATRICES)


def test_model_without_parameters_has_no_groups() -> None:
    assert fusedreg.param_groups(nn.ReLU(), weight_decay=0.1) == []


def test_biases_of_attention_and_of_recurrent_layers_are_not_penalised() -> None:
    """Attention has two of three dimensions: bias_k and bias_v."""
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    groups = fusedreg.param_groups(attention, weight_decay=0.1)
    assert penalised(groups) == {"in_proj_weight", "out_proj.weight"}
    groups = fusedreg.param_groups(nn.GRU(2, 3), weight_decay=0.1)
    assert penalised(groups) == {"weight_ih_l0", "weight_hh_l0"}


def test_lists_dicts_shared_modules_and_padding_are_grouped_like_all() -> None:
    model = nn.Module()
    model.list = nn.ParameterList([torch.ones(2, 3), torch.ones(3)])
    model.dict = nn.ParameterDict({"weight": torch.ones(2, 3), "bias": torch.ones(2, 3)})
    model.embed = nn.Embedding(4, 3, padding_idx=1)
    model.one = nn.Sequential(nn.Linear(2, 3))
    model.other = model.one
    groups = fusedreg.param_groups(model, weight_decay=0.1)
    assert penalised(groups) == {"list.0", "dict.weight", "embed.weight", "one.0.weight"}
    assert penalised(fusedreg.param_groups(model, l1=0.1, no_decay=["other.*"])) == {
        "list.0",
        "dict.weight",
        "embed.weight",
    }
    report = fusedreg.sparsity(model)
    assert list(report) == [name for name, _ in model.named_parameters()]
    assert report["embed.weight"] == (3, 12)  # the row of the padding


PREFIXES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "compiled": (partial(torch.compile, backend="eager"), "_orig_mod."),
    "data_parallel": (nn.DataParallel, "module."),
    "averaged": (torch.optim.swa_utils.AveragedModel, "module."),
}


@pytest.mark.parametrize(("wrap", "prefix"), PREFIXES.values(), ids=PREFIXES)
def test_a_wrapped_model_is_split_as_without_the_wrapper(
    wrap: Callable[[nn.Module], Any], prefix: str
) -> None:
    model = wrap(Net())
    groups = fusedreg.param_groups(model, weight_decay=0.1)
    assert penalised(groups) == {prefix + name for name in MATRICES}
    assert list(fusedreg.sparsity(model)) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_split_needs_no_values(device: str) -> None:
    with torch.device(device):
        model = Net()
    assert penalised(fusedreg.param_groups(model, weight_decay=0.1)) == MATRICES


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv1d(2, 3), nn.LazyBatchNorm1d(), nn.LazyLinear(3))


@pytest.mark.parametrize("arguments", [{}, {"l1": 0.1}, {"overrides": {"*": {"lr": 0.1}}}], ids=str)
def test_lazy_parameters_are_refused_by_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'0.weight', '2.weight' \(.*forward pass.*no_decay"):
        fusedreg.param_groups(lazy(), **arguments)


def test_lazy_parameters_are_taken_where_it_is_said_or_clear_what_they_get() -> None:
    assert not penalised(fusedreg.param_groups(lazy(), weight_decay=0.0, l1=0.0))
    model = lazy()
    groups = fusedreg.param_groups(
        model, weight_decay=0.1, no_decay=["0.*"], overrides={"2.weight": {"weight_decay": 0.2}}
    )
    assert penalised(groups) == {"2.weight"}
    model(torch.ones(2, 3, 5))
    assert penalised(fusedreg.param_groups(model, l1=0.1)) == {"0.weight", "2.weight"}


class Sharded(nn.Module):
    """With zeros in the first row of the weight and in the bias of the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.odd = nn.Parameter(torch.ones(3))
        with torch.no_grad():
            self.linear.weight[0] = 0.0
            self.linear.bias.fill_(1.0)


ZEROS = {
    "odd": (0, 3),
    "linear.weight": (5, 20),
    "linear.bias": (0, 4),
    "norm.weight": (0, 4),
    "norm.bias": (4, 4),
}


@on_every_rank
def test_parts_of_dtensors_are_split_and_counted_as_the_whole() -> None:
    model = Sharded()
    fully_shard(model)
    assert penalised(fusedreg.param_groups(model, l1=0.1)) == {"linear.weight"}
    assert fusedreg.sparsity(model) == ZEROS


@pytest.mark.parametrize("use_orig_params", [False, True])
@on_every_rank
def test_flattened_parameters_are_refused_and_counted_when_summoned(use_orig_params: bool) -> None:
    """A matrix of which each rank has a part as a vector is no bias."""
    net = Sharded()
    groups = fusedreg.param_groups(net, l1=0.1)
    model = FullyShardedDataParallel(
        net, device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    named = "linear.weight'" if use_orig_params else "_flat_param' "
    with pytest.raises(ValueError, match=f"{named}.*flattened it: use fully_shard"):
        fusedreg.param_groups(model, l1=0.1)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        assert fusedreg.sparsity(model) == ZEROS
    if use_orig_params:  # the parameters are the same ones, so that the groups hold
        assert {id(p) for p in net.parameters()} == {
            id(p) for group in groups for _, p in group["params"]
        }
        arguments = {"overrides": {"*linear.weight": {"l1": 0.2}}, "no_decay": ["*odd"]}
        assert len(penalised(fusedreg.param_groups(model, l1=0.1, **arguments))) == 1


# ---- sparsity ----------------------------------------------------------------------------------


def sparse_net() -> nn.Module:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2), nn.Linear(30, 2))
    model[2].weight = model[1].weight
    model.register_parameter("empty", nn.Parameter(torch.ones(0, 3)))
    model.register_parameter("phase", nn.Parameter(torch.tensor([0j, 1j, 0j + 1e-30])))
    with torch.no_grad():
        model[0].weight.fill_(1e-30)
        model[0].weight[:, :39] = 0.0
        model[1].weight.fill_(-0.0)
        model[1].weight[0, 0] = torch.nan
        for layer in model:
            layer.bias.fill_(1.0)
    return model


def test_sparsity_counts_exact_zeros() -> None:
    report = fusedreg.sparsity(sparse_net())
    assert {name: (row.zeros, row.numel) for name, row in report.items()} == {
        "empty": (0, 0),
        "phase": (1, 3),
        "0.weight": (1170, 1200),
        "0.bias": (0, 30),
        "1.weight": (59, 60),  # -0.0 is zero, NaN is not; tied, so counted once
        "1.bias": (0, 2),
        "2.bias": (0, 2),
    }
    assert (report.total.zeros, report.total.numel) == (1230, 1297)
    assert report.total.fraction == 1230 / 1297
    assert report["0.weight"].fraction == 0.975
    assert report["empty"].fraction == 0.0


def test_sparsity_prints_an_aligned_table() -> None:
    assert str(fusedreg.sparsity(sparse_net())).splitlines() == [
        "empty         0 of     0 zero    0.00%",
        "phase         1 of     3 zero   33.33%",
        "0.weight  1,170 of 1,200 zero   97.50%",
        "0.bias        0 of    30 zero    0.00%",
        "1.weight     59 of    60 zero   98.33%",
        "1.bias        0 of     2 zero    0.00%",
        "2.bias        0 of     2 zero    0.00%",
        "total     1,230 of 1,297 zero   94.83%",
    ]


def test_sparsity_of_an_empty_model() -> None:
    report = fusedreg.sparsity(nn.ReLU())
    assert report == {}
    assert (report.total.zeros, report.total.numel, report.total.fraction) == (0, 0, 0.0)
    assert str(report) == "total  0 of 0 zero    0.00%"


def test_sparsity_leaves_the_model_alone() -> None:
    model = sparse_net()
    before = frozen(list(model.parameters()))
    fusedreg.sparsity(model)
    assert frozen(list(model.parameters())) == before
    assert all(param.requires_grad and param.grad is None for param in model.parameters())


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_dense"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_what_a_sparse_layout_leaves_out_is_zero(layout: str) -> None:
    model = nn.Module()
    entries = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    model.weight = nn.Parameter(getattr(entries, layout)())
    with torch.no_grad():
        values = model.weight.values() if layout == "to_sparse_csr" else None
        if values is not None:
            values[0] = 0.0  # one that is stored
    assert fusedreg.sparsity(model)["weight"] == (4 if values is None else 5, 6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_frozen_parameters_of_narrow_dtypes_are_counted_and_grouped(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.eye(3).to(dtype), requires_grad=False)
    assert fusedreg.sparsity(model)["weight"] == (6, 9)
    assert penalised(fusedreg.param_groups(model, l1=0.1)) == {"weight"}


def test_parameters_without_values_cannot_be_counted() -> None:
    with pytest.raises(RuntimeError, match=r"'0.weight', a meta tensor; no data!.*to_empty\(\)"):
        fusedreg.sparsity(nn.Sequential(nn.Linear(3, 2, device="meta")))
    with pytest.raises(ValueError, match=r"'0.weight', an uninitialized parameter.*dummy batch"):
        fusedreg.sparsity(lazy())
