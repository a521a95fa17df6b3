"""Arguments of environments that are seen by their pictures: they reach what is behind, or fail."""

from __future__ import annotations

from contextlib import closing
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest

from acktr.envs import (
    EnvError,
    PixelSettings,
    describe,
    drawer,
    found_masks,
    make_single,
    make_vec,
    rendering,
)
from tests.envs.test_pixels import pictures_of


def made(env_id: str, env_kwargs: dict[str, Any], **settings: Any) -> gymnasium.Env[Any, Any]:
    chosen = PixelSettings(**{"size": 16, **settings})
    return make_single(env_id, render_mode=None, env_kwargs=env_kwargs, pixels=chosen)


def steps_to_the_end(env: gymnasium.Env[Any, Any], most: int) -> int | None:
    """None: it does not end in so many."""
    env.reset(seed=0)
    env.action_space.seed(0)
    for count in range(1, most + 1):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            assert truncated
            return count
    return None


@pytest.mark.usefixtures("drawn")
class TestMuJoCo:
    @pytest.mark.parametrize(
        ("limit", "skip", "steps"),
        [(200, 1, 200), (20, 2, 10), (20, 3, 7), (-1, 50, None)],
    )
    def test_the_time_limit_that_is_asked_for(
        self, limit: int, skip: int, steps: int | None
    ) -> None:
        """It counts steps of the environment behind; -1 is none, so that 450 steps end nothing."""
        given = {"max_episode_steps": limit}
        with closing(made("Pixels/Reacher-v5", given, frame_skip=skip)) as env:
            assert steps_to_the_end(env, most=(steps or 8) + 1) == steps
            layer: Any = env
            while layer is not pictures_of(env):  # none around the pictures
                assert not isinstance(layer, gymnasium.wrappers.TimeLimit)
                layer = layer.env
        facts = describe("Pixels/Reacher-v5", env_kwargs=given, pixels=PixelSettings(size=16))
        assert facts["max_episode_steps"] == limit

    @pytest.mark.parametrize(
        "given",
        [
            {"camera_name": "nonsense"},
            {"camera_id": -1},
            {"render_mode": "human"},
            {"width": 200, "height": 100},
            {"default_camera_config": {"distance": 30.0}},
        ],
    )
    def test_what_would_not_be_seen_is_refused(self, given: dict[str, Any]) -> None:
        with pytest.raises(EnvError, match=r"another renderer draws .* pixels.camera") as caught:
            made("Pixels/Hopper-v5", given)
        assert f"env_kwargs {', '.join(sorted(given))}: " in str(caught.value)

    def test_the_free_camera_may_be_set(self) -> None:
        given = {"default_camera_config": {"distance": 30.0}}
        with closing(made("Pixels/Hopper-v5", given, camera="free")) as env:
            env.reset(seed=0)
            assert pictures_of(env).told()["view"]["distance"] == 30.0

    @pytest.mark.parametrize("name", ["base", "settings", "env_kwargs"])
    def test_names_of_our_own_are_no_arguments(self, name: str) -> None:
        with pytest.raises(EnvError, match="unexpected keyword"):
            made("Pixels/Hopper-v5", {name: "Walker2d-v5"})

    def test_other_arguments_reach_the_environment(self) -> None:
        with closing(made("Pixels/Hopper-v5", {"ctrl_cost_weight": 0.5})) as env:
            assert env.unwrapped._ctrl_cost_weight == 0.5  # type: ignore[attr-defined]

    def test_samples_are_those_that_are_drawn(self) -> None:
        with closing(made("Pixels/Reacher-v5", {}, multisample=1)) as env:
            env.reset(seed=0)
            pixels = pictures_of(env)
            drawn = pixels._views[16]._drawing.offSamples
            assert pixels.told()["multisample"] == drawn
        assert describe("Pixels/Reacher-v5", pixels=PixelSettings(size=16))["multisample"] == 0

    def test_nothing_is_drawn_after_the_end(self) -> None:
        env = made("Pixels/Reacher-v5", {})
        env.reset(seed=0)
        env.close()
        with pytest.raises(EnvError, match="is closed"):
            env.render()

    def test_the_case_of_the_backend_makes_no_difference(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MUJOCO_GL", rendering.choose_backend().upper())
        with closing(made("Pixels/Reacher-v5", {})) as env:
            assert env.reset(seed=0)[0].any()

    def test_what_draws(self) -> None:
        assert drawer("Pixels/Hopper-v5") == rendering.drawn_by()


class Masked(gymnasium.Env[Any, Any]):
    """Allows action 1 alone at even steps, and action 0 alone at odd ones."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Dict(
        obs=gymnasium.spaces.Box(-1, 1, (2,), np.float32),
        action_mask=gymnasium.spaces.MultiBinary(2),
    )
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def _seen(self) -> dict[str, Any]:
        mask = np.array([self.count % 2, 1 - self.count % 2], np.int8)
        return {"obs": np.zeros(2, np.float32), "action_mask": mask}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        assert action == 1 - self.count % 2
        self.count += 1
        return self._seen(), 1.0, self.count == 5, False, {}

    def render(self) -> Any:
        return np.full((20, 20, 3), self.count, np.uint8)


@pytest.fixture
def masked() -> Any:
    gymnasium.register("PixelMasked-v0", entry_point=Masked)
    yield "Pixels/PixelMasked-v0"
    del gymnasium.registry["PixelMasked-v0"]


class TestOthers:
    def test_masks_in_an_observation_that_is_not_seen_are_kept(self, masked: str) -> None:
        envs = make_vec(masked, 2, pixels=PixelSettings(size=16), masks="auto")
        with closing(envs):
            _, infos = envs.reset()
            assert found_masks(envs).source == "info"
            for count in range(12):
                step = count % 5
                assert infos["action_mask"].tolist() == [[step % 2 == 1, step % 2 == 0]] * 2
                infos = envs.step(np.full(2, 1 - step % 2))[4]

    def test_a_render_mode_is_refused(self, masked: str) -> None:
        with pytest.raises(EnvError, match="no other render_mode than rgb_array"):
            made(masked, {"render_mode": "rgb_array"})

    def test_nothing_of_mujoco_draws(self, masked: str) -> None:
        assert drawer(masked) is None and drawer("CartPole-v1") is None
