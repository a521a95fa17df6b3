"""To which sample each row of a layer's output belongs, seen from two backward passes.

With numbers e without a pattern and codes f_n of the samples, the gradients of s = sum_n e_n . z_n
and of s' = sum_n f_n e_n . z_n by a row of a layer's output are g and f_n g if the row reaches the
output z_n of sample n alone; that ratio names the sample. Otherwise samples meet in the row, as
before a batch normalisation in training, or in a layer that is called without the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from acktr.kfac.statistics.uses import Use

Rows = Tensor | None
"""Sample of each row, of the shape of the leading dimensions: -1 where no gradient is; None where
samples meet in a row."""


def codes(count: int) -> tuple[Tensor, Tensor]:
    """Codes f_n in [1, 2) in an order without a pattern, and the sample of each in rising order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    values = torch.empty(count, dtype=torch.float64)
    values[order] = 1 + torch.arange(count, dtype=torch.float64) / count
    return values, order


def probes(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """S and s' of outputs (N, ...)."""
    generator = torch.Generator().manual_seed(1)
    values, _ = codes(len(parts[0]))
    plain, coded = [], []
    for part in parts:
        numbers = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        scaled = values.reshape(-1, *[1] * (part.dim() - 1)) * numbers
        plain.append((numbers.to(part.device, part.dtype) * part).sum())
        coded.append((scaled.to(part.device, part.dtype) * part).sum())
    return torch.stack(plain).sum(), torch.stack(coded).sum()


def found(plain: Tensor, coded: Tensor, leading: int, count: int) -> Rows:
    """The samples of a layer's rows.

    Args:
        plain: Gradient of s by the layer's output.
        coded: Gradient of s'.
        leading: Number of dimensions that make up the rows.
        count: Number of samples N.
    """
    shape = plain.shape[:leading]
    if not plain.numel():
        return torch.full(shape, -1, device=plain.device)
    g, scaled = (tensor.reshape(shape.numel(), -1).double() for tensor in (plain, coded))
    eps = torch.finfo(plain.dtype).eps
    size, place = g.abs().max(1)
    rounding = 1e3 * eps * size.max()
    reached = size > 1e4 * eps * size.max()
    ratio = scaled.gather(1, place[:, None])[:, 0] / g.gather(1, place[:, None])[:, 0]
    values, order = (tensor.to(g.device) for tensor in codes(count))
    rank = ((ratio - 1) * count).nan_to_num().round().clamp(0, count - 1).long()
    owner = order[rank]
    apart = (scaled - values[owner][:, None] * g).abs() <= eps**0.5 * size[:, None] + rounding
    if not bool((apart.all(1) | ~reached).all()):
        return None
    return owner.where(reached, -1).reshape(shape)


def in_order(rows: Tensor, count: int) -> bool:
    """Whether the first dimension of a layer's output is that of the samples."""
    if len(rows) != count:
        return False
    own = torch.arange(count, device=rows.device).reshape(-1, *[1] * (rows.dim() - 1))
    return bool(((rows == own) | (rows == -1)).all())


def shared_out(rows: Tensor, count: int) -> Tensor:
    """The samples of rows (R,), with those that no gradient reaches given to whom has fewest.

    Args:
        rows: The samples; -1 for none.
        count: Number of samples.
    """
    dead = rows < 0
    sizes = rows[~dead].bincount(minlength=count)
    most = torch.maximum(sizes.max(), torch.tensor(-(-len(rows) // count), device=rows.device))
    free = torch.arange(count, device=rows.device).repeat_interleave(most - sizes)
    filled = rows.clone()
    filled[dead] = free[: int(dead.sum())]
    return filled


def slots(owner: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Rows in the order of their samples, the places that they get, and places per sample.

    Args:
        owner: The sample of each row (R,).
        count: Number of samples.
    """
    sizes = owner.bincount(minlength=count)
    most, order = int(sizes.max()), owner.argsort(stable=True)
    rank = torch.arange(len(owner), device=owner.device)
    rank -= (sizes.cumsum(0) - sizes)[owner[order]]
    return order, owner[order] * most + rank, most


def by_owner(use: Use, rows: Tensor, count: int, present: Tensor | None = None) -> Use:
    """The use with its rows brought together by samples, (N, T, ...), and filled up with zeros.

    Args:
        use: A use of a module of one vector for each position.
        rows: The samples of its rows; those that no gradient reaches go anywhere.
        count: Number of samples N.
        present: Those that count though no gradient reaches them, as a mask; None for all.
    """
    lead, size = rows.dim(), rows.numel()
    owner = shared_out(rows.flatten(), count)
    order, place, most = slots(owner, count)

    def put(tensor: Tensor) -> Tensor:
        flat = tensor.reshape(size, *tensor.shape[lead:])
        filled = flat.new_zeros(count * most, *flat.shape[1:])
        filled[place] = flat[order]
        return filled.reshape(count, most, *flat.shape[1:])

    weights = use.weights if use.weights is None else put(use.weights.reshape(rows.shape))
    if present is not None or size != count * most:
        counted = put(torch.ones_like(rows) if present is None else (present > 0) | (rows >= 0))
        weights = counted if weights is None else counted * weights
    filled = use.seen_as(put(use.input), map(put, use.gradients), weights)
    return replace(filled, complete=bool((rows >= 0).all()))
