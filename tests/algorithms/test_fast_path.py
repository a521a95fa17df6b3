"""The Atari update in float32 follows a plain float64 implementation written out here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional

from acktr.algorithms.acktr import ACKTRLearner
from acktr.config import Config, preset
from acktr.envs import picture
from acktr.policies.build import build_network
from acktr.policies.distributions import action_head
from acktr.policies.images import FrameStore
from acktr.rollout import Batch

GAME = "BreakoutNoFrameskip-v4"
SPACE = spaces.Box(0, 255, (4, 44, 44), np.uint8)
STEPS, ENVS, ACTIONS, UPDATES = 6, 8, 4, 10
ROWS = STEPS * ENVS


class Reference:
    """ACKTR for a shared convolutional network, by the formulas and nothing else.

    Joint Fisher of policy and value (Wu et al. 2017, section 3.1), factors with patches of
    ``unfold``, bias-corrected averages, dense inverses, q = g . U, momentum after the rescaling.
    """

    def __init__(self, network: nn.Module, config: Config) -> None:
        self.theta = {n: p.detach().double().clone() for n, p in network.named_parameters()}
        modules = dict(network.named_modules())
        self.layers = [n for n, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)]
        self.strides = {
            n: modules[n].stride[0] if isinstance(modules[n], nn.Conv2d) else 0 for n in self.layers
        }
        self.config = config
        self.velocity = {n: torch.zeros_like(p) for n, p in self.theta.items()}
        self.averages: dict[str, list[Any]] = {n: [0.0, 0.0] for n in self.layers}
        self.weight = 0.0
        self.steps = 0
        self.observed = 0
        self.inverses: dict[str, Any] = {}

    def forward(
        self, images: Tensor, theta: dict[str, Tensor], seen: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        hidden = images
        for name in self.layers:
            weight, bias = theta[f"{name}.weight"], theta[f"{name}.bias"]
            if self.strides[name]:
                output = functional.conv2d(hidden, weight, bias, self.strides[name])
            else:
                hidden = hidden.flatten(1)
                output = hidden @ weight.T + bias
            seen[name] = (hidden, output)
            if not name.startswith(("policy", "value")):
                hidden = output.relu()
        policy, value = (seen[n][1] for n in self.layers if n.startswith(("policy", "value")))
        return policy, value[:, 0]

    def update(self, images: Tensor, batch: dict[str, Tensor], lr: float) -> None:
        theta = {n: p.requires_grad_() for n, p in self.theta.items()}
        seen: dict[str, Any] = {}
        logits, values = self.forward(images, theta, seen)
        log_p = logits.log_softmax(-1)
        gumbel = -(-batch["noise"].log()).log()
        drawn = (log_p.detach() + gumbel).argmax(-1, keepdim=True)
        sigma = self.config.acktr.value_sigma
        target = values.detach() + sigma * batch["value_noise"]
        settings = self.config.acktr.actor
        warm = self.steps - settings.cold_steps
        if warm < 0 or warm % settings.stat_interval == 0:
            self.observe(seen, log_p, drawn, values, target)
        chosen = log_p.gather(1, batch["actions"][:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        loss = -(batch["advantages"] * chosen).mean() - self.config.ent_coef * entropy
        loss = loss + self.config.vf_coef * (values - batch["returns"]).square().mean()
        found = torch.autograd.grad(loss, list(theta.values()))
        self.theta = {n: p.detach() for n, p in theta.items()}
        self.move(dict(zip(theta, found, strict=True)), lr)

    def observe(
        self, seen: dict[str, Any], log_p: Tensor, drawn: Tensor, values: Tensor, target: Tensor
    ) -> None:
        settings, sigma = self.config.acktr.actor, self.config.acktr.value_sigma
        every = round(1 / settings.stat_fraction)
        rows = slice(self.observed % every, None, every)
        self.observed += 1
        fisher = -log_p.gather(1, drawn)[rows].sum()
        fisher = fisher + 0.5 * ((values - target) / sigma)[rows].square().sum()
        outputs = [seen[n][1] for n in self.layers]
        gradients = torch.autograd.grad(fisher, outputs, retain_graph=True)
        decay = settings.stat_decay
        for name, gradient in zip(self.layers, gradients, strict=True):
            inputs = seen[name][0].detach()[rows]
            for place, new in enumerate(self.factors(name, inputs, gradient[rows])):
                old = self.averages[name][place]
                self.averages[name][place] = decay * old + (1 - decay) * new
        self.weight = decay * self.weight + 1 - decay

    def factors(self, name: str, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        count = len(inputs)
        if self.strides[name]:
            kernel = self.theta[f"{name}.weight"].shape[-1]
            rows = functional.unfold(inputs, kernel, stride=self.strides[name]).mT
            rows = rows.reshape(-1, rows.shape[-1])
            gradient = gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1])
        else:
            rows = inputs
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        return rows.T @ rows / len(rows), gradient.T @ gradient / count

    def refresh(self) -> None:
        settings = self.config.acktr.actor
        for name in self.layers:
            a, g = (average / self.weight for average in self.averages[name])
            if settings.structure == "cholesky":
                pi = (a.diagonal().mean() / g.diagonal().mean()).sqrt()
                root = settings.damping**0.5
                self.inverses[name] = (
                    torch.linalg.inv(a + pi * root * torch.eye(len(a), dtype=a.dtype)),
                    torch.linalg.inv(g + root / pi * torch.eye(len(g), dtype=a.dtype)),
                )
            else:
                self.inverses[name] = (*torch.linalg.eigh(a), *torch.linalg.eigh(g))

    def precondition(self, name: str, gradient: Tensor) -> Tensor:
        if self.config.acktr.actor.structure == "cholesky":
            a, g = self.inverses[name]
            return g @ gradient @ a
        a, a_vectors, g, g_vectors = self.inverses[name]
        scale = g[:, None] * a + self.config.acktr.actor.damping
        return g_vectors @ ((g_vectors.T @ gradient @ a_vectors) / scale) @ a_vectors.T

    def move(self, gradients: dict[str, Tensor], lr: float) -> None:
        settings = self.config.acktr.actor
        if self.steps < settings.cold_steps:
            norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
            clip = min(1.0, settings.cold_max_grad_norm / (float(norm) + 1e-6))
            self.advance({n: clip * g for n, g in gradients.items()}, settings.cold_lr)
            return
        if self.steps == settings.cold_steps:
            self.velocity = {n: torch.zeros_like(v) for n, v in self.velocity.items()}
        if (self.steps - settings.cold_steps) % settings.refresh_interval == 0:
            self.refresh()
        step = {}
        for name in self.layers:
            weight = gradients[f"{name}.weight"]
            both = torch.cat([weight.flatten(1), gradients[f"{name}.bias"][:, None]], dim=1)
            solved = self.precondition(name, both)
            step[f"{name}.weight"] = solved[:, :-1].reshape(weight.shape)
            step[f"{name}.bias"] = solved[:, -1]
        q = sum(float((gradients[n] * u).sum()) for n, u in step.items())
        assert settings.kl_clip is not None
        nu = min(1.0, (settings.kl_clip / (lr * lr * q)) ** 0.5)
        self.advance({n: nu * u for n, u in step.items()}, lr * (1 - settings.momentum))

    def advance(self, step: dict[str, Tensor], rate: float) -> None:
        momentum = self.config.acktr.actor.momentum
        for name, update in step.items():
            self.velocity[name] = momentum * self.velocity[name] + update
            self.theta[name] = self.theta[name] - rate * self.velocity[name]
        self.steps += 1


def configuration(structure: Any, fraction: float, interval: int) -> Config:
    """The Atari preset with statistics of part of the data and a short beginning."""
    config, _ = preset(GAME)
    actor = dataclasses.replace(
        config.acktr.actor,
        stat_fraction=fraction,
        stat_interval=interval,
        cold_steps=2,
        refresh_interval=4,
        structure=structure,
    )
    acktr = dataclasses.replace(config.acktr, actor=actor)
    return dataclasses.replace(config, precision="float32", acktr=acktr)


@pytest.mark.parametrize(
    ("structure", "fraction", "interval"),
    [("kfac", 1.0, 1), ("kfac", 1.0, 2), ("cholesky", 1 / 3, 2)],
)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ten_updates_equal_the_reference(
    structure: str, fraction: float, interval: int, dtype: torch.dtype, limit: float, place: str
) -> None:
    """All parameters as one vector, within the limit of its size and 100 times that of its change.

    The float64 run says that both are one algorithm, the float32 run what the fast path loses.
    """
    config = configuration(structure, fraction, interval)
    torch.manual_seed(0)
    head = action_head(spaces.Discrete(ACTIONS))
    network = build_network(SPACE, head, config.network).to(dtype)
    reference = Reference(network, config)
    network = network.to(place)
    begun = flat(p.detach() for p in network.parameters())
    own, twin = (torch.Generator(place).manual_seed(1) for _ in range(2))
    learner = ACKTRLearner(network, head, config, own, nullcontext)
    draw = torch.Generator().manual_seed(2)
    seen = picture(SPACE)
    assert seen is not None
    store = FrameStore(seen, torch.device(place))
    for update in range(UPDATES):
        raw = torch.randint(256, (ROWS, *SPACE.shape), generator=draw, dtype=torch.uint8)
        drawn = {n: torch.randn(ROWS, generator=draw).to(dtype) for n in ("advantages", "returns")}
        actions = torch.randint(ACTIONS, (ROWS,), generator=draw)
        frames = store.room(STEPS, ENVS, dtype)
        for step in range(STEPS):
            store.put(raw[step * ENVS : (step + 1) * ENVS].numpy(), frames[step])
        there = {name: value.to(place) for name, value in drawn.items()}
        batch = Batch(frames.flatten(0, 1), actions.to(place), **there, values=there["returns"])
        learner.update(batch, update / 20)
        noise = {"noise": head.noise(ROWS, twin, dtype)}
        noise["value_noise"] = torch.randn(ROWS, generator=twin, dtype=dtype, device=place)
        wide = {name: value.double().cpu() for name, value in (drawn | noise).items()}
        lr = config.acktr.actor.lr * (1 - update / 20 / 1.1)
        reference.update(raw.double() / 255, wide | {"actions": actions}, lr)
    assert torch.equal(twin.get_state(), learner.generator.get_state())
    expected = flat(reference.theta[name] for name, _ in network.named_parameters())
    error = (flat(p.detach() for p in network.parameters()) - expected).norm()
    assert error <= limit * expected.norm()
    assert error <= 100 * limit * (expected - begun).norm()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.double().cpu().flatten() for tensor in tensors])
