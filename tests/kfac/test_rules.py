"""Layers of one's own, registered with a rule."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    GaussianLoss,
    KFACConfig,
    KroneckerBlock,
    LayerRule,
    Preconditioner,
    UnsupportedParameterWarning,
)
from acktr.kfac.blocks.rules import Rules
from acktr.kfac.config import Sharing
from tests.tools.exact import Apply, Seen, close, gap, stored
from tests.tools.kfac import build, plain_config, randn
from tests.tools.product_cases import filled


class Conv1D(nn.Module):
    """A linear layer with the weight (in, out), as in GPT-2."""

    def __init__(self, width: int, out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, out))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Patches(nn.Module):
    """Pictures cut into patches of 2 by 2 pixels, and a kernel as an einsum would have it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(2, 2, 3, 4))
        self.shift = nn.Parameter(torch.zeros(4))

    def cut(self, x: Tensor) -> Tensor:
        """(N, patches, 2, 2, C)."""
        x = x.unfold(2, 2, 2).unfold(3, 2, 2)
        return x.flatten(2, 3).permute(0, 2, 3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("npijc,ijco->nop", self.cut(x), self.kernel)
        return y + self.shift[:, None]


class Gated(nn.Linear):
    """A subclass with a forward pass of its own, of the parent on a changed input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.tanh())


CONV1D = LayerRule(matrix=lambda _, w: w.mT, tensor=lambda _, m: m.mT)
PATCHES = LayerRule(
    inputs=lambda layer, x: layer.cut(x).flatten(2),
    outputs=lambda _, g: g.mT,
    matrix=lambda _, w: w.flatten(0, 2).mT,
    tensor=lambda layer, m: m.mT.reshape(layer.kernel.shape),
    weight="kernel",
    bias="shift",
)
GATED = LayerRule(inputs=lambda _, x: x.tanh())
RULES: dict[type[nn.Module], LayerRule] = {Conv1D: CONV1D, Patches: PATCHES, Gated: GATED}


def ruled(model: nn.Module, inputs: Tensor, loss: Any, rules: Rules, **settings: Any) -> Seen:
    """The curvature of a net with rules, after one batch; every parameter has a block."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnsupportedParameterWarning)
        config = plain_config(small_parameters="gradient", **settings)
        curvature = Preconditioner(model, config, layers=rules)
    seen = Seen(model, inputs, loss, curvature)
    seen.again()
    return seen


class Usual(nn.Module):
    """The nets below with layers of torch in the place of one's own."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        with torch.no_grad():
            if isinstance(own, Patches):
                self.layer: nn.Module = nn.Conv2d(3, 4, 2, stride=2).double()
                self.layer.weight.copy_(own.kernel.permute(3, 2, 0, 1))  # type: ignore[union-attr]
                self.layer.bias.copy_(own.shift)  # type: ignore[union-attr]
            else:
                weight = own.weight.mT if isinstance(own, Conv1D) else own.weight
                assert isinstance(weight, Tensor)
                out, width = weight.shape
                self.layer = nn.Linear(width, out, bias=own.bias is not None).double()
                self.layer.weight.copy_(weight)
                if own.bias is not None:
                    self.layer.bias.copy_(own.bias)  # type: ignore[arg-type]
        self.before = torch.tanh if isinstance(own, Gated) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.before(x))
        return y.flatten(2) if y.dim() == 4 else y


NETS: dict[str, tuple[list[nn.Module], Tensor]] = {
    "conv1d": ([Conv1D(3, 4), nn.Tanh(), nn.Linear(4, 3)], randn(6, 3)),
    "conv1d over positions": ([Conv1D(3, 4), nn.Tanh(), nn.Linear(4, 3)], randn(5, 2, 3)),
    "conv1d without bias": ([Conv1D(3, 4, False), nn.Tanh(), nn.Linear(4, 3)], randn(5, 2, 3)),
    "patches": ([Patches(), nn.Flatten(), nn.Tanh(), nn.Linear(16, 3)], randn(16, 3, 4, 4)),
    "gated": ([Gated(3, 4), nn.Tanh(), nn.Linear(4, 3)], randn(6, 3)),
}


RULES_OF: dict[str, Rules] = {
    name: {kind: rule for kind, rule in RULES.items() if isinstance(layers[0], kind)}
    for name, (layers, _) in NETS.items()
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["kfac", "cholesky", "ekfac", "diagonal"])
@pytest.mark.parametrize("name", NETS)
def test_a_registered_layer_steps_as_the_layer_of_torch_that_it_is(
    name: str, structure: str, sharing: Sharing
) -> None:
    layers, inputs = NETS[name]
    own = build(*layers, seed=4)
    usual = nn.Sequential(Usual(own[0]), *own[1:])
    torch.testing.assert_close(own(inputs), usual(inputs))
    settings = {"structure": structure, "linear_sharing": sharing, "conv_sharing": sharing}
    steps = []
    for model, rules in ((own, RULES_OF[name]), (usual, {})):
        seen = ruled(model, inputs, CategoricalLoss(), rules, **settings)
        seen.curvature.refresh()
        seen.again()
        model.zero_grad()
        model(inputs).square().sum().backward()
        steps.append(seen.curvature.direction(seen.curvature.gradients()))
    weight = steps[1]["0.layer.weight"]
    if isinstance(own[0], Patches):
        weight = weight.permute(2, 3, 1, 0)
    elif isinstance(own[0], Conv1D):
        weight = weight.mT
    found = list(steps[0].items())
    close(found[0][1], weight)
    if "0.layer.bias" in steps[1]:
        close(found[1][1], steps[1]["0.layer.bias"])


@pytest.mark.parametrize("name", NETS)
def test_a_registered_layer_is_exact_for_one_datum_at_one_position(name: str) -> None:
    layers, inputs = NETS[name]
    model = build(*layers, seed=4)
    one = inputs[:1, :1] if name.startswith("conv1d ") else inputs[:1]
    seen = ruled(model, one, CategoricalLoss(), RULES_OF[name])
    if name == "patches":  # four positions of one datum: not exact
        assert gap(stored(seen.block("0")), seen.truth("0")) > 0.01
    else:
        close(stored(seen.block("0")), seen.truth("0"))


def test_patches_are_exact_before_a_pooling_and_where_they_are_terms() -> None:
    pooled = build(Patches(), Apply(lambda y: y.sum(2)), nn.Linear(4, 2))
    terms = build(Patches(), Apply(lambda y: y.mT), nn.Linear(4, 2))
    for model, sharing in ((pooled, "reduce"), (terms, "expand")):
        inputs, loss = randn(5, 3, 4, 4), GaussianLoss(std=0.6)
        seen = ruled(model, inputs, loss, {Patches: PATCHES}, linear_sharing=sharing)
        close(stored(seen.block("0")), seen.truth("0"))


class Shared(nn.Module):
    """Two registered layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Conv1D(3, 3), Conv1D(3, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.first(x[:, 0]), self.second(x[:, 1])], 1)


def test_registered_layers_that_share_a_weight_share_a_block() -> None:
    seen = ruled(filled(Shared()), randn(6, 2, 3), GaussianLoss(std=0.6), {Conv1D: CONV1D})
    assert list(seen.curvature.stats) == ["first"]
    close(stored(seen.block("first")), seen.truth("first"))


class Renamed(Conv1D):
    """Keeps the forward pass."""


def test_a_rule_serves_subclasses_that_keep_the_forward_pass() -> None:
    model = build(Renamed(3, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = KFAC(model, layers={Conv1D: CONV1D})
    assert [b.names for b in optimizer.blocks if isinstance(b, KroneckerBlock)] == [
        ("0.weight", "0.bias"),
        ("2.weight", "2.bias"),
    ]


# --- rules that do not fit ------------------------------------------------------------------------


class Mixing(Conv1D):
    """A noise of its own in every call."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


TURNED = {"matrix": CONV1D.matrix, "tensor": CONV1D.tensor}
WRONG: dict[str, tuple[nn.Module, LayerRule, str]] = {
    "the weight not turned": (Conv1D(4, 4), LayerRule(), "is not the gradient of the weight"),
    "another input": (
        Conv1D(4, 4),
        LayerRule(inputs=lambda _, x: x.tanh(), **TURNED),
        r"is not the gradient of the weight \(relative difference",
    ),
    "another shape": (Conv1D(4, 3), LayerRule(bias=None), "of a matrix"),
    "not as many rows": (
        Conv1D(4, 4),
        LayerRule(outputs=lambda _, g: g[..., None], **TURNED),
        r"rows a \(6, 1, 5\) and g \(6, 4, 1\) of a matrix \(4, 5\)",
    ),
    "noise": (Mixing(4, 4), CONV1D, "is not the gradient of the weight"),
}


PATHS: dict[str, tuple[dict[str, Any], Tensor | None]] = {
    "factors": ({}, None),
    "entries": ({"structure": "diagonal"}, None),
    "weights": ({}, torch.linspace(0, 1, 6)),
}
"""What the first rows of a layer are for: settings, and weights of the samples."""


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_rows_that_do_not_give_the_gradient_are_an_error(
    name: str, autocast: bool, path: str
) -> None:
    layer, rule, message = WRONG[name]
    settings, weights = PATHS[path]
    model = build(layer, nn.Linear(3 if "shape" in name else 4, 2)).float()
    curvature = Preconditioner(model, KFACConfig(**settings), layers={type(layer): rule})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), curvature.capture() as captured:
        output = model(randn(6, 4).float())
    pattern = f"LayerRule of {type(layer).__name__} does not fit: .*{message}"
    with pytest.raises(ValueError, match=pattern) as caught:
        curvature.observe(captured, output.float(), GaussianLoss(), weights=weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_rows_that_fit_are_taken_in_narrow_types(kind: torch.dtype, autocast: bool) -> None:
    model = build(Conv1D(3, 4), nn.Tanh(), Gated(4, 2)).to(kind)
    curvature = Preconditioner(model, layers={Conv1D: CONV1D, Gated: GATED})
    state = torch.random.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), curvature.capture() as captured:
        output = model(randn(6, 3).to(kind))
    curvature.observe(captured, output.float(), GaussianLoss())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({nn.Conv3d: CONV1D}, "layers names Conv3d, which the module has not"),
        ({"Conv1D": CONV1D}, "layers must map types of layers to LayerRule, got Conv1D"),
        ({Conv1D: nn.Linear}, "layers must map types of layers to LayerRule"),
        ({Conv1D: LayerRule()}, r"the matrix is \(3, 4\), the bias \(4,\)"),
        (
            {Conv1D: LayerRule(matrix=CONV1D.matrix)},
            r"must be \(out, in\), and its tensor the inverse",
        ),
        ({Conv1D: LayerRule(matrix=lambda _, w: w[None])}, r"its matrix must be \(out, in\)"),
        ({Conv1D: LayerRule(weight="kernel")}, "Conv1D has no parameter 'kernel'"),
    ],
)
def test_a_bad_rule_is_refused_at_construction(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        KFAC(build(Conv1D(3, 4), nn.Tanh(), nn.Linear(4, 3)), layers=rules)
    assert "\n" not in str(caught.value)


def test_a_registered_layer_that_returns_a_dict_is_told_as_such() -> None:
    class Named(Conv1D):
        def forward(self, inputs: Tensor) -> Any:
            return {"rows": super().forward(inputs)}

    model = build(Named(3, 4))
    optimizer = KFAC(model, layers={Named: CONV1D})
    message = "the LayerRule layer '0' must return a tensor or a tuple of tensors, got dict"
    with pytest.raises(ValueError, match=f"^{message}$"), optimizer.capture():
        model(randn(5, 3))
