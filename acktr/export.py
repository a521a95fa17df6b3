"""Export of a policy for other programs, with everything that it needs inside.

The exported program takes a batch of raw observations (N, ...), of Dict and Tuple spaces one input
for each part by its name, and gives three outputs:

    action      the most likely action as the environment takes it: clipped to the bounds of a Box,
                reshaped, and counted from the space's start
    parameters  of the distribution (N, P): logits, or means and log standard deviations
    value       V (N,), of the rewards that the agent learns from (scaled, if it scales them)

Running normalisation of observations is part of it, frozen. An agent with action masks takes them
as an input action_mask (N, P), bool, unless they are a part of its observations.

A network with a memory has further inputs: episode_start (N,), bool, true where an observation is
the first of an episode, and its state (N, ...) in parts state_0, state_1, ..., which the outputs
next_state_0, ... give for the next step. Where episode_start is true the state does not matter, so
that zeros will do.

ONNX runs in many programs. The other form is torch.export's: TorchScript, which was torch's own,
is deprecated since torch 2.9, and newer Pythons have none.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from acktr.environments import evaluation_envs
from acktr.envs import MASK, MaskSource, found_masks, parts
from acktr.files import reason, write_atomic
from acktr.policies import ObservationNormalizer, PartNormalizer, Policy
from acktr.runs.saved import SavedAgent
from acktr.tree import Tree

OUTPUTS = ("action", "parameters", "value")
"""Names of what an exported policy gives; a network with a memory gives its state behind them."""
START = "episode_start"


class ExportError(RuntimeError):
    """A policy that cannot be exported; the message is one line."""


class Standalone(nn.Module):
    """A policy as one module, from raw observations (N, ...) to :data:`OUTPUTS`, on the CPU.

    Observations of Dict and Tuple spaces are a dict of tensors by ``acktr.envs.parts``.

    Args:
        policy: What acts.
        masks: Where its environment's action masks are.
    """

    low: Tensor
    high: Tensor

    def __init__(self, policy: Policy, masks: MaskSource | None) -> None:
        super().__init__()
        self.masks = masks
        inside = parts(policy.observation_space)  # a tuple has a mask for each component
        self.mask_parts = [name for name in inside if name.partition("/")[0] == MASK]
        self.network = copy.deepcopy(policy.network).cpu().eval()
        self.head = policy.head
        self.space = policy.action_space
        self.normalized = nn.ModuleDict(
            {_key(name): _Normalized(each) for name, each in _normalizers(policy).items()}
        )
        if isinstance(self.space, gymnasium.spaces.Box):
            self.register_buffer("low", torch.from_numpy(self.space.low.copy()))
            self.register_buffer("high", torch.from_numpy(self.space.high.copy()))

    def forward(
        self,
        observation: Tree,
        action_mask: Tensor | None = None,
        episode_start: Tensor | None = None,
        state: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """Actions, parameters and values, and the state of a network with a memory."""
        if self.masks == "observation" and isinstance(observation, dict):
            action_mask = torch.cat([observation[name] == 1 for name in self.mask_parts], -1)
        if isinstance(observation, dict):
            shown: Tree = {name: self._shown(name, part) for name, part in observation.items()}
        else:
            shown = self._shown("", observation)
        after: tuple[Tensor, ...] = ()
        if episode_start is None:
            parameters, values, *_ = self.network(shown)
        else:
            (parameters, values, *_), after = self.network.step(shown, state, episode_start)
        action = self._action(self.head.make(parameters, action_mask).mode())
        return action, parameters, values, *after

    def _shown(self, name: str, part: Tensor) -> Tensor:
        return self.normalized[_key(name)](part) if _key(name) in self.normalized else part

    def _action(self, mode: Tensor) -> Tensor:
        """As :func:`acktr.policies.to_environment`."""
        space = self.space
        shaped = mode.reshape(mode.shape[0], *(space.shape or ()))
        if isinstance(space, gymnasium.spaces.Box):
            return torch.minimum(torch.maximum(shaped, self.low), self.high).to(self.low.dtype)
        if isinstance(space, gymnasium.spaces.MultiDiscrete):
            shaped = shaped + torch.from_numpy(np.asarray(space.start, np.int64))
        elif isinstance(space, gymnasium.spaces.Discrete):
            return shaped + int(space.start)
        return shaped.to(torch.from_numpy(np.zeros(1, space.dtype)).dtype)


class _Normalized(nn.Module):
    """What ``ObservationNormalizer`` does, in float64 too."""

    mean: Tensor
    scale: Tensor

    def __init__(self, normalizer: ObservationNormalizer) -> None:
        super().__init__()
        moments, self.clip = normalizer.moments, normalizer.clip
        deviation = np.asarray(np.sqrt(moments.variance + 1e-8))
        self.register_buffer("mean", torch.from_numpy(np.asarray(moments.mean)))
        self.register_buffer("scale", torch.from_numpy(deviation))

    def forward(self, values: Tensor) -> Tensor:
        """Normalise a batch."""
        scaled = (values.double() - self.mean) / self.scale
        return scaled.clamp(-self.clip, self.clip).float()


def _normalizers(policy: Policy) -> dict[str, ObservationNormalizer]:
    """The normalisers by part."""
    normalizer = policy.normalizer
    if isinstance(normalizer, PartNormalizer):
        return normalizer.parts
    return {"": normalizer} if isinstance(normalizer, ObservationNormalizer) else {}


def _key(name: str) -> str:
    """The name of a part as one that modules may have: not empty and without dots."""
    return "part " + name.replace(".", "\N{FULLWIDTH FULL STOP}")


def export_policy(policy: Policy, out: Path, masks: MaskSource | None = None) -> None:
    """Write a policy to a file, which appears whole or not at all.

    Args:
        policy: What acts.
        out: The file: .onnx, or .pt2 for ``torch.export.load``.
        masks: Where its environment's action masks are; None: it has none.

    Raises:
        ExportError: The name ends otherwise, a package is missing, the network cannot be traced,
            or the file cannot be written.
    """
    write = _writer(out)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about its own future
            data = write(_traced(policy, masks), *_names(policy, masks))
    except Exception as error:  # whatever a user's network, or torch about it, raises
        first = str(error).strip().partition("\n")[0]
        kind = type(error).__name__
        raise ExportError(
            f"{out}: torch cannot export the network: {kind}: {first:.200}"
        ) from error
    try:
        write_atomic(out, data)
    except OSError as error:
        raise ExportError(f"{out}: cannot write: {reason(error)}") from error


def export_saved(agent: SavedAgent, out: Path) -> None:
    """Write the policy of a saved agent to a file.

    Raises:
        ExportError: As :func:`export_policy`.
        EnvError: Its environment, whose spaces are needed, cannot be made.
        CheckpointError: It does not fit the environment, or only Python code can make that.
    """
    _writer(out)
    agent.require_env()
    with closing(evaluation_envs(agent.config, 1, agent.config.seed)) as envs:
        envs.reset()  # which finds the masks
        masks = found_masks(envs).source
        spaces = envs.single_observation_space, envs.single_action_space
        policy = agent.policy(*spaces, torch.device("cpu"))
    export_policy(policy, out, masks)


def _writer(out: Path) -> Callable[[torch.export.ExportedProgram, list[str], list[str]], bytes]:
    """What writes the kind of file that the name says, after everything was checked."""
    if out.suffix == ".pt2":
        return _pt2
    if out.suffix in (".pt", ".pth", ".ts"):
        raise ExportError(f"{out}: TorchScript is deprecated in torch; write .pt2 or .onnx")
    if out.suffix != ".onnx":
        raise ExportError(f"{out}: the name must end in .onnx, or in .pt2 for torch.export.load")
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ExportError(
                f'{out}: ONNX needs the package {package}: pip install "acktr[export]"'
            )
    return _onnx


def _names(policy: Policy, masks: MaskSource | None) -> tuple[list[str], list[str]]:
    """Names of what the program takes, and of what it gives."""
    inputs = [name or "observation" for name in parts(policy.observation_space)]
    outputs = list(OUTPUTS)
    if masks not in (None, "observation"):
        inputs.append(MASK)
    if policy.recurrent:
        states = [f"state_{place}" for place in range(len(policy.network.initial_state(1)))]
        inputs += [START, *states]
        outputs += [f"next_{name}" for name in states]
    names = [*inputs, *outputs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ExportError(
            f"the part {twice!r} of the observation has the name of another input or output of the"
            " file: call it otherwise in the environment"
        )
    return inputs, outputs


def _traced(policy: Policy, masks: MaskSource | None) -> torch.export.ExportedProgram:
    """The program, for batches of any size."""
    examples: Any = {
        name: torch.from_numpy(np.zeros((2, *(part.shape or ())), part.dtype))
        for name, part in parts(policy.observation_space).items()
    }
    batch = torch.export.Dim("batch")
    sizes: Any = {name: {0: batch} for name in examples}
    if "" in examples:  # a space without parts
        examples, sizes = examples[""], sizes[""]
    given, named = [examples], {}
    shapes: dict[str, Any] = {"observation": sizes}
    if masks not in (None, "observation"):
        given.append(torch.ones(2, policy.head.outputs, dtype=torch.bool))
        shapes[MASK] = {0: batch}
    if policy.recurrent:
        state = tuple(part.cpu() for part in policy.network.initial_state(2))
        named = {START: torch.zeros(2, dtype=torch.bool), "state": state}
        shapes |= {START: {0: batch}, "state": tuple({0: batch} for _ in state)}
    program = Standalone(policy, masks)
    with torch.no_grad():
        return torch.export.export(program, tuple(given), named, dynamic_shapes=shapes)


def _pt2(program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _onnx(program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str]) -> bytes:
    made = torch.onnx.export(
        program,
        input_names=inputs,
        output_names=outputs,
        external_data=False,
        verbose=False,
    )
    assert made is not None
    data: bytes = made.model_proto.SerializeToString()
    return data
