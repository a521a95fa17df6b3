"""Updates of the learners on one device, for comparison with those on another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from acktr.algorithms import A2CLearner, ACKTRLearner, TRPOLearner
from acktr.compute import autocast_context
from acktr.config import Algo, Config, merge, preset
from acktr.policies import action_head, build_network
from acktr.rollout import Acting, Batch
from scripts.gpu.noise import same_noise

_LEARNERS = {"acktr": ACKTRLearner, "a2c": A2CLearner, "trpo": TRPOLearner}
_GAME, _ROBOT = "BreakoutNoFrameskip-v4", "HalfCheetah-v5"
_SEED = 1

State = dict[str, dict[str, Tensor]]
"""Parameters and statistics of K-FAC by name."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An algorithm with a network that updates are taken of."""

    algo: Algo
    """Which."""
    pictures: bool
    """A shared convolutional network of discrete actions, or two small ones of Gaussian actions."""
    rows: int
    """Samples of a batch."""
    side: int = 84
    """Of a picture."""

    @property
    def what(self) -> str:
        """For the reader."""
        network = "pictures" if self.pictures else "vectors"
        return f"{self.algo.upper()}, {network}, {self.rows} samples"

    def spaces(self) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
        """Those of observations and actions."""
        if self.pictures:
            shape = (4, self.side, self.side)
            return spaces.Box(0, 255, shape, np.uint8), spaces.Discrete(4)
        return spaces.Box(-np.inf, np.inf, (17,)), spaces.Box(-1, 1, (6,))

    def config(self, compiled: bool) -> Config:
        """The preset, with statistics at every step of K-FAC and a refresh at every second."""
        chosen = preset(_GAME if self.pictures else _ROBOT, self.algo)[0]
        often = {"cold_steps": 0, "refresh_interval": 2, "stat_interval": 1}
        return merge(chosen, {"compile": compiled, "acktr": {"actor": often}})

    def batch(self, number: int, dtype: torch.dtype, device: torch.device) -> Batch:
        """A batch that depends on its number alone."""
        draw = torch.Generator().manual_seed(100 + number)
        seen, _ = self.spaces()
        assert seen.shape is not None
        shape = (self.rows, *seen.shape)
        if self.pictures:
            shown = torch.rand(shape, generator=draw, dtype=torch.float64)
            shown = shown.contiguous(memory_format=torch.channels_last)
            actions = torch.randint(4, (self.rows,), generator=draw)
        else:
            shown = torch.randn(shape, generator=draw, dtype=torch.float64)
            actions = torch.randn(self.rows, 6, generator=draw, dtype=torch.float64).to(dtype)
        numbers = torch.randn(3, self.rows, generator=draw, dtype=torch.float64)
        moved = (number.to(device, dtype) for number in numbers)
        return Batch(shown.to(device, dtype), actions.to(device), *moved)


@contextmanager
def computing(dtype: torch.dtype) -> Iterator[None]:
    """A context of torch's default type, without TF32 in place of float32."""
    before, cudnn = torch.get_default_dtype(), torch.backends.cudnn.allow_tf32
    torch.set_default_dtype(dtype)
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.backends.cudnn.allow_tf32 = cudnn


def updated(
    subject: Subject,
    device: torch.device,
    precision: str,
    counts: tuple[int, ...],
    compiled: bool = False,
) -> tuple[State, list[State]]:
    """Where the updates begin, and where they are after so many.

    Args:
        subject: What learns.
        device: Where.
        precision: float64, or that of forward passes.
        counts: Ascending numbers of updates.
        compiled: Whether the forward pass of updates is compiled.
    """
    dtype = torch.float64 if precision == "float64" else torch.float32
    with computing(dtype), same_noise():
        learner = _learner(subject, device, dtype, precision, compiled)
        begun, found = _state(learner), []
        for number in range(counts[-1]):
            learner.update(subject.batch(number, dtype, device), number / 20)
            if number + 1 in counts:
                found.append(_state(learner))
    return begun, found


def _learner(
    subject: Subject, device: torch.device, dtype: torch.dtype, precision: str, compiled: bool
) -> Any:
    observations, actions = subject.spaces()
    head, config = action_head(actions), subject.config(compiled)
    torch.manual_seed(0)
    with computing(torch.float32):  # the same weights in every type
        network = build_network(observations, head, config.network)
    network = network.to(device=device, dtype=dtype)
    narrow = precision if precision == "bfloat16" else "float32"
    _, autocast = autocast_context(device, narrow, subject.pictures)
    noise = torch.Generator(device).manual_seed(_SEED)
    return _LEARNERS[subject.algo](network, head, config, noise, autocast)


def _state(learner: Any) -> State:
    """Copies on the CPU of the parameters, and of the factors of all K-FAC optimizers."""
    parameters = {n: _kept(p) for n, p in learner.network.named_parameters()}
    factors: dict[str, Tensor] = {}
    for part, state in learner.state_dict().items():
        curvature = state.get("curvature") if isinstance(state, Mapping) else None
        for layer, values in curvature["layers"].items() if curvature else ():
            factors |= {f"{part} {layer} {k}": _kept(values[k]) for k in ("a", "g") if k in values}
    return {"parameters": parameters, "statistics": factors}


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def acting_difference(subject: Subject, device: torch.device, updates: int) -> float:
    """Largest difference between compiled acting, with CUDA graphs, and plain acting.

    K-FAC's updates in between change the weights that a graph reads, and hang hooks into the
    network for a while.
    """
    gaps = []
    with computing(torch.float32):
        learner = _learner(subject, device, torch.float32, "float32", False)
        plain, compiled = (
            Acting(
                learner.network,
                learner.head,
                torch.Generator(device).manual_seed(_SEED),
                learner.autocast,
                which,
            )
            for which in (False, True)
        )
        for number in range(updates):
            batch = subject.batch(number, torch.float32, device)
            seen = batch.observations
            assert isinstance(seen, Tensor)
            for _ in range(3):
                pairs = zip(plain(seen), compiled(seen), strict=True)
                for ours, theirs in pairs:
                    if ours is not None and theirs is not None:
                        gaps.append((ours.double() - theirs.double()).abs().max().cpu())
            learner.update(batch, number / 20)
    return float(torch.stack(gaps).max())  # NaN if one is
