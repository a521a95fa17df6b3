"""Measures how often one core steps and draws a MuJoCo environment, ours and Gymnasium's way."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from acktr.envs import PixelSettings, lookup, make_single
from scripts.bench.cases import Case, Timing
from scripts.bench.measure import Windows


def measure_drawing(case: Case, timing: Timing) -> dict[str, Any]:
    """Steps per second, with random actions and a picture each."""
    size, ours = case.settings["size"], case.settings["by"] == "ours"
    env: Any
    if ours:
        env = make_single(case.env, pixels=PixelSettings(size=size), render_mode=None)
    else:
        base = lookup(case.env).kwargs["base"]
        env = make_single(base, env_kwargs={"width": size, "height": size})
    with closing(env):
        env.reset(seed=0)
        env.action_space.seed(0)
        windows, count = Windows(timing), 0
        while not windows.done:
            *_, terminated, truncated, _ = env.step(env.action_space.sample())
            if not ours:
                env.render()
            count += 1
            windows.end_update(count)
            if terminated or truncated:
                env.reset()
        return windows.result()
