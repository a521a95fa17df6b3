"""This process among those that train one agent together, each with environments of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from acktr.config import Config, ConfigError
from acktr.kfac import RankError, Ranks, bits_of, processes
from acktr.policies import ActorCritic
from acktr.rollout import Batch, Rollout, absent, together

UNKEPT = "several processes trained it, whose episodes are not in the checkpoint"
"""Why a trainer's state has no episodes; those of all processes are added to a checkpoint."""
PARTS = "parts"
"""Where a collector's state has the episodes of all processes, by rank."""
_EPISODES = ("envs", "unsaved", "observation", "dead", "masks", "memory")

Numbers = tuple[float, ...]


class Joined(NamedTuple):
    """An update's batch and what came with it, as all ranks know it."""

    batch: Batch
    """This rank's samples, with their share."""
    env_steps: int
    """Steps of all environments."""
    finite: bool
    """Whether all returns are finite."""
    stop: int | None
    """A signal that one of the ranks got; None without one."""
    episodes: list[Numbers]
    """What was told of the episodes of all."""


@dataclass(frozen=True)
class World:
    """The ranks of a run, as its trainer needs them.

    Every process has as many of the environments, in the order of the ranks, and the same network;
    ``config.num_envs`` counts all. Whatever decides on how training goes on is the same number on
    all of them.
    """

    ranks: Ranks
    local_rank: int = 0
    """Number of this process on its machine."""

    def device(self, device: torch.device) -> torch.device:
        """A GPU of its own for every process of a machine, if it is one; CUDA's present device too.

        Raises:
            ConfigError: There are fewer.
        """
        if device.type != "cuda":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {self.local_rank} of this machine has no GPU of its own: torch sees"
                f" {torch.cuda.device_count()}; start fewer, or set device to cpu"
            )
        # What CUDA does without being told where, such as the recording of graphs, is to be there.
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def begin(self, config: Config, network: ActorCritic, auxiliary: Mapping[str, object]) -> None:
        """Refuse what has not been made for several processes; give all the same parameters.

        Raises:
            ConfigError: One line.
            ValueError: The ranks have networks of other shapes; nothing is sent.
        """
        refused = {
            "a network with a memory": network.recurrent,
            "a network with batch normalisation or dropout": network.modal
            or any(buffer.is_floating_point() for buffer in network.buffers()),
            "an auxiliary loss": bool(auxiliary),
        }
        # Before any is refused, as the others would wait for a process that ends alone.
        self.ranks.check_equal("kinds of networks", refused, next(network.parameters()).device)
        for what, here in refused.items():
            if here:
                raise ConfigError(f"{what} trains in one process only, not in {self.ranks.size}")
        self.ranks.start(network)

    def joined(
        self,
        rollout: Rollout,
        batch: Batch,
        network: nn.Module,
        stop: int | None,
        episodes: Sequence[Numbers],
    ) -> Joined:
        """Tell the other ranks of an update, before anything is learned, and hear of theirs.

        Args:
            rollout: What this rank's environments gave.
            batch: Its samples.
            network: Its parameters must be those of all.
            stop: A signal that this process got; None without one.
            episodes: Numbers of each of its episodes, as many for each.

        Raises:
            RankError: Another rank failed, or the ranks have become different.
            ConfigError: A rank has no samples.
        """
        told = [float(stop or 0), float(len(episodes)), bits_of(network.parameters())]
        found = together(self.ranks, rollout, batch, told)
        for rank, (_, _, checksum) in enumerate(found.told):
            if checksum != found.told[0][2]:
                raise RankError(f"rank {rank} has other parameters than rank 0")
        share = found.batch.share
        if share is not None and not share.least:
            raise ConfigError(
                "a process had no step to learn from: more num_steps or num_envs, or fewer"
                " processes, are needed"
            )
        signals = [int(row[0]) for row in found.told if row[0]]
        counts = [int(row[1]) for row in found.told]
        every = self._episodes(episodes, counts, batch.returns.device)
        stopped = signals[0] if signals else None
        return Joined(found.batch, found.env_steps, found.finite, stopped, every)

    def every(self, data: bytes) -> list[bytes]:
        """What every rank says, by rank; messages go between CPUs."""
        cpu = torch.device("cpu")
        sizes = [int(row[0]) for row in self.ranks.gather([float(len(data))], cpu)]
        table = torch.zeros(self.ranks.size, max(sizes), dtype=torch.uint8)
        table[self.ranks.rank, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        (rows,) = self.ranks.summed([table])
        return [row[:size].numpy().tobytes() for row, size in zip(rows, sizes, strict=True)]

    def fail(self, device: torch.device) -> None:
        """Tell the other ranks, who wait for this one's rollout, that there is none."""
        with suppress(RankError):
            absent(self.ranks, 3, device)

    def _episodes(
        self, mine: Sequence[Numbers], counts: Sequence[int], device: torch.device
    ) -> list[Numbers]:
        """The numbers of all ranks' episodes, by rank; all know how many each has."""
        if not sum(counts):
            return []
        (width,) = {len(numbers) for numbers in mine} or {0}
        width = int(max(row[0] for row in self.ranks.gather([float(width)], device)))
        room = [0.0] * (width * max(counts))
        flat = [x for numbers in mine for x in numbers]
        rows = self.ranks.gather([*flat, *room[len(flat) :]], device)
        return [
            tuple(row[place * width : (place + 1) * width])
            for row, count in zip(rows, counts, strict=True)
            for place in range(count)
        ]


def require_alone() -> None:
    """Refuse to train for oneself beside other processes, each of which would learn its own agent.

    Raises:
        ConfigError: torch.distributed has several.
    """
    if (size := processes()) > 1:
        raise ConfigError(
            f"each of the {size} processes of torch.distributed would train an agent of its own:"
            f" train in one process, or with `acktr train --nproc {size}`, whose processes share"
            " the environments out"
        )


def part_of_envs(num_envs: int, rank: int, size: int) -> tuple[int, int]:
    """How many of all environments are a rank's, and the number of the first.

    Raises:
        ConfigError: They cannot be shared out evenly.
    """
    if num_envs % size:
        raise ConfigError(
            f"num_envs must be a multiple of the {size} processes that share them out, got"
            f" {num_envs}"
        )
    count = num_envs // size
    return count, rank * count


def own_episodes(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a collector's state lives until the end of an episode, which every rank has."""
    scaler = state["reward_scaler"]
    returns = None if scaler is None else scaler["returns"]
    return {**{name: state[name] for name in _EPISODES}, "returns": returns}


def with_episodes(state: Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
    """A collector's state with the episodes of a rank, of as many ranks as it is from.

    For another number of ranks it has none, and says so.

    Args:
        state: With the episodes of one process, or those of several as ``PARTS``.
        rank: Whose episodes go on.
        size: Number of ranks.
    """
    result = dict(state)
    parts = result.pop(PARTS, None)
    if parts is None and (size == 1 or state["envs"] is None):
        return result
    count = 1 if parts is None else len(parts)
    if count != size:
        why = f"processes that trained it were {count}, and now there are {size}"
        return {**result, "envs": None, "unsaved": why}
    unsaved = [part["unsaved"] for part in parts if part["envs"] is None]
    result |= {name: parts[rank][name] for name in _EPISODES}
    if unsaved:
        result |= {"envs": None, "unsaved": unsaved[0]}
    elif result["reward_scaler"] is not None:
        result["reward_scaler"] |= {"returns": parts[rank]["returns"]}
    return result
