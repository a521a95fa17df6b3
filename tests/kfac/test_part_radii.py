"""Every part of a sum has a radius of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    GaussianLoss,
    SumLoss,
    dense_fisher,
)
from acktr.kfac.fisher.graph import own_parameters
from acktr.kfac.trust import part_scales
from tests.kfac.test_radius import LOSS, Heads, change, net, settings, take
from tests.tools.kfac import build, parameters, randn, same, set_gradients


def test_part_scales_fill_every_radius_and_leave_none() -> None:
    roots = randn(200, 3, 2, 2, seed=1) * torch.tensor([1.0, 30.0]).double()
    clips = torch.tensor([1.0, 0.1, torch.inf]).double()
    for root in roots:
        forms = root @ root.mT
        s, *own = part_scales(forms, clips).tolist()
        assert 0 < s <= 1
        for form, clip, x in zip(forms, clips.tolist(), own, strict=True):
            vector = torch.tensor([s, x]).double()
            used = float(vector @ form @ vector)
            assert used <= clip * (1 + 1e-5)
            assert x == 1 or used == pytest.approx(clip, rel=1e-5)  # as far as it goes


def flat_parts(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The Fisher matrices of policy and value, by parts of the output alone."""

    class Only(nn.Module):
        def __init__(self, part: int) -> None:
            super().__init__()
            self.net, self.part = model, part

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)[self.part]
            return out

    return dense_fisher(Only(0), (x,), LOSS), dense_fisher(Only(1), (x,), GaussianLoss())


@pytest.mark.parametrize("wild", [1.0, 1e4])
@pytest.mark.parametrize("weights", [None, (1.0, 0.25)])
def test_each_part_has_its_radius_and_a_wild_critic_does_not_starve_the_policy(
    wild: float, weights: tuple[float, float] | None
) -> None:
    loss = SumLoss(parts=(LOSS, GaussianLoss()), weights=weights)
    spent: dict[str, list[float]] = {}
    for name, clip in (("parts", (1e-6, 3e-6)), ("one", 4e-6)):
        (model,), x = build(Heads()), randn(9, 4)
        optimizer = KFAC(model, settings(kl_clip=clip, lr=1.0))
        policy, value = flat_parts(model, x)
        with optimizer.capture() as captured:
            output = model(x)
        optimizer.observe(captured, output, loss)
        set_gradients(model)
        for parameter in model.value.parameters():
            assert parameter.grad is not None
            parameter.grad *= wild
        before = parameters(model)
        optimizer.step()
        step = change(before, model)
        spent[name] = [float(step @ fisher @ step) / 2 for fisher in (policy, value)]
        info = optimizer.last_step
        assert info is not None
        if name == "parts":
            assert info.part_kl is not None
            assert info.part_kl.tolist() == pytest.approx(spent[name], rel=1e-8)
            assert float(info.predicted_kl) == pytest.approx(sum(spent[name]), rel=1e-8)
    room = 0.01  # (1 - momentum)^2: the first of many steps of one direction
    policy_kl, value_kl = spent["parts"]
    assert policy_kl == pytest.approx(0.5e-6 * room, rel=1e-8)
    assert value_kl <= 1.5e-6 * room * (1 + 1e-8)
    if wild > 1:
        assert spent["one"][0] < 0.01 * policy_kl


def test_own_parameters_are_those_of_one_part_alone() -> None:
    (model,) = build(Heads())
    own = own_parameters(model(randn(3, 4)), dict(model.named_parameters()))
    wanted = {
        n: 1 if n.startswith("policy") else 2
        for n, _ in model.named_parameters()
        if "trunk" not in n
    }
    assert own == wanted


def test_radii_for_parts_need_a_loss_with_them() -> None:
    model = net("mlp")
    optimizer = KFAC(model, settings(kl_clip=(1e-3, None)))
    before = parameters(model)
    with pytest.raises(ValueError, match="2 radii, the output 1 parts"):
        take(optimizer, model, randn(9, 4))
    assert same(parameters(model), before)
    for wrong in ((), (0.0, 1.0)):
        with pytest.raises(ValueError, match="kl_clip"):
            settings(kl_clip=wrong)
    with pytest.raises(ValueError, match='quadratic="corrected"'):
        settings(kl_clip=(1.0,), quadratic="exact")
    with pytest.raises(ValueError, match="one kl_clip"):
        KFAC(model, settings(kl_clip=(1.0,)), step_rule="quadratic_model")
