"""Evaluations in environments that somebody else made."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from acktr.envs import EnvWarning, GuardedVectorEnv
from acktr.evaluate import evaluate
from tests.tools.toys import CountingEnv


class Player:
    """Always the same action."""

    def act(self, observations: Any, deterministic: bool) -> NDArray[Any]:
        return np.zeros(len(observations), np.int64)


class Deaf(SyncVectorEnv):
    """A vector environment that resets all environments whatever it is asked for."""

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return super().reset(seed=seed)


@pytest.mark.parametrize("kind", [SyncVectorEnv, Deaf])
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_environments_that_know_no_reset_mask_are_told(kind: Any, mode: AutoresetMode) -> None:
    """Where an episode is cut short the others must go on: their returns would be of two."""
    inside = [lambda n=n: CountingEnv(terminate_at=n) for n in (4, 9)]
    envs = GuardedVectorEnv(kind(inside, autoreset_mode=mode), "counting", 0, foreign=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = evaluate(Player(), envs, 4, seed=0, max_episode_steps=6)
    assert found.cut > 0
    if kind is Deaf:
        assert {each.category for each in told} == {EnvWarning}
        assert "environments that the mask leaves out" in str(told[0].message)
        assert told[0].filename == __file__
    else:
        assert not told
        assert sorted(found.lengths) == [4, 4, 6, 6]
