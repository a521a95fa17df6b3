"""Products with the exact Fisher matrix, by Jacobian-vector products.

For a module with output z of parameters theta and an objective h = (1/Z) sum_l h_l of loss terms,

    F = (1/Z) sum_l J_l^T H_l J_l,    J_l = dz_l / dtheta,    H_l = the Hessian of term l in z_l,

which is the Fisher information of the output distribution (its targets drawn from the model) and
the generalised Gauss-Newton matrix at once (Martens 2020, sections 8 and 9). No Kronecker structure
is assumed. Parameters, directions and results go by name: ``dict[str, Tensor]``.

The module is left as it was: every pass gets its own copies of the buffers, so that the running
statistics of batch normalisation do not move, and the global random generators are set back, so
that all passes of one call see the same dropout mask and the caller's random stream goes on
undisturbed. Attention and recurrence are computed without fused kernels, which have no forward-mode
derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp

from acktr.kfac.losses.base import OutputLoss
from acktr.kfac.statistics.elementary import elementary_operations
from acktr.kfac.statistics.generators import RandomState
from acktr.kfac.statistics.inputs import Inputs
from acktr.kfac.tensors import accumulation_type, parts_of

Output = Tensor | tuple[Tensor, ...]
"""What a module returns."""

Vector = Mapping[str, Tensor]
"""A direction in parameter space, by parameter name; a name that is missing stands for zero."""


def output_tangents(
    module: nn.Module,
    args: tuple[Any, ...],
    vectors: Sequence[Vector],
    *,
    kwargs: Mapping[str, Any] | None = None,
    random: RandomState | None = None,
    select: Callable[[Any], Any] | None = None,
) -> tuple[Output, list[Output]]:
    """Output z and its directional derivatives J v, one forward-mode pass for each vector.

    Args:
        module: The network; its output is a tensor or a tuple of tensors.
        args: Positional inputs of the module.
        vectors: Directions; shapes and types are those of the parameters.
        kwargs: Its inputs given by keyword.
        random: State of the random generators at the beginning; by default the present one.
        select: Takes that output from what the module returns, such as a dict; None for all.

    Returns:
        The output, detached, and for each vector its tangent with the structure of the output.

    Raises:
        ValueError: A vector names an unknown parameter or does not fit it, or the module returns
            something else than tensors.
    """
    named = dict(module.named_parameters())
    for vector in vectors:
        _check_vector(vector, named)
    forward, primals = _as_function(module, Inputs.of(args, kwargs), list(named), select)
    if not vectors or not named:
        with undisturbed(named, random):
            output = forward({})
        return output, [_mapped(torch.zeros_like, output) for _ in vectors]
    first = next(iter(named))
    passes = []
    for vector in vectors:
        direction = dict(vector) or {first: torch.zeros_like(primals[first])}
        start = {name: primals[name] for name in direction}
        with undisturbed(named, random):
            passes.append(jvp(forward, (start,), (direction,)))
    return passes[0][0], [both[1] for both in passes]


def moved_output(
    module: nn.Module,
    inputs: Inputs,
    change: Vector,
    select: Callable[[Any], Any] | None = None,
    random: RandomState | None = None,
) -> Output:
    """The output of a module whose parameters are changed, which leaves them as they are.

    Args:
        module: The network.
        inputs: Its inputs.
        change: What is added to parameters, by name.
        select: Takes the output from what the module returns; None for all.
        random: State of the random generators at the beginning; by default the present one.
    """
    forward, primals = _as_function(module, inputs, list(change), select)
    with undisturbed(primals, random), torch.no_grad():
        output: Output = forward({name: primals[name] + d for name, d in change.items()})
    return output


def fisher_gram(
    module: nn.Module,
    args: tuple[Any, ...],
    loss: OutputLoss[Any],
    vectors: Sequence[Vector],
    *,
    kwargs: Mapping[str, Any] | None = None,
    select: Callable[[Any], Any] | None = None,
) -> Tensor:
    """Matrix B of the Fisher's quadratic form on some directions, B_ij = v_i^T F v_j.

    Costs one Jacobian-vector product and one output-Hessian product for each vector; F itself never
    appears, and no backward pass runs.

    Args:
        module: The network.
        args: Its positional inputs, one batch.
        loss: The objective, which gives H and Z.
        vectors: k >= 1 directions.
        kwargs: Its inputs given by keyword.
        select: Takes the loss's output from what the module returns; None for all.

    Returns:
        B (k, k), symmetric, without damping.

    Raises:
        ValueError: There is no vector, or one does not fit the parameters.
    """
    if not vectors:
        raise ValueError("the Fisher's quadratic form needs at least one vector")
    output, tangents = output_tangents(module, args, vectors, kwargs=kwargs, select=select)
    return Curved.of(loss, output, tangents).grams(loss).sum(0)


class Curved(NamedTuple):
    """An output, its tangents and their products with the loss's Hessian, at least in float32."""

    output: Output
    """z."""
    tangents: list[Output]
    """t_i = J v_i."""
    products: list[Output]
    """H t_i."""

    @classmethod
    def of(cls, loss: OutputLoss[Any], output: Output, tangents: Sequence[Output]) -> Curved:
        """Multiply the tangents, which have the structure of the output, by the loss's H."""
        wide, wide_tangents = widened(output), [widened(tangent) for tangent in tangents]
        return cls(wide, wide_tangents, [loss.hessian_product(wide, t) for t in wide_tangents])

    def grams(self, loss: OutputLoss[Any]) -> Tensor:
        """Quadratic forms t_i^T H_k t_j / Z of each part k of the output; their sum is the whole.

        Returns:
            The forms (parts, k, k), symmetric; one part unless the output is a tuple.
        """
        rows = [torch.stack([_dots(t, h) for h in self.products]) for t in self.tangents]
        grams = torch.stack(rows).permute(2, 0, 1)
        return (grams + grams.mT) / (2 * _normalizer(loss, self.output))


def fisher_vector_product(
    module: nn.Module,
    args: tuple[Any, ...],
    loss: OutputLoss[Any],
    vector: Vector,
    *,
    kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """F v = (1/Z) J^T H J v: a Jacobian-vector, an output-Hessian and a vector-Jacobian product.

    Args:
        module: The network.
        args: Its positional inputs, one batch.
        loss: The objective, which gives H and Z.
        vector: The direction v.
        kwargs: Its inputs given by keyword.

    Returns:
        F v for every trainable parameter, also for those that v leaves out.

    Raises:
        ValueError: The vector does not fit the parameters.
    """
    output, tangents = output_tangents(module, args, [vector], kwargs=kwargs)
    wide, _, (curved,) = Curved.of(loss, output, tangents)
    scale = 1 / _normalizer(loss, wide)
    forward, primals = _as_function(module, Inputs.of(args, kwargs), _trainable(module))
    with undisturbed(primals):
        pull = vjp(forward, primals)[1]
    pairs = zip(parts_of(output), parts_of(curved), strict=True)
    cotangents = tuple((scale * h).to(z.dtype) for z, h in pairs)
    product: dict[str, Tensor]
    (product,) = pull(cotangents[0] if isinstance(output, Tensor) else cotangents)
    return product


def dense_fisher(
    module: nn.Module,
    args: tuple[Any, ...],
    loss: OutputLoss[Any],
    names: Sequence[str] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    select: Callable[[Any], Any] | None = None,
) -> Tensor:
    """The Fisher matrix itself, for small networks and as a check of the products.

    It takes another way than they do: the whole Jacobian by reverse mode, and H as the sum of outer
    products of the loss's square roots, F = (1/Z) sum_n sum_c (J_n^T r_nc) (J_n^T r_nc)^T. The
    Jacobian is held in memory, one row for each entry of the output.

    Args:
        module: The network.
        args: Its positional inputs, one batch.
        loss: The objective, which gives the roots and Z.
        names: Parameters in the order wanted; by default the trainable ones, in the order of
            ``named_parameters``.
        kwargs: Its inputs given by keyword.
        select: Takes the loss's output from what the module returns; None for all.

    Returns:
        F (P, P) over the parameters, each flattened and then concatenated.

    Raises:
        ValueError: A name is unknown or given twice, or there is none.
    """
    order = _trainable(module) if names is None else list(names)
    unknown = sorted(set(order) - {name for name, _ in module.named_parameters()})
    if unknown or len(set(order)) < len(order) or not order:
        raise ValueError(
            "dense_fisher needs distinct names of the module's parameters,"
            f" got {', '.join(unknown or order) or 'none'}"
        )
    forward, primals = _as_function(module, Inputs.of(args, kwargs), order, select)

    def twice(values: dict[str, Tensor]) -> tuple[Any, Any]:
        output = forward(values)
        return output, output

    with undisturbed(primals):
        jacobian, output = jacrev(twice, has_aux=True)(primals)
    rows = [
        torch.cat([block[name].reshape(*_rows(part), -1) for name in order], dim=2)
        for block, part in zip(parts_of(jacobian), parts_of(output), strict=True)
    ]
    leaf = _mapped(lambda part: part.detach().requires_grad_(), output)
    total = rows[0].new_zeros(rows[0].shape[2], rows[0].shape[2])
    with torch.enable_grad():
        for root in loss.roots(leaf):
            gradients = torch.autograd.grad(root, parts_of(leaf), allow_unused=True)
            for gradient, row in zip(gradients, rows, strict=True):
                if gradient is not None:
                    columns = torch.einsum("nm,nmp->np", gradient.reshape(row.shape[:2]), row)
                    total += columns.mT @ columns
    return total / _normalizer(loss, output)


def inner_products(first: Sequence[Vector], second: Sequence[Vector]) -> Tensor:
    """Matrix of the dot products u_i . v_j of two lists of directions.

    It serves the damping terms of a quadratic form (``first`` and ``second`` the same directions)
    and the slopes of a gradient along them (``first`` the gradient alone).

    Args:
        first: k >= 1 directions.
        second: m >= 1 directions.

    Returns:
        The products (k, m); names missing from either side count as zero.

    Raises:
        ValueError: No name is shared by any pair.
    """
    terms = [[[(u[n] * v[n]).sum() for n in u if n in v] for v in second] for u in first]
    example = next((pair[0] for row in terms for pair in row if pair), None)
    if example is None:
        raise ValueError("inner products need directions that share a parameter")
    zero = torch.zeros_like(example)
    rows = [[torch.stack(pair).sum() if pair else zero for pair in row] for row in terms]
    return torch.stack([torch.stack(row) for row in rows])


def _as_function(
    module: nn.Module,
    inputs: Inputs,
    names: Sequence[str],
    select: Callable[[Any], Any] | None = None,
) -> tuple[Callable[[dict[str, Tensor]], Any], dict[str, Tensor]]:
    """The module as a function of the named parameters alone, and their values."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def forward(values: dict[str, Tensor]) -> Any:
        buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
        everything = {**parameters, **buffers, **values}
        output = functional_call(module, everything, inputs.args, dict(inputs.kwargs))
        output = output if select is None else select(output)
        parts = parts_of(output)
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            got = type(output).__name__
            raise ValueError(f"the module must return a tensor or a tuple of tensors, got {got}")
        return output

    return forward, {name: parameters[name] for name in names}


def _check_vector(vector: Vector, named: Mapping[str, Tensor]) -> None:
    for name, value in vector.items():
        if name not in named:
            raise ValueError(f"the module has no parameter {name!r}")
        place = named[name]
        if value.shape != place.shape or value.dtype != place.dtype:
            raise ValueError(
                f"the vector's {name!r} must be {place.dtype} of shape {tuple(place.shape)},"
                f" got {value.dtype} of shape {tuple(value.shape)}"
            )


def _trainable(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if p.requires_grad]


def widened(output: Output) -> Output:
    """At least float32, for sums over half-precision outputs."""
    return _mapped(lambda part: part.to(accumulation_type(part)), output)


def _mapped(function: Callable[[Tensor], Tensor], output: Output) -> Output:
    if isinstance(output, Tensor):
        return function(output)
    return tuple(function(part) for part in output)


def _rows(part: Tensor) -> tuple[int, int]:
    """Number of samples, and of output entries per sample."""
    return part.shape[0], math.prod(part.shape[1:])


def _dots(first: Output, second: Output) -> Tensor:
    """Dot product of each part (parts,)."""
    pairs = zip(parts_of(first), parts_of(second), strict=True)
    return torch.stack([(a * b).sum() for a, b in pairs])


def _normalizer(loss: OutputLoss[Any], output: Output) -> float:
    return loss.normalizer(output) or 1.0  # Z is a count, None for a sum


@contextmanager
def undisturbed(
    parameters: Mapping[str, Tensor], random: RandomState | None = None
) -> Iterator[None]:
    """Set the random generators back afterwards; no fused kernels inside."""
    state = random or RandomState.now(parameters.values())
    with state.again(), elementary_operations():
        yield


@contextmanager
def _own_buffers(module: nn.Module) -> Iterator[None]:
    """Give the module copies of its buffers, and its own ones back afterwards."""
    copies: dict[int, Tensor] = {}
    kept = [(m, dict(m._buffers)) for m in module.modules() if m._buffers]
    for owner, buffers in kept:
        for name, buffer in buffers.items():
            if buffer is not None:
                owner._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
    try:
        yield
    finally:
        for owner, buffers in kept:
            owner._buffers.update(buffers)


def repeatable(
    module: nn.Module, function: Callable[[], Any], random: RandomState | None = None
) -> Callable[[], Any]:
    """The function, such that all its calls draw the same random numbers.

    A call leaves the generators and the module's buffers (running statistics) as they were.

    Args:
        module: The module that the function calls.
        function: What to evaluate.
        random: State of the generators that all calls start from; by default the present one.
    """
    state = random or RandomState.now(module.parameters())

    def evaluate() -> Any:
        with state.again(), _own_buffers(module):
            return function()

    return evaluate
