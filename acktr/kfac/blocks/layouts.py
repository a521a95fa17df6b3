"""How a layer's parameters form a matrix, and how its uses give Kronecker factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from acktr.kfac.blocks import rows
from acktr.kfac.blocks.linear import LinearLayout, Shapes, as_matrix, as_parts
from acktr.kfac.blocks.projections import ProjectionLayout
from acktr.kfac.blocks.replicas import ReplicaLayout, Replicas
from acktr.kfac.blocks.rules import RuleLayout
from acktr.kfac.blocks.tied import TiedLayout
from acktr.kfac.config import KFACConfig, Sharing
from acktr.kfac.statistics import factors, transposed
from acktr.kfac.statistics.averages import RunningAverage
from acktr.kfac.statistics.uses import Use, by_sample
from acktr.kfac.tensors import accumulation_type


@dataclass(frozen=True)
class ConvLayout:
    """A convolution over one, two or three dimensions; one pair of factors per group."""

    module: factors.Conv
    bias: bool
    sharing: Sharing

    @property
    def shapes(self) -> Shapes:
        """([k,] C kh kw [+ 1]) and ([k,] out / k) square."""
        groups = self.module.groups
        lead = () if groups == 1 else (groups,)
        width, out = self.module.weight[0].numel() + self.bias, self.module.out_channels // groups
        return (*lead, width, width), (*lead, out, out)

    def input_factor(self, uses: Sequence[Use], diagonal: bool) -> tuple[Tensor, float]:
        """Factor A, or its diagonal, as (sum, divisor)."""
        inputs = [use.input for use in uses]
        return factors.conv_input_factor(inputs, self.module, self.bias, self.sharing, diagonal)

    def output_factor(self, uses: Sequence[Use], index: int, diagonal: bool) -> Tensor:
        """Sum over samples for factor G, or for its diagonal."""
        gradients = [use.gradients[index] for use in uses]
        return factors.output_factor(gradients, 1, self.sharing, self.module.groups, diagonal)

    def rows(self, use: Use, index: int) -> tuple[Tensor, Tensor]:
        """Rows a ([k,] N, T, C kh kw [+ 1]) and g ([k,] N, T, out / k)."""
        inputs = factors.conv_rows(use.input, self.module, self.bias)
        gradients = factors.output_rows(use.gradients[index], 1, self.module.groups)
        return inputs, gradients.to(inputs.dtype)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """([k,] out / k, C kh kw [+ 1])."""
        return as_matrix(weight.flatten(1), bias, self.module.groups)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (out, C, kh, kw) and bias (out)."""
        weight, bias = as_parts(matrix, self.bias, self.module.groups)
        return weight.reshape(self.module.weight.shape), bias


@dataclass(frozen=True)
class ConvTransposeLayout:
    """A transposed convolution, as an ordinary one over its spread input."""

    module: transposed.ConvTranspose
    plain: ConvLayout
    """The layout of the ordinary convolution."""

    @classmethod
    def of(
        cls, module: transposed.ConvTranspose, bias: bool, sharing: Sharing
    ) -> ConvTransposeLayout:
        """The layout of a module."""
        return cls(module, ConvLayout(transposed.plain_conv(module), bias, sharing))

    @property
    def sharing(self) -> Sharing:
        """How positions share the weight."""
        return self.plain.sharing

    @property
    def shapes(self) -> Shapes:
        """([k,] C kh kw [+ 1]) and ([k,] out / k) square."""
        return self.plain.shapes

    def _spread(self, use: Use) -> Use:
        inputs = transposed.spread_input(use.input, self.module, use.gradients[0].shape[2:])
        return use.seen_as(inputs, weights=use.weights)

    def input_factor(self, uses: Sequence[Use], diagonal: bool) -> tuple[Tensor, float]:
        """Factor A, or its diagonal, as (sum, divisor)."""
        spread, plain = [self._spread(use) for use in uses], self.plain
        if diagonal or plain.sharing == "reduce" or set(self.module.stride) == {1}:
            return plain.input_factor(spread, diagonal)
        inputs = [use.input for use in spread]
        return transposed.spread_input_factor(inputs, self.module, plain.module, plain.bias)

    def output_factor(self, uses: Sequence[Use], index: int, diagonal: bool) -> Tensor:
        """Sum over samples for factor G, or for its diagonal."""
        return self.plain.output_factor(uses, index, diagonal)

    def rows(self, use: Use, index: int) -> tuple[Tensor, Tensor]:
        """Rows a ([k,] N, T, C kh kw [+ 1]) and g ([k,] N, T, out / k)."""
        return self.plain.rows(self._spread(use), index)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """([k,] out / k, C kh kw [+ 1]), the kernel mirrored."""
        return self.plain.matrix(self._turned(weight), bias)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (C, out / k, kh, kw) and bias (out)."""
        weight, bias = self.plain.split(matrix)
        return self._turned(weight), bias

    def _turned(self, weight: Tensor) -> Tensor:
        """The weight (C, out / k, ...) as that of the ordinary convolution (out, C / k, ...).

        It is its own inverse.
        """
        axes = list(range(-len(self.module.kernel_size), 0))
        grouped = weight.reshape(self.module.groups, -1, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1).flip(axes)


@dataclass(frozen=True)
class EmbeddingLayout:
    """An embedding: a linear layer with one-hot inputs, whose factor A is diagonal."""

    module: nn.Embedding
    sharing: ClassVar[Sharing] = "expand"
    """Tokens have no mean."""

    @property
    def shapes(self) -> Shapes:
        """(V,), the diagonal, and (D) square."""
        out = self.module.embedding_dim
        return (self.module.num_embeddings,), (out, out)

    def input_factor(self, uses: Sequence[Use], diagonal: bool) -> tuple[Tensor, float]:
        """Factor A, which is its diagonal, as (sum, divisor)."""
        return rows.token_factor(self.module, uses)

    def output_factor(self, uses: Sequence[Use], index: int, diagonal: bool) -> Tensor:
        """Sum over samples for factor G, or for its diagonal."""
        gradients = [use.gradients[index] for use in uses]
        return factors.output_factor(gradients, -1, "expand", diagonal=diagonal)

    def squares(
        self,
        uses: Sequence[Use],
        index: int,
        a_vectors: Tensor | None,
        g_vectors: Tensor | None,
        apart: bool,
    ) -> Tensor:
        """Sum over samples, if they are apart, of (Q_G^T sum_t g a^T)^2, (D, V)."""
        found = [factors.output_rows(use.gradients[index], -1) for use in uses]
        every = torch.cat(found, dim=1)
        every = every.to(accumulation_type(every))
        every = every if g_vectors is None else every @ g_vectors
        pairs = zip(uses, found, strict=True)
        tokens = torch.cat([use.input.reshape(g.shape[:2]) for use, g in pairs], dim=1)
        num, padding = self.module.num_embeddings, self.module.padding_idx
        if not apart:
            total = every.new_zeros(num, every.shape[-1])
            total.index_add_(0, tokens.flatten(), every.flatten(0, 1))
            if padding is not None:
                total[padding] = 0
            return total.square().mT
        return factors.squared_token_gradients(tokens, every, num, padding)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(D, V), the transposed table."""
        return weight.mT

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """The table (V, D)."""
        return matrix.mT.contiguous(), None


Layout = (
    LinearLayout
    | ConvLayout
    | ConvTransposeLayout
    | EmbeddingLayout
    | ProjectionLayout
    | ReplicaLayout
    | RuleLayout
    | TiedLayout
)
"""A kind of layer; its weight and bias are a matrix ([k,] out, in [+ 1]) with k groups."""


class LayerFactors:
    """A layer's weight and bias as one matrix, and the running averages of its factors A and G.

    Args:
        name: Path of the layer.
        module: Linear, convolution or embedding, or the module that a projection is part of.
        weight: Name of its weight.
        bias: Name of its bias; None without.
        config: Settings.
        paths: Paths of all layers that share the weight, by default this one alone.
        layout: How uses become factors, if the kind of module does not say it.

    Raises:
        TypeError: There is no Kronecker block for this kind of module.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        weight: str,
        bias: str | None,
        config: KFACConfig,
        paths: Sequence[str] | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.name = name
        self.module = module
        self.layout: Layout
        if layout is not None:
            self.layout = layout
        elif isinstance(module, nn.Linear):
            shape = module.out_features, module.in_features
            self.layout = LinearLayout(shape, bias is not None, config.linear_sharing)
        elif isinstance(module, nn.Embedding):
            self.layout = EmbeddingLayout(module)
        elif isinstance(module, Replicas):
            count, out, width = module.weight.shape
            self.layout = ReplicaLayout((count, out, width), bias is not None)
        elif isinstance(module, factors.Conv):
            self.layout = ConvLayout(module, bias is not None, config.conv_sharing)
        elif isinstance(module, transposed.ConvTranspose):
            self.layout = ConvTransposeLayout.of(module, bias is not None, config.conv_sharing)
        else:
            raise TypeError(f"no Kronecker block for {type(module).__name__}")
        self.paths = tuple(paths) if paths else (name,)
        self.weight_name = weight
        self.bias_name = bias
        self.names: tuple[str, ...] = (weight,) if bias is None else (weight, bias)
        place = next(module.parameters())
        self.dtype = torch.float64 if config.float64 else accumulation_type(place)
        self.device = place.device
        shapes, limit = self.layout.shapes, config.max_factor_size or math.inf
        large = [len(shape) > 1 and shape[-1] > limit for shape in shapes]
        sizes = [f"{name} {shape[-1]}" for name, shape in zip("AG", shapes, strict=True)]
        self.capped = ", ".join(size for size, cut in zip(sizes, large, strict=True) if cut)
        """Names and sizes of the factors of which the diagonal alone is kept, as in "A 4097"."""
        pairs = zip(shapes, large, strict=True)
        self.a, self.g = (RunningAverage(self.zeros(s[-1:] if cut else s)) for s, cut in pairs)

    @property
    def cuttable(self) -> bool:
        """Whether the diagonal of a factor can be kept in its place."""
        return len(self.layout.shapes[1]) == 2

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros of the statistics' type, on their device; ValueError if they do not fit there."""
        try:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        except RuntimeError as error:  # torch has no type for it on the CPU
            raise ValueError(
                f"K-FAC layer {self.name!r}: no memory for a factor of the shape {shape}: set"
                " max_factor_size, above which only the diagonal is kept"
            ) from error

    def observe(self, uses: Sequence[Use], weights: Sequence[float], count: float) -> None:
        """Join a part of a batch to the statistics."""
        known = all(use.complete and use.owners is None for use in uses)
        if self.layout.sharing == "reduce" and not (by_sample(uses, self.name) and known):
            raise ValueError(
                f"K-FAC layer {self.name!r}: its output {tuple(uses[0].gradients[0].shape)} does"
                ' not begin with the samples, which sharing "reduce" needs: use "expand"'
            )
        a_diagonal, g_diagonal = (factor.value.dim() == 1 for factor in (self.a, self.g))
        if isinstance(self.layout, TiedLayout):
            words, tokens, width = self.layout.moments(uses, weights, (a_diagonal, g_diagonal))
            self.a.add(words.to(self.dtype), tokens)
            self.g.add(width, count)
            return
        if isinstance(self.layout, EmbeddingLayout | ProjectionLayout):
            total, divisor = self.layout.input_factor(uses, a_diagonal)
        else:
            total, divisor = rows.input_factor(self.layout, uses, a_diagonal)
        self.a.add(total.to(self.dtype), divisor)  # frequencies have the table's type
        sums = ((self.layout.output_factor(uses, i, g_diagonal), w) for i, w in enumerate(weights))
        self.g.add(reduce(torch.add, (g if w == 1 else g * w for g, w in sums)), count)

    def squares(
        self, uses: Sequence[Use], index: int, a_vectors: Tensor | None, g_vectors: Tensor | None
    ) -> Tensor:
        """Sum over samples of (Q_G^T (sum_t g a^T) Q_A)^2, with Q = I for a diagonal factor."""
        vectors, apart = (a_vectors, g_vectors), by_sample(uses, self.name)
        if isinstance(self.layout, EmbeddingLayout | ProjectionLayout):
            return self.layout.squares(uses, index, *vectors, apart)
        return rows.squares(self.layout, uses, index, *vectors, apart)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Weight and bias tensors as one ([k,] out, in [+ 1]) matrix."""
        bias = None if self.bias_name is None else tensors[self.bias_name]
        return self.layout.matrix(tensors[self.weight_name], bias)

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`matrix`."""
        weight, bias = self.layout.split(matrix)
        if self.bias_name is None or bias is None:
            return {self.weight_name: weight}
        return {self.weight_name: weight, self.bias_name: bias}

    def state_dict(self) -> dict[str, Tensor]:
        """Both averages."""
        return self.a.state_dict("a") | self.g.state_dict("g")

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a checked state."""
        self.a.load_state_dict("a", state)
        self.g.load_state_dict("g", state)
