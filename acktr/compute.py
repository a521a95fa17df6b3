"""How tensors are computed: device, precision, threads, compilation, and where the time goes."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar, TypeVarTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from acktr.config import ConfigError

Args = TypeVarTuple("Args")
R = TypeVar("R")


def resolve_device(name: str) -> torch.device:
    """The device of a name: auto (CUDA where there is one), cpu, cuda or cuda:N.

    Raises:
        ConfigError: The name is unknown or the device is absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware (AMX or AVX512-BF16 on CPU, CUDA 8.0 or later)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def autocast_context(
    device: torch.device, precision: str, convolutional: bool
) -> tuple[str, Callable[[], AbstractContextManager[Any]]]:
    """The precision in use and a context factory for forward passes.

    Args:
        device: Where the network lives.
        precision: auto, float32 or bfloat16. auto means bfloat16 for convolutional networks on
            hardware that is fast at it, float32 otherwise.
        convolutional: Whether the network is convolutional.
    """
    if precision == "auto":
        precision = "bfloat16" if convolutional and fast_bfloat16(device) else "float32"
    if precision == "float32":
        return precision, nullcontext
    return precision, lambda: torch.autocast(device.type, dtype=torch.bfloat16)


class _OneThread:
    """Lets torch compute on one thread; threads that begin meanwhile find the former number.

    torch keeps the number for every thread, and a number that new threads begin with.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._count = 1

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            present = torch.get_num_threads()  # a thread's first call takes the common number
            if self._users == 0:
                self._count = present
            self._users += 1
            count = self._count
            torch.set_num_threads(1)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                torch.set_num_threads(count)


one_thread = _OneThread()
"""Context in which torch computes on one thread.

Its other threads spin for a while after each parallel operation, waiting for the next one; between
the small forward passes of acting they would take the cores that environments need.
"""


def restore_generator(generator: torch.Generator, state: torch.Tensor) -> None:
    """Continue a saved stream; one of another kind of device does not fit and is left alone.

    Raises:
        ValueError: The state is not a generator's.
    """
    if state.shape != generator.get_state().shape:
        return
    try:
        generator.set_state(state)
    except (RuntimeError, TypeError):
        raise ValueError("checkpoint: damaged state of a random generator") from None


def to_tensor(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor in torch's own, 64-byte aligned memory.

    Matrix products may round differently on numpy's less aligned memory, which would make a run
    depend on where its arrays happen to lie.
    """
    return torch.from_numpy(array).clone().to(device)


class Clock:
    """Adds up the wall-clock seconds of named parts of the work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside the context; parts inside of others are counted in both."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def joined(*parts: Mapping[str, float]) -> dict[str, float]:
    """Sums by name."""
    total: dict[str, float] = {}
    for seconds in parts:
        for name, value in seconds.items():
            total[name] = total.get(name, 0.0) + value
    return total


class Compiled(Generic[R, *Args]):
    """A function by way of torch.compile, which compiles at the first call.

    Where torch cannot compile it (no compiler, an unsupported Python) a warning says so once, and
    it runs uncompiled from then on.

    Args:
        function: Of tensors; it may be called twice for one call.
        name: What the warning calls it.
        graph: Whether torch records the kernels as a CUDA graph, whose next replay overwrites what
            the last one returned.
        dynamic: Whether one compilation serves all shapes: no, or (None) once they have changed.
    """

    def __init__(
        self, function: Callable[[*Args], R], name: str, *, graph: bool, dynamic: bool | None
    ) -> None:
        self._function = function
        self._name = name
        mode = "reduce-overhead" if graph else None
        self._compiled: Callable[[*Args], R] | None = torch.compile(
            function, mode=mode, dynamic=dynamic
        )

    @property
    def active(self) -> bool:
        """Whether it is still by way of the compiler."""
        return self._compiled is not None

    def __call__(self, *args: *Args) -> R:
        """Call the function."""
        if self._compiled is None:
            return self._function(*args)
        try:
            return self._compiled(*args)
        except Exception as error:  # what is not the compiler's fault comes again below
            answer = self._function(*args)
            self._compiled = None
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"compile: torch cannot compile {self._name} ({reason}); it runs uncompiled",
                RuntimeWarning,
                stacklevel=2,
            )
            return answer


def compiled_for_updates(network: Callable[[Tensor], R]) -> Compiled[R, Tensor]:
    """A network for gradients of a loss: batches differ in size, and gradients outlive a replay."""
    return Compiled(network, "the update", graph=False, dynamic=None)
