"""Settings of the networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from acktr.config.schema import Checked, Limits, Positive
from acktr.envs import Channels

Activation = Literal["tanh", "relu", "elu"]
Memory = Literal["none", "lstm", "gru", "attention"]
Trunk = Literal["nature", "strided"]
Width = Annotated[int, Limits(1, 16_384)]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Checked):
    """Actor and critic networks."""

    shared: bool = True
    """One trunk with two heads (joint Fisher) instead of a separate actor and critic."""
    hidden: tuple[Width, ...] = (64, 64)
    """Widths of the actor's (or the shared trunk's) hidden layers, for vector observations."""
    critic_hidden: tuple[Width, ...] = (64, 64)
    """Widths of a separate critic's hidden layers, for vector observations."""
    activation: Activation = "tanh"
    """Activation of the actor (or shared trunk), for vector observations and the strided trunk."""
    critic_activation: Activation = "tanh"
    """Activation of a separate critic, for the same."""
    trunk: Trunk = "nature"
    """Layers below the heads, for pictures: nature (8x8, 4x4 and 3x3 filters, 512 units, ReLU), or
    strided (twice 32 filters 3x3 with stride 2, 256 units)."""
    policy_gain: Positive = 0.01
    """Gain of the orthogonal initialisation of the policy head."""
    log_std_init: Annotated[float, Limits(-20, 2)] = 0.0
    """Initial log standard deviation of Gaussian policies (independent of the state)."""
    channels: Channels = "auto"
    """Axis of pictures that has the channels: first, last, or auto, by the shape; none: no Box is a
    picture."""
    memory: Memory = "none"
    """What goes from step to step behind the hidden layers: nothing, the state of an lstm or a gru,
    or the last steps of the episode, for attention."""
    memory_width: Width = 64
    """Numbers that the memory gives at each step."""
    memory_window: Annotated[int, Limits(2, 1024)] = 16
    """Steps that attention sees, the present one included."""
    custom: str | None = None
    """Name of a network of one's own (module:Class), to which the rest here does not apply.

    It is given by network= in Python and by --network on the command line; a name alone never
    imports anything.
    """
