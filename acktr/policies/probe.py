"""A look at a network before it is used: what it returns for a few observations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd

from acktr.config import ConfigError
from acktr.envs import flat, one_line
from acktr.kfac import fill_bound
from acktr.policies.contract import (
    ActorCritic,
    Outputs,
    State,
    as_outputs,
    described,
)
from acktr.tree import Observed, Sequences, Tree, first, length, rows, tree_map

_EXAMPLES = 3
_WIDEST = 1e3
"""Largest size of a number in an example; bounds may be those of the type."""


def examples(space: gymnasium.Space[Any], device: torch.device) -> Tree:
    """A few observations of a space, as the environment gives them; always the same ones."""
    batch = batch_space(space, _EXAMPLES)
    batch.seed(0)

    def tensor(array: Any) -> Tensor:
        numbers = np.asarray(array)
        if numbers.dtype.kind == "f":
            numbers = numbers.clip(-_WIDEST, _WIDEST)
        return torch.from_numpy(numbers).to(device)

    shown = flat(space, batch.sample())
    if isinstance(shown, dict):
        return {name: tensor(array) for name, array in shown.items()}
    return tensor(shown)


def check_network(network: ActorCritic, observations: Observed) -> ActorCritic:
    """Call a network on a few observations; returns it in evaluation mode.

    The outputs must have their shapes and be finite, be the same in every call, depend on the
    observations, and each row on its own observation alone; the observations must stay as they
    are. That is looked at with moved weights, since heads may begin at zero.

    Args:
        network: It sets ``modal``.
        observations: Two rows or more, different ones; of a recurrent network two sequences or
            more, all steps of which count, and the first of which begins an episode.

    Raises:
        ConfigError: One line that says what is wrong and what would be right.
    """
    observations = _mapped(torch.clone, observations)
    network.eval()
    leaves = _leaves(observations)
    cuda = [leaf.device for leaf in leaves[:1] if leaf.is_cuda]
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        whole, weights = _finite(_run(network, observations, {})), _moved(network)
        outputs = _run(network, observations, weights)
        if all(bool(output.isfinite().all()) for output in outputs):
            whole = outputs
            _check_repetition(whole, _run(network, observations, weights))
            _check_rows(network, observations, weights, whole)
            _check_dependence(network, observations, whole)
        else:
            weights = {}
        _check_gradients(network, observations)
        network.modal = _differs_in_training(network, observations, weights, whole)
    return network


def _moved(network: ActorCritic) -> dict[str, Tensor]:
    """The weights, each with some noise that is always the same."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: p + 0.1 * torch.randn(p.shape, generator=draw).to(p)
        for name, p in network.named_parameters()
        if p.is_floating_point()
    }


def _mapped(function: Callable[[Tensor], Tensor], observations: Observed) -> Observed:
    """The observations with what a function makes of each tensor of them."""
    if isinstance(observations, Sequences):
        return replace(observations, observations=tree_map(function, observations.observations))
    return tree_map(function, observations)


def _leaves(observations: Observed) -> list[Tensor]:
    """The tensors of observations (N, ...), or of N sequences (N, T, ...)."""
    shown = observations.observations if isinstance(observations, Sequences) else observations
    parts = list(shown.values()) if isinstance(shown, dict) else [shown]
    return [part.transpose(0, 1) for part in parts] if shown is not observations else parts


def _run(network: ActorCritic, observations: Observed, weights: dict[str, Tensor]) -> Outputs:
    """Outputs with some weights or buffers replaced.

    Raises:
        ConfigError: It changes observations or starts in place. A rollout records these very
            tensors, so that it would learn from others than it acted on.
    """
    watched = [("observations", leaf) for leaf in _leaves(observations)]
    if isinstance(observations, Sequences):
        watched.append(("starts", observations.starts))
    # torch counts changes of every tensor, also those that leave these numbers alone.
    before = [(*each, each[1]._version) for each in watched if not each[1].is_inference()]
    with _told(observations):
        outputs = as_outputs(functional_call(network, weights, (observations,)))
    for name, leaf, version in before:
        if leaf._version != version:
            raise ConfigError(
                f"the network's forward() changes its {name} in place, which rollouts record:"
                " compute new tensors (x = 0.5 * x, not x.mul_(0.5) or x *= 0.5)"
            )
    return outputs


@contextmanager
def _told(given: Observed) -> Iterator[None]:
    """Context in which an error of a network is one of the observations that it cannot take."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # whatever a network of one's own raises
        what = f"observations {described(given)}"
        if isinstance(given, Sequences):
            what = (
                f"observations {described(given.observations)}, state {described(given.state)} and"
                f" starts {described(given.starts)}"
            )
        raise ConfigError(
            f"the network cannot take {what}: {type(error).__name__}: {one_line(error)}"
        ) from error


def _finite(outputs: Outputs) -> Outputs:
    """The outputs; raises ConfigError if they hold NaN or Inf."""
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise ConfigError(
            "the network's outputs are not finite (masks belong to the environment: a network"
            " gives logits of all actions)"
        )
    return outputs


def _check_repetition(outputs: Outputs, again: Outputs) -> None:
    """Raise ConfigError if a second call gave other outputs.

    Policies are compared, evaluated and exported as functions of the observations. Noise for
    exploration need not end here: it is drawn in training mode, or by a method of its own.
    """
    if not all(map(_near, outputs, again)):
        raise ConfigError(
            "the network's outputs for the same observations differ from call to call in evaluation"
            " mode: dropout and noise are for training mode, as in F.dropout(x, p,"
            " training=self.training)"
        )


def _check_rows(
    network: ActorCritic, observations: Observed, weights: dict[str, Tensor], outputs: Outputs
) -> None:
    """Raise ConfigError if outputs depend on the other observations or sequences of the batch."""
    edges: Iterable[int] = range(length(observations) + 1)
    one, each, part = "observation", "observations", "row"
    if isinstance(observations, Sequences):
        edges, one, each, part = observations.edges, "environment", "environments", "sequence"
    for number, (start, stop) in enumerate(pairwise(edges)):
        own = slice(start, stop)
        alone = _finite(_run(network, rows(observations, own), weights))
        if not all(_near(o[own], a, o) for o, a in zip(outputs, alone, strict=True)):
            raise ConfigError(
                f"the network's output for {one} {number} depends on the other {each} of the"
                f" batch: forward() must take each {part} by itself"
            )


def _differs_in_training(
    network: ActorCritic, observations: Observed, weights: dict[str, Tensor], outputs: Outputs
) -> bool:
    """Whether training mode gives other outputs or changes a buffer, which are left as they were.

    Learners take gradients in training mode whatever the answer is. It says whether policies must
    be compared in another pass, and whether statistics move that only training mode moves.
    """
    owned = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in network.modules()
        for name, buffer in module._buffers.items()
    ]
    network.train()
    try:
        trained = _run(network, observations, weights)
    finally:
        network.eval()
        moved = False
        for module, name, buffer, kept in owned:
            now = module._buffers[name]
            if now is not buffer:
                moved, module._buffers[name] = True, buffer
            if buffer is not None and kept is not None and not torch.equal(buffer, kept):
                moved = True
                buffer.copy_(kept)
    # Dropout of small probability may leave these few numbers alone.
    rare = any(isinstance(each, _DropoutNd) and each.p > 0 for each in network.modules())
    return moved or rare or not all(map(_near, outputs, trained))


def _check_gradients(network: ActorCritic, observations: Observed) -> None:
    """Raise ConfigError if the policy or the value cannot learn."""
    with torch.enable_grad():
        outputs = _run(network, observations, {})
    for name, output in zip(("policy", "value"), outputs, strict=False):
        if not output.requires_grad:
            raise ConfigError(
                f"the network's {name} has no gradient: forward() must neither detach it nor run"
                " under torch.no_grad(), and some of its parameters must not be frozen"
            )


def _check_dependence(network: ActorCritic, observations: Observed, outputs: Outputs) -> None:
    """Raise ConfigError if neither policy nor value depends on the observations."""
    leaves = _leaves(observations)
    count = len(leaves[0])
    # The steps of a sequence may differ by what the network remembers alone.
    apart = [output.reshape(count, -1) for output in outputs[:2]]
    differ = any(bool((leaf[1:] != leaf[:1]).any()) for leaf in leaves)
    if not differ or not all(_near(o, o[:1].expand_as(o)) for o in apart):
        return
    inputs: list[Tensor] = []

    def wanted(leaf: Tensor) -> Tensor:
        if leaf.is_floating_point():
            inputs.append(leaf.clone().requires_grad_())
            return inputs[-1]
        return leaf

    asked = _mapped(wanted, observations)
    if inputs:  # the same numbers may also come from activations that are saturated
        with torch.enable_grad():
            policy, value, *_ = as_outputs(network(asked))
            total = policy.sum() + value.sum()
        if total.requires_grad:
            slopes = torch.autograd.grad(total, inputs, allow_unused=True)
            if any(slope is not None for slope in slopes):
                return
    raise ConfigError(
        "the network's policy and value are the same for different observations: forward() does"
        " not use them"
    )


class _Unrolled(nn.Module):
    """A recurrent network whose forward pass gives its last state too."""

    def __init__(self, network: ActorCritic) -> None:
        super().__init__()
        self.network = network

    def forward(self, sequences: Sequences) -> tuple[Outputs, State]:
        """Outputs (B, ...) and states (N, ...)."""
        return self.network.unroll(sequences)


@torch.no_grad()
def check_sequences(network: ActorCritic, observations: Tree) -> ActorCritic:
    """Call a recurrent network of one's own on a few observations (N, ...); returns it.

    Raises:
        ConfigError: As :func:`check_network`; or it gives other outputs for sequences than for
            their steps, or does not forget where an episode starts.
    """
    turned = tree_map(lambda part: part.flip(0), observations)
    both = tree_map(lambda *steps: torch.stack(steps), observations, turned)  # (2, N, ...)
    count = length(observations)
    starts = torch.zeros(2, count, dtype=torch.bool, device=first(observations).device)
    starts[0] = True
    fresh = network.initial_state(count)
    whole = Sequences.of(both, starts, fresh, torch.ones_like(starts))
    check_network(network, whole)
    for weights in ({}, _moved(network)):
        _check_steps(network, whole, weights)
    return network


def _check_steps(network: ActorCritic, whole: Sequences, weights: dict[str, Tensor]) -> None:
    """Raise ConfigError unless sequences of two steps are their steps, and begin where they say."""
    unrolled = _Unrolled(network)
    named = {f"network.{name}": weight for name, weight in weights.items()}

    def run(sequences: Sequences) -> tuple[Outputs, State]:
        with _told(sequences):
            found: tuple[Outputs, State] = functional_call(unrolled, named, (sequences,))
            return found

    early = tree_map(lambda part: part[0], whole.observations)
    late = tree_map(lambda part: part[1], whole.observations)
    begin, go_on = whole.starts
    outputs, _ = run(whole)
    if not all(bool(output.isfinite().all()) for output in outputs):
        return
    one, state = run(Sequences.step(early, begin, whole.state))
    two, _ = run(Sequences.step(late, go_on, state))
    for together, *apart in zip(outputs, one, two, strict=True):
        if not _near(together, torch.stack(apart, dim=1).flatten(0, 1)):
            raise ConfigError(
                "the network's outputs for a sequence are not those of its steps one by one:"
                " forward() must take observations (T, N, ...) in the order of time"
            )
    again, _ = run(Sequences.step(late, begin, state))
    anew, _ = run(Sequences.step(late, begin, whole.state))
    # The state alone differs here, so that no rounding does.
    if not all(_near(*both, power=1.0) for both in zip(again, anew, strict=True)):
        raise ConfigError(
            "the network does not forget its state where starts is true: an episode begins there"
        )
    # h[starts[t]] = 0 also changes an output that is h itself, of the step before.
    cut, _ = run(replace(whole, starts=torch.ones_like(whole.starts)))
    for together, *apart in zip(cut, one, again, strict=True):
        if not _near(together, torch.stack(apart, dim=1).flatten(0, 1)):
            raise ConfigError(
                "the network's outputs are others where a sequence goes on with a new episode:"
                " forward() must forget at every step where starts is true, and change no output"
                " of the step before (h = h.masked_fill(...), not h[starts[t]] = 0)"
            )


def _near(first: Tensor, second: Tensor, scale: Tensor | None = None, power: float = 0.5) -> bool:
    """Whether two outputs are equal up to what a batch of another size may round.

    The -1e9 that a network itself gives actions that are not allowed is compared apart: next to it
    no other number would count.
    """
    whole = first if scale is None else scale
    bound, allowed = fill_bound(whole), 10 * torch.finfo(first.dtype).eps ** power
    filled = first < bound
    return all(
        bool(((first - second).abs() * part).max() <= allowed * (whole.abs() * seen).max())
        for part, seen in ((filled, whole < bound), (~filled, whole >= bound))
    )
