"""Weights that a module forms from other parameters, and what those parameters are to them.

`torch.nn.utils.parametrize` keeps the parameters behind a weight in `module.parametrizations` and
forms the weight whenever it is read. The older `weight_norm` and `spectral_norm`, and
`torch.nn.utils.prune`, keep them beside the weight (`weight_g`, `weight_orig`), and a hook forms
the weight before each forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Role = Literal["entries", "direction", "size", "unknown"]
"""What a parameter is to the weight that is formed from it.

"entries": its entries are those of the weight, as under a pruning mask. "direction": the length of
the weight does not depend on it. "size": its entries are, up to the sign, the norms of the rows of
the weight.
"""


class Formed(NamedTuple):
    """A weight that a module forms from its parameters."""

    name: str
    """The name under which the module reads the weight, such as "weight"."""
    roles: dict[Tensor, Role]
    """The parameters that stand in the place of the weight."""
    beside: tuple[str, ...]
    """The names of those that the module has beside the weight."""
    value: Callable[[], Tensor]
    """Forms the weight from its parameters as they are now."""


def formed(module: nn.Module) -> Iterator[Formed]:
    """The weights that a module forms, without those of its children."""
    for name, chain in _parametrizations(module):
        if next(chain.parameters(), None) is not None:  # else a buffer is parametrized
            yield Formed(name, _roles(chain), (), partial(_value, chain))
    for hook in module._forward_pre_hooks.values():
        roles: dict[str, Role] = {}
        if isinstance(hook, WeightNorm):
            name, value = hook.name, partial(hook.compute_weight, module)
            roles = {f"{name}_g": "size", f"{name}_v": "direction"}
        elif isinstance(hook, SpectralNorm):
            name = hook.name
            value = partial(hook.compute_weight, module, do_power_iteration=False)
            roles = {f"{name}_orig": "direction"}
        elif isinstance(hook, BasePruningMethod):
            name, value = hook._tensor_name, partial(hook.apply_mask, module)
            roles = {f"{name}_orig": "entries"}
        if roles:
            yield Formed(name, _named(module, roles), tuple(roles), value)


def _parametrizations(module: nn.Module) -> Iterable[tuple[str, ParametrizationList]]:
    """The names of the parametrized tensors of a module, and what forms each."""
    chains: Any = module.parametrizations if is_parametrized(module) else {}
    found: Iterable[tuple[str, ParametrizationList]] = chains.items()
    return found


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The names and values of all weights as a forward reads them, formed or plain, each once.

    Call it without grad mode.
    """
    yield from _weights(model, "", set())


def _weights(module: nn.Module, prefix: str, seen: set[object]) -> Iterator[tuple[str, Tensor]]:
    if module in seen:
        return
    seen.add(module)
    made = [*formed(module)]
    behind = {name for weight in made for name in weight.beside}
    for weight in made:
        if weight.name not in behind:  # a masked weight_v is only a part of the weight
            yield prefix + weight.name, weight.value()
    for name, param in module.named_parameters(recurse=False):
        if name not in behind and param not in seen:
            seen.add(param)
            yield prefix + name, param
    for name, child in module.named_children():
        if name == "_fsdp_wrapped_module":  # which summon_full_params leaves out of names too
            yield from _weights(child, prefix, seen)
        elif not (name == "parametrizations" and is_parametrized(module)):
            yield from _weights(child, f"{prefix}{name}.", seen)


def _roles(chain: ParametrizationList) -> dict[Tensor, Role]:
    """What the originals are to the weight that a chain of parametrizations forms from them."""
    if any(isinstance(step, (_SpectralNorm, _Orthogonal)) for step in chain):
        return _named(chain, dict.fromkeys(_originals(chain), "direction"))
    if isinstance(chain[0], _WeightNorm):
        size: Role = "size" if len(chain) == 1 else "unknown"
        return _named(chain, {"original0": size, "original1": "direction"})
    return _named(chain, dict.fromkeys(_originals(chain), "unknown"))


def _originals(chain: ParametrizationList) -> list[str]:
    return ["original"] if chain.is_tensor else [f"original{i}" for i in range(chain.ntensors)]


def _named(module: nn.Module, roles: dict[str, Role]) -> dict[Tensor, Role]:
    """The parameters of these names; where a mask is laid over one, the parameter under it."""
    found: dict[Tensor, Role] = {}
    for name, role in roles.items():
        param = module._parameters.get(name, module._parameters.get(f"{name}_orig"))
        if param is not None:  # else it is a buffer
            found[param] = role
    return found


def _value(chain: ParametrizationList) -> Tensor:
    """What a chain of parametrizations forms in eval mode, on copies of its buffers.

    In training mode spectral_norm advances its power iteration whenever the weight is read.
    """
    modes = {step: step.training for step in chain.modules()}
    buffers = {name: buffer.clone() for name, buffer in chain.named_buffers()}
    try:
        for step in modes:
            step.training = False
        weight: Tensor = functional_call(chain, buffers, ())
    finally:
        for step, mode in modes.items():
            step.training = mode
    return weight
