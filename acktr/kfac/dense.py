"""Curvature as matrices and linear operators, to look at and to compare; for small networks.

Rows and columns run over parameters in the order of ``named_parameters``, each flattened row by
row, as in :func:`acktr.kfac.dense_fisher`. The matrices of a curvature cover the names of
:func:`curved_names`: all trainable parameters but those without a curvature block, which follow
their plain gradient and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.chain import Chain
from acktr.kfac.blocks.kronecker import KroneckerBlock
from acktr.kfac.blocks.simple import Block, KnownBlock, PlainBlock
from acktr.kfac.blocks.tridiagonal import chain_matrix
from acktr.kfac.blocks.vectors import VectorBlock
from acktr.kfac.fisher.products import dense_fisher, fisher_gram, fisher_vector_product
from acktr.kfac.linalg import trace_ratio
from acktr.kfac.losses.likelihoods import OutputLoss
from acktr.kfac.optimizer import KFAC
from acktr.kfac.preconditioner import Preconditioner

Curvature = Preconditioner | KFAC


# --- order of parameters --------------------------------------------------------------------------


def curved_names(curvature: Curvature) -> list[str]:
    """Names of the rows of :func:`dense_kfac` and :func:`dense_inverse`, in their order."""
    found, decay = _parts(curvature)
    plain = {name for b in found.blocks if isinstance(b, PlainBlock) for name in b.names}
    return [name for name in found.named if name not in plain and (decay is None or name in decay)]


def _parts(curvature: Curvature) -> tuple[Preconditioner, dict[str, float] | None]:
    """The preconditioner, and the weight decay of every parameter that is in a group."""
    if isinstance(curvature, Preconditioner):
        return curvature, None
    groups = curvature.param_groups
    decay = {name: float(g["weight_decay"]) for g in groups for name in g["param_names"]}
    return curvature.curvature, decay


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


# --- the exact Fisher -----------------------------------------------------------------------------


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


# --- the approximation ----------------------------------------------------------------------------


@torch.no_grad()
def dense_kfac(curvature: Curvature, *, damped: bool = False) -> Tensor:
    """The approximate Fisher matrix that the present statistics stand for.

    Block-diagonal with G (x) A for K-FAC, Q diag(s) Q^T in the installed eigenbasis for EKFAC, and
    second moments, or known values, elsewhere. With ``structure="tridiagonal"`` the layers of the
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
def dense_inverse(curvature: Curvature) -> Tensor:
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
    curvature: Curvature,
    args: tuple[Any, ...] | None = None,
    loss: OutputLoss[Any] | None = None,
    *,
    damped: bool = False,
) -> KFACError:
    """How far the approximate curvature is from the exact Fisher of a batch.

    Args:
        curvature: A preconditioner or optimizer that has observed a batch.
        args: Inputs of the exact Fisher; by default those of the last observed batch.
        loss: Its loss; by default the observed one.
        damped: Compare the damped matrix of :func:`dense_kfac` with F + lambda I (weight decay
            added to lambda for its blocks).

    Raises:
        FactorError: As :func:`dense_kfac`.
        ValueError: As :func:`dense_kfac`, or there is no batch to compare with.
    """
    view, kwargs = _View(curvature), None
    if args is None and loss is None and view.found.observed is not None:
        call, loss = view.found.observed.inputs, view.found.observed.loss
        args, kwargs = call.args, call.kwargs
    if args is None or loss is None:
        raise ValueError("kfac_error needs both args and loss, or neither after an observe()")
    approximate = view.matrix(damped)
    exact = dense_fisher(view.found.module, args, loss, view.names, kwargs=kwargs)
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

    def __init__(self, curvature: Curvature) -> None:
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
        if isinstance(block, KroneckerBlock):
            return block.matrix(self.index).flatten()
        return torch.cat([self.index[name].flatten() for name in block.names])

    def damping(self, block: Block) -> float:
        return self.found.block_damping(block, self.decay)

    def matrix(self, damped: bool) -> Tensor:
        result, chain = self.zeros(), self.found.chain
        if chain is not None:
            where = torch.cat([self.rows(block) for block in chain.blocks])
            damping = [self.damping(block) * damped for block in chain.blocks]
            result[where[:, None], where] = _chain(chain, damping)
        for block in self.blocks:
            if chain is not None and isinstance(block, KroneckerBlock):
                continue
            where = self.rows(block)
            mine = self._block(block, self.damping(block) * damped, len(where))
            result[where[:, None], where] = mine.to(result.dtype)
        return result

    def _block(self, block: Block, damping: float, size: int) -> Tensor:
        if isinstance(block, KroneckerBlock):
            corrected = self.found.config.structure == "ekfac"
            if not corrected and self.found.config.factored_damping:
                return _product(*_split_damping(block, damping))
            matrix = _corrected(block) if corrected else _product(*_split_damping(block, 0.0))
        elif isinstance(block, VectorBlock):
            matrix = block.moment.mean()
            matrix = matrix.diag() if block.diagonal else matrix
        else:
            assert isinstance(block, KnownBlock)
            matrix = torch.full((size,), block.fisher, dtype=torch.float64).diag()
            matrix = matrix.to(self.index[block.names[0]].device)
        return matrix + damping * _eye(matrix)


def _split_damping(block: KroneckerBlock, damping: float) -> tuple[Tensor, Tensor]:
    """A + pi sqrt(lambda) I and G + sqrt(lambda) / pi I, ([k,] d, d)."""
    a, g = block.a.mean(), block.g.mean()
    a = a.diag() if a.dim() == 1 else a
    pi = trace_ratio(a.diagonal(dim1=-2, dim2=-1), g.diagonal(dim1=-2, dim2=-1))[..., None]
    root = damping**0.5
    return a + root * pi * _eye(a), g + root / pi * _eye(g)


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
    if block.basis is None or block.scales.value is None:
        raise ValueError(f"EKFAC layer {block.name!r} has no eigenbasis yet: refresh() first")
    a, a_vectors, _, g_vectors = block.basis
    if a_vectors is None:
        a_vectors = torch.ones_like(a).diag()
    basis = _product(a_vectors, g_vectors)
    return (basis * block.scales.mean().flatten()) @ basis.mT


def _chain(chain: Chain, damping: Sequence[float]) -> Tensor:
    """F-hat over the chain's layers, with its own factors damped as for its inverse."""
    own = [_split_damping(b, value) for b, value in zip(chain.blocks, damping, strict=True)]
    return chain_matrix(
        [a for a, _ in own],
        [g for _, g in own],
        [average.mean() for average in chain.a_cross],
        [average.mean() for average in chain.g_cross],
    )


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
