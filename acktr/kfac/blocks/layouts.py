"""How a layer's parameters form a matrix, and how its uses give Kronecker factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from acktr.kfac.config import KFACConfig, Sharing
from acktr.kfac.statistics import factors
from acktr.kfac.statistics.averages import RunningAverage, Use, check_sizes


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

    @property
    def sharing(self) -> Sharing:
        """Whether positions and uses of a sample are observations (expand) or joined (reduce)."""
        ...

    def input_factor(self, uses: Sequence[Use]) -> tuple[Tensor, int]:
        """Factor A as (sum, divisor)."""
        ...

    def output_factor(self, uses: Sequence[Use], index: int) -> Tensor:
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
    sharing: Sharing

    @property
    def a_shape(self) -> tuple[int, ...]:
        """(in [+ 1]) square."""
        width = self.module.in_features + self.bias
        return width, width

    @property
    def g_shape(self) -> tuple[int, ...]:
        """(out) square."""
        return self.module.out_features, self.module.out_features

    def input_factor(self, uses: Sequence[Use]) -> tuple[Tensor, int]:
        """Factor A as (sum, divisor)."""
        return factors.linear_input_factor([use.args[0] for use in uses], self.bias, self.sharing)

    def output_factor(self, uses: Sequence[Use], index: int) -> Tensor:
        """Sum over samples for factor G."""
        return factors.output_factor([use.gradients[index] for use in uses], -1, self.sharing)

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
    sharing: Sharing

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

    def input_factor(self, uses: Sequence[Use]) -> tuple[Tensor, int]:
        """Factor A as (sum, divisor)."""
        inputs = [use.args[0] for use in uses]
        return factors.conv_input_factor(inputs, self.module, self.bias, self.sharing)

    def output_factor(self, uses: Sequence[Use], index: int) -> Tensor:
        """Sum over samples for factor G."""
        gradients = [use.gradients[index] for use in uses]
        return factors.output_factor(gradients, 1, self.sharing, self.module.groups)

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
    def sharing(self) -> Sharing:
        """Always expand: tokens have no mean."""
        return "expand"

    @property
    def a_shape(self) -> tuple[int, ...]:
        """(V,), the diagonal."""
        return (self.module.num_embeddings,)

    @property
    def g_shape(self) -> tuple[int, ...]:
        """(D) square."""
        return self.module.embedding_dim, self.module.embedding_dim

    def input_factor(self, uses: Sequence[Use]) -> tuple[Tensor, int]:
        """Factor A as (sum, divisor)."""
        return factors.embedding_input_factor([use.args[0] for use in uses], self.module)

    def output_factor(self, uses: Sequence[Use], index: int) -> Tensor:
        """Sum over samples for factor G."""
        return factors.output_factor([use.gradients[index] for use in uses], -1, "expand")

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


def layout_of(module: nn.Module, bias: bool, config: KFACConfig) -> Layout:
    """The layout of a layer; raises TypeError for a module that has none."""
    if isinstance(module, nn.Linear):
        return LinearLayout(module, bias, config.linear_sharing)
    if isinstance(module, nn.Embedding):
        return EmbeddingLayout(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvLayout(module, bias, config.conv_sharing)
    raise TypeError(f"no Kronecker block for {type(module).__name__}")


class LayerFactors:
    """A layer's weight and bias as one matrix, and the running averages of its factors A and G.

    Args:
        name: Path of the layer.
        module: Linear, convolution or embedding.
        weight: Name of its weight.
        bias: Name of its bias; None without.
        config: Settings.
        paths: Paths of all layers that share the weight, by default this one alone.

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
    ) -> None:
        self.name = name
        self.module = module
        self.layout: Layout = layout_of(module, bias is not None, config)
        self.paths = tuple(paths) if paths else (name,)
        self.weight_name = weight
        self.bias_name = bias
        self.names: tuple[str, ...] = (weight,) if bias is None else (weight, bias)
        place = next(module.parameters())
        self.dtype = factors.accumulation_type(place)
        self.device = place.device
        self.a = RunningAverage(self.zeros(self.layout.a_shape))
        self.g = RunningAverage(self.zeros(self.layout.g_shape))

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros of the statistics' type, on their device."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def observe(self, uses: Sequence[Use], weights: Sequence[float], count: float) -> None:
        """Join a part of a batch to the statistics."""
        if self.layout.sharing == "reduce":
            check_sizes(uses, self.name)
        self.a.add(*self.layout.input_factor(uses))
        total: Tensor | None = None
        for index, weight in enumerate(weights):
            part = self.layout.output_factor(uses, index)
            part = part if weight == 1 else part * weight
            total = part if total is None else total + part
        if total is not None:
            self.g.add(total, count)

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
        return {
            "a": self.a.value,
            "a_weight": self.a.weight,
            "g": self.g.value,
            "g_weight": self.g.weight,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a checked state."""
        self.a.load(state["a"].to(self.device), state["a_weight"].to(self.device))
        self.g.load(state["g"].to(self.device), state["g_weight"].to(self.device))
