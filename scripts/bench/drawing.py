"""Measures how many pictures of a MuJoCo environment one core draws, ours and Gymnasium's."""

from __future__ import annotations

import os
from contextlib import closing
from typing import Any

import gymnasium

from acktr.envs import PixelSettings, lookup, make_single
from acktr.envs.rendering import choose_backend, prepare_rendering
from acktr.envs.view import View
from scripts.bench.cases import Case, Timing
from scripts.bench.measure import Windows

_MOVES = 10
"""Pictures between two steps, by which the robot moves."""


def measure_drawing(case: Case, timing: Timing) -> dict[str, Any]:
    """Pictures per second, without the steps between them as far as these cost little."""
    size, ours = case.settings["size"], case.settings["by"] == "ours"
    os.environ["LP_NUM_THREADS"] = "0"  # Mesa draws in the thread that asks
    choose_backend()
    if ours:
        env: Any = make_single(case.env, pixels=PixelSettings(size=size), render_mode=None)
    else:
        base = lookup(case.env).kwargs["base"]
        env = gymnasium.make(base, render_mode="rgb_array", width=size, height=size)
        prepare_rendering(env)
    with closing(env):
        env.reset(seed=0)
        env.action_space.seed(0)
        draw = View(env.unwrapped, size, "auto", False, 0).draw if ours else env.render
        windows, count = Windows(timing), 0
        while not windows.done:
            draw()
            count += 1
            windows.end_update(count)
            if count % _MOVES == 0:
                env.unwrapped.step(env.action_space.sample())
        return {"rates": windows.rates, "updates": windows.updates, "seconds": windows.seconds}
