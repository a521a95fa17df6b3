"""Processes of torch.distributed that train one model, each on a share of every batch.

Ranks are micro-batches that happen at the same time: sums and what they are divided by are added up
over the ranks before anything is made of them, so that all ranks know the same and no block of the
curvature knows of ranks. Every decision that leads to another message is made from such sums.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from acktr.kfac.channel import Channel, answered
from acktr.kfac.tensors import accumulation_type

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DIGITS = 12
"""Hexadecimal digits of a digest that float64 holds exactly."""


class Ranks:
    """The ranks of one group of torch.distributed, with gloo or nccl.

    All ranks must call the same methods in the same order. Sums have the same bits on all of them,
    and the same in another run with as many ranks.

    Args:
        group: The group; by default all processes.
        curvature: Whether the last of all processes does not train but decomposes for the others,
            which are the ranks then. All make this object at the same time.
        timeout: Of messages with ``curvature``: torch does not hand that of ``init_process_group``
            on to new groups, which have 30 minutes with gloo.

    Raises:
        ValueError: ``init_process_group`` was not called, this process is not in the group, or
            there is no second one.
        RankError: Another one did not come, with ``curvature``.
    """

    serves = False
    """Whether this process decomposes for the ranks and is none: see :func:`acktr.kfac.serve`."""
    helped = False
    """Whether a process decomposes for the ranks."""
    channel: Channel | None = None
    """To that process, on rank 0, and from it."""

    def __init__(
        self,
        group: ProcessGroup | None = None,
        *,
        curvature: bool = False,
        timeout: timedelta | None = None,
    ) -> None:
        from torch import distributed

        if not distributed.is_available() or not distributed.is_initialized():
            raise ValueError("Ranks() needs torch.distributed.init_process_group() before it")
        self._distributed: Any = distributed
        if curvature:
            group = self._apart(group, timeout)
        self.group = group
        self.rank = distributed.get_rank(group)
        """Number of this one."""
        self.size = distributed.get_world_size(None if curvature else group) - curvature
        """Number of all."""
        if self.rank < 0 and not self.serves:
            raise ValueError("this process is not in the group that Ranks() was given")

    def _apart(self, group: ProcessGroup | None, timeout: timedelta | None) -> Any:
        """The group of all processes but the last, which gets a channel to the first."""
        last = self._distributed.get_world_size() - 1
        if group is not None or not last:
            raise ValueError(
                "Ranks(curvature=True) is of all processes, two or more: the last one decomposes"
            )
        with answered():
            learners = self._distributed.new_group([*range(last)], timeout=timeout)
            pair = self._distributed.new_group([0, last], timeout=timeout, backend="gloo")
        here = self._distributed.get_rank()
        self.helped, self.serves = True, here == last
        if here in (0, last):
            self.channel = Channel(pair, last - here)
        return learners

    def close(self, code: int = 0) -> None:
        """Let the process that decomposes end, if there is one; all refreshes are over then.

        Args:
            code: What :func:`acktr.kfac.serve` returns there.

        Raises:
            RankError: It does not answer.
        """
        if self.channel is not None and not self.serves:
            self.channel.stop(code)

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the ranks of tensors of the same shapes; one message for each type.

        Args:
            tensors: On the device of the group's backend.
        """
        if self.size == 1:
            return list(tensors)
        return self._joined(tensors, self._add)

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> list[Tensor]:
        """The tensors of one rank, bit for bit and in memory of their own; the source's too.

        Args:
            tensors: What the source has, and what is like it on the others.
            source: Number of the rank.
        """
        given = tensors if self.rank == source else [torch.zeros_like(t) for t in tensors]
        found = self._joined(given, lambda flat: self._send(flat, source))
        return [tensor.clone() for tensor in found]

    def gather(self, values: Sequence[float], device: torch.device) -> list[list[float]]:
        """What every rank says, in float64 and by rank; it waits for the device.

        Args:
            values: As many on all ranks.
            device: That of the group's backend.
        """
        table = torch.zeros(self.size, len(values), dtype=torch.float64, device=device)
        table[self.rank] = table.new_tensor(values)
        rows: list[list[float]] = self.summed([table])[0].tolist()
        return rows

    def check_equal(self, what: str, value: object, device: torch.device) -> None:
        """Raise ValueError, on all ranks, where the value has another repr than on rank 0."""
        digest = hashlib.sha256(repr(value).encode()).hexdigest()
        rows = self.gather([_number(digest)], device)
        other = [rank for rank, row in enumerate(rows) if row != rows[0]]
        if other:
            raise ValueError(f"rank {other[0]} has other {what} than rank 0: give all the same")

    @torch.no_grad()
    def start(self, module: nn.Module) -> None:
        """Give all ranks the parameters and buffers of rank 0.

        Raises:
            ValueError: A rank has others, on all ranks; nothing is changed.
        """
        places = [*module.parameters(), *module.buffers()]
        if not places:
            return
        named = [*module.named_parameters(), *module.named_buffers()]
        what = "names, shapes or types of parameters and buffers"
        self.check_equal(what, layout(named), places[0].device)
        for place, new in zip(places, self.broadcast([p.detach() for p in places], 0), strict=True):
            place.copy_(new)

    @torch.no_grad()
    def average(self, module: nn.Module, rows: float | None) -> None:
        """Make gradients those of the batch of all ranks together, sum_r n_r / N grad_r.

        It is a mean over all rows, not the mean of the ranks' means; DistributedDataParallel, whose
        gradients are that, needs as many rows on every rank.

        Args:
            module: Its gradients are replaced. One that no rank has stays None.
            rows: What this rank's objective is a mean over, its samples or the sum of their
                weights; 0 for a rank without any, whose gradients do not count. None where the
                objective is a sum, which is added up.
        """
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            return
        alone = rows is None or self.size == 1
        weight = 1.0 if rows is None else float(rows > 0) if alone else float(rows)
        given = [float(p.grad is not None) for p in parameters]
        # Of the gradients' type, so that all is one message; see _scaled.
        first = parameters[0]
        kind = accumulation_type(first)
        facts = torch.tensor([*given, weight], dtype=kind, device=first.device)
        facts, *grads = self.summed([facts, *(_scaled(p, weight) for p in parameters)])
        *some, total = facts.tolist()
        divisor = 1.0 if alone else total or 1.0
        for parameter, grad, there in zip(parameters, grads, some, strict=True):
            if there:
                mean = grad.clone() if alone else grad / divisor
                parameter.grad = mean.to(parameter.dtype)

    def _joined(self, tensors: Sequence[Tensor], send: Any) -> list[Tensor]:
        """Tensors through messages that take those of one type and device as one."""
        kinds = dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors)
        found: dict[int, Tensor] = {}
        for kind in kinds:
            places = [i for i, t in enumerate(tensors) if (t.dtype, t.device) == kind]
            flat = torch.cat([tensors[place].detach().flatten() for place in places])
            if flat.numel():
                send(flat)
            parts = torch.split(flat, [tensors[place].numel() for place in places])
            for place, part in zip(places, parts, strict=True):
                found[place] = part.view(tensors[place].shape)
        return [found[place] for place in range(len(tensors))]

    def _add(self, flat: Tensor) -> None:
        with answered():
            self._distributed.all_reduce(flat, group=self.group)

    def _send(self, flat: Tensor, source: int) -> None:
        if self.size > 1:
            place = source
            if self.group is not None:
                place = self._distributed.get_global_rank(self.group, source)
            with answered():
                self._distributed.broadcast(flat, place, group=self.group)


def _scaled(parameter: Tensor, weight: float) -> Tensor:
    """A gradient times a weight, in single precision at least; zeros without either.

    Half precision overflows from 65504 rows on.
    """
    grad, kind = parameter.grad, accumulation_type(parameter)
    if grad is None or weight == 0:
        return torch.zeros_like(parameter, dtype=kind)
    return (grad.to_dense() if grad.is_sparse else grad).to(kind) * weight


def processes() -> int:
    """How many processes torch.distributed has; 1 before it is begun, and nothing is imported."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 1
    size: int = distributed.get_world_size()
    return size


def bits_of(tensors: Iterable[Tensor | None]) -> float:
    """A number that tensors of equal bits share, and others do not.

    Sums would not do: gradients of a softmax head add up to zero over the classes whatever they
    are. The tensors are copied to the host.

    Args:
        tensors: Of the same shapes on all ranks; None counts as another one than zeros.
    """
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            found.update(b"None")
        else:
            flat = tensor.detach().cpu().reshape(-1).contiguous()
            found.update(flat.view(torch.uint8).numpy().data)
    return _number(found.hexdigest())


def layout(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, tuple[int, ...], str]]:
    """Names, shapes and types of tensors, which must be the same on all ranks."""
    return [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named]


def _number(digest: str) -> float:
    return float(int(digest[:_DIGITS], 16))
