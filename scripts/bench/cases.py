"""What is measured, each case in a process of its own, and for how long."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from acktr.config import Config, merge, preset
from acktr.files import read_object

BASELINE = "acktr"
"""Key of the case that others are compared with: ACKTR with its default preset."""
_GAME, _OTHER_GAME, _ROBOT = "BreakoutNoFrameskip-v4", "PongNoFrameskip-v4", "HalfCheetah-v5"
_ROBOTS = ("Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5")
_WALKER = _ROBOTS[1]
_ZOO = Path(__file__).with_name("zoo.json")
_PEERS = {"sb3-a2c": "SB3 A2C", "sb3-ppo": "SB3 PPO", "sb3-trpo": "SB3-contrib TRPO"}
_BATCH_STEPS = (5, 20, 80)
_MICRO_BATCH = 640

Kind = Literal["training", "environment", "compute", "atari peer", "mujoco peer", "kfac", "drawing"]
NEEDS = {
    "atari peer": ("stable_baselines3", "sb3_contrib", "cv2"),
    "mujoco peer": ("stable_baselines3", "sb3_contrib"),
}
"""Modules without which a kind of case cannot run."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure; JSON values only, since it is handed to another process."""

    key: str
    """Unique in its suite."""
    what: str
    """For the reader."""
    kind: Kind
    """Training, random actions alone, computation alone, a peer, K-FAC beside SGD, or pictures."""
    env: str = ""
    """Environment id; not used by ``kfac``."""
    num_envs: int = 0
    """Parallel environments."""
    num_steps: int = 0
    """Steps of each environment per update."""
    settings: dict[str, Any]
    """Our configuration, the peer's values, or those of the problem for K-FAC and pictures."""
    ranks: int = 0
    """Processes of torch.distributed that train together; 0 for one without it."""
    beside: str = BASELINE
    """Key of the case of the same environment whose speed its own is compared with."""

    @property
    def batch(self) -> str:
        """Environments times steps."""
        return f"{self.num_envs} x {self.num_steps}"

    @property
    def environment_key(self) -> str:
        """Key of the case in which the environments of a training are stepped alone."""
        return f"environment-{self.env}-{self.num_envs}"

    @property
    def compute_key(self) -> str:
        """Key of the case in which a training computes without environments."""
        return f"compute-{self.key}"

    def missing(self) -> list[str]:
        """Modules that it needs and that are not installed."""
        return [module for module in NEEDS.get(self.kind, ()) if find_spec(module) is None]


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


def _batch() -> list[Case]:
    """ACKTR and A2C at the same batches, and the largest one in parts."""
    acktr, cases = preset(_GAME)[0], []
    for name, config in (("ACKTR", acktr), ("A2C", preset(_GAME, "a2c")[0])):
        for steps in _BATCH_STEPS:
            size = acktr.num_envs * steps
            key = BASELINE if name == "ACKTR" and steps == acktr.num_steps else f"{name}-{size}"
            sized = replace(config, num_envs=acktr.num_envs, num_steps=steps)
            cases.append(_training(key, f"{name}, batch {size}", sized))
        parts = replace(sized, micro_batch=_MICRO_BATCH)
        what = f"{name}, batch {size} in parts of {_MICRO_BATCH}"
        cases.append(_training(f"{name}-parts", what, parts))
    return cases


def _atari() -> list[Case]:
    acktr, a2c = preset(_GAME)[0], preset(_GAME, "a2c")[0]
    whole = merge(acktr, {"acktr": {"actor": {"stat_fraction": 1.0, "stat_interval": 1}}})
    equal = replace(a2c, num_envs=acktr.num_envs, num_steps=acktr.num_steps)
    ours = [
        _training(BASELINE, "ACKTR", acktr),
        _training("a2c-equal", "A2C with ACKTR's batch", equal),
        _training("acktr-whole", "ACKTR, statistics of all samples", whole),
        _training("a2c", "A2C", a2c),
    ]
    peers = [
        replace(_peer("atari peer", peer, where, _GAME, values), key=f"{peer}-{where}")
        for peer, values in read_object(_ZOO)["atari"].items()
        for where in ("DummyVecEnv", "SubprocVecEnv")
    ]
    return [*ours, *peers, *limits(ours)]


def _mujoco() -> list[Case]:
    ours = [
        _training(BASELINE, "ACKTR", preset(_ROBOT)[0]),
        _training("a2c", "A2C", preset(_ROBOT, "a2c")[0]),
        _training("trpo", "TRPO", preset(_ROBOT, "trpo")[0]),
    ]
    others = [_training(f"acktr-{env}", "ACKTR", preset(env)[0]) for env in _ROBOTS]
    zoo = read_object(_ZOO)["mujoco"] | {"sb3-ppo": _published_ppo(_ROBOT)}
    peers = [_peer("mujoco peer", name, "DummyVecEnv", _ROBOT, zoo[name]) for name in zoo]
    return [*ours, *peers, *others, *limits([*ours, *others])]


def _published_ppo(env: str) -> dict[str, Any]:
    """The values that scripts.peers trains with."""
    from scripts.peers.settings import choose

    return _json(asdict(choose("sb3-ppo", env)[0]))


def _score() -> list[Case]:
    """ACKTR and PPO on the tasks of scripts.time_to_score."""
    games, robots = (_OTHER_GAME, _GAME), (_ROBOT, _WALKER)
    ours = [_training(f"{BASELINE}-{env}", "ACKTR", preset(env)[0]) for env in (*games, *robots)]
    zoo = read_object(_ZOO)["atari"]["sb3-ppo"]
    peers = [_peer("atari peer", "sb3-ppo", "DummyVecEnv", env, zoo) for env in games]
    peers += [
        _peer("mujoco peer", "sb3-ppo", "DummyVecEnv", env, _published_ppo(env)) for env in robots
    ]
    named = [replace(case, key=f"{case.key}-{case.env}") for case in peers]
    return [replace(case, beside=f"{BASELINE}-{case.env}") for case in (*ours, *named)]


def _peer(kind: Kind, peer: str, where: str, env: str, values: dict[str, Any]) -> Case:
    return Case(
        key=peer,
        what=f"{_PEERS[peer]}, {where}",
        kind=kind,
        env=env,
        num_envs=values["num_envs"],
        num_steps=values["num_steps"],
        settings={"peer": peer, "where": where, "values": values},
    )


def _kfac() -> list[Case]:
    return [
        Case(
            key=f"statistics-{part}",
            what=f"K-FAC beside SGD, statistics from {says}",
            kind="kfac",
            settings={"size": 32, "batch": 128, "statistics_part": part, "refresh_every": 10},
        )
        for part, says in ((8, "1/8 of the batch"), (1, "the whole batch"))
    ]


def _pixels() -> list[Case]:
    """Pictures alone, ours and Gymnasium's, and training at two sizes."""
    drawing = [
        Case(
            key=f"drawing-{env}-{size}-{by}",
            what=f"{size} x {size}, {'Gymnasium' if by == 'gymnasium' else by}",
            kind="drawing",
            env=f"Pixels/{env}",
            settings={"size": size, "by": by},
        )
        for env in (*_ROBOTS[:2], _ROBOT, "Reacher-v5")
        for size in (64, 84)
        for by in ("ours", "gymnasium")
    ]
    trainings = []
    for key, size in ((BASELINE, 64), ("acktr-84", 84)):
        chosen = merge(preset(f"Pixels/{_ROBOT}")[0], {"pixels": {"size": size}})
        trainings.append(_training(key, f"ACKTR, {size} x {size}", chosen))
    a2c = _training("a2c", "A2C, 64 x 64", preset(f"Pixels/{_ROBOT}", "a2c")[0])
    return [*drawing, *trainings, a2c, *limits(trainings[:1])]


def _ranks() -> list[Case]:
    """Training in one process and in several, whose threads are those of the machine together."""
    cases = []
    for key, env in ((BASELINE, _ROBOT), (f"{BASELINE}-{_GAME}", _GAME)):
        plain = replace(_training(key, "ACKTR, one process", preset(env)[0]), beside=key)
        cases.append(plain)
        for count, says in ((1, "a group of one"), (2, "two processes")):
            joined = replace(plain, key=f"{key}-ranks{count}", what=f"ACKTR, {says}", ranks=count)
            cases.append(joined)
    return cases


def _training(key: str, what: str, config: Config) -> Case:
    return Case(
        key=key,
        what=what,
        kind="training",
        env=config.env,
        num_envs=config.num_envs,
        num_steps=config.num_steps,
        settings=_json(asdict(replace(config, device="cpu"))),
    )


def _json(values: dict[str, Any]) -> dict[str, Any]:
    """The values as another process reads them."""
    read: dict[str, Any] = json.loads(json.dumps(values))
    return read


def limits(trainings: Iterable[Case]) -> list[Case]:
    """For every training its computation alone and its environments alone, each once."""
    alone: dict[str, Case] = {}
    for case in trainings:
        random = replace(case, key=case.environment_key, what="random actions", kind="environment")
        alone.setdefault(random.key, random)
        what = f"{case.what}, computation"
        alone[case.compute_key] = replace(case, key=case.compute_key, what=what, kind="compute")
    return list(alone.values())


SUITES: dict[str, Callable[[], list[Case]]] = {
    "atari": _atari,
    "mujoco": _mujoco,
    "kfac": _kfac,
    "batch": _batch,
    "pixels": _pixels,
    "ranks": _ranks,
    "score": _score,
}
"""The cases of a report, in the order in which they are measured."""
