"""The exact Fisher matrix of one batch as a linear operator on flat vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac.fisher.products import dense_fisher, fisher_gram, fisher_vector_product
from acktr.kfac.losses.likelihoods import OutputLoss


def flattened(vector: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Named tensors as one vector (P,).

    Raises:
        ValueError: A name is missing.
    """
    missing = [name for name in names if name not in vector]
    if missing or not names:
        raise ValueError(f"a flat vector needs a tensor for {', '.join(missing) or 'some name'}")
    return torch.cat([vector[name].flatten() for name in names])


def unflattened(flat: Tensor, names: Sequence[str], module: nn.Module) -> dict[str, Tensor]:
    """Inverse of :func:`flattened`, with the shapes and types of the module's parameters.

    Raises:
        ValueError: A name is unknown, or the length is not that of the parameters.
    """
    named = dict(module.named_parameters())
    unknown = [name for name in names if name not in named]
    if unknown:
        raise ValueError(f"the module has no parameter {unknown[0]!r}")
    sizes = [named[name].numel() for name in names]
    if flat.shape != (sum(sizes),):
        raise ValueError(f"the vector must be of shape ({sum(sizes)},), got {tuple(flat.shape)}")
    parts = zip(names, torch.split(flat, sizes), strict=True)
    return {name: part.reshape(named[name].shape).to(named[name].dtype) for name, part in parts}


@dataclass(frozen=True)
class FisherOperator:
    """The exact Fisher matrix F of one batch, by products; P x P, symmetric, without damping.

    Attributes:
        module: The network.
        args: Its positional inputs, one batch.
        loss: The objective, which gives the output's Hessian and Z.
        names: Parameters that rows and columns run over; by default all trainable ones. With fewer
            names it is that part of the matrix.

    Raises:
        ValueError: A name is no trainable parameter or is given twice, or there is none.
    """

    module: nn.Module
    args: tuple[Any, ...]
    loss: OutputLoss[Any]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Fill in the names and check them."""
        trainable = [name for name, p in self.module.named_parameters() if p.requires_grad]
        names = tuple(self.names or trainable)
        wrong = [name for name in names if name not in trainable]
        if wrong or not names or len(set(names)) < len(names):
            raise ValueError(
                "a Fisher operator needs distinct names of trainable parameters,"
                f" got {', '.join(wrong or names) or 'none'}"
            )
        object.__setattr__(self, "names", names)

    @property
    def shape(self) -> tuple[int, int]:
        """The pair (P, P)."""
        named = dict(self.module.named_parameters())
        size = sum(named[name].numel() for name in self.names)
        return size, size

    def matvec(self, vector: Tensor) -> Tensor:
        """F v for a flat vector (P,): one product each with J, H and J^T."""
        direction = unflattened(vector, self.names, self.module)
        found = fisher_vector_product(self.module, self.args, self.loss, direction)
        return flattened(found, self.names)

    def __matmul__(self, other: Tensor) -> Tensor:
        """F times a vector (P,), or a matrix (P, k) column by column.

        Raises:
            ValueError: The shape does not fit.
        """
        if other.dim() == 1:
            return self.matvec(other)
        if other.dim() != 2 or other.shape[1] == 0:
            raise ValueError(f"F @ x needs x of shape (P,) or (P, k), got {tuple(other.shape)}")
        return torch.stack([self.matvec(column) for column in other.unbind(1)], dim=1)

    def trace(self) -> Tensor:
        """Tr F = sum_i e_i^T F e_i, exact: P Jacobian-vector products, no P x P matrix."""
        named = dict(self.module.named_parameters())
        example = named[self.names[0]]
        total = torch.zeros((), dtype=torch.float64, device=example.device)
        for index in range(self.shape[0]):
            unit = example.new_zeros(self.shape[0])
            unit[index] = 1
            column = unflattened(unit, self.names, self.module)
            total += fisher_gram(self.module, self.args, self.loss, [column])[0, 0]
        return total.to(torch.promote_types(example.dtype, torch.float32))

    def dense(self) -> Tensor:
        """The matrix itself, by :func:`acktr.kfac.dense_fisher`."""
        return dense_fisher(self.module, self.args, self.loss, self.names)
