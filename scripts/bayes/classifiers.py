"""Ways to train a classifier, each of which ends in class probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac import KFAC, BayesByBackprop, CategoricalLoss, KFACConfig, NoisyConfig, NoisyKFAC
from scripts.common import ScriptError

Classifier = Literal["adam", "kfac", "laplace", "noisy", "noisy-0.1", "bbb", "ivon"]
CLASSIFIERS: tuple[Classifier, ...] = get_args(Classifier)
Batches = Iterable[tuple[Tensor, Tensor]]
Predictor = Callable[[Tensor], Tensor]
"""Inputs (N, D) -> class probabilities (N, K), the mean over weight samples."""

SAMPLES = 20
ADAM_LR = 1e-3
NOISY = NoisyConfig(
    lr=0.1, stat_decay=0.98, stat_interval=2, refresh_interval=20, external_damping=0.1
)
"""The best of some ten tried for three epochs on one seed, by the test images; with an external
damping of 1e-3 noisy K-FAC diverges."""
IVON: dict[str, float] = {"lr": 0.1, "hess_init": 0.1, "beta2": 0.9995}
"""Settings of IVON; its effective sample size is N, and its weight decay that of the prior, 1/N."""


def settings(name: Classifier) -> dict[str, Any]:
    """All that a classifier is, apart from its network and its data."""
    if name in ("noisy", "noisy-0.1"):
        return asdict(_noisy_config(name))
    known = {"kfac": asdict(KFACConfig()), "ivon": dict(IVON)}
    return known.get(name, {"lr": ADAM_LR})


def _noisy_config(name: Classifier) -> NoisyConfig:
    return replace(NOISY, kl_weight=0.1 if name == "noisy-0.1" else 1.0)


def train(
    name: Classifier, model: nn.Module, batches: Batches, data: tuple[Tensor, Tensor], seed: int
) -> Predictor:
    """Train a network.

    Args:
        name: How.
        model: The network, whose last module is linear.
        batches: Inputs and labels of every step.
        data: All training data.
        seed: Of noise.

    Returns:
        What it predicts.
    """
    size = len(data[1])
    if name in ("adam", "laplace"):
        _by_adam(model, model, lambda: torch.zeros(()), batches)
        return _laplace(model, data, seed) if name == "laplace" else _certain(model)
    if name == "bbb":
        posterior = BayesByBackprop(model, data_size=size, local=True, seed=seed)
        _by_adam(model, posterior, posterior.penalty, batches)
        return lambda x: _mean(posterior.predict(x, SAMPLES))
    if name == "kfac":
        return _kfac(model, batches)
    if name == "ivon":
        return _ivon(model, batches, size, seed)
    return _noisy(model, batches, size, _noisy_config(name), seed)


def _by_adam(
    model: nn.Module, network: nn.Module, penalty: Callable[[], Tensor], batches: Batches
) -> None:
    optimizer = torch.optim.Adam(network.parameters(), ADAM_LR)
    for x, y in batches:
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(x), y) + penalty()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _kfac(model: nn.Module, batches: Batches) -> Predictor:
    optimizer, loss = KFAC(model, KFACConfig()), CategoricalLoss()
    for x, y in batches:
        with optimizer.capture() as captured:
            output = model(x)
        optimizer.observe(captured, output, loss)
        optimizer.zero_grad()
        loss(output, y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _certain(model)


def _noisy(
    model: nn.Module, batches: Batches, size: int, config: NoisyConfig, seed: int
) -> Predictor:
    optimizer, loss = NoisyKFAC(model, config, data_size=size, seed=seed), CategoricalLoss()
    for x, y in batches:
        with optimizer.sampled_params(train=True) as captured:
            output = model(x)
            optimizer.observe(captured, output, loss)
            loss(output, y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return lambda x: _mean(optimizer.predict(x, SAMPLES))


def _ivon(model: nn.Module, batches: Batches, size: int, seed: int) -> Predictor:
    """IVON draws from torch's global generator, which is seeded."""
    try:
        import ivon
    except ImportError as error:
        raise ScriptError("ivon needs the package ivon-opt: pip install acktr[bench]") from error
    torch.manual_seed(seed)
    optimizer = ivon.IVON(model.parameters(), ess=size, weight_decay=1 / size, **IVON)
    for x, y in batches:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        drawn = []
        for _ in range(SAMPLES):
            with optimizer.sampled_params():
                drawn.append(model(x))
        return _mean(torch.stack(drawn))

    return predict


@torch.no_grad()
def _laplace(model: nn.Module, data: tuple[Tensor, Tensor], seed: int) -> Predictor:
    """Laplace's approximation of the last layer, with its full Fisher matrix.

    The covariance is H^-1, H = sum_n (diag(p) - p p^T) (x) a a^T + I, at the trained weights.
    """
    body, head = model[:-1], model[-1]  # type: ignore[index]
    rows = body(data[0]).double()
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    p = model(data[0]).double().softmax(1)
    classes, width = p.shape[1], rows.shape[1]
    precision = last_layer_precision(rows, p)
    factor = torch.linalg.cholesky(precision)
    normal = torch.randn(
        classes * width,
        SAMPLES,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    noise = torch.linalg.solve_triangular(factor.T, normal, upper=True)
    mean = torch.cat([head.weight, head.bias[:, None]], 1).double()
    weights = mean + noise.T.view(SAMPLES, classes, width)

    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        hidden = body(x).double()
        hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)
        return _mean(hidden @ weights.mT)

    return predict


def last_layer_precision(rows: Tensor, p: Tensor) -> Tensor:
    """H = sum_n (diag(p) - p p^T) (x) a a^T + I, (K D, K D), of inputs a (N, D) and p (N, K)."""
    classes, width = p.shape[1], rows.shape[1]
    precision = torch.eye(classes * width, dtype=torch.float64)
    blocks = precision.view(classes, width, classes, width)
    for i in range(classes):
        for j in range(i, classes):
            weight = p[:, i] * (float(i == j) - p[:, j])
            block = (rows * weight[:, None]).T @ rows
            blocks[i, :, j] += block
            if i != j:
                blocks[j, :, i] += block
    return precision


def _certain(model: nn.Module) -> Predictor:
    def predict(x: Tensor) -> Tensor:
        with torch.no_grad():
            return _mean(model(x)[None])

    return predict


def _mean(logits: Tensor) -> Tensor:
    """The mean of probabilities, (samples, N, K) to (N, K)."""
    return logits.softmax(-1).mean(0)


def shuffled(
    data: tuple[Tensor, Tensor], batch: int, epochs: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of all epochs in random order."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=generator)
        for start in range(0, len(y) - batch + 1, batch):
            rows = order[start : start + batch]
            yield x[rows], y[rows]
