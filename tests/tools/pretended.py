"""A device that is pretended, to see without a GPU that nothing meets a tensor of the CPU.

    python -m tests.tools.pretended

trains on it and on the CPU, and prints by how much the networks differ. Tensors of the device
compute on the CPU; an operation between one of them and a tensor of the CPU that is no scalar
raises an error, as with CUDA. torch knows a device for the whole process, so that this is a program
of its own.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch._dynamo  # before torch.Generator is replaced, which it has in annotations
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import acktr.train
from acktr.config import preset
from acktr.environments import training_envs
from acktr.train import Trainer

NAME = "pretended"
CASES = (
    ("CartPole-v1", "acktr", "kfac"),
    ("Reacher-v5", "acktr", "kfac"),
    ("Reacher-v5", "trpo", "kfac"),
    ("BreakoutNoFrameskip-v4", "acktr", "cholesky"),
    ("BreakoutNoFrameskip-v4", "acktr", "kfac"),
    ("BreakoutNoFrameskip-v4", "a2c", "kfac"),
)
UPDATES = 5
_aten = torch.ops.aten


class OtherDeviceError(RuntimeError):
    """Tensors of both devices met."""


class Module(backend_registration._DummyBackendModule):
    """What torch asks a device for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class There(Tensor):
    """A tensor of the device, around one of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type[There], inner: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(function, args, kwargs or {})


def compute(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on tensors of one device, or from one device to the other."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    own = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, There)}
    moves = function in (_aten.copy_.default, _aten._to_copy.default)
    if own and not moves:
        for tensor in tensors:
            if not isinstance(tensor, There) and tensor.dim() > 0:
                raise OtherDeviceError(f"{function}: {tuple(tensor.shape)} is on the CPU")
    # What is written to decides where a result is, or else what is asked for, or else what is read.
    there = isinstance(args[0], There) if function is _aten.copy_.default else bool(own)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map_only(There, lambda tensor: tensor.inner, (args, kwargs))
    result = function(*args, **kwargs)
    if not there:
        return result
    return tree_map_only(Tensor, lambda one: own[id(one)] if id(one) in own else There(one), result)


class Device(TorchDispatchMode):
    """Context in which tensors are made on the device where it is asked for."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(function, args, kwargs or {})


class Generator:
    """A generator of the CPU that says it is the device's."""

    plain = torch.Generator

    def __init__(self) -> None:
        self.inner = self.plain()
        self.device = torch.device(NAME, 0)

    def manual_seed(self, seed: int) -> Generator:
        self.inner.manual_seed(seed)
        return self

    def get_state(self) -> Tensor:
        return self.inner.get_state()


def generator(device: torch.device | str = "cpu") -> Any:
    return Generator() if torch.device(device).type == NAME else Generator.plain(device)


def drawn(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that draws numbers, with generators of the device as well."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        source = kwargs.get("generator")
        if not isinstance(source, Generator):
            return draw(*args, **kwargs)
        asked = kwargs.pop("device", None)
        if asked is None or torch.device(asked).type != NAME:
            raise OtherDeviceError("numbers for the CPU from a generator of the device")
        return There(draw(*args, **kwargs | {"generator": source.inner}))

    return call


def filled(fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same for a method that fills a tensor."""

    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        source = kwargs.get("generator")
        if not isinstance(source, Generator):
            return fill(tensor, *args, **kwargs)
        if not isinstance(tensor, There):
            raise OtherDeviceError("a generator of the device fills a tensor of the CPU")
        fill(tensor.inner, *args, **kwargs | {"generator": source.inner})
        return tensor

    return call


def put(module: nn.Module, device: Any) -> nn.Module:
    """What Module.to does for a whole module."""
    if torch.device(device).type == NAME:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(There(parameter.detach().clone()))
    return module


def register() -> None:
    """Teach torch the device."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    vars(torch)["Generator"] = generator
    for name in ("randn", "rand", "randint", "randperm"):
        vars(torch)[name] = drawn(getattr(torch, name))
    Tensor.exponential_ = filled(Tensor.exponential_)  # type: ignore[method-assign]
    nn.Module.to = put  # type: ignore[method-assign,assignment]


def trained(env: str, algo: str, structure: str, device: str) -> Tensor:
    """The parameters, as one vector, after some updates in float32."""
    config, _ = preset(env, algo)
    actor = dataclasses.replace(
        config.acktr.actor,
        structure=structure,
        refresh_interval=2,
        cold_steps=min(2, config.acktr.actor.cold_steps),
    )
    config = dataclasses.replace(
        config,
        num_envs=4,
        num_steps=16,
        env_workers=1,
        precision="float32",
        acktr=dataclasses.replace(config.acktr, actor=actor),
    )
    acktr.train.resolve_device = lambda _name: torch.device(device)
    envs = training_envs(config)
    with Device() if device != "cpu" else nullcontext():
        trainer = Trainer(config, envs)
        for _ in trainer.run(UPDATES * 64):
            pass
        found = [parameter.detach() for parameter in trainer.network.parameters()]
    envs.close()
    assert all(isinstance(each, There) == (device != "cpu") for each in found)
    return torch.cat([(p.inner if isinstance(p, There) else p).flatten() for p in found])


def check() -> None:
    """Raise unless tensors of both devices are kept apart."""
    with Device():
        there = torch.ones(2, device=torch.device(NAME, 0))
        assert isinstance(there + 1, There) and isinstance(there.cpu(), Tensor)
        assert not isinstance(there.cpu(), There) and isinstance(torch.ones(2).to(there), There)
        for mixed in (lambda: there * torch.ones(2), lambda: torch.ones(2).addmm_(there, there)):
            try:
                mixed()
            except OtherDeviceError:
                continue
            raise AssertionError("tensors of both devices were taken")


def main() -> None:
    torch.set_num_threads(1)
    register()
    check()
    for case in CASES:
        here, there = trained(*case, "cpu"), trained(*case, f"{NAME}:0")
        difference = float((here - there).norm() / here.norm())
        sys.stdout.write(json.dumps([*case, difference]) + "\n")


if __name__ == "__main__":
    main()
