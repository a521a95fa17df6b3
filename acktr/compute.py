"""How tensors are computed: device, precision, threads, compilation, and where the time goes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar, TypeVarTuple

import gymnasium
import torch
from numpy.typing import NDArray

from acktr.config import ConfigError
from acktr.envs import Channels, pictures
from acktr.tree import Observed

Args = TypeVarTuple("Args")
R = TypeVar("R")

_SEEDED = threading.RLock()
"""Held while torch's own generator, which all threads share, has a seed for a while."""


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
        self._here = threading.local()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if getattr(self._here, "inside", False):  # the outer context restores the number
            yield
            return
        with self._lock:
            present = torch.get_num_threads()  # a thread's first call takes the common number
            if self._users == 0:
                self._count = present
            self._users += 1
            count = self._count
            torch.set_num_threads(1)
        self._here.inside = True
        try:
            yield
        finally:
            self._here.inside = False
            with self._lock:
                self._users -= 1
                torch.set_num_threads(count)


one_thread = _OneThread()
"""Context in which torch computes on one thread.

Its other threads spin for a while after each parallel operation, waiting for the next one; between
the small forward passes of acting they would take the cores that environments need.
"""


def threads_for(
    space: gymnasium.Space[Any], channels: Channels = "auto"
) -> AbstractContextManager[None]:
    """Context with torch's threads for networks of such observations: all for pictures, else one.

    With small matrices several threads gain nothing, and where other work keeps the cores busy
    they wait for each other: training was seen to take ten times as long.
    """
    return nullcontext() if pictures(space, channels) else one_thread()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context with torch's own generator at a seed, for one thread at a time; it comes back."""
    with _SEEDED, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


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


def joined(*parts: Mapping[str, float]) -> dict[str, float]:
    """Sums by name."""
    total: dict[str, float] = {}
    for seconds in parts:
        for name, value in seconds.items():
            total[name] = total.get(name, 0.0) + value
    return total


class Compiled(Generic[R, *Args]):
    """A function by way of torch.compile, which compiles at the first call.

    Args:
        function: Of tensors.
        name: What messages call it.
        graph: Whether torch records the kernels as a CUDA graph, whose next replay overwrites what
            the last one returned.
        dynamic: Whether one compilation serves all shapes: no, or (None) once they have changed.

    Raises:
        ConfigError: torch cannot compile here (no compiler, an unsupported Python); the call raises
            it too.
    """

    def __init__(
        self, function: Callable[[*Args], R], name: str, *, graph: bool, dynamic: bool | None
    ) -> None:
        self._name = name
        mode = "reduce-overhead" if graph else None
        try:
            self._compiled: Callable[[*Args], R] = torch.compile(
                function, mode=mode, dynamic=dynamic
            )
        except RuntimeError as error:
            raise self._refusal(error) from error

    def __call__(self, *args: *Args) -> R:
        """Call the function."""
        try:
            return self._compiled(*args)
        except RuntimeError as error:
            if _of_compiler(error):
                raise self._refusal(error) from error
            raise

    def _refusal(self, error: RuntimeError) -> ConfigError:
        reason = str(error).strip().partition("\n")[0]
        return ConfigError(
            f"compile: torch cannot compile {self._name} ({reason}); set compile to false"
        )


def _of_compiler(error: RuntimeError) -> bool:
    """Whether the compiler failed, rather than the function that it was given."""
    from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError  # slow to import

    return isinstance(error, TorchDynamoException) and not isinstance(error, TorchRuntimeError)


def compiled_for_updates(network: Callable[[Observed], R]) -> Compiled[R, Observed]:
    """A network for gradients of a loss: batches differ in size, and gradients outlive a replay."""
    return Compiled(network, "the update", graph=False, dynamic=None)
