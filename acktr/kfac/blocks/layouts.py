"""How a layer's parameters form a matrix, and how its uses give Kronecker factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from acktr.kfac.config import KFACConfig
from acktr.kfac.statistics import factors
from acktr.kfac.statistics.averages import Use

Grads = dict[str, Tensor]


class Layout(Protocol):
    """A kind of layer; the matrix is ([k,] out, in [+ 1]) with k groups."""

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Shape of factor A; a vector where A is diagonal."""
        ...

    @property
    def g_shape(self) -> tuple[int, ...]:
        """Shape of factor G."""
        ...

    def reduces(self, config: KFACConfig) -> bool:
        """Whether all positions and uses of a sample are joined first (sharing "reduce")."""
        ...

    def input_factor(self, uses: Sequence[Use], config: KFACConfig) -> tuple[Tensor, int]:
        """Factor A as (sum, divisor)."""
        ...

    def output_factor(self, uses: Sequence[Use], index: int, config: KFACConfig) -> Tensor:
        """Sum over samples for factor G, of the gradients number ``index``."""
        ...

    def rows(self, use: Use, index: int) -> tuple[Tensor, Tensor]:
        """Rows a ([k,] N, T, in [+ 1]) and g ([k,] N, T, out) of one use."""
        ...

    def squares(
        self, uses: Sequence[Use], index: int, a_vectors: Tensor | None, g_vectors: Tensor
    ) -> Tensor:
        """Sum over samples of (Q_G^T (sum_t g a^T) Q_A)^2, with Q_A = I where A is diagonal."""
        ...

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Weight and bias as the matrix."""
        ...

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inverse of :meth:`matrix`."""
        ...


def _gradients(uses: Sequence[Use], index: int) -> list[Tensor]:
    return [use.gradients[index] for use in uses]


def _inputs(uses: Sequence[Use]) -> list[Tensor]:
    return [use.args[0] for use in uses]


def _squares(pairs: Sequence[tuple[Tensor, Tensor]], a_vectors: Tensor, g: Tensor) -> Tensor:
    """The same from the rows of all uses."""
    inputs = torch.cat([pair[0] for pair in pairs], dim=-2) @ a_vectors.unsqueeze(-3)
    gradients = torch.cat([pair[1] for pair in pairs], dim=-2) @ g.unsqueeze(-3)
    return factors.squared_gradients(inputs, gradients)


@dataclass(frozen=True)
class LinearLayout:
    """A Linear layer, over any number of leading dimensions."""

    module: nn.Linear
    bias: bool

    @property
    def a_shape(self) -> tuple[int, ...]:
        """(in [+ 1]) square."""
        width = self.module.in_features + self.bias
        return width, width

    @property
    def g_shape(self) -> tuple[int, ...]:
        """(out) square."""
        return self.module.out_features, self.module.out_features

    def reduces(self, config: KFACConfig) -> bool:
        """Whether all positions and uses of a sample are joined first."""
        return config.linear_sharing == "reduce"

    def input_factor(self, uses: Sequence[Use], config: KFACConfig) -> tuple[Tensor, int]:
        """Factor A as (sum, divisor)."""
        return factors.linear_input_factor(_inputs(uses), self.bias, config.linear_sharing)

    def output_factor(self, uses: Sequence[Use], index: int, config: KFACConfig) -> Tensor:
        """Sum over samples for factor G."""
        return factors.output_factor(_gradients(uses, index), -1, config.linear_sharing)

    def rows(self, use: Use, index: int) -> tuple[Tensor, Tensor]:
        """Rows a (N, T, in [+ 1]) and g (N, T, out)."""
        inputs = factors.positions(use.args[0])
        inputs = inputs.to(factors.accumulation_type(inputs))
        gradients = factors.output_rows(use.gradients[index], -1).to(inputs.dtype)
        return (factors.append_one(inputs) if self.bias else inputs), gradients

    def squares(
        self, uses: Sequence[Use], index: int, a_vectors: Tensor | None, g_vectors: Tensor
    ) -> Tensor:
        """Sum over samples of the squared rotated gradient, (out, in [+ 1])."""
        assert a_vectors is not None
        return _squares([self.rows(use, index) for use in uses], a_vectors, g_vectors)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(out, in [+ 1])."""
        return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias (out)."""
        if not self.bias:
            return matrix, None
        return matrix[:, :-1], matrix[:, -1].contiguous()


@dataclass(frozen=True)
class ConvLayout:
    """A convolution over one, two or three dimensions; one pair of factors per group."""

    module: factors.Conv
    bias: bool

    @property
    def _lead(self) -> tuple[int, ...]:
        return () if self.module.groups == 1 else (self.module.groups,)

    @property
    def a_shape(self) -> tuple[int, ...]:
        """([k,] C kh kw [+ 1]) square."""
        width = self.module.weight[0].numel() + self.bias
        return *self._lead, width, width

    @property
    def g_shape(self) -> tuple[int, ...]:
        """([k,] out / k) square."""
        out = self.module.out_channels // self.module.groups
        return *self._lead, out, out

    def reduces(self, config: KFACConfig) -> bool:
        """Whether all positions and uses of a sample are joined first."""
        return config.conv_sharing == "reduce"

    def input_factor(self, uses: Sequence[Use], config: KFACConfig) -> tuple[Tensor, int]:
        """Factor A as (sum, divisor)."""
        inputs = _inputs(uses)
        return factors.conv_input_factor(inputs, self.module, self.bias, config.conv_sharing)

    def output_factor(self, uses: Sequence[Use], index: int, config: KFACConfig) -> Tensor:
        """Sum over samples for factor G."""
        found = _gradients(uses, index)
        return factors.output_factor(found, 1, config.conv_sharing, self.module.groups)

    def rows(self, use: Use, index: int) -> tuple[Tensor, Tensor]:
        """Rows a ([k,] N, T, C kh kw [+ 1]) and g ([k,] N, T, out / k)."""
        inputs = factors.conv_rows(use.args[0], self.module, self.bias)
        gradients = factors.output_rows(use.gradients[index], 1, self.module.groups)
        return inputs, gradients.to(inputs.dtype)

    def squares(
        self, uses: Sequence[Use], index: int, a_vectors: Tensor | None, g_vectors: Tensor
    ) -> Tensor:
        """Sum over samples of the squared rotated gradient, ([k,] out / k, C kh kw [+ 1])."""
        assert a_vectors is not None
        return _squares([self.rows(use, index) for use in uses], a_vectors, g_vectors)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """([k,] out / k, C kh kw [+ 1])."""
        flat = weight.flatten(1)
        if bias is not None:
            flat = torch.cat([flat, bias[:, None]], dim=1)
        groups = self.module.groups
        return flat if groups == 1 else flat.reshape(groups, -1, flat.shape[1])

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (out, C, kh, kw) and bias (out)."""
        flat = matrix if self.module.groups == 1 else matrix.flatten(0, 1)
        shape = self.module.weight.shape
        if not self.bias:
            return flat.reshape(shape), None
        return flat[:, :-1].reshape(shape), flat[:, -1].contiguous()


@dataclass(frozen=True)
class EmbeddingLayout:
    """An embedding: a linear layer with one-hot inputs, whose factor A is diagonal."""

    module: nn.Embedding

    @property
    def a_shape(self) -> tuple[int, ...]:
        """(V,), the diagonal."""
        return (self.module.num_embeddings,)

    @property
    def g_shape(self) -> tuple[int, ...]:
        """(D) square."""
        return self.module.embedding_dim, self.module.embedding_dim

    def reduces(self, config: KFACConfig) -> bool:
        """Whether all positions and uses of a sample are joined first."""
        return False

    def input_factor(self, uses: Sequence[Use], config: KFACConfig) -> tuple[Tensor, int]:
        """Factor A as (sum, divisor)."""
        return factors.embedding_input_factor(_inputs(uses), self.module)

    def output_factor(self, uses: Sequence[Use], index: int, config: KFACConfig) -> Tensor:
        """Sum over samples for factor G."""
        return factors.output_factor(_gradients(uses, index), -1, "expand")

    def rows(self, use: Use, index: int) -> tuple[Tensor, Tensor]:
        """Rows a (N, T, V), one-hot, and g (N, T, D)."""
        gradients = factors.output_rows(use.gradients[index], -1)
        gradients = gradients.to(factors.accumulation_type(gradients))
        tokens = use.args[0].reshape(*gradients.shape[:2], 1).long()
        hot = gradients.new_zeros(*gradients.shape[:2], self.module.num_embeddings)
        hot.scatter_(2, tokens, 1)
        if self.module.padding_idx is not None:
            hot[..., self.module.padding_idx] = 0
        return hot, gradients

    def squares(
        self, uses: Sequence[Use], index: int, a_vectors: Tensor | None, g_vectors: Tensor
    ) -> Tensor:
        """Sum over samples of the squared rotated gradient, (D, V)."""
        found = [factors.output_rows(use.gradients[index], -1) for use in uses]
        rows = torch.cat(found, dim=1)
        rows = rows.to(factors.accumulation_type(rows)) @ g_vectors
        pairs = zip(uses, found, strict=True)
        tokens = torch.cat([use.args[0].reshape(g.shape[:2]) for use, g in pairs], dim=1)
        num, padding = self.module.num_embeddings, self.module.padding_idx
        return factors.squared_token_gradients(tokens, rows, num, padding)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(D, V), the transposed table."""
        return weight.mT

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """The table (V, D)."""
        return matrix.mT.contiguous(), None


def layout_of(module: nn.Module, bias: bool) -> Layout:
    """The layout of a layer; raises TypeError for a module that has none."""
    if isinstance(module, nn.Linear):
        return LinearLayout(module, bias)
    if isinstance(module, nn.Embedding):
        return EmbeddingLayout(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvLayout(module, bias)
    raise TypeError(f"no Kronecker block for {type(module).__name__}")
