"""A wrapper that gives a NaN or Inf once; when, the variable POISON of its process says.

Its value is "KIND NUMBER FILE": observation or reward, which step, and a file that is made then.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, SupportsFloat

import gymnasium
import numpy as np


class Poisoned(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment with one bad step."""

    steps = 0
    """Of all environments in this process."""

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step, and spoil what that gives when it is time to."""
        observation, reward, *rest = self.env.step(action)
        kind, number, mark = os.environ.get("POISON", "no 0 x").split()
        Poisoned.steps += 1
        if Poisoned.steps == int(number):
            Path(mark).touch()
            if kind == "reward":
                return observation, math.nan, *rest
            observation = np.array(observation)
            observation[0] = math.inf
        return observation, reward, *rest
