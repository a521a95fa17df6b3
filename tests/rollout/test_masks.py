"""Acting and collecting with action masks."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from acktr.config import NetworkConfig
from acktr.envs import GuardedVectorEnv, make_vec
from acktr.policies import action_head, build_network
from acktr.rollout import Acting, Collector, NonFiniteError, make_batch
from tests.rollout.test_acting import compiler
from tests.tools.masked import KINDS, MODES, MaskedEnv, shown_masks, sync
from tests.tools.toys import variant

CPU = torch.device("cpu")
kinds = pytest.mark.parametrize("nvec", KINDS.values(), ids=KINDS)


def acting(envs: Any, *, shared: bool = True, compiled: bool = False, place: str = "cpu") -> Acting:
    torch.manual_seed(0)
    head = action_head(envs.single_action_space)
    config = NetworkConfig(shared=shared, hidden=(8,), critic_hidden=(8,))
    network = build_network(envs.single_observation_space, head, config).to(place)
    return Acting(network, head, torch.Generator(place).manual_seed(1), nullcontext, compiled)


@kinds
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mode", [*MODES, "workers"])
def test_a_rollout_has_the_masks_that_its_actions_obeyed(
    mode: Any, shared: bool, nvec: tuple[int, ...]
) -> None:
    """The environment raises at a forbidden action; observations say which mask is theirs."""
    settings: dict[str, Any] = {"source": "info", "nvec": nvec, "start": 1}
    if mode == "workers":
        envs = make_vec(variant(MaskedEnv, settings), 4, env_workers=2)
    else:
        envs = GuardedVectorEnv(sync(mode, 4, **settings), "masked", 0, foreign=True)
    runner = Collector(envs, acting(envs, shared=shared))
    for _ in range(2):
        rollout = runner.collect(7)
        assert rollout.masks is not None
        shown = shown_masks(rollout.observations.numpy())
        np.testing.assert_array_equal(rollout.masks[rollout.valid], shown[rollout.valid])
        assert rollout.masks[~rollout.valid].all()
        assert rollout.valid.all() == (mode != AutoresetMode.NEXT_STEP)
        batch = make_batch(rollout, 0.99, 0.95, CPU)
        assert batch.masks is not None
        np.testing.assert_array_equal(batch.masks, shown_masks(batch.observations))
        starts = torch.tensor([0, *np.cumsum(nvec[:-1])])
        chosen = batch.actions.reshape(len(batch), -1) + starts
        assert batch.masks.gather(1, chosen).all()
    envs.close()


def test_masks_may_be_left_aside() -> None:
    envs = make_vec(variant(MaskedEnv, {"source": "info", "lenient": True}), 4)
    rollout = Collector(envs, acting(envs), masked=False).collect(5)
    assert rollout.masks is None
    assert make_batch(rollout, 0.99, 0.95, CPU).masks is None


def test_what_the_network_returns_is_checked_where_the_mask_hides_it() -> None:
    envs = make_vec(variant(MaskedEnv, {"source": "info"}), 4)
    runner = Collector(envs, acting(envs))
    runner.collect(2)  # infinite masked logits are no fault
    with torch.no_grad():
        runner.acting.network.policy.linear.bias[2] = torch.inf  # type: ignore[union-attr]
    runner._masks = np.array([[True, True, False, True, True]] * 4)
    with pytest.raises(NonFiniteError):
        runner.collect(1)


def test_environments_that_go_on_have_their_masks_back() -> None:
    envs: Any = GuardedVectorEnv(sync(MODES[0], 2, source="info"), "masked", 0, foreign=True)
    inner: Any = envs.unwrapped
    inner.state_dict, inner.load_state_dict = dict, lambda state: None
    runner = Collector(envs, acting(envs))
    runner.collect(3)
    state = runner.state_dict()
    later = Collector(envs, acting(envs))
    later.load_state_dict(state)
    rollout = later.collect(4)
    np.testing.assert_array_equal(rollout.masks, shown_masks(rollout.observations.numpy()))
    del state["masks"]  # as an earlier version wrote it
    later.load_state_dict(state)


@compiler
@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_acting_obeys_masks_too(place: str) -> None:
    envs = make_vec(variant(MaskedEnv, {"source": "info", "nvec": (3, 4)}), 4)
    plain, compiled = (acting(envs, compiled=which, place=place) for which in (False, True))
    observations, infos = envs.reset(seed=0)
    seen = torch.from_numpy(observations).to(place)
    masks = torch.from_numpy(infos["action_mask"]).to(place)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(3):
            torch.testing.assert_close(compiled(seen, masks), plain(seen, masks))
            masks = masks.roll(1, 0)
