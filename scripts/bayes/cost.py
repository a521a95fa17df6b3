"""What a step of noisy K-FAC costs beside one of K-FAC with the same curvature.

784-200-200-10 on random data, batch 100, one weight sample a step, CPU seconds on one thread. Every
structure makes whole cycles of its refreshes, with a step of plain K-FAC of the same structure and
intervals after each of its own, and is told as the median over cycles of the ratio of both.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, UntypedStorage, nn

from acktr.kfac import CategoricalLoss, NoisyConfig, NoisyKFAC
from acktr.report.tables import markdown as table
from scripts.common import (
    check_folder,
    command_line,
    complain,
    described_machine,
    integer,
    parsed,
    save,
)
from scripts.race.cost import Net, Step, kfac, seconds

_BATCH, _DATA_SIZE = 100, 10_000
_CYCLE = 20
"""Steps of a cycle: the decompositions are renewed once in it."""
_MIB = 2**20

Posterior = Literal["mvg", "ffg", "emvg", "tridiagonal"]


def net() -> Net:
    """784-200-200-10 with ReLU, and a batch of 100."""
    layers = (nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
    inputs, labels = torch.rand(_BATCH, 784), torch.randint(10, (_BATCH,))
    return Net("digits", nn.Sequential(*layers), inputs, labels, CategoricalLoss())


def config(structure: Posterior) -> NoisyConfig:
    """Settings of a structure: decompositions every 20 steps, statistics every second."""
    form: Literal["exact", "factored"] = "factored" if structure == "tridiagonal" else "exact"
    return NoisyConfig(structure=structure, damping_form=form, stat_interval=2, refresh_interval=20)


def noisy(settings: NoisyConfig) -> Callable[[Net], Step]:
    """How a step of noisy K-FAC is made."""

    def make(given: Net) -> Step:
        optimizer = NoisyKFAC(given.network, settings, data_size=_DATA_SIZE)

        def step() -> None:
            with optimizer.sampled_params(train=True) as captured:
                output = given.network(given.inputs)
                optimizer.observe(captured, output, given.loss)
                torch.autograd.backward(given.loss(output, given.targets))
            optimizer.step()

        return step

    return make


def in_turn(theirs: Step, ours: Step, cycles: int) -> list[tuple[float, float]]:
    """CPU seconds of a step of each, means of every cycle; the first, to warm up, is not counted.

    The steps alternate, so that what else the machine does slows both.
    """
    found = []
    for _ in range(cycles + 1):
        spent = [0.0, 0.0]
        for _ in range(_CYCLE):
            spent = [spent[0] + seconds(theirs), spent[1] + seconds(ours)]
        found.append((spent[0] / _CYCLE, spent[1] / _CYCLE))
    return found[1:]


def sample_bytes(settings: NoisyConfig) -> tuple[int, int]:
    """Bytes of the parameters, and what all tensors hold more while a sample is in the module."""
    given = net()
    optimizer = NoisyKFAC(given.network, settings, data_size=_DATA_SIZE)
    noisy(settings)(given)()
    before = _storages()  # which keeps them, so that no new one has the place of an old one
    with optimizer.sampled_params():
        held = sum(size for place, (size, _) in _storages().items() if place not in before)
    return sum(parameter.nbytes for parameter in given.network.parameters()), held


def _storages() -> dict[int, tuple[int, UntypedStorage]]:
    """Bytes of all storages that a tensor of this process has, by their place, and themselves."""
    gc.collect()
    found = {}
    # Not those of subclasses, such as the compiler's, which have no storage.
    for tensor in (each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)):
        with suppress(RuntimeError, NotImplementedError):  # nor have batched or sparse ones
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = (storage.nbytes(), storage)
    return found


def work(argv: Sequence[str]) -> int:
    """Run the command line of ``cost``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bayes cost", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of summary.md")
    what = f"cycles of {_CYCLE} steps of each structure; default 10"
    parser.add_argument("--cycles", type=integer(1), default=10, help=what)
    asked = parsed(parser, argv)
    check_folder(asked.out)
    torch.set_num_threads(1)
    body = []
    for structure in get_args(Posterior):
        settings = config(structure)
        torch.manual_seed(0)
        theirs = kfac(replace(settings.curvature(), damping=0.01))(net())
        found = in_turn(theirs, noisy(settings)(net()), asked.cycles)
        own, held = sample_bytes(settings)
        both = [1000 * statistics.median(column) for column in zip(*found, strict=True)]
        times = statistics.median(mine / other for other, mine in found)
        complain("bayes cost", f"{structure}: {times:.2f}")
        cells = (f"{both[0]:.2f}", f"{both[1]:.2f}", f"{times:.2f}")
        body.append([structure, *cells, f"{own / _MIB:.2f}", f"{held / _MIB:.2f}"])
    head = ["structure", "K-FAC, ms", "noisy, ms", "ratio", "parameters, MiB", "sample, MiB"]
    text = "\n".join(
        [
            "# The cost of a step with weight noise\n",
            f"Command: `{command_line('bayes', ['cost', *argv])}`\n",
            f"CPU milliseconds of a step, medians over {asked.cycles} cycles of {_CYCLE} steps"
            " with one refresh each; 784-200-200-10, batch 100. The last column is what tensors"
            " hold more while a sample of the weights is in the module.\n",
            table(head, body),
            described_machine(),
        ]
    )
    save(asked.out, {"summary.md": text.encode()})
    sys.stdout.write(text)
    return 0
