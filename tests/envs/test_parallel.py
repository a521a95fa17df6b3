"""Environments stepped by several processes: the same steps, and no way to hang."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from acktr.envs import EnvError, EnvFault, EnvWarning, make_vec
from acktr.envs import workers as number
from acktr.envs.parallel import ParallelEnvs
from acktr.envs.vector import env_seeds
from tests.tools import toys
from tests.tools.command_line import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are for Linux")

SHORT = {
    "short/HalfCheetah-v0": "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv",
    "short/Hopper-v0": "gymnasium.envs.mujoco.hopper_v5:HopperEnv",
}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    for env_id, entry_point in SHORT.items():
        gymnasium.register(env_id, entry_point=entry_point, max_episode_steps=37)
    yield
    for env_id in SHORT:
        del gymnasium.registry[env_id]


def play(env_id: str, workers: int, steps: int, num_envs: int = 5) -> tuple[list[Any], int]:
    """Everything that a vector environment returns, and the number of episodes."""
    vec = make_vec(env_id, num_envs, seed=3, env_workers=workers)
    assert number(vec) == workers
    rng, space = np.random.default_rng(1), vec.single_action_space
    found, episodes = [vec.reset()[0]], 0
    for step in range(steps):
        if isinstance(space, spaces.Discrete):
            actions = rng.integers(0, space.n, num_envs)
        else:
            actions = rng.uniform(-1, 1, (num_envs, *space.shape)).astype(np.float32)
        *arrays, infos = vec.step(actions)
        found += arrays
        if "episode" in infos:
            found += [infos["final_obs"], infos["_final_obs"], infos["_episode"]]
            found += [infos["episode"]["r"], infos["episode"]["l"]]
            episodes += int(infos["_episode"].sum())
        if step == steps // 2:
            mask = np.arange(num_envs) % 2 == 1
            found.append(vec.reset(seed=11, options={"reset_mask": mask})[0])
    found.append(vec.reset()[0])
    vec.close()
    return found, episodes


@pytest.mark.parametrize(
    ("env_id", "steps", "least"),
    [
        ("HalfCheetah-v5", 300, 0),
        ("short/HalfCheetah-v0", 200, 20),
        ("short/Hopper-v0", 300, 40),
        ("Hopper-v5", 300, 40),
        ("Pendulum-v1", 450, 8),
        ("CartPole-v1", 300, 40),
        ("FrozenLake-v1", 200, 40),
    ],
)
def test_steps_do_not_depend_on_the_number_of_processes(
    env_id: str, steps: int, least: int
) -> None:
    wanted, episodes = play(env_id, 1, steps)
    assert episodes >= least
    for workers in (2, 3, 5):
        found, _ = play(env_id, workers, steps)
        assert len(found) == len(wanted)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert ours.tobytes() == theirs.tobytes()


def test_returned_arrays_are_not_overwritten() -> None:
    vec = make_vec(toys.variant(toys.CountingEnv, {"truncate_at": 2}), 2, env_workers=2)
    first, _ = vec.reset()
    results = [vec.step(np.zeros(2, np.int64)) for _ in range(4)]
    assert first[1, 0] == 0
    assert [result[0][1, 0] for result in results] == [1, 0, 1, 0]
    assert [result[1][1] for result in results] == [1, 2, 1, 2]
    assert [bool(result[3][1]) for result in results] == [False, True, False, True]
    assert results[1][4]["final_obs"][1, 0] == 2
    vec.close()


class Toy(gymnasium.Env[Any, Any]):
    """Does something bad at step 3; the observation is the action of the step before the last."""

    def __init__(self, deed: str = "") -> None:
        self.observation_space = spaces.Box(-9.0, 9.0, (1,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._deed, self._steps, self._kept = deed, 0, np.zeros(1, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self._steps += 1
        if self._steps == 3:
            self._misbehave()
        before, self._kept = self._kept, action
        shape = (2,) if self._deed == "shape" and self._steps == 3 else (1,)
        reward: Any = np.zeros(2) if self._deed == "reward" and self._steps == 3 else 0.0
        return np.broadcast_to(before, shape), reward, False, False, {}

    def _misbehave(self) -> None:
        if self._deed == "sleep":
            time.sleep(60)
        elif self._deed == "exit":
            sys.exit(5)
        elif self._deed == "die":
            os._exit(5)
        elif self._deed == "interrupt":
            self._deed = ""
            raise KeyboardInterrupt


def vector(*deeds: str, workers: int, deadline: float = 20.0) -> ParallelEnvs:
    vec = ParallelEnvs([Toy(deed) for deed in deeds], "Toy", workers, deadline)
    vec.reset(seed=[0] * len(deeds))
    for _ in range(2):
        vec.step(np.zeros((len(deeds), 1), np.float32))
    return vec


def pids(vec: ParallelEnvs) -> list[int]:
    return [process.pid for process in vec._processes]


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def wait_for_end(pid: int) -> None:
    until = time.monotonic() + 20
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(pid)


def assert_closes(vec: ParallelEnvs) -> None:
    children = pids(vec)
    vec.close()
    vec.close()
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_environment_may_keep_its_last_action() -> None:
    vec = vector("", "", "", workers=2)
    rows = [vec.step(np.full((3, 1), step, np.float32))[0][:, 0] for step in (1, 2, 3)]
    np.testing.assert_array_equal(rows, [[0] * 3, [1] * 3, [2] * 3])
    assert_closes(vec)


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("shape", r"environment 2 of Toy gave something unfit at step 3: ValueError: .*\(2,\)"),
        ("exit", r"environment.* 2 of Toy: SystemExit: 5"),
        ("die", r"the process of environment.* 2 of Toy ended with exit code 5"),
        ("sleep", r"environment 2 of Toy did not return from step 3 within 0.3 s; env_timeout"),
    ],
)
def test_what_a_process_can_do_wrong_is_one_line(deed: str, message: str) -> None:
    vec = vector("", "", deed, workers=2, deadline=0.3 if deed == "sleep" else 20.0)
    started = time.monotonic()
    with pytest.raises(EnvFault, match=message) as caught:
        vec.step(np.zeros((3, 1), np.float32))
    assert "\n" not in str(caught.value)
    if deed in ("die", "sleep"):
        with pytest.raises(EnvFault, match=message):
            vec.step(np.zeros((3, 1), np.float32))
    assert_closes(vec)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("deed", ["shape", "reward"])
def test_wrong_shape_in_the_main_process(deed: str) -> None:
    vec = vector(deed, "", workers=1)
    match = r"environment 0 of Toy gave something unfit at step 3: .*of shape \(2,\)(,|$)"
    with pytest.raises(EnvFault, match=match):
        vec.step(np.zeros((2, 1), np.float32))
    vec.close()


def test_killed_process() -> None:
    vec = vector("", "", "", workers=3)
    os.kill(pids(vec)[0], signal.SIGKILL)
    with pytest.raises(EnvFault, match="environment 1 of Toy was killed by SIGKILL"):
        vec.step(np.zeros((3, 1), np.float32))
    with pytest.raises(EnvFault, match="environment 1 of Toy was killed by SIGKILL"):
        vec.reset()
    assert_closes(vec)


def test_killed_before_closing() -> None:
    vec = vector("", "", workers=2)
    os.kill(pids(vec)[0], signal.SIGKILL)
    with pytest.warns(EnvWarning, match="environment 1 of Toy was killed by SIGKILL before it had"):
        assert_closes(vec)


def test_process_reaped_by_somebody_else() -> None:
    vec = vector("", "", workers=2)
    os.kill(pids(vec)[0], signal.SIGKILL)
    os.waitpid(pids(vec)[0], 0)
    with pytest.raises(EnvFault, match="environment 1 of Toy is gone"):
        vec.step(np.zeros((2, 1), np.float32))
    assert_closes(vec)


@pytest.mark.parametrize("what", ["observation", "final observation", "reward", "exception"])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.filterwarnings("ignore")
def test_faults_of_environments_keep_their_message(what: str, workers: int) -> None:
    settings: dict[str, Any] = {"what": what, "at": 3, "index": 2, "value": np.nan}
    env_id = toys.variant(toys.FaultyEnv, settings)
    toys.FaultyEnv.made = 0
    vec = make_vec(env_id, 3, env_workers=workers)
    vec.reset()
    for _ in range(2):
        vec.step(np.zeros(3, np.int64))
    with pytest.raises(EnvFault) as caught:
        vec.step(np.zeros(3, np.int64))
    value = "ZeroDivisionError at step 3: the toy broke"
    said = f"raised {value}" if what == "exception" else f"returned a non-finite {what} at step 3"
    assert str(caught.value).startswith(f"environment 2 of {env_id} {said}")
    assert str(caught.value).endswith(f" (episode 1, seed {env_seeds(0, 3)[2]})")
    vec.step(np.zeros(3, np.int64))
    vec.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_the_group_are_for_the_main_process(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT)
    vec = vector("", "", workers=2)
    os.kill(pids(vec)[0], number)
    time.sleep(0.05)
    vec.step(np.zeros((2, 1), np.float32))
    assert signal.getsignal(signal.SIGINT) is before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert_closes(vec)


def test_after_an_interrupted_step_it_goes_on() -> None:
    vec = vector("interrupt", "", "", workers=3)
    with pytest.raises(KeyboardInterrupt):
        vec.step(np.zeros((3, 1), np.float32))
    vec.reset(seed=[0] * 3)
    for step in range(1, 5):
        obs = vec.step(np.full((3, 1), step, np.float32))[0]
    np.testing.assert_array_equal(obs, [[3.0]] * 3)
    assert_closes(vec)


def test_an_interrupted_step_can_be_closed() -> None:
    vec = vector("interrupt", "", workers=2)
    with pytest.raises(KeyboardInterrupt):
        vec.step(np.zeros((2, 1), np.float32))
    assert_closes(vec)


def test_forgotten_environments_leave_no_process() -> None:
    vec = vector("", "", workers=2)
    (pid,) = pids(vec)
    del vec
    gc.collect()
    wait_for_end(pid)


@pytest.mark.parametrize("deed", ["", "sleep"])
def test_processes_end_with_their_parent(deed: str) -> None:
    code = (
        "import numpy as np\n"
        "from tests.envs.test_parallel import pids, vector\n"
        f"vec = vector('', {deed!r}, workers=2)\n"
        "print(*pids(vec), flush=True)\n"
        "while True:\n"
        "    vec.step(np.zeros((2, 1), np.float32))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert alive(pid)
    process.kill()
    process.communicate(timeout=20)
    wait_for_end(pid)


def test_a_script_that_closes_nothing_ends(tmp_path: Path) -> None:
    code = (
        "from tests.envs.test_parallel import vector\n"
        "vec = vector('', '', workers=2)\n"
        "print('before', end='')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("before", "")


def test_what_needs_all_environments_here() -> None:
    vec = vector("", "", workers=2)
    for forbidden in (lambda: vec.get_attr("spec"), lambda: vec.set_attr("x", 1)):
        with pytest.raises(EnvError, match="set env_workers to 1"):
            forbidden()
    with pytest.raises(EnvError, match=r"reset options \['x'\]"):
        vec.reset(options={"x": 1})
    with pytest.raises(EnvError, match="reset_mask must be 2 booleans"):
        vec.reset(options={"reset_mask": np.zeros(2, np.bool_)})
    assert_closes(vec)


class Learned(Toy):
    """Its reward is computed by torch on threads."""

    def __init__(self) -> None:
        super().__init__()
        self._weight = torch.ones(300, 300)
        self._computed()

    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        return obs, self._computed(), *rest

    def _computed(self) -> float:
        return float((self._weight @ self._weight).sigmoid().mean())


def test_environments_may_compute_with_torch() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        vec = ParallelEnvs([Learned(), Learned()], "Learned", 2, timeout=5.0)
        vec.reset(seed=[0, 0])
        np.testing.assert_allclose(vec.step(np.zeros((2, 1), np.float32))[1], 1.0)
        vec.close()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_scripts_without_a_main_guard(method: str, tmp_path: Path) -> None:
    """Processes are forked whatever the start method, so that no script is run again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        f"multiprocessing.set_start_method({method!r})\n"
        "import gymnasium\n"
        "from acktr.envs import make_vec, workers\n"
        "size = 3\n"
        "vec = make_vec(lambda: gymnasium.make('CartPole-v1'), 2, env_workers=2)\n"
        "vec.reset()\n"
        "vec.step([0, 1])\n"
        "print(workers(vec))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment(),
    )
    assert (done.stdout, done.stderr) == ("2\n", "")
