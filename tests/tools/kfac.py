"""Ground truth for the K-FAC tests: dense Fisher blocks and exact statistics by enumeration."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from acktr.kfac import KFAC, KFACConfig, KroneckerBlock, Preconditioner
from acktr.kfac.blocks.kronecker import Corrected, Eigen
from acktr.kfac.blocks.layouts import LayerFactors
from acktr.kfac.blocks.tridiagonal import TridiagonalBlock
from acktr.kfac.linalg import FactorError, Spectrum, decompose

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def build(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """A float64 Sequential with reproducible, not too small parameters."""
    model = nn.Sequential(*layers).double()
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator).double())
    return model


def mlp(seed: int = 0) -> nn.Sequential:
    return build(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), seed=seed)


def plain_config(**settings: Any) -> KFACConfig:
    """K-FAC with nothing around it: ACKTR's numbers, but all parameters have curvature.

    Every batch counts, eigenvalues are damped as they are, and the trust region is measured.
    """
    general: dict[str, Any] = {
        "small_parameters": "diagonal",
        "max_factor_size": 2048,
        "quadratic": "corrected",
    }
    return replace(KFACConfig.for_rl(), **{**general, **settings})


def kfac(model: nn.Module, **settings: Any) -> KFAC:
    known = settings.pop("known_fisher", None)
    return KFAC(model, replace(KFACConfig.for_rl(), **settings), known_fisher=known)


def block(optimizer: KFAC, name: str) -> KroneckerBlock:
    found = next(b for b in optimizer.blocks if isinstance(b, KroneckerBlock) and b.name == name)
    return found


def layers(optimizer: KFAC) -> list[LayerFactors]:
    """The layers with factors, of blocks of their own or of a chain."""
    own = [b.layer for b in optimizer.blocks if isinstance(b, KroneckerBlock)]
    chains = [b for b in optimizer.blocks if isinstance(b, TridiagonalBlock)]
    return own + [layer for chain in chains for layer in chain.layers]


def chain(optimizer: KFAC) -> TridiagonalBlock:
    return next(b for b in optimizer.blocks if isinstance(b, TridiagonalBlock))


def eigen(found: KroneckerBlock) -> Eigen:
    """The eigenbasis of a block, that of corrected eigenvalues included."""
    inverse = found.inverse.basis if isinstance(found.inverse, Corrected) else found.inverse
    assert isinstance(inverse, Eigen)
    return inverse


def basis(found: KroneckerBlock) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Eigenvalues and eigenvectors of A and of G."""
    a, g = eigen(found).a, eigen(found).g
    assert found.history.ready and g.vectors is not None
    return a.values, a.vectors, g.values, g.vectors


def set_basis(
    found: KroneckerBlock, a: Tensor, a_vectors: Tensor | None, g: Tensor, g_vectors: Tensor
) -> None:
    eigen(found).a, eigen(found).g = Spectrum(a, a_vectors), Spectrum(g, g_vectors)


def scales(found: KroneckerBlock) -> Tensor:
    """The mean squared gradients of EKFAC."""
    assert isinstance(found.inverse, Corrected)
    return found.inverse.scales.mean()


def refresh_alone(found: KroneckerBlock, damping: float) -> None:
    parts = decompose([(matrix, found.method) for matrix in found.requests(damping)])
    if parts and found.history.settle(parts):
        found.install([part for part in parts if not isinstance(part, FactorError)])


def factors(optimizer: KFAC, name: str) -> tuple[Tensor, Tensor]:
    found = next(layer for layer in layers(optimizer) if layer.name == name)
    return found.a.mean(), found.g.mean()


def kronecker(optimizer: KFAC, name: str) -> Tensor:
    """The block as a dense matrix over the row-major (out, in [+ 1]) matrix."""
    a, g = factors(optimizer, name)
    return torch.kron(g, a)


def dense_fisher(
    model: nn.Module, layer: KroneckerBlock, inputs: Tensor, output_fisher: Tensor | None = None
) -> Tensor:
    """Exact Fisher block, 1/N sum_n J_n^T H_n J_n, in the same order as :func:`kronecker`.

    H is the Fisher of the output distribution, (N, D, D); the identity when it is None.
    """
    everything = {name: p.detach() for name, p in model.named_parameters()}

    def output(selected: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, {**everything, **selected}, (sample[None],)).flatten()

    selected = {name: everything[name] for name in layer.names}
    jacobian = vmap(jacrev(output), (None, 0))(selected, inputs)
    matrix = jacobian[layer.layer.weight_name].flatten(3)
    if layer.layer.bias_name is not None:
        matrix = torch.cat([matrix, jacobian[layer.layer.bias_name][..., None]], dim=3)
    flat = matrix.flatten(2)
    if output_fisher is None:
        return torch.einsum("ndp,ndq->pq", flat, flat) / len(inputs)
    return torch.einsum("ndp,nde,neq->pq", flat, output_fisher, flat) / len(inputs)


def softmax_fisher(logits: Tensor) -> Tensor:
    p = logits.detach().softmax(-1)
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def observe_softmax(optimizer: KFAC, model: nn.Module, inputs: Tensor) -> None:
    """Statistics as if every action had been drawn exactly in proportion to its probability."""
    with torch.no_grad():
        count = model(inputs[:1]).shape[-1]
    repeated = inputs.repeat_interleave(count, 0)
    actions = torch.arange(count).repeat(len(inputs))
    with optimizer.capture() as captured:
        logits = model(repeated)
    chosen = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    weights = (count * chosen.detach().exp()).sqrt()
    optimizer.update_curvature(captured, (weights * chosen).sum())


def observe_gaussian(optimizer: KFAC, model: nn.Module, inputs: Tensor) -> None:
    """Statistics of unit-variance Gaussian outputs with the noise covariance exactly I."""
    with torch.no_grad():
        width = model(inputs[:1]).shape[-1]
    repeated = inputs.repeat_interleave(width, 0)
    with optimizer.capture() as captured:
        output = model(repeated)
    noise = width**0.5 * torch.eye(width, dtype=output.dtype).repeat(len(inputs), 1)
    noise = noise.reshape(len(repeated), *[1] * (output.dim() - 2), width)
    optimizer.update_curvature(captured, (noise * output).sum())


def observe(optimizer: KFAC, model: nn.Module, inputs: Tensor, seed: int = 0) -> Tensor:
    """Statistics from one draw of Gaussian noise; returns the output, whose graph is kept."""
    with optimizer.capture() as captured:
        output = model(inputs)
    noise = torch.randn(output.shape, generator=seeded(seed), dtype=torch.float64)
    optimizer.update_curvature(captured, (noise.to(output.dtype) * output).sum())
    return output


def set_gradients(model: nn.Module, seed: int = 7, scale: float = 1.0) -> dict[str, Tensor]:
    """Give every trainable parameter a random gradient; returns them by name."""
    generator = seeded(seed)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            drawn = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = drawn.to(parameter.dtype)
            found[name] = parameter.grad.clone()
    return found


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(before: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def flat(tensors: dict[str, Tensor], layer: KroneckerBlock | LayerFactors) -> Tensor:
    found = layer.layer if isinstance(layer, KroneckerBlock) else layer
    return found.matrix(tensors).flatten()


def same(first: Any, second: Any) -> bool:
    """Bit-for-bit equality of nested states."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and bool(first == second)


def snapshot(optimizer: KFAC | Preconditioner) -> dict[str, Any]:
    by_name = optimizer.state_by_name() if isinstance(optimizer, KFAC) else optimizer.state_dict()
    return copy.deepcopy(by_name)


class OpRecorder(TorchDispatchMode):
    """Lists the operators that run, with arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, result))
        return result

    def of(self, overload: Any) -> list[tuple[Any, ...]]:
        return [args for func, args, _ in self.calls if func is overload]

    def products(self) -> list[tuple[int, ...]]:
        """Shapes of the matrix products."""
        aten = torch.ops.aten
        wanted = (aten.mm.default, aten.addmm.default)
        return [tuple(result.shape) for func, _, result in self.calls if func in wanted]


class HostSyncError(AssertionError):
    """A value was copied from the device to the host."""


class NoHostSync(TorchDispatchMode):
    """Fails on every operator whose result Python must wait for."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        waiting = (
            aten._local_scalar_dense.default,
            aten.equal.default,
            aten.nonzero.default,
            aten.masked_select.default,
        )
        masked = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and (
            any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        )
        if func in waiting or masked:
            raise HostSyncError(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_eigh(monkeypatch: Any) -> Iterator[list[int]]:
    """Sizes of the matrices given to torch.linalg.eigh inside the context."""
    real = torch.linalg.eigh
    sizes: list[int] = []

    def eigh(matrix: Tensor) -> Any:
        sizes.extend([matrix.shape[-1]] * matrix[..., 0, 0].numel())
        return real(matrix)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", eigh)
        yield sizes
