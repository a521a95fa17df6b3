"""What an update of K-FAC and of its peers costs beside one of SGD, in CPU seconds on one thread.

Three networks on random data. Every optimizer makes whole cycles of its refreshes, an update of SGD
after every fourth of its own, and is told as a ratio to those neighbours; a first cycle, in which
libraries are loaded and K-FAC starts, is not counted. Peers that are not installed are left out,
and said.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac import KFAC, BernoulliLoss, CategoricalLoss, KFACConfig
from acktr.report.tables import markdown as table
from scripts.common import (
    check_folder,
    command_line,
    complain,
    described_machine,
    integer,
    parsed,
    run,
    save,
)
from scripts.race.peers import heavyball, muon

_SYMBOLS, _LENGTH, _WIDTH, _LAYERS, _HEADS = 256, 64, 128, 4, 4
_CYCLE = 20
"""Updates of a cycle, a multiple of every refresh period here."""
_BETWEEN = 4
"""Updates between two of SGD."""

Step = Callable[[], None]


@dataclass(frozen=True)
class Net:
    """A network with a batch of random data."""

    name: str
    network: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: BernoulliLoss | CategoricalLoss

    def objective(self) -> Tensor:
        """The loss by torch's own functions."""
        output = self.network(self.inputs)
        if isinstance(self.loss, BernoulliLoss):
            total = functional.binary_cross_entropy_with_logits(
                output, self.targets, reduction="sum"
            )
            return total / len(output)
        return functional.cross_entropy(output.flatten(0, -2), self.targets.flatten())


class _Layer(nn.Module):
    """Causal self-attention and a wide ReLU layer, each behind a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.attended, self.mixed = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.wide, self.narrow = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        split = self.attended(self.before(hidden)).unflatten(-1, (3, _HEADS, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        heads = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.mixed(heads.transpose(1, 2).flatten(-2))
        wide = functional.gelu(self.wide(self.between(hidden)))
        total: Tensor = hidden + self.narrow(wide)
        return total


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(_SYMBOLS, _WIDTH)
        self.places = nn.Embedding(_LENGTH, _WIDTH)
        self.layers = nn.Sequential(*(_Layer() for _ in range(_LAYERS)))
        self.last, self.head = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, _SYMBOLS)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.symbols(text) + self.places(torch.arange(text.shape[1]).expand_as(text))
        logits: Tensor = self.head(self.last(self.layers(hidden)))
        return logits


def autoencoder() -> Net:
    """784-1000-500-250-30 and back, tanh, batch 1000."""
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    del layers[-1], layers[7]  # the code and the logits are linear
    pixels = torch.rand(1000, 784)
    return Net("autoencoder", nn.Sequential(*layers), pixels, pixels, BernoulliLoss())


def convnet() -> Net:
    """Four convolutions of 32 and 64 channels and a dense layer of 4096 inputs, batch 128."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2)):
        layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(4096, 128), nn.ReLU(), nn.Linear(128, 10)]
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    return Net("convnet", nn.Sequential(*layers), images, labels, CategoricalLoss())


def transformer() -> Net:
    """Four layers of width 128 over 64 windows of 64 tokens."""
    text = torch.randint(_SYMBOLS, (64, _LENGTH + 1))
    return Net("transformer", _Transformer(), text[:, :-1], text[:, 1:], CategoricalLoss())


NETS = (autoencoder, convnet, transformer)


def kfac(config: KFACConfig) -> Callable[[Net], Step]:
    """How an update of K-FAC with these settings is made for a network."""

    def make(net: Net) -> Step:
        optimizer = KFAC(net.network, replace(config, lr=0.01))

        def step() -> None:
            with optimizer.capture() as captured:
                output = net.network(net.inputs)
            optimizer.observe(captured, output, net.loss)
            optimizer.zero_grad()
            torch.autograd.backward(net.loss(output, net.targets))
            optimizer.step()

        return step

    return make


def _plain(make: Callable[[nn.Module], list[torch.optim.Optimizer]]) -> Callable[[Net], Step]:
    def made(net: Net) -> Step:
        optimizers = make(net.network)

        def step() -> None:
            for optimizer in optimizers:
                optimizer.zero_grad()
            torch.autograd.backward(net.objective())
            for optimizer in optimizers:
                optimizer.step()

        return step

    return made


def _heavyball(name: str) -> Callable[[Net], Step]:
    return _plain(lambda network: heavyball(name, network, 1e-4))


def _singd(net: Net) -> Step:
    from singd.optim.optimizer import SINGD

    tokens = net.name == "transformer"
    average = "batch+sequence" if tokens else "batch"
    own = SINGD(net.network, lr=1e-4, T=10, loss_average=average, warn_unsupported=False)
    kinds = (nn.Linear, nn.Conv2d)
    others = [m for m in net.network.modules() if not isinstance(m, kinds)]
    rest = [p for m in others for p in m.parameters(recurse=False)]
    sgd = [torch.optim.SGD(rest, lr=1e-4)] if rest else []
    return _plain(lambda _: [own, *sgd])(net)


_EIGEN = KFACConfig(structure="kfac", stat_interval=1, refresh_interval=10)
OPTIMIZERS: dict[str, tuple[str | None, Callable[[Net], Step]]] = {
    "K-FAC, for_supervised()": (None, kfac(KFACConfig())),
    "K-FAC, cholesky, every batch, period 10": (None, kfac(replace(_EIGEN, structure="cholesky"))),
    "K-FAC, eigenvectors, every batch, period 10": (None, kfac(_EIGEN)),
    "EKFAC, every batch, period 10": (None, kfac(replace(_EIGEN, structure="ekfac"))),
    "Adam": (None, _plain(lambda network: [torch.optim.Adam(network.parameters(), lr=1e-4)])),
    "Muon (torch) and Adam": (None, _plain(lambda network: muon(network, 1e-4))),
    "SOAP (heavyball), period 10": ("heavyball", _heavyball("SOAP")),
    "KL-Shampoo (heavyball), period 10": ("heavyball", _heavyball("KLShampoo")),
    "SINGD (singd), dense, period 10": ("singd", _singd),
}
"""The package that an optimizer needs, and how its update is made."""


def ratio(make_net: Callable[[], Net], make: Callable[[Net], Step], updates: int) -> list[float]:
    """CPU seconds of an update of SGD, and of one of an optimizer over it."""
    torch.manual_seed(0)
    net = make_net()
    torch.manual_seed(0)
    plain = _plain(lambda network: [torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)])
    beside = plain(make_net())
    step = make(net)
    beside()
    for _ in range(_CYCLE):
        step()
    mine, theirs = 0.0, []
    for update in range(updates):
        if update % _BETWEEN == 0:
            theirs.append(seconds(beside))
        mine += seconds(step)
    return [statistics.median(theirs), mine / updates / statistics.median(theirs)]


def seconds(step: Step) -> float:
    """CPU seconds of one update."""
    started = time.process_time()
    step()
    return time.process_time() - started


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code: 0, 2 bad input, 130 Ctrl-C, 75 SIGTERM."""
    return run("race.cost", lambda _: _cost(argv), "nothing is written before the end")


def _cost(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.race.cost", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of cost.md")
    what = f"updates of each optimizer on each network; default a cycle of {_CYCLE}"
    parser.add_argument("--updates", type=integer(1), default=_CYCLE, help=what)
    asked = parsed(parser, argv)
    check_folder(asked.out)
    torch.set_num_threads(1)
    body, sgd = [], []
    for name, (package, make) in OPTIMIZERS.items():
        if package and find_spec(package) is None:
            complain("race.cost", f"{name} is left out: {package} is not installed")
            body.append([name, *["not installed"] * len(NETS)])
            continue
        found = [ratio(net, make, asked.updates) for net in NETS]
        complain("race.cost", f"{name}: {', '.join(f'{times:.2f}' for _, times in found)}")
        sgd.append([seconds for seconds, _ in found])
        body.append([name, *(f"{times:.2f}" for _, times in found)])
    least = [f"{1000 * min(column):.0f} ms" for column in zip(*sgd, strict=True)]
    head = ["optimizer", *(f"{net.__name__}: {(net.__doc__ or '').rstrip('.')}" for net in NETS)]
    text = "\n".join(
        [
            "# CPU seconds of an update over those of SGD with momentum\n",
            f"Command: `{command_line('race.cost', argv)}`\n",
            table(head, [["SGD itself", *least], *body]),
            described_machine(),
        ]
    )
    save(asked.out, {"cost.md": text.encode()})
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
