"""A translated peer and our own algorithm do the same, from the first step to the update."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor, nn

from acktr.config import Config, from_dict, preset
from acktr.envs import make_vec
from acktr.rollout import Batch, gae
from acktr.train import Trainer
from scripts.peers.models import make_model
from scripts.peers.settings import kl_parts, read_settings
from scripts.peers.translate import translate
from tests.tools.peers import ours

ENV = "Reacher-v5"
Arrays = dict[str, NDArray[np.float32]]


class Recorder(BaseCallback):
    """Copies what was collected before each update, arrays (T, N, ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[Arrays] = []

    def _on_rollout_end(self) -> None:
        buffer = self.locals["rollout_buffer"]
        names = ("observations", "actions", "rewards", "values", "advantages", "returns")
        self.rollouts.append({name: np.array(getattr(buffer, name)) for name in names})

    def _on_step(self) -> bool:
        return True


class Pair:
    """Our trainer and the translated peer with the same weights."""

    def __init__(self, algo: str, changes: dict[str, Any], total: int) -> None:
        changes = {"env": ENV, "seed": 0, "total_timesteps": total} | changes
        self.config: Config = from_dict(ours(algo, changes))
        self.total = total
        self.trainer = Trainer(self.config, make_vec(ENV, self.config.num_envs, 0))
        peer = f"sb3-{algo}"
        settings = read_settings(peer, translate(peer, self.config, kl_parts(ENV)))
        envs = make_vec(ENV, settings.num_envs, 0)
        self.model, self.normalized = make_model(settings, envs, 0, total)
        with torch.no_grad():
            self.model.policy.action_net.weight.mul_(50)  # so that the trunk's gradient is not tiny
            for mine, theirs in self.parameters():
                mine.copy_(theirs)

    def parameters(self) -> list[tuple[Tensor, Tensor]]:
        network: Any = self.trainer.network
        assert not network.shared
        assert network.actor.head.log_std is not None
        policy: Any = self.model.policy
        mine = [network.actor.trunk, network.actor.head.linear, network.critic]
        theirs = [policy.mlp_extractor.policy_net, policy.action_net]
        theirs += [policy.mlp_extractor.value_net, policy.value_net]
        pairs = zip(flat(mine), flat(theirs), strict=True)
        return [*pairs, (network.actor.head.log_std, policy.log_std)]

    def learn(self) -> list[Arrays]:
        return learn(self.model, self.total)

    def batch(self, found: Arrays) -> Batch:
        """What the peer learns from, as we have it."""
        tensors = {name: torch.from_numpy(array).float() for name, array in found.items()}
        rows = {name: tensor.flatten(0, 1) for name, tensor in tensors.items()}
        return Batch(
            observations=rows["observations"],
            actions=rows["actions"],
            advantages=rows["advantages"],
            returns=rows["returns"],
            values=rows["values"],
        )


def flat(modules: list[nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters()]


def learn(model: OnPolicyAlgorithm, total: int) -> list[Arrays]:
    recorder = Recorder()
    model.learn(total, callback=recorder, log_interval=None)
    return recorder.rollouts


def test_rollouts_are_the_same() -> None:
    """Observations, scaled rewards, values, time limits and advantages, without action noise."""
    pair = Pair("a2c", {"num_steps": 120, "network.log_std_init": -20.0}, total=480)
    for moments in (pair.normalized.obs_rms, pair.normalized.ret_rms):
        moments.count = 0.0  # no samples of a prior, as in ours
    (theirs,) = pair.learn()
    config = pair.config
    pair.trainer.collector.reset(config.seed)
    mine = pair.trainer.collector.collect(config.num_steps)
    values, next_values = mine.values.numpy(), mine.next_values.numpy()
    advantages = gae(
        mine.rewards,
        values,
        next_values,
        mine.terminated,
        mine.ended,
        config.gamma,
        config.gae_lambda,
    )
    assert mine.ended.sum() == 2 * config.num_envs and not mine.terminated.any()
    bonus = np.where(mine.ended, config.gamma * next_values, 0)  # how the peer bootstraps
    assert np.abs(bonus[mine.ended]).max() > 0.2
    pairs = {
        "actions": mine.actions,
        "observations": mine.observations.numpy(),
        "values": values,
        "rewards": mine.rewards + bonus,
        "advantages": advantages,
        "returns": advantages + values,
    }
    # The peer's statistics hold the next episode's first observation before the last one's value.
    near = {"rewards": 2e-2, "advantages": 2e-2, "returns": 2e-2}
    for name, array in pairs.items():
        atol = near.get(name, 1e-3)
        np.testing.assert_allclose(array, theirs[name], atol=atol, err_msg=name)
    alive = ~mine.ended
    np.testing.assert_allclose(mine.rewards[alive], theirs["rewards"][alive], atol=1e-4)


@pytest.mark.parametrize("standardise", [False, True])
def test_a2c_updates_are_the_same(standardise: bool) -> None:
    """Several updates in a row: loss, clipping, RMSprop and its schedule."""
    changes = {"ent_coef": 0.01, "normalize_advantage": standardise, "num_steps": 50}
    changes["a2c.lr"] = 0.1
    pair = Pair("a2c", changes, total=800)
    before = [mine.detach().clone() for mine, _ in pair.parameters()]
    rollouts = pair.learn()
    assert len(rollouts) == 4
    for index, found in enumerate(rollouts):
        pair.trainer.learner.update(pair.batch(found), index * 200 / 800)
    # The sample's deviation in place of the population's changes advantages by 1/400.
    tolerance = 1e-2 if standardise else 1e-4
    for (mine, theirs), start in zip(pair.parameters(), before, strict=True):
        moved = (theirs - start).norm()
        assert moved > 1e-3
        assert (mine - theirs).norm() < tolerance * moved


def test_trpo_updates_are_the_same() -> None:
    """The policy's step up to the noise that the peer's conjugate gradient starts from."""
    changes = {"num_steps": 64, "trpo.critic.batch_size": None, "trpo.cg_iterations": 30}
    pair = Pair("trpo", changes, total=256)
    before = [mine.detach().clone() for mine, _ in pair.parameters()]
    (found,) = pair.learn()
    pair.trainer.learner.update(pair.batch(found), 0.0)
    for (mine, theirs), start in zip(pair.parameters(), before, strict=True):
        moved = (theirs - start).norm()
        assert moved > 1e-3
        assert (mine - theirs).norm() < 2e-2 * moved


@pytest.mark.parametrize("algo", ["a2c", "trpo"])
@pytest.mark.parametrize("env", ["Hopper-v5", "HalfCheetah-v5", "InvertedPendulum-v5"])
def test_our_presets_can_be_translated(algo: str, env: str) -> None:
    config, _ = preset(env, algo)
    peer = f"sb3-{algo}"
    settings = read_settings(peer, translate(peer, config, kl_parts(env)))
    assert (settings.num_envs, settings.num_steps) == (config.num_envs, config.num_steps)
    assert settings.network.hidden == config.network.hidden
