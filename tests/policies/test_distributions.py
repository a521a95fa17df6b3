"""Action distributions against closed forms, torch.distributions, and Monte Carlo."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.func import hessian

from acktr.policies.distributions import ActionHead, action_head, to_environment

SPACES: dict[str, gymnasium.Space] = {
    "discrete": spaces.Discrete(4),
    "gaussian": spaces.Box(-1, 1, (3,), np.float64),
    "multi-discrete": spaces.MultiDiscrete([2, 3, 4]),
    "multi-binary": spaces.MultiBinary(3),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def width(head: ActionHead) -> int:
    return head.outputs * (2 if head.gaussian else 1)


def parameters(head: ActionHead, rows: int = 1, seed: int = 0) -> Tensor:
    drawn = torch.randn(rows, width(head), generator=generator(seed), dtype=torch.float64)
    return 0.7 * drawn


def reference(name: str, params: Tensor) -> torch.distributions.Distribution:
    td = torch.distributions
    if name == "discrete":
        return td.Categorical(logits=params)
    if name == "multi-binary":
        return td.Independent(td.Bernoulli(logits=params), 1)
    mean, log_std = params.chunk(2, -1)
    return td.Independent(td.Normal(mean, log_std.exp()), 1)


@pytest.mark.parametrize("name", ["discrete", "gaussian", "multi-binary"])
def test_agrees_with_torch_distributions(name: str) -> None:
    head = action_head(SPACES[name])
    params, other = parameters(head, 5), parameters(head, 5, seed=1)
    ours, theirs = head.make(params), reference(name, params)
    actions = ours.sample(ours.noise(generator()))
    expected = theirs.log_prob(actions if name != "multi-binary" else actions.double())
    torch.testing.assert_close(ours.log_prob(actions), expected)
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    kl = torch.distributions.kl_divergence(theirs, reference(name, other))
    torch.testing.assert_close(ours.kl(other), kl)
    assert (
        torch.equal(ours.kl(params), torch.zeros(5).double()) or ours.kl(params).abs().max() < 1e-14
    )


def test_multi_discrete_is_a_product_of_categoricals() -> None:
    head = action_head(SPACES["multi-discrete"])
    params, other = parameters(head, 5), parameters(head, 5, seed=1)
    dist = head.make(params)
    actions = dist.sample(dist.noise(generator()))
    cuts = [slice(0, 2), slice(2, 5), slice(5, 9)]
    parts = [torch.distributions.Categorical(logits=params[:, cut]) for cut in cuts]
    others = [torch.distributions.Categorical(logits=other[:, cut]) for cut in cuts]
    log_prob = sum(part.log_prob(actions[:, i]) for i, part in enumerate(parts))
    torch.testing.assert_close(dist.log_prob(actions), log_prob)
    torch.testing.assert_close(dist.entropy(), sum(part.entropy() for part in parts))
    pairs = zip(parts, others, strict=True)
    kl = sum(torch.distributions.kl_divergence(p, q) for p, q in pairs)
    torch.testing.assert_close(dist.kl(other), kl)


@pytest.mark.parametrize("name", SPACES)
def test_samples_follow_the_log_probabilities(name: str) -> None:
    """E[score] = 0 within 4 standard errors, and the mode has the largest probability."""
    head = action_head(SPACES[name])
    params = parameters(head)
    rows = params.repeat(20_000, 1).requires_grad_()
    dist = head.make(rows)
    actions = dist.sample(dist.noise(generator(3)))
    (scores,) = torch.autograd.grad(dist.log_prob(actions).sum(), rows)
    error = scores.std(0) / len(scores) ** 0.5
    assert ((scores.mean(0).abs()) <= 4 * error).all()
    assert (
        head.make(params).log_prob(head.make(params).mode()) >= dist.log_prob(actions).max() - 1e-12
    ).all()


@pytest.mark.parametrize("name", SPACES)
def test_sampled_fisher_converges_to_the_closed_form(name: str) -> None:
    """E[score score^T] from samples equals the metric's matrix within 4 standard errors."""
    head = action_head(SPACES[name])
    params = parameters(head)
    rows = params.repeat(40_000, 1).requires_grad_()
    dist = head.make(rows)
    actions = dist.sample(dist.noise(generator(5)))
    (scores,) = torch.autograd.grad(dist.log_prob(actions).sum(), rows)
    products = scores[:, :, None] * scores[:, None, :]
    error = products.std(0) / len(products) ** 0.5 + 1e-12
    exact = metric_matrix(head, params)
    assert ((products.mean(0) - exact).abs() <= 4 * error).all()


def metric_matrix(head: ActionHead, params: Tensor) -> Tensor:
    """F from the quadratic form by polarisation."""
    basis = torch.eye(width(head), dtype=torch.float64)
    dist = head.make(params)
    q = torch.stack([dist.fisher_quadratic(e[None])[0] for e in basis])
    pairs = [[dist.fisher_quadratic((a + b)[None])[0] for b in basis] for a in basis]
    return (torch.stack([torch.stack(row) for row in pairs]) - q[:, None] - q[None, :]) / 2


@pytest.mark.parametrize("name", SPACES)
def test_metric_is_the_hessian_of_the_kl(name: str) -> None:
    head = action_head(SPACES[name])
    params = parameters(head)
    second = hessian(lambda shifted: head.make(params).kl(shifted[None])[0])(params[0])
    torch.testing.assert_close(metric_matrix(head, params), second, rtol=1e-9, atol=1e-10)


def test_closed_forms_of_the_specification() -> None:
    p = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    categorical = action_head(spaces.Discrete(3))
    exact = torch.diag(p[0]) - torch.outer(p[0], p[0])
    torch.testing.assert_close(metric_matrix(categorical, p.log()), exact)
    gaussian = action_head(spaces.Box(-1, 1, (2,)))
    log_std = torch.tensor([0.5, -1.0], dtype=torch.float64)
    params = torch.cat([torch.zeros(2).double(), log_std])[None]
    expected = torch.diag(torch.cat([(-2 * log_std).exp(), torch.full((2,), 2.0).double()]))
    torch.testing.assert_close(metric_matrix(gaussian, params), expected)


def test_environment_actions_respect_the_space() -> None:
    box = spaces.Box(np.array([[-1.0, 0.0]]), np.array([[1.0, 2.0]]), dtype=np.float32)
    given = np.array([[5.0, -5.0], [0.5, 1.5]])
    expected = np.array([[[1.0, 0.0]], [[0.5, 1.5]]], np.float32)
    np.testing.assert_array_equal(to_environment(given, box), expected)
    assert to_environment(given, box).dtype == np.float32
    shifted = to_environment(np.array([0, 2]), spaces.Discrete(3, start=-1))
    np.testing.assert_array_equal(shifted, [-1, 1])
    bits = to_environment(np.array([[0, 1, 1]]), spaces.MultiBinary(3))
    assert spaces.MultiBinary(3).contains(bits[0])
    assert spaces.MultiDiscrete([2, 3]).contains(
        to_environment(np.array([[1, 2]]), spaces.MultiDiscrete([2, 3]))[0]
    )


def test_unsupported_action_space_is_refused() -> None:
    with pytest.raises(ValueError, match="unsupported action space Text"):
        action_head(spaces.Text(3))


@pytest.mark.parametrize("name", SPACES)
def test_noise_of_a_batch_gives_its_samples_in_parts(name: str) -> None:
    """The noise is drawn once, without the parameters, and any rows of it act on theirs."""
    head = action_head(SPACES[name])
    params = parameters(head, 7)
    dist = head.make(params)
    actions = dist.sample(dist.noise(generator(3)))
    noise = head.noise(7, generator(3), torch.float64)
    cuts = (slice(0, 3), slice(3, 7))
    parts = [head.make(params[cut]).sample(noise[cut]) for cut in cuts]
    assert torch.equal(torch.cat(parts), actions)
