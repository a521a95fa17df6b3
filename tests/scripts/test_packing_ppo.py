"""MaskablePPO on bin packing plays with our networks and keeps to the masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("sb3_contrib")

from acktr.envs import MASK, make_vec
from acktr.runs.folder import RunFolder
from scripts.examples.packing.maskable_ppo import ENV, Settings, build, main
from scripts.peers.runs import Job, is_finished, make

SMALL = Settings(num_envs=2, n_steps=8, batch_size=8, n_epochs=2)
JOB = Job(
    peer="maskable-ppo",
    env=ENV,
    seed=0,
    total_timesteps=32,
    eval_episodes=2,
    settings=SMALL,
    source="a test",
)


def test_the_policy_is_our_networks_under_the_mask():
    envs = make_vec(ENV, 2, seed=0)
    model, player = build(JOB, envs)
    observations, infos = envs.reset(seed=0)
    masks = infos[MASK]
    ours = model.policy.features_extractor
    assert sum(p.numel() for p in model.policy.parameters()) == sum(
        p.numel() for p in [*ours.actor.parameters(), *ours.critic.parameters()]
    )
    inputs = torch.as_tensor(observations)
    with torch.no_grad():
        logits = ours.actor(inputs).masked_fill(~torch.as_tensor(masks), -torch.inf)
        actions, values, log_prob = model.policy(inputs, action_masks=masks)
    wanted = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    torch.testing.assert_close(log_prob, wanted)
    torch.testing.assert_close(values, ours.critic(inputs))
    assert np.array_equal(player.act(observations, True, masks), logits.argmax(-1).numpy())
    envs.close()


def test_a_run_is_made_once(tmp_path, capsys):
    line = make(JOB, tmp_path, ["a", "command"], build)
    assert "done: maskable-ppo" in line and is_finished(JOB, tmp_path)
    folder = RunFolder.open(JOB.path(tmp_path))
    assert folder.read_config()["n_steps"] == 8 and folder.last_evaluation() == 32
    assert main(["--total-timesteps", "0"]) == 2
    assert "needs an integer" in capsys.readouterr().err
