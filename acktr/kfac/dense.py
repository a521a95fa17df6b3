"""Curvature as matrices and linear operators, to look at and to compare; for small networks.

Rows and columns run over parameters in the order of ``named_parameters``, each flattened row by
row, as in :func:`acktr.kfac.dense_fisher`. The matrices of a curvature cover the names of
:func:`curved_names`: all trainable parameters but those without a curvature block, which follow
their plain gradient and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.blocks.constant import KnownBlock, PlainBlock
from acktr.kfac.blocks.diagonal import DiagonalBlock
from acktr.kfac.blocks.entries import EntriesBlock
from acktr.kfac.blocks.kronecker import Corrected, KroneckerBlock
from acktr.kfac.blocks.layouts import LayerFactors
from acktr.kfac.blocks.registry import Block
from acktr.kfac.blocks.tridiagonal import TridiagonalBlock, chain_matrix
from acktr.kfac.blocks.vectors import VectorBlock
from acktr.kfac.fisher.flat import flattened, unflattened
from acktr.kfac.fisher.products import dense_fisher
from acktr.kfac.linalg import FactorError, factored_tikhonov
from acktr.kfac.losses.base import OutputLoss
from acktr.kfac.optimizer import KFAC
from acktr.kfac.preconditioner import Preconditioner

KFACLike = Preconditioner | KFAC
"""What has a curvature."""


def curved_names(curvature: KFACLike) -> list[str]:
    """Names of the rows of :func:`dense_kfac` and :func:`dense_inverse`, in their order."""
    found, decay = _parts(curvature)
    plain = {name for b in found.blocks if isinstance(b, PlainBlock) for name in b.names}
    return [name for name in found.named if name not in plain and (decay is None or name in decay)]


def _parts(curvature: KFACLike) -> tuple[Preconditioner, dict[str, float] | None]:
    """The preconditioner, and the weight decay of every parameter that is in a group."""
    if isinstance(curvature, Preconditioner):
        return curvature, None
    groups = curvature.param_groups
    decay = {name: float(g["weight_decay"]) for g in groups for name in g["param_names"]}
    return curvature.curvature, decay


@torch.no_grad()
def dense_kfac(curvature: KFACLike, *, damped: bool = False) -> Tensor:
    """The approximate Fisher matrix that the present statistics stand for.

    Block-diagonal with G (x) A for K-FAC, Q diag(s) Q^T in the installed eigenbasis for EKFAC, and
    second moments, the drawn diagonals of :class:`acktr.kfac.blocks.diagonal.DiagonalBlock`, or
    known values, elsewhere. With ``structure="tridiagonal"`` the layers of the
    chain form one matrix F-hat whose inverse is block tridiagonal.

    Args:
        curvature: A preconditioner or optimizer that has observed a batch.
        damped: With the damping (and weight decay) of the next refresh, split as the settings say:
            lambda I, or A + pi sqrt(lambda) I and G + sqrt(lambda) / pi I. Right after a refresh it
            is the inverse of :func:`dense_inverse`.

    Returns:
        The matrix (P, P) over :func:`curved_names`.

    Raises:
        FactorError: There are no statistics yet, or an inner factor of a chain is singular.
        ValueError: EKFAC has no eigenbasis yet, or no parameter has a curvature block.
    """
    return _View(curvature).matrix(damped)


@torch.no_grad()
def dense_inverse(curvature: KFACLike) -> Tensor:
    """The matrix that ``direction()`` multiplies gradients with, made column by column.

    It belongs to the installed decompositions, which may be older than the statistics, and to the
    present damping; before the first refresh it is the identity for all but known values. Weight
    decay counts in the damping only, not as a part of the gradient.

    Returns:
        The matrix (P, P) over :func:`curved_names`.

    Raises:
        ValueError: No parameter has a curvature block.
    """
    view = _View(curvature)
    spent = view.found.seconds["apply"]
    result = view.zeros()
    for column in range(len(result)):
        unit = result.new_zeros(len(result))
        unit[column] = 1
        gradients = unflattened(unit, view.names, view.found.module)
        step = view.found.direction(gradients, view.decay)
        result[:, column] = flattened(step, view.names)
    view.found.seconds["apply"] = spent
    return result


@dataclass(frozen=True)
class KFACError:
    """Relative Frobenius errors ||M - F|| / ||F|| of a curvature M against the exact Fisher F."""

    blocks: dict[str, float]
    """Of each diagonal block, by the name of its first parameter."""
    diagonal: float
    """Of all diagonal blocks together, against the same blocks of F."""
    whole: float
    """Of the whole matrix, over all curved parameters."""


@torch.no_grad()
def kfac_error(
    curvature: KFACLike,
    args: tuple[Any, ...] | None = None,
    loss: OutputLoss[Any] | None = None,
    *,
    damped: bool = False,
) -> KFACError:
    """How far the approximate curvature is from the exact Fisher of a batch.

    Args:
        curvature: A preconditioner or optimizer that has observed a batch.
        args: Inputs of the exact Fisher, of all that the module returns; by default those of the
            last observed batch, of the output that was observed.
        loss: Its loss; by default the observed one.
        damped: Compare the damped matrix of :func:`dense_kfac` with F + lambda I (weight decay
            added to lambda for its blocks).

    Raises:
        FactorError: As :func:`dense_kfac`.
        ValueError: As :func:`dense_kfac`, or there is no batch to compare with.
    """
    view, kwargs, select = _View(curvature), None, None
    if args is None and loss is None and (observed := view.found.observed) is not None:
        args, kwargs = observed.inputs.args, observed.inputs.kwargs
        loss, select = observed.loss, observed.select
    if args is None or loss is None:
        raise ValueError("kfac_error needs both args and loss, or neither after an observe()")
    approximate = view.matrix(damped)
    exact = dense_fisher(view.found.module, args, loss, view.names, kwargs=kwargs, select=select)
    exact = exact.to(approximate.dtype)
    blocks, wrong, size = {}, 0.0, 0.0
    for block in view.blocks:
        where = view.rows(block)
        if damped:
            exact[where, where] += view.damping(block)
        mine, right = approximate[where[:, None], where], exact[where[:, None], where]
        blocks[block.names[0]] = relative_error(mine, right)
        wrong += float((mine - right).double().square().sum())
        size += float(right.double().square().sum())
    diagonal = _ratio(wrong**0.5, size**0.5)
    return KFACError(blocks, diagonal, relative_error(approximate, exact))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The ratio ||found - expected|| / ||expected|| in the Frobenius norm; 0 / 0 counts as 0."""
    return _ratio(float((found - expected).norm()), float(expected.norm()))


def _ratio(error: float, size: float) -> float:
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return error / size


class _View:
    """A curvature's blocks, and where their parameters lie in its matrix."""

    def __init__(self, curvature: KFACLike) -> None:
        self.found, self.decay = _parts(curvature)
        self.names = curved_names(curvature)
        self.blocks = [block for block in self.found.blocks if block.names[0] in self.names]
        if not self.names:
            raise ValueError("no parameter of the module has a curvature block")
        self.index: dict[str, Tensor] = {}
        self.size = 0
        for name in self.names:
            parameter = self.found.named[name]
            rows = torch.arange(parameter.numel(), device=parameter.device) + self.size
            self.index[name] = rows.reshape(parameter.shape)
            self.size += parameter.numel()

    def zeros(self) -> Tensor:
        parameters = [self.found.named[name] for name in self.names]
        dtype = torch.float32
        for parameter in parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
        return torch.zeros(self.size, self.size, dtype=dtype, device=parameters[0].device)

    def rows(self, block: Block) -> Tensor:
        """Row numbers of a block's parameters, in the order of the block's own matrix."""
        if isinstance(block, KroneckerBlock | EntriesBlock):
            return block.layer.matrix(self.index).flatten()
        if isinstance(block, TridiagonalBlock):
            return torch.cat([layer.matrix(self.index).flatten() for layer in block.layers])
        return torch.cat([self.index[name].flatten() for name in block.names])

    def damping(self, block: Block) -> float:
        return self.found.block_damping(block, self.decay)

    def matrix(self, damped: bool) -> Tensor:
        result = self.zeros()
        for block in self.blocks:
            where = self.rows(block)
            mine = self._block(block, self.damping(block) * damped, len(where))
            result[where[:, None], where] = mine.to(result.dtype)
        return result

    def _block(self, block: Block, damping: float, size: int) -> Tensor:
        if not isinstance(block, KnownBlock | PlainBlock) and not block.history.started:
            raise FactorError(f"K-FAC {block.history.what} has no statistics yet")
        if isinstance(block, TridiagonalBlock):
            return _chain(block, damping)
        if isinstance(block, KroneckerBlock):
            if self.found.config.structure in ("kfac_factored", "cholesky"):
                return _product(*_split_damping(block.layer, damping))
            corrected = isinstance(block.inverse, Corrected)
            matrix = _corrected(block) if corrected else _product(*_split_damping(block.layer, 0.0))
        elif isinstance(block, EntriesBlock):
            matrix = block.moment.mean().diag()
        elif isinstance(block, DiagonalBlock):
            matrix = block.fisher().flatten().diag()
        elif isinstance(block, VectorBlock):
            matrix = block.moment.mean()
            matrix = matrix.diag() if block.diagonal else matrix
        else:
            assert isinstance(block, KnownBlock)
            matrix = torch.full((size,), block.fisher, dtype=torch.float64).diag()
            matrix = matrix.to(self.index[block.names[0]].device)
        return matrix + damping * _eye(matrix)


def _split_damping(layer: LayerFactors, damping: float) -> tuple[Tensor, Tensor]:
    """A + pi sqrt(lambda) I and G + sqrt(lambda) / pi I, ([k,] d, d)."""
    a, g = factored_tikhonov(layer.a.mean(), layer.g.mean(), damping)
    return (a.diag() if a.dim() == 1 else a), (g.diag() if g.dim() == 1 else g)


def _product(a: Tensor, g: Tensor) -> Tensor:
    """G (x) A, for the groups of a convolution one after the other."""
    if a.dim() == 2:
        return torch.kron(g, a)
    blocks = [torch.kron(right, left) for left, right in zip(a, g, strict=True)]
    size = len(blocks[0])
    result = a.new_zeros(len(blocks), size, len(blocks), size)
    for group, block in enumerate(blocks):
        result[group, :, group] = block
    return result.flatten(2).flatten(0, 1)


def _corrected(block: KroneckerBlock) -> Tensor:
    """Q diag(s) Q^T with Q = Q_G (x) Q_A, for the groups of a convolution one after the other."""
    inverse = block.inverse
    if not block.history.ready or not isinstance(inverse, Corrected):
        raise ValueError(f"EKFAC layer {block.name!r} has no eigenbasis yet: refresh() first")
    a, g = inverse.basis.a, inverse.basis.g
    basis = _product(*(_eye(x.values) if x.vectors is None else x.vectors for x in (a, g)))
    return (basis * inverse.scales.mean().flatten()) @ basis.mT


def _chain(chain: TridiagonalBlock, damping: float) -> Tensor:
    """F-hat over the chain's layers, with its own factors damped as for its inverse."""
    own = [_split_damping(layer, damping) for layer in chain.layers]
    return chain_matrix(
        [a for a, _ in own],
        [g for _, g in own],
        [average.mean() for average in chain.a_cross],
        [average.mean() for average in chain.g_cross],
    )


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
