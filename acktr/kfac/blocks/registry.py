"""The kinds of curvature blocks, and which one every parameter of a module gets."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import get_args

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from acktr.kfac.blocks.constant import KnownBlock, PlainBlock
from acktr.kfac.blocks.diagonal import DiagonalBlock
from acktr.kfac.blocks.entries import EntriesBlock
from acktr.kfac.blocks.kronecker import KroneckerBlock
from acktr.kfac.blocks.layouts import LayerFactors
from acktr.kfac.blocks.linear import LinearLayout
from acktr.kfac.blocks.projections import ProjectionBiasRows, ProjectionLayout
from acktr.kfac.blocks.replicas import Replicas
from acktr.kfac.blocks.rules import LayerRule, RuleLayout, Rules, check_rules
from acktr.kfac.blocks.skip import Skip, skipped
from acktr.kfac.blocks.tied import TiedLayout
from acktr.kfac.blocks.tridiagonal import TridiagonalBlock
from acktr.kfac.blocks.vectors import (
    BiasRows,
    ExampleRows,
    Norm,
    NormRows,
    RowSource,
    SlopeRows,
    VectorBlock,
)
from acktr.kfac.config import KFACConfig
from acktr.kfac.statistics.capture import ROOT
from acktr.kfac.statistics.factors import Conv
from acktr.kfac.statistics.projections import Projection, biases, is_fused, projections
from acktr.kfac.statistics.transposed import ConvTranspose

_INSIDE = ("acktr.kfac", "torch.")
"""Modules of frames that a warning does not point to: ours, and torch's wrappers of step()."""
_LAYERS = (nn.Linear, nn.Embedding, Replicas, *get_args(Conv | ConvTranspose))
_VECTORS = (*get_args(Norm), nn.PReLU)
_PASS = (
    "forward",
    "__call__",
    "_conv_forward",
    "_output_padding",
    "_apply_instance_norm",
    "_handle_no_batch_input",
    "_get_no_batch_dim",
)
"""Methods that make up the forward pass of torch's layers."""


LayerBlock = KroneckerBlock | VectorBlock | TridiagonalBlock | EntriesBlock
"""A block that learns from what its layers saw."""
StatBlock = LayerBlock | DiagonalBlock
"""A block that learns its curvature from batches."""
Block = StatBlock | KnownBlock | PlainBlock
"""A group of parameters with its own curvature."""


class LargeFactorWarning(UserWarning):
    """Kronecker factors above ``max_factor_size``, of which the diagonal alone is kept."""


class UnsupportedParameterWarning(UserWarning):
    """A parameter without a curvature block follows its plain gradient."""


@dataclass(frozen=True)
class _Owner:
    path: str
    layer: nn.Module
    key: str


def keeps_forward(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is of a kind and computes what the kind does.

    A subclass that keeps the forward pass does; one that replaces a part of it may do anything, and
    so may an instance whose method was replaced.
    """
    return isinstance(layer, kind) and all(
        getattr(type(layer), name, None) is getattr(kind, name, None) and name not in vars(layer)
        for name in _PASS
    )


def _base(layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> type[nn.Module] | None:
    """The kind whose forward pass a layer has; None for one of its own."""
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return None  # nn.MultiheadAttention takes its weight but does not call it
    return next((kind for kind in kinds if keeps_forward(layer, kind)), None)


class Registry:
    """Builds the blocks of a module; every trainable parameter ends in exactly one.

    Args:
        module: The network.
        named: Its trainable parameters.
        known: Diagonal Fisher by name, for parameters outside of layers.
        config: Settings.
        rules: How layers of one's own become rows, by their type.
        skip: Layers without a block of their own; their parameters are treated as those that no
            layer has.
        wanted: Names of the parameters that are to have blocks.

    Raises:
        ValueError: A rule does not fit, or ``skip`` names what does not exist.
    """

    def __init__(
        self,
        module: nn.Module,
        named: Mapping[str, nn.Parameter],
        known: Mapping[str, float],
        config: KFACConfig,
        rules: Rules | None,
        skip: Skip,
        wanted: Iterable[str],
    ) -> None:
        self.wanted = set(wanted)
        self.rules = rules or {}
        check_rules(self.rules, module)
        self.module = module
        self.named = named
        self.known = known
        # Factors that nothing looks at are kept small.
        self.diagonal = config.structure == "diagonal"
        self.config = replace(config, max_factor_size=1) if self.diagonal else config
        self.names = {id(parameter): name for name, parameter in named.items()}
        self.owners: dict[int, list[_Owner]] = {}
        for path, layer in module.named_modules():
            for key, parameter in layer._parameters.items():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append(_Owner(path, layer, key))
        self.taken: set[str] = set()
        self.skipped = skipped(module, skip)
        self.capped: list[str] = []

    def build(self) -> list[Block]:
        """One block per layer, per known parameter, and for what is left.

        Raises:
            ValueError: ``known`` names a parameter that does not exist, or the
                layers form no chain although the structure is tridiagonal.
        """
        unknown = sorted(set(self.known) - set(self.named))
        if unknown:
            raise ValueError(f"known_fisher names no trainable parameter of the module: {unknown}")
        blocks: list[Block] = []
        chain: list[LayerFactors] = []
        self.taken.update(self.known)
        for path, module in self.module.named_modules():
            layer, norm = self._layer(path, module), self._norm(path, module)
            if layer is not None and self.config.structure == "tridiagonal":
                chain.append(layer)
            elif layer is not None:
                blocks.append(self._layer_block(layer))
            if norm is not None:
                blocks.append(norm)
            for taken in (layer, norm):
                self.taken.update(() if taken is None else taken.names)
            blocks.extend(self._projections(path, module))
        self._tell_capped()
        if self.config.structure == "tridiagonal":
            blocks.append(TridiagonalBlock(chain, self.config))
        for path, layer in self.module.named_modules():
            vector = self._bias(path, layer)
            if vector is not None:
                blocks.append(vector)
                self.taken.update(vector.names)
        blocks.extend(KnownBlock(name, fisher) for name, fisher in self.known.items())
        return [*self._wanted(blocks), *self._rest()]

    def _layer_block(self, layer: LayerFactors) -> KroneckerBlock | EntriesBlock:
        kind = EntriesBlock if self.diagonal else KroneckerBlock
        return kind(layer, self.config)

    def _wanted(self, blocks: Iterable[Block]) -> list[Block]:
        """The blocks of wanted parameters; ValueError for one that is half wanted."""
        kept = [block for block in blocks if not self.wanted.isdisjoint(block.names)]
        for block in kept:
            if not self.wanted.issuperset(block.names):
                raise ValueError(
                    f"{' and '.join(block.names)} share a curvature block: give them one group"
                )
        return kept

    def _free(self, layer: nn.Module, key: str) -> str | None:
        """Name of a layer's parameter if it is trainable and in no block yet."""
        parameter = layer._parameters.get(key)
        name = None if parameter is None else self.names.get(id(parameter))
        return None if name is None or name in self.taken else name

    def _kind(self, layer: nn.Module) -> tuple[object, ...] | None:
        """What layers must agree in to share a block; None for a layer without one."""
        rule = self._rule(layer)
        if rule is not None:
            return (rule,)
        base = _base(layer, _LAYERS)
        if isinstance(layer, nn.Embedding) and base is not None:
            odd = layer.sparse or layer.scale_grad_by_freq or layer.max_norm is not None
            return None if odd else (base, layer.padding_idx)
        if isinstance(layer, Conv | ConvTranspose) and base is not None:
            mode = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
            return base, *mode
        return None if base is None else (base,)

    def _rule(self, layer: nn.Module) -> LayerRule | None:
        """The rule for a layer, which goes before what its kind is known for."""
        return next((r for kind, r in self.rules.items() if keeps_forward(layer, kind)), None)

    def _layer(self, path: str, layer: nn.Module) -> LayerFactors | None:
        """The factors of a layer that can have them."""
        kind, rule = self._kind(layer), self._rule(layer)
        own, other = ("weight", "bias") if rule is None else (rule.weight, rule.bias)
        weight = self._free(layer, own) if kind is not None else None
        if weight is None:
            return None
        users = self.owners[id(layer._parameters[own])]
        if any(user.key != own or user.path in self.skipped for user in users):
            return None
        kinds = {self._kind(user.layer) for user in users}
        paths = [user.path for user in users]
        if len(kinds) > 1:
            return self._tied(path, layer, weight, kinds, paths)
        bias = None if other is None else self._free(layer, other)
        if bias is not None:
            sharers = self.owners[id(self.named[bias])]
            same = paths == [user.path for user in sharers]
            if not same or any(user.key != other for user in sharers):
                bias = None
        sharing = self.config.linear_sharing
        layout = None if rule is None else RuleLayout(layer, rule, bias is not None, sharing)
        return self._cut(LayerFactors(path, layer, weight, bias, self.config, paths, layout))

    def _cut(self, factors: LayerFactors) -> LayerFactors | None:
        """The factors, noted if some are diagonals for their size; None if they cannot be."""
        if not factors.capped or self.diagonal or self.wanted.isdisjoint(factors.names):
            return factors
        apart = "" if factors.cuttable else ", no block"
        name = factors.name or type(factors.module).__name__
        self.capped.append(f"{name} ({factors.capped}{apart})")
        return None if apart else factors

    def _tell_capped(self) -> None:
        """Say which factors are diagonals; a ValueError for a chain, which needs whole ones."""
        names, limit = ", ".join(self.capped), self.config.max_factor_size
        if names and self.config.structure == "tridiagonal":
            raise ValueError(
                f"structure=tridiagonal needs whole factors, but some are above max_factor_size"
                f" {limit}: {names} (raise max_factor_size or take another structure)"
            )
        if names:
            warnings.warn(
                f"K-FAC keeps only the diagonal of factors above max_factor_size {limit}: {names}",
                LargeFactorWarning,
                stacklevel=caller_level(),
            )

    def _tied(
        self,
        path: str,
        layer: nn.Module,
        weight: str,
        kinds: Set[tuple[object, ...] | None],
        paths: list[str],
    ) -> LayerFactors | None:
        """The factors of a table that embeddings and linear layers share, and no others do."""
        tables = {kind for kind in kinds if kind is not None and kind[0] is nn.Embedding}
        if len(tables) != 1 or kinds != {*tables, (nn.Linear,)}:
            return None
        layout = TiedLayout(layer)
        return self._cut(LayerFactors(path, layer, weight, None, self.config, paths, layout))

    def _projections(self, path: str, module: nn.Module) -> Iterator[Block]:
        """Blocks of the weights inside of an attention or recurrent module; none for a chain.

        Weights and biases that are shared with another module are left out.
        """
        skip = path in self.skipped or self.config.structure == "tridiagonal"
        if skip or not is_fused(module):
            return
        prefix = f"{path}." if path else ""
        for part in projections(module):
            weight, bias = self._unshared(module, part.key), self._unshared(module, part.bias)
            name = prefix + part.name
            if weight is not None:
                layout = self._projection_layout(name, part, weight, bias is not None)
                layer = LayerFactors(name, module, weight, bias, self.config, layout=layout)
                if self._cut(layer) is not None:
                    self.taken.update(layer.names)
                    yield self._layer_block(layer)
        for key, parts in biases(module).items():
            bias = self._unshared(module, key)
            if bias is not None:
                self.taken.add(bias)
                source = ProjectionBiasRows(max(len(parts), parts[0].groups))
                yield self._vector(bias, [bias], source, [prefix + part.name for part in parts])

    def _projection_layout(
        self, name: str, part: Projection, weight: str, bias: bool
    ) -> ProjectionLayout:
        """The maps of a projection; gates apart, and noted, if their common factor is too large."""
        rows, width = self.named[weight].shape
        limit, gates = self.config.max_factor_size or math.inf, part.gates
        split = rows > limit >= max(rows // gates, width + bias)
        if split:
            self.capped.append(f"{name} (G {rows}, {gates} blocks of it)")
        groups = gates if split else part.groups
        linear = LinearLayout((rows // groups, width), bias, self.config.linear_sharing)
        return ProjectionLayout(linear, groups, apart=not split)

    def _unshared(self, module: nn.Module, key: str | None) -> str | None:
        """Name of a parameter, also one of a submodule, that is free and has one owner alone."""
        if key is None:
            return None
        path, _, leaf = key.rpartition(".")
        name = self._free(module.get_submodule(path), leaf)
        return name if name and len(self.owners[id(self.named[name])]) == 1 else None

    def _vector(
        self, name: str, names: list[str], source: RowSource, paths: list[str]
    ) -> VectorBlock:
        parameters = [self.named[n] for n in names]
        return VectorBlock(name, names, parameters, source, paths, self.config)

    def _norm(self, path: str, layer: nn.Module) -> VectorBlock | None:
        base = _base(layer, _VECTORS)
        if base is None or path in self.skipped:
            return None
        parts = [self._free(layer, key) for key in ("weight", "bias")]
        names = [name for name in parts if name is not None]
        if not names or any(len(self.owners[id(self.named[n])]) > 1 for n in names):
            return None
        slope = base is nn.PReLU
        source = SlopeRows() if slope else NormRows(parts[0] is not None, parts[1] is not None)
        return self._vector(path, names, source, [path])

    def _bias(self, path: str, layer: nn.Module) -> VectorBlock | None:
        """The bias of a layer whose weight is frozen, known, or shared with another bias."""
        name = None if _base(layer, _LAYERS) is None else self._free(layer, "bias")
        if name is None or path in self.skipped:
            return None
        sharers = self.owners[id(self.named[name])]
        if any(_base(user.layer, _LAYERS) is None or user.key != "bias" for user in sharers):
            return None
        return self._vector(name, [name], BiasRows(), [user.path for user in sharers])

    def _rest(self) -> list[Block]:
        """What every parameter gets that has no block yet."""
        left = [name for name in self.named if name not in self.taken and name in self.wanted]
        curved = [] if self.config.small_parameters == "gradient" else left
        curved = [name for name in curved if not self._rescaled(name)]
        plain = [name for name in left if name not in curved]
        if plain:
            warnings.warn(
                f"no curvature block for {', '.join(plain)}: plain gradient steps",
                UnsupportedParameterWarning,
                stacklevel=caller_level(),
            )
        blocks: list[Block] = [PlainBlock(name) for name in plain]
        size = sum(self.named[name].numel() for name in curved)
        if curved and self.config.small_parameters == "dense" and size <= self.config.dense_limit:
            source = ExampleRows(self.module, curved)
            return [*blocks, self._vector("small_parameters", curved, source, [ROOT])]
        return blocks + [DiagonalBlock(name, self.named[name], self.config) for name in curved]

    def _rescaled(self, name: str) -> bool:
        """Whether a layer's gradient is not that of the loss, so that no Fisher belongs to it."""
        users = self.owners[id(self.named[name])]
        return any(getattr(user.layer, "scale_grad_by_freq", False) for user in users)


def caller_level() -> int:
    """Stack level of the first caller outside of this package, for a warning of our caller."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        frame = frame.f_back
        level += 1
    return level
