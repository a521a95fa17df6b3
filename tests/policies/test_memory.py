"""Memory over sequences, against single steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from acktr.policies.memory import Recurrent, Window

T, N, D, W = 9, 3, 4, 8
KINDS = ["lstm", "gru", "attention"]


def make(kind, window=4):
    torch.manual_seed(0)
    memory = Window(D, W, window, heads=2) if kind == "attention" else Recurrent(kind, D, W)
    memory = memory.double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return memory


def sequence(seed=1, starts=0.3):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(T, N, D, generator=generator, dtype=torch.float64)
    return inputs, torch.rand(T, N, generator=generator) < starts


def started(memory, seed=2):
    """A state in the middle of episodes."""
    inputs, _ = sequence(seed)
    state = memory.initial_state(N)
    first = torch.zeros(T, N, dtype=torch.bool)
    return tuple(part.detach() for part in memory(inputs, state, first)[1])


def stepped(memory, inputs, state, starts):
    """One step after the other, with the state forgotten by hand where an episode begins."""
    outputs, fresh = [], memory.initial_state(N)
    no = torch.zeros(1, N, dtype=torch.bool)
    for t in range(len(inputs)):
        state = tuple(
            torch.stack([f[n] if starts[t, n] else s[n] for n in range(N)])
            for s, f in zip(state, fresh, strict=True)
        )
        output, state = memory(inputs[t : t + 1], state, no)
        outputs.append(output[0])
    return torch.stack(outputs), state


@pytest.mark.parametrize("starts", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_is_its_steps(kind, starts):
    memory = make(kind)
    inputs, first = sequence(starts=starts)
    state = started(memory)
    whole, last = memory(inputs, state, first)
    single, end = stepped(memory, inputs, state, first)
    assert torch.allclose(whole, single, atol=1e-12)
    for mine, theirs in zip(last, end, strict=True):
        # What lies before an episode's beginning does not matter in a window.
        hidden = end[1][..., None] > 0 if kind == "attention" and mine.dim() == 3 else True
        assert torch.allclose(mine * hidden, theirs * hidden, atol=1e-12)
    weights = torch.randn_like(whole)
    gradients = [
        torch.autograd.grad((weights * outputs).sum(), list(memory.parameters()))
        for outputs in (whole, single)
    ]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*gradients, strict=True))
    assert any(bool(a.abs().max() > 1e-3) for a in gradients[0])


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_before_an_episode_is_forgotten(kind):
    memory = make(kind, window=T)
    inputs, first = sequence(starts=0.0)
    first[4] = True
    other = inputs.clone()
    other[:4] += 1.0
    state = started(memory)
    mine, theirs = memory(inputs, state, first)[0], memory(other, memory.initial_state(N), first)[0]
    assert torch.equal(mine[4:], theirs[4:]) or torch.allclose(mine[4:], theirs[4:], atol=1e-12)
    assert not torch.allclose(mine[:4], theirs[:4], atol=1e-3)


def test_a_window_sees_no_further():
    memory = make("attention", window=3)
    inputs, first = sequence(starts=0.0)
    other = inputs.clone()
    other[:4] += 1.0
    state = memory.initial_state(N)
    mine, theirs = memory(inputs, state, first)[0], memory(other, state, first)[0]
    assert torch.allclose(mine[6:], theirs[6:], atol=1e-12)
    assert not torch.allclose(mine[5], theirs[5], atol=1e-3)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_layer_is_that_of_torch(kind):
    memory = make(kind)
    inputs, first = sequence(starts=0.0)
    assert torch.allclose(
        memory(inputs, memory.initial_state(N), first)[0], memory.core(inputs)[0], atol=1e-12
    )
    assert isinstance(memory.core, nn.LSTM if kind == "lstm" else nn.GRU)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_gates_of_keeping_begin_open(kind):
    memory = Recurrent(kind, 3, 4).double()
    with torch.no_grad():
        memory.core.weight_hh_l0.zero_()  # so that nothing else goes from step to step
    first = tuple(torch.rand_like(part) for part in memory.initial_state(2))
    starts = torch.zeros(8, 2, dtype=torch.bool)
    _, last = memory(torch.zeros(8, 2, 3, dtype=torch.float64), first, starts)
    kept = torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)) ** 8
    torch.testing.assert_close(last[-1], kept * first[-1])
