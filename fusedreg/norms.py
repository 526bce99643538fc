"""The global gradient norm and the factor that clipping makes of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fusedreg.dist import Sharding, local, sharded_as, sharding_of
from fusedreg.scalars import wide_dtype


def _norm(x: Tensor) -> Tensor:
    """L2 norm of one real tensor, in the widest dtype of its device."""
    wide = wide_dtype(x.device)
    if x.numel() == 0:
        return torch.zeros((), dtype=wide, device=x.device)
    if wide == torch.float64 and x.dtype != torch.float64:
        # The square of any finite number of a narrower dtype is a normal float64.
        norm: Tensor = torch.linalg.vector_norm(x, dtype=wide)
        return norm
    # Here squares may overflow or underflow, so divide by the largest entry first. The clamp keeps
    # 0/0 and inf/inf out and lets an infinite or NaN entry through to the norm.
    x = x.to(wide)
    limits = torch.finfo(wide)
    largest = x.abs().amax().clamp(min=limits.tiny, max=limits.max)
    ratio: Tensor = torch.linalg.vector_norm(x / largest)
    return largest * ratio


def global_norm(grads: Iterable[Tensor], device: torch.device) -> Tensor:
    r"""One L2 norm over all gradients: :math:`\sqrt{\sum_k \sum_i |g_{k,i}|^2}`.

    Args:
        grads: tensors of any shape, stride, dtype and device; an empty one counts 0.
        device: where the result shall be.

    Returns:
        A 0-dim tensor in the device's widest dtype (float64), so that neither the largest nor the
        smallest finite gradient of a narrower dtype overflows or vanishes. Infinite or NaN exactly
        when a gradient is, or when a float64 norm exceeds 1.8e308; 0 without gradients.

    >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0, 12.0]])], torch.device("cpu")).item()
    13.0
    >>> global_norm([], torch.device("cpu")).item()
    0.0
    """
    norms = []
    for grad in grads:
        norm = _norm(torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad)
        norms.append(norm.to(device, wide_dtype(device)))
    if not norms:
        return torch.zeros((), dtype=wide_dtype(device), device=device)
    return _norm(torch.stack(norms))


def norms_by_sharding(
    shardings: Iterable[Sharding | None],
    params: Iterable[Tensor],
    more: Iterable[tuple[Sharding | None, Tensor]],
    device: torch.device,
) -> dict[Sharding | None, Tensor]:
    """What :func:`fusedreg.dist.total_norm` sums: a norm for each way to be sharded over ranks.

    Args:
        shardings: all that there are on any rank, also without a gradient here.
        params: parameters whose gradients count, where they have one.
        more: vectors whose norms are those of further gradients.
        device: where the results shall be.
    """
    parts: dict[Sharding | None, list[Tensor]] = {None: []}
    parts.update({sharding: [] for sharding in shardings})
    for param in params:
        if param.grad is not None:
            parts[sharding_of(param)].append(local(sharded_as(param, param.grad)))
    for sharding, norms in more:
        parts[sharding].append(norms)
    return {sharding: global_norm(tensors, device) for sharding, tensors in parts.items()}


def clip_factor(norm: Tensor, max_grad_norm: float) -> Tensor:
    """`min(1, max_grad_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_` has it.

    An infinite norm gives 0 and a NaN gives NaN: clipping does not repair a non-finite gradient.
    """
    return (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
