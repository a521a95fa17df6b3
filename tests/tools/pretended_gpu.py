"""A pretended GPU: tensors that say they are on CUDA, of which the CPU computes the numbers.

What only a GPU would show of a program's tensors shows here too: an operation with tensors of two
devices, ``.numpy()`` on the GPU, a generator of another device than its numbers. Each wait for the
GPU is counted. Kernels are those of the CPU, so that a run ends with the bits of one on the CPU. It
knows nothing of streams, CUDA graphs, ``torch.compile``, autocast and kernels of CUDA's own.

torch's FakeTensorMode has no numbers to decide by, and without CUDA its backward pass aborts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
_ATEN = torch.ops.aten
_CROSSING = {_ATEN.copy_.default, _ATEN._to_copy.default}
"""Operations that take tensors of two devices."""
_INDEXED = {
    _ATEN.index.Tensor,
    _ATEN.index_put_.default,
    _ATEN.index_put.default,
    _ATEN._index_put_impl_.default,
}
"""Operations of a tensor on the GPU whose indices may be on the CPU."""
_WAITS = {_ATEN._local_scalar_dense.default, _ATEN.nonzero.default}


class OnGPU(Tensor):
    """A tensor that says it is on CUDA."""

    inner: Tensor
    waits = 0
    """How often the host waited for the device since the pretence began."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",  # of another one autograd asks for a stream
        )
        made.inner = inner
        found: OnGPU = made
        return found

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        _require_one_device(func, args, given)
        OnGPU.waits += func in _WAITS
        out = func(*tree_map(_inner, args), **tree_map(_inner, given))
        changed = [
            a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments
        ]
        if any(changed[:1]) and isinstance(args[0], Tensor):
            return args[0]
        return tree_map(lambda each: OnGPU(each) if isinstance(each, Tensor) else each, out)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnGPU) else value


def _require_one_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what CUDA's kernels refuse: tensors on the CPU, unless they are scalars."""
    if func in _CROSSING:
        return
    if func in _INDEXED and isinstance(args[0], OnGPU):
        args = (args[0], *args[2:])
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    strangers = [each for each in tensors if not isinstance(each, OnGPU) and each.dim() > 0]
    if strangers:
        shapes = [tuple(each.shape) for each in strangers]
        raise RuntimeError(f"{func}: tensors of shapes {shapes} are on the CPU, others on the GPU")


class Generator(torch.Generator):
    """A generator that says it is on the device that it was asked for.

    A state has 16 bytes on the GPU, as those of CUDA have; here they are a number of a state.
    """

    _states: ClassVar[list[Tensor]] = []
    _place: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        made._place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._place

    def get_state(self) -> Tensor:
        state = super().get_state()
        if self._place.type == "cpu":
            return state
        self._states.append(state)
        return torch.tensor([*len(self._states).to_bytes(16, "big")], dtype=torch.uint8)

    def set_state(self, state: Tensor) -> Generator:
        if self._place.type != "cpu":
            if state.shape != (16,):
                raise RuntimeError("RNG state is wrong size")
            state = self._states[int.from_bytes(bytes(state.tolist()), "big") - 1]
        super().set_state(state)
        return self


class _Mode(TorchFunctionMode):
    """Makes tensors, and moves them, where the caller wants them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], OnGPU):
            OnGPU.waits += 1
            return args[0].inner.tolist()
        if func is Tensor.cpu:
            return _moved(args[0], torch.device("cpu"))
        if func is Tensor.pin_memory:
            if isinstance(args[0], OnGPU):
                raise RuntimeError("cannot pin memory of the GPU")
            return args[0].clone()
        if func is Tensor.new_tensor and "device" not in given:
            given["device"] = args[0].device
        if func is Tensor.to:
            return _to(func, args, given)
        device = given.get("device")
        generator = given.get("generator")
        if generator is not None:
            wanted = device or next((a for a in args if isinstance(a, Tensor)), torch.empty(0))
            place = torch.device(getattr(wanted, "device", wanted))
            if generator.device.type != place.type:
                raise RuntimeError(f"{func}: generator of {generator.device} for {place}")
        if device is None or torch.device(device).type not in ("cpu", "cuda"):
            return func(*args, **given)
        del given["device"]
        return tree_map(lambda each: _moved(each, torch.device(device)), func(*args, **given))


def _to(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``Tensor.to`` in all its forms."""
    tensor, *rest = args
    device = kwargs.pop("device", None)
    if rest and isinstance(rest[0], Tensor):
        device, rest[0] = rest[0].device, rest[0].dtype
    elif rest and isinstance(rest[0], str | torch.device):
        device = rest.pop(0)
        if rest and rest[0] is None:  # a dtype that stays
            rest[0] = tensor.dtype
    if device is not None and torch.device(device).type not in ("cpu", "cuda"):
        return func(tensor, device, *rest, **kwargs)
    found = func(tensor, *rest, **kwargs) if rest or kwargs else tensor
    return found if device is None else _moved(found, torch.device(device))


def _moved(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor) or value.device.type == device.type:
        return value
    if device.type == "cpu":
        OnGPU.waits += 1
        return _inner(value).detach().clone()
    return OnGPU(value.detach().clone()).requires_grad_(value.requires_grad)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """A context in which ``cuda`` is a device; it counts in ``OnGPU.waits``."""
    OnGPU.waits = 0
    absent = {
        "device_count": lambda: 1,
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: torch.empty(0, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "Stream": mock.MagicMock(),
        "current_stream": mock.MagicMock(),
        "stream": lambda _: nullcontext(),
    }
    with ExitStack() as stack:
        for name, pretended in absent.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, pretended))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(_Mode())
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        yield
