"""What is measured, each case in a process of its own, and for how long."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from acktr.config import Config, merge
from acktr.config import to_dict as config_to_dict
from acktr.envs import is_atari
from acktr.files import read_object
from acktr.presets import preset
from scripts.common import ScriptError

SUITES = ("atari", "mujoco", "kfac", "batch")
BASELINE = "acktr"
"""Key of the case that others are compared with: ACKTR with its default preset."""
GAME = "BreakoutNoFrameskip-v4"
_ROBOT = "HalfCheetah-v5"
_ROBOTS = ("Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5")
_ZOO = Path(__file__).with_name("zoo.json")
_PEERS = {"sb3-a2c": "SB3 A2C", "sb3-ppo": "SB3 PPO", "sb3-trpo": "SB3-contrib TRPO"}
_BATCH_STEPS = (5, 20, 80)
_MICRO_BATCH = 640
_NEEDS = ("stable_baselines3", "sb3_contrib")

Kind = Literal["training", "environment", "compute", "atari peer", "mujoco peer", "kfac"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure; JSON values only, since it is handed to another process."""

    key: str
    """Unique in its suite."""
    what: str
    """For the reader."""
    kind: Kind
    """Training, random actions alone, computation alone, a peer, or K-FAC beside SGD."""
    env: str = ""
    """Environment id; not used by ``kfac``."""
    num_envs: int = 0
    """Parallel environments."""
    num_steps: int = 0
    """Steps of each environment per update."""
    settings: dict[str, Any]
    """Our configuration, the peer's values, or those of the problem for K-FAC."""
    needs: tuple[str, ...] = ()
    """Modules without which it cannot run."""

    @property
    def batch(self) -> str:
        """Environments times steps."""
        return f"{self.num_envs} x {self.num_steps}"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long and with how many threads everything is measured."""

    threads: int
    """Of torch."""
    seconds: float
    """Least length of a window, which ends with an update."""
    windows: int
    """Windows, one after another."""
    warm_up: float
    """Least seconds before the first window."""
    warm_up_updates: int
    """Least updates before the first window, such as the cold steps of K-FAC."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Cases of one report."""

    name: str
    """One of ``SUITES``."""
    cases: tuple[Case, ...]
    """In the order in which they are measured."""
    ratios: tuple[tuple[str, str, str], ...] = ()
    """Times per step to compare: what is said, and the keys of numerator and denominator."""


def make_suite(name: str, game: str) -> Suite:
    """The cases of a suite.

    Args:
        name: One of ``SUITES``.
        game: Atari game of the suites atari and batch.

    Raises:
        ScriptError: The game is no Atari game.
        EnvError: There is no such environment.
    """
    if name in ("atari", "batch"):
        if not is_atari(game):
            raise ScriptError(f"argument --env: {game} is no Atari game")
        return _atari(game) if name == "atari" else _batch(game)
    return _mujoco() if name == "mujoco" else _kfac()


def missing(case: Case) -> list[str]:
    """Modules that the case needs and that are not installed."""
    return [module for module in case.needs if find_spec(module) is None]


def _batch(game: str) -> Suite:
    """ACKTR and A2C at the same batches, and the largest one in parts."""
    acktr, a2c = preset(game)[0], preset(game, "a2c")[0]
    cases = []
    for name, config in (("ACKTR", acktr), ("A2C", a2c)):
        for steps in _BATCH_STEPS:
            size = acktr.num_envs * steps
            key = BASELINE if name == "ACKTR" and steps == acktr.num_steps else f"{name}-{size}"
            sized = dataclasses.replace(config, num_envs=acktr.num_envs, num_steps=steps)
            cases.append(_training(key, f"{name}, batch {size}", sized))
        parts = dataclasses.replace(sized, micro_batch=_MICRO_BATCH)
        what = f"{name}, batch {size} in parts of {_MICRO_BATCH}"
        cases.append(_training(f"{name}-parts", what, parts))
    return Suite(name="batch", cases=tuple(cases))


def _atari(game: str) -> Suite:
    acktr, _ = preset(game)
    whole = merge(acktr, {"acktr": {"actor": {"stat_fraction": 1.0, "stat_interval": 1}}})
    a2c, _ = preset(game, "a2c")
    equal = dataclasses.replace(a2c, num_envs=acktr.num_envs, num_steps=acktr.num_steps)
    ours = [
        _training(BASELINE, "ACKTR", acktr),
        _training("a2c-equal", "A2C with ACKTR's batch", equal),
        _training("acktr-whole", "ACKTR, statistics of all samples", whole),
        _training("a2c", "A2C", a2c),
    ]
    zoo = read_object(_ZOO)["atari"]
    peers = [
        _atari_peer(peer, values, game, processes)
        for peer, values in zoo.items()
        for processes in (False, True)
    ]
    said = "time per step, ACKTR over A2C at the same batch"
    pairs = ((said, BASELINE, "a2c-equal"), (f"{said}, all samples", "acktr-whole", "a2c-equal"))
    return Suite(name="atari", cases=(*ours, *peers, *limits(ours)), ratios=pairs)


def _atari_peer(peer: str, values: dict[str, Any], game: str, processes: bool) -> Case:
    where = "SubprocVecEnv" if processes else "DummyVecEnv"
    return Case(
        key=f"{peer}-{where}",
        what=f"{_PEERS[peer]}, {where}",
        kind="atari peer",
        env=game,
        num_envs=values["num_envs"],
        num_steps=values["num_steps"],
        settings={"peer": peer, "processes": processes, **values},
        needs=(*_NEEDS, "cv2"),
    )


def _mujoco() -> Suite:
    ours = [
        _training(BASELINE, "ACKTR", preset(_ROBOT)[0]),
        _training("a2c", "A2C", preset(_ROBOT, "a2c")[0]),
        _training("trpo", "TRPO", preset(_ROBOT, "trpo")[0]),
    ]
    others = [_training(f"acktr-{env}", "ACKTR", preset(env)[0]) for env in _ROBOTS]
    zoo = dict(read_object(_ZOO)["mujoco"])
    zoo["sb3-ppo"] = _published_ppo()
    peers = [_mujoco_peer(peer, values) for peer, values in zoo.items()]
    return Suite(name="mujoco", cases=(*ours, *peers, *others, *limits([*ours, *others])))


def _published_ppo() -> dict[str, Any]:
    """The values that scripts.peers trains with."""
    from scripts.peers.settings import choose, to_dict

    return to_dict(choose("sb3-ppo", _ROBOT, None, None).settings)


def _mujoco_peer(peer: str, values: dict[str, Any]) -> Case:
    return Case(
        key=peer,
        what=f"{_PEERS[peer]}, DummyVecEnv",
        kind="mujoco peer",
        env=_ROBOT,
        num_envs=values["num_envs"],
        num_steps=values["num_steps"],
        settings={"peer": peer, "values": json.loads(json.dumps(values))},
        needs=_NEEDS,
    )


def _kfac() -> Suite:
    cases = []
    for part in (8, 1):
        says = f"1/{part} of the batch" if part > 1 else "the whole batch"
        settings = {"size": 32, "batch": 128, "statistics_part": part, "refresh_every": 10}
        cases.append(
            Case(
                key=f"statistics-{part}",
                what=f"K-FAC beside SGD, statistics from {says}",
                kind="kfac",
                settings=settings,
            )
        )
    return Suite(name="kfac", cases=tuple(cases))


def _training(key: str, what: str, config: Config) -> Case:
    config = dataclasses.replace(config, device="cpu")
    return Case(
        key=key,
        what=what,
        kind="training",
        env=config.env,
        num_envs=config.num_envs,
        num_steps=config.num_steps,
        settings=json.loads(json.dumps(config_to_dict(config))),
    )


def limits(trainings: Sequence[Case]) -> list[Case]:
    """For every training its computation alone and its environments alone, each once."""
    found: dict[str, Case] = {}
    for case in trainings:
        for key, kind, what in (
            (environment_key(case), "environment", "random actions"),
            (compute_key(case), "compute", f"{case.what}, computation"),
        ):
            alone = dataclasses.replace(case, key=key, what=what, kind=kind)  # type: ignore[arg-type]
            found.setdefault(key, alone)
    return list(found.values())


def environment_key(case: Case) -> str:
    """Key of the case in which the environments of a training are stepped alone."""
    return f"environment-{case.env}-{case.num_envs}"


def compute_key(case: Case) -> str:
    """Key of the case in which a training computes without environments."""
    return f"compute-{case.key}"
