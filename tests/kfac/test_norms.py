"""Second moments of small parameters: normalisations, lone biases, everything else."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    CategoricalLoss,
    Exact,
    GaussianLoss,
    KroneckerBlock,
    Preconditioner,
    SumLoss,
    UnsupportedParameterWarning,
)
from acktr.kfac.blocks.constant import PlainBlock
from tests.tools.exact import close, gap, observed, stored
from tests.tools.kfac import plain_config, randn
from tests.tools.losses import MAKERS, REDUCTIONS
from tests.tools.product_cases import filled

NORMS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "layer": ([nn.Linear(3, 4), nn.LayerNorm(4)], (6, 3)),
    "layer over positions": ([nn.Linear(3, 4), nn.LayerNorm(4)], (5, 2, 3)),
    "layer without bias": ([nn.Linear(3, 4), nn.LayerNorm(4, bias=False)], (5, 2, 3)),
    "layer over two dimensions": ([nn.Linear(3, 4), nn.LayerNorm((2, 4))], (5, 3, 2, 3)),
    "group": ([nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4)], (5, 2, 4, 3)),
    "group without positions": ([nn.Linear(3, 4), nn.GroupNorm(2, 4)], (6, 3)),
    "batch 1d": ([nn.Linear(3, 4), nn.BatchNorm1d(4)], (6, 3)),
    "batch 1d over positions": ([nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4)], (5, 2, 4)),
    "batch 2d": ([nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4)], (5, 2, 4, 3)),
    "batch 3d": ([nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)], (5, 2, 2, 3, 3)),
    "rms": ([nn.Linear(3, 4), nn.RMSNorm(4)], (6, 3)),
    "rms over positions": ([nn.Linear(3, 4), nn.RMSNorm(4, eps=0.1)], (5, 2, 3)),
    "rms over two dimensions": ([nn.Linear(3, 4), nn.RMSNorm((2, 4))], (5, 3, 2, 3)),
    "instance 1d": ([nn.Conv1d(2, 4, 2), nn.InstanceNorm1d(4, affine=True)], (5, 2, 4)),
    "instance 2d": ([nn.Conv2d(2, 4, 2), nn.InstanceNorm2d(4, affine=True)], (5, 2, 4, 3)),
    "instance 3d": (
        [nn.Conv3d(2, 4, 2), nn.InstanceNorm3d(4, affine=True, eps=0.1)],
        (5, 2, 2, 3, 3),
    ),
    "instance with running moments": (
        [nn.Conv2d(2, 4, 2), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)],
        (5, 2, 4, 3),
    ),
    "slopes": ([nn.Linear(3, 4), nn.PReLU(4)], (6, 3)),
    "one slope": ([nn.Linear(3, 4), nn.PReLU()], (5, 2, 3)),
    "slopes over positions": ([nn.Conv2d(2, 4, 2), nn.PReLU(4)], (5, 2, 4, 3)),
}


def with_norm(name: str) -> tuple[nn.Sequential, Tensor]:
    """A small net with that normalisation in the middle, in evaluation mode, and its inputs."""
    layers, shape = NORMS[name]
    inputs = randn(*shape, seed=3)
    layers = [*copy.deepcopy(layers), nn.Tanh(), nn.Flatten(), nn.LazyLinear(4)]
    model = nn.Sequential(*layers).double()
    model(inputs)
    found = filled(model).eval()
    assert isinstance(found, nn.Sequential)
    return found, inputs


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scale_and_shift_have_the_exact_block_for_any_batch(
    name: str, kind: str, reduction: Any
) -> None:
    model, inputs = with_norm(name)
    seen = observed(model, inputs, MAKERS[kind](reduction))
    close(stored(seen.vector("1")), seen.truth("1"))


HALVED = [name for name, (layers, _) in NORMS.items() if layers[1].weight.numel() > 1]


@pytest.mark.parametrize("name", HALVED)
def test_above_the_dense_limit_the_exact_diagonal_is_kept(name: str) -> None:
    model, inputs = with_norm(name)
    size = sum(p.numel() for p in model[1].parameters())
    whole = observed(model, inputs, CategoricalLoss(), dense_limit=size)
    diagonal = observed(model, inputs, CategoricalLoss(), dense_limit=size - 1)
    assert whole.vector("1").moment.mean().shape == (size, size)
    found = diagonal.vector("1").moment.mean()
    assert found.shape == (size,)
    close(found, whole.truth("1").diagonal())


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_a_frozen_half_leaves_the_exact_block_of_the_other(key: str) -> None:
    model, inputs = with_norm("layer over positions")
    getattr(model[1], "bias" if key == "weight" else "weight").requires_grad_(False)
    seen = observed(model, inputs, CategoricalLoss())
    assert seen.vector("1").names == (f"1.{key}",)
    close(stored(seen.block("1")), seen.truth("1"))


class TwiceNorm(nn.Module):
    """One normalisation that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.norm(self.norm(self.first(x)).tanh()))
        return output


def test_a_normalisation_used_twice_is_exact() -> None:
    seen = observed(filled(TwiceNorm()), randn(6, 3), CategoricalLoss())
    close(stored(seen.block("norm")), seen.truth("norm"))


@pytest.mark.parametrize("name", ["instance 1d", "instance 2d", "instance with running moments"])
def test_instance_normalisation_in_training_takes_every_sample_by_itself(name: str) -> None:
    model, inputs = with_norm(name)
    model.train()
    curvature = Preconditioner(model)
    with curvature.capture() as captured:
        output = model(inputs)
    curvature.observe(captured, output, CategoricalLoss(), source=Exact())
    block = curvature.stats["1"]
    apart, _ = with_norm(name)  # the same function without the running moments that it may keep
    apart[1] = type(model[1])(4, affine=True).double()
    apart[1].load_state_dict({key: model[1].state_dict()[key] for key in ("weight", "bias")})
    wanted = observed(apart, inputs, CategoricalLoss())
    close(stored(block), wanted.truth("1"))  # type: ignore[arg-type]


def test_layers_without_parameters_of_their_own_have_no_block() -> None:
    plain = nn.RMSNorm(4, elementwise_affine=False), nn.InstanceNorm1d(2)
    seen = observed(
        filled(nn.Sequential(nn.Linear(3, 4), *plain, nn.Flatten(), nn.Linear(8, 3))),
        randn(5, 2, 3),
        CategoricalLoss(),
    )
    assert sorted(seen.curvature.stats) == ["0", "4"]


# --- batch normalisation in training --------------------------------------------------------------


def test_in_training_the_batch_statistics_are_constants_of_the_rows() -> None:
    """The block is that of the net with the batch's own statistics frozen in."""
    model, inputs = with_norm("batch 1d")
    model.train()[0].requires_grad_(False)  # in whose rows the samples meet
    seen = observed(model, inputs, CategoricalLoss())
    frozen, _ = with_norm("batch 1d")
    hidden = frozen[0](inputs).detach()
    frozen[1].running_mean, frozen[1].running_var = hidden.mean(0), hidden.var(0, unbiased=False)
    wanted = observed(frozen.eval(), inputs, CategoricalLoss())
    close(stored(seen.block("1")), wanted.truth("1"))
    model.eval()
    assert gap(stored(seen.block("1")), seen.truth("1")) > 0.05


def test_training_leaves_the_running_statistics_to_the_forward_pass() -> None:
    model, inputs = with_norm("batch 1d")
    model.train()[0].requires_grad_(False)
    reference, _ = with_norm("batch 1d")
    reference.train()(inputs)
    observed(model, inputs, CategoricalLoss())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, reference.get_buffer(name))


def test_rows_belong_to_the_forward_pass_whatever_the_module_does_after_it() -> None:
    for training in (False, True):
        model, inputs = with_norm("batch 1d")
        model[0].requires_grad_(False)  # in whose rows the samples meet in training
        wanted = observed(model.train(training), inputs, CategoricalLoss())
        model, _ = with_norm("batch 1d")
        model[0].requires_grad_(False)
        curvature = Preconditioner(model.train(training))
        with curvature.capture() as captured:
            output = model(inputs)
        model.train(not training)
        shifted = {n: 3 * b.double() + 1 for n, b in model[1].named_buffers() if "running" in n}
        for buffer, value in shifted.items():
            setattr(model[1], buffer, value)
        curvature.observe(captured, output, CategoricalLoss(), source=Exact())
        found = curvature.stats["1"].moment.mean()  # type: ignore[union-attr]
        close(found, stored(wanted.block("1")))


class ChannelNorm(nn.LayerNorm):
    """Normalises channels in the second place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("side", [4, 5])
def test_a_subclass_that_changes_the_layout_is_no_normalisation(side: int) -> None:
    """It has the exact block of any other parameters; with side 4 no shape would tell."""
    model = filled(nn.Sequential(nn.Conv2d(2, 4, 1), ChannelNorm(4), nn.Flatten(), nn.Tanh()))
    inputs = randn(3, 2, side, side)
    seen = observed(model, inputs, CategoricalLoss(), small_parameters="dense")
    assert sorted(seen.curvature.stats) == ["0", "small_parameters"]
    close(stored(seen.block("small_parameters")), seen.truth("small_parameters"))


# --- lone biases ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 4), (6, 3)),
        (nn.Linear(3, 4), (5, 2, 3)),
        (nn.Conv1d(2, 4, 2), (5, 2, 4)),
        (nn.Conv2d(4, 4, 2, groups=2), (5, 4, 4, 3)),
        (nn.Conv3d(2, 4, 2), (5, 2, 2, 3, 3)),
    ],
    ids=["linear", "positions", "conv1d", "conv2d", "conv3d"],
)
def test_the_bias_of_a_frozen_weight_has_its_exact_block(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    inputs = randn(*shape, seed=3)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(4)).double()
    model(inputs)
    filled(model)
    model[0].weight.requires_grad_(False)
    seen = observed(model, inputs, CategoricalLoss())
    close(stored(seen.vector("0.bias")), seen.truth("0.bias"))
    small = observed(model, inputs, CategoricalLoss(), dense_limit=3)
    close(small.vector("0.bias").moment.mean(), seen.truth("0.bias").diagonal())


# --- everything else ------------------------------------------------------------------------------


class Own(nn.Module):
    """Parameters of its own between layers that have blocks, and several kinds of output."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.scale = nn.Parameter(torch.zeros(6))
        self.mixing = nn.Parameter(torch.zeros(6, 6))
        self.last = nn.Parameter(torch.zeros(6, 6, 8))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh() * self.scale
        y = torch.einsum("ni,nj,ijk->nk", hidden, hidden @ self.mixing, self.last).tanh()
        views = {
            "plain": y,
            "slice": y[:, 1:5],
            "transposed": y.reshape(len(y), 2, 4).mT,
            "permuted": y.reshape(len(y), 2, 2, 2).permute(0, 3, 1, 2),
            "expanded": y[:, None].expand(-1, 2, -1),
            "split": y.chunk(2, -1)[1],
            "reshaped": y.reshape(len(y), 2, 4),
        }
        return views[self.kind]


VIEWS = ["plain", "slice", "transposed", "permuted", "expanded", "split", "reshaped"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", VIEWS)
def test_small_parameters_have_the_exact_block_of_any_net(kind: str, reduction: Any) -> None:
    model, loss = filled(Own(kind)), CategoricalLoss(reduction=reduction)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnsupportedParameterWarning)
        dense = observed(model, randn(5, 3), loss, small_parameters="dense")
    truth = dense.truth("small_parameters")
    assert dense.vector("small_parameters").names == ("scale", "mixing", "last")
    close(stored(dense.block("small_parameters")), truth)
    limited = observed(
        model, randn(5, 3), loss, small_parameters="dense", dense_limit=len(truth) - 1
    )
    assert sorted(limited.curvature.stats) == ["first", "last", "mixing", "scale"]


class OwnHeads(nn.Module):
    """Parameters of its own behind a policy and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.zeros(4))
        self.policy = nn.Parameter(torch.zeros(4, 6))
        self.value = nn.Parameter(torch.zeros(4, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = (self.trunk(x) * self.scale).tanh()
        return (hidden @ self.policy).reshape(-1, 2, 3), hidden @ self.value


def test_small_parameters_of_a_net_with_two_outputs_are_exact() -> None:
    loss = SumLoss(parts=(CategoricalLoss(), GaussianLoss(std=0.4)), weights=(0.6, 1.7))
    seen = observed(filled(OwnHeads()), randn(5, 3), loss, small_parameters="dense")
    truth = seen.truth("small_parameters")
    close(stored(seen.block("small_parameters")), truth)
    assert float(truth.diagonal().min()) > 0


class InPlaceEnd(nn.Module):
    """The output is the view of a layer's, changed in place after the layer returned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x * self.scale)
        return output.mul_(2).sigmoid_()


def test_small_parameters_behind_an_in_place_output_are_exact() -> None:
    model = filled(InPlaceEnd())
    seen = observed(model, randn(4, 2, 3), CategoricalLoss(), small_parameters="dense")
    close(stored(seen.block("small_parameters")), seen.truth("small_parameters"))


def test_small_parameters_in_a_net_of_unsupported_layers() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Bilinear(2, 2, 3)
            self.slope = nn.PReLU(3)
            self.head = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.head(self.slope(self.pair(x, x.tanh())))
            return output

    seen = observed(filled(Mixed()), randn(4, 2), CategoricalLoss(), small_parameters="dense")
    assert seen.vector("small_parameters").names == ("pair.weight", "pair.bias")
    close(stored(seen.block("small_parameters")), seen.truth("small_parameters"))


def test_without_curvature_small_parameters_follow_their_gradient_and_are_named() -> None:
    with pytest.warns(UnsupportedParameterWarning, match="scale, mixing, last"):
        curvature = Preconditioner(filled(Own()), plain_config(small_parameters="gradient"))
    plain = [b.names[0] for b in curvature.blocks if isinstance(b, PlainBlock)]
    assert plain == ["scale", "mixing", "last"]
    assert [b.name for b in curvature.blocks if isinstance(b, KroneckerBlock)] == ["first"]


# --- inverses -------------------------------------------------------------------------------------


def test_the_step_solves_the_dense_damped_system() -> None:
    model = filled(Own())
    seen = observed(
        model, randn(5, 3), GaussianLoss(), Exact(), small_parameters="dense", damping=0.07
    )
    model(seen.inputs).square().sum().backward()
    block = seen.vector("small_parameters")
    matrix = stored(block) + 0.07 * torch.eye(len(stored(block))).double()
    seen.curvature.refresh()
    gradients = seen.curvature.gradients()
    step = seen.curvature.direction(gradients)
    flat = torch.cat([gradients[name].flatten() for name in block.names])
    found = torch.cat([step[name].flatten() for name in block.names])
    assert gap(found, torch.linalg.solve(matrix, flat)) < 1e-10


def test_a_norm_far_beyond_the_dense_limit_is_never_a_full_matrix() -> None:
    model = nn.Sequential(nn.Linear(3, 2000), nn.LayerNorm(2000), nn.Linear(2000, 2)).double()
    seen = observed(model, randn(4, 3), GaussianLoss())
    assert seen.vector("1").moment.mean().shape == (4000,)
