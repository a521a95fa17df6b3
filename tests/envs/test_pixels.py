"""Environments seen by their pictures: what is drawn, where, and that nothing else changes."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest

from acktr.envs import EnvError, PixelSettings, describe, lookup, make_single, make_vec, rendering
from acktr.envs.pixels import PixelEnv, shrunk
from acktr.envs.view import drawn_here
from tests.tools.command_line import environment


def single(env_id: str, **settings: Any) -> gymnasium.Env[Any, Any]:
    return make_single(env_id, render_mode=None, pixels=PixelSettings(**settings))


def pictures_of(env: Any) -> PixelEnv:
    while not isinstance(env, PixelEnv):
        env = env.env
    return env


def robot_pixels(env: gymnasium.Env[Any, Any]) -> int:
    """How many pixels differ from the same picture without the robot."""
    pixels, model = pictures_of(env), env.unwrapped.model  # type: ignore[attr-defined]
    robot, colors = model.geom_bodyid > 0, model.geom_rgba.copy()
    picture = pixels._picture().astype(int)
    model.geom_rgba[robot, 3] = 0.0
    background = pixels._picture().astype(int)
    model.geom_rgba[:] = colors
    return int((np.abs(picture - background).max(axis=2) > 30).sum())


@pytest.mark.usefixtures("drawn")
class TestView:
    @pytest.mark.parametrize("name", ["Ant", "HalfCheetah", "Hopper", "Swimmer", "Walker2d"])
    def test_the_robot_stays_in_the_picture(self, name: str) -> None:
        with closing(single(f"Pixels/{name}-v5")) as env:
            env.reset(seed=0)
            near, inner = robot_pixels(env), env.unwrapped
            position = inner.data.qpos.copy()  # type: ignore[attr-defined]
            position[0] += 20.0
            inner.set_state(position, inner.data.qvel.copy())  # type: ignore[attr-defined]
            assert near > 60
            assert robot_pixels(env) > near / 2
            assert env.render().shape == (480, 480, 3)  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        "name", ["Reacher", "InvertedPendulum", "InvertedDoublePendulum", "Pusher"]
    )
    def test_robots_that_stay_are_seen(self, name: str) -> None:
        with closing(single(f"Pixels/{name}-v5")) as env:
            env.reset(seed=0)
            assert robot_pixels(env) > 60

    def test_the_target_of_reacher_is_seen(self) -> None:
        """It is red, and where the state says: 0.55 m above the middle, 45 degrees, 64 pixels."""
        with closing(single("Pixels/Reacher-v5")) as env:
            picture = env.reset(seed=1)[0][..., -3:].astype(int)
            red = (picture[..., 0] > 80) & (picture[..., 1:].max(axis=2) < 60)
            rows, columns = np.nonzero(red)
            assert len(rows) >= 2
            metres = 2 * 0.55 * np.tan(np.radians(22.5)) / 64
            inner: Any = env.unwrapped
            x, y = inner.get_body_com("target")[:2]
            assert (columns.mean() - 31.5) * metres == pytest.approx(x, abs=metres)
            assert (31.5 - rows.mean()) * metres == pytest.approx(y, abs=metres)

    def test_quality_is_as_asked(self) -> None:
        with closing(single("Pixels/Hopper-v5", size=32)) as env:
            env.reset(seed=0)
            scene = pictures_of(env)._views[32]._scene
            model: Any = env.unwrapped.model  # type: ignore[attr-defined]
            assert (scene.flags[0], scene.flags[2]) == (0, 0)  # shadows, reflections
            assert model.vis.quality.offsamples == 0
            assert model.geom_size[0, 2] == 20.0

    def test_an_unknown_camera_is_named(self) -> None:
        with pytest.raises(EnvError, match=r"no camera 'behind'; it offers auto, free, track"):
            single("Pixels/Hopper-v5", camera="behind")


@pytest.mark.usefixtures("drawn")
class TestEnvironment:
    def test_physics_is_that_of_the_environment(self) -> None:
        """With three steps a picture: the same rewards in sum, bit for bit."""
        with (
            closing(single("Pixels/Walker2d-v5", size=16, frame_skip=3)) as seen,
            closing(make_single("Walker2d-v5", render_mode=None)) as plain,
        ):
            seen.reset(seed=4)
            plain.reset(seed=4)
            seen.action_space.seed(0)
            over, count = False, 0
            while not over:
                action = seen.action_space.sample()
                _, reward, terminated, truncated, info = seen.step(action)
                total, done, cut, told = 0.0, False, False, {}
                for _ in range(3):
                    if not (done or cut):
                        _, more, done, cut, told = plain.step(action)
                        total += float(more)
                assert (reward, terminated, truncated) == (total, done, cut)
                assert info["x_position"] == told["x_position"]
                over, count = terminated or truncated, count + 1
            assert count > 2

    def test_time_limit_counts_steps_of_the_environment(self) -> None:
        with closing(single("Pixels/Reacher-v5", size=16, frame_skip=4)) as env:
            env.reset(seed=0)
            ends = [env.step(env.action_space.sample())[3] for _ in range(13)]
            assert ends == [False] * 12 + [True]

    @pytest.mark.parametrize("blank", [False, True])
    def test_pictures_are_stacked_the_newest_last(self, blank: bool) -> None:
        settings = {"size": 24, "frame_stack": 3, "blank_start": blank}
        with closing(single("Pixels/HalfCheetah-v5", **settings)) as env:
            first, _ = env.reset(seed=0)
            assert env.observation_space == gymnasium.spaces.Box(0, 255, (24, 24, 9), np.uint8)
            assert env.observation_space.contains(first)
            older = np.zeros_like(first[..., :3]) if blank else first[..., 6:]
            assert (first[..., :3] == older).all() and (first[..., 3:6] == older).all()
            kept = first.copy()
            second, third = (env.step(env.action_space.high)[0] for _ in range(2))
            assert (first == kept).all()
            assert (second[..., :6] == first[..., 3:]).all()
            assert (third[..., :6] == second[..., 3:]).all()
            assert (third[..., 6:] != second[..., 6:]).any()

    def test_any_number_of_workers_sees_the_same_and_nothing_is_drawn_here(self) -> None:
        """In a process of its own, which must have made no context when it forks."""
        code = (
            "import hashlib, json, sys\n"
            "from acktr.envs import PixelSettings, describe, make_vec\n"
            "from acktr.envs.view import drawn_here\n"
            "facts = describe('Pixels/Hopper-v5', pixels=PixelSettings(size=16))\n"
            "drawn, said = [drawn_here()], []\n"
            "for workers in (2, 1):\n"
            "    chosen = PixelSettings(size=16)\n"
            "    envs = make_vec('Pixels/Hopper-v5', 4, env_workers=workers, pixels=chosen)\n"
            "    drawn.append(drawn_here())\n"
            "    found = hashlib.sha256(envs.reset()[0].tobytes())\n"
            "    envs.action_space.seed(0)\n"
            "    for _ in range(30):\n"
            "        found.update(envs.step(envs.action_space.sample())[0].tobytes())\n"
            "    said.append(found.hexdigest())\n"
            "    envs.close()\n"
            "    envs.close()\n"
            "json.dump([drawn, said, facts], sys.stdout)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(MUJOCO_GL="", OMP_NUM_THREADS=""),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        drawn, (two, one), facts = json.loads(done.stdout)
        assert drawn == [False, False, True]  # this process steps a part of the two workers'
        assert two == one
        assert facts["view"]["camera"] == "track"
        assert facts["kind"] == "pixels" and facts["base"] == "Hopper-v5"
        assert len(facts["first_picture_sha256"]) == 64
        assert facts["drawn_by"].split(", ")[0] in ("egl", "osmesa")

    def test_a_restored_environment_goes_on_with_the_same_pictures(self) -> None:
        chosen = PixelSettings(size=16, frame_skip=2)
        made = [make_vec("Pixels/Hopper-v5", 2, seed=s, pixels=chosen) for s in (1, 2)]
        one, other = made
        one.reset()
        one.action_space.seed(0)
        for _ in range(9):
            one.step(one.action_space.sample())
        other.load_state_dict(one.state_dict())
        for _ in range(20):
            action = one.action_space.sample()
            for ours, theirs in zip(one.step(action)[:4], other.step(action)[:4], strict=True):
                assert (ours == theirs).all()
        for envs in made:
            envs.close()

    def test_pictures_of_another_renderer_are_not_gone_on_with(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chosen = PixelSettings(size=16)
        with closing(make_vec("Pixels/Hopper-v5", 1, pixels=chosen)) as envs:
            envs.reset()
            state = envs.state_dict()
            envs.check_state_dict(state)
            here = rendering.drawn_by()
            monkeypatch.setattr("acktr.envs.pixels.drawn_by", lambda: "a new driver")
            with pytest.raises(EnvError) as error:
                envs.check_state_dict(state)
            assert f"drawn by {here}, here a new driver draws" in str(error.value)

    def test_backends_agree(self) -> None:
        """EGL and OSMesa of the same Mesa draw the same bytes."""
        if not all(map(rendering._works, ("egl", "osmesa"))):
            pytest.skip("EGL and OSMesa are not both here")
        code = (
            "import json, sys\n"
            "from acktr.envs import describe\n"
            "json.dump(describe('Pixels/Walker2d-v5'), sys.stdout)\n"
        )
        found = []
        for backend in ("egl", "osmesa"):
            variables = environment(MUJOCO_GL=backend, PYOPENGL_PLATFORM="")
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, env=variables, capture_output=True, check=True)
            found.append(json.loads(done.stdout))
        assert [each["drawn_by"].split(", ")[0] for each in found] == ["egl", "osmesa"]
        if len({each["drawn_by"].partition(", ")[2] for each in found}) == 1:
            assert found[0]["first_picture_sha256"] == found[1]["first_picture_sha256"]


class Gray(gymnasium.Env[Any, Any]):
    """Renders pictures that tell how many steps there were."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None, height: int = 40) -> None:
        self.render_mode, self.height = render_mode, height

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        return np.zeros(2, np.float32), 1.0, self.count == 5, False, {}

    def render(self) -> Any:
        return np.full((self.height, 60, 3), 10 * self.count, np.uint8)


class Blind(Gray):
    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}


@pytest.fixture
def gray() -> Any:
    for kind in (Gray, Blind):
        gymnasium.register(f"Pixel{kind.__name__}-v0", entry_point=kind, max_episode_steps=9)
    yield "Pixels/PixelGray-v0"
    for kind in (Gray, Blind):
        del gymnasium.registry[f"Pixel{kind.__name__}-v0"]


class TestOthers:
    def test_any_environment_that_renders(self, gray: str) -> None:
        with closing(make_single(gray, env_kwargs={"height": 50})) as env:
            observation, _ = env.reset(seed=0)
            assert observation.shape == (64, 64, 9)
            assert observation.max() == 0
            for count in range(1, 6):
                observation, reward, over, _, _ = env.step(0)
                assert reward == 1.0
                assert (observation[..., -3:] == 10 * count).all()
            assert over
            assert env.render().shape == (50, 60, 3)  # type: ignore[union-attr]
        facts = describe(gray, env_kwargs={"height": 50})
        assert (facts["rendered"], facts["drawn_by"]) == ([50, 60, 3], "the environment")
        assert facts["max_episode_steps"] == 9

    def test_one_that_does_not_is_refused(self, gray: str) -> None:
        with pytest.raises(EnvError, match=r"PixelBlind-v0 renders no pictures: it offers \[\]"):
            single("Pixels/PixelBlind-v0")
        with pytest.raises(EnvError, match="is for MuJoCo: it must be auto"):
            single(gray, camera="track")

    def test_ids(self) -> None:
        spec = lookup("Pixels/Hopper-v5")
        assert (spec.id, spec.namespace, spec.max_episode_steps) == (
            "Pixels/Hopper-v5",
            "Pixels",
            None,
        )
        assert lookup("Pixels/Hopper").id == "Pixels/Hopper-v5"
        with pytest.raises(EnvError, match="did you mean 'Hopper-v5'"):
            lookup("Pixels/Hoper-v5")
        with pytest.raises(EnvError, match="is an Atari game, seen by its pictures anyway"):
            lookup("Pixels/PongNoFrameskip-v4")
        with pytest.raises(EnvError, match="use Hopper-v5 or Hopper-v4"):
            make_single("Pixels/Hopper-v2")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"size": 8}, "pixels.size must be an integer from 16 to 512, got 8"),
            ({"frame_stack": 0}, "pixels.frame_stack must be"),
            ({"frame_skip": 1.5}, "pixels.frame_skip must be"),
            ({"shadows": 1}, "pixels.shadows must be true or false, got 1"),
            ({"camera": ""}, "pixels.camera must be the name of a camera, got ''"),
        ],
    )
    def test_settings_are_checked(self, settings: Any, message: str) -> None:
        with pytest.raises(EnvError, match=message):
            PixelSettings(**settings)

    def test_without_drawing_nothing_is_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rendering, "_works", lambda backend: False)
        for make in (make_single, lambda name: make_vec(name, 2), describe):
            with pytest.raises(EnvError, match="apt install libegl1 libopengl0 or libosmesa6"):
                make("Pixels/Hopper-v5")

    def test_areas(self) -> None:
        """Means over areas, those on a border in part: exact for a picture that rises linearly."""
        picture = np.zeros((6, 9, 3), np.uint8)
        picture[..., 0] = 10 * np.arange(9)
        picture[..., 1] = 20 * np.arange(6)[:, None]
        small = shrunk(picture, 3)
        assert (small[..., 0] == [10, 40, 70]).all()
        assert (small[..., 1] == np.array([10, 50, 90])[:, None]).all()
        half = shrunk(picture, 2)[0, :, 0]  # 4.5 columns each
        assert half.tolist() == [round((0 + 10 + 20 + 30 + 20) / 4.5), round(280 / 4.5)]
        large = shrunk(picture, 18)
        assert (large[::3, ::2, 0] == picture[:, :, 0]).all()


def test_command_line_without_gl(tmp_path: Path) -> None:
    """One line, exit code 2, and nothing on the disk."""
    done = subprocess.run(
        [sys.executable, "-m", "acktr", "train", "--env", "Pixels/Hopper-v5"],
        cwd=tmp_path,
        env=environment(MUJOCO_GL="nonsense"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "acktr: error: MuJoCo cannot draw with MUJOCO_GL=nonsense; unset it or try egl"
    ]
    assert list(tmp_path.iterdir()) == []


def test_this_process_draws_only_after_a_reset(drawn: None) -> None:
    before = drawn_here()
    with closing(single("Pixels/Reacher-v5", size=16)) as env:
        assert drawn_here() == before
        env.reset(seed=0)
        assert drawn_here()
