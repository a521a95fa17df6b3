"""Faster kernels for float32 matrix products that give the same numbers up to rounding.

oneDNN may be allowed to take bfloat16 for the factors of a float32 product and float32 for its sums
(CUDA: TF32). Two uses of that permission lose nothing:

- Factors that came from bfloat16 are unchanged by it. Statistics of a network that runs in bfloat16
  are such products.
- Where the hardware has no such product oneDNN computes in float32 all the same, on some processors
  in half the time of the other library. A probe decides.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch

LARGE_FACTOR = 256
"""Size of a factor from which choosing a library for its products is worth the call."""

_PROBE = 512
_MKLDNN: Any = torch.backends.mkldnn
_FLOAT32_ERROR = 1e-5
"""Above the relative error of a product that was computed in float32; bfloat16 gives 2e-3."""


class _Precision:
    """A backend's precision of float32 products, which is one for all threads.

    The first thread that needs another one sets it, and the last one puts the former back.

    Args:
        backend: Of matrix products.
        parent: Whose precision it has unless it was given one of its own.
        precision: What is needed.
    """

    def __init__(self, backend: Any, parent: Any, precision: str) -> None:
        self._backend = backend
        self._parent = parent
        self._precision = precision
        self._lock = threading.Lock()
        self._users = 0
        self._before = "none"

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The context in which it is set."""
        with self._lock:
            if self._users == 0:
                before = self._backend.fp32_precision
                self._before = "none" if before == self._parent.fp32_precision else before
                self._backend.fp32_precision = self._precision
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._backend.fp32_precision = self._before


_BFLOAT16 = _Precision(_MKLDNN.matmul, _MKLDNN, "bf16")
_TF32 = _Precision(torch.backends.cuda.matmul, torch.backends, "tf32")


def narrow_products(source: torch.dtype, device: torch.device) -> Any:
    """Context for float32 products whose factors are numbers of a narrower type.

    Args:
        source: What the factors were converted from; a type wider than bfloat16 changes nothing.
        device: Where they are.
    """
    if device.type == "cpu" and source == torch.bfloat16:
        return _BFLOAT16()
    if device.type == "cuda" and source in (torch.bfloat16, torch.float16):
        return _TF32()
    return nullcontext()


def float32_products(device: torch.device) -> Any:
    """Context for float32 products on a processor whose oneDNN computes them faster."""
    if device.type == "cpu" and _stays_float32():
        return _BFLOAT16()
    return nullcontext()


@lru_cache(maxsize=1)
def _stays_float32() -> bool:
    """Whether oneDNN takes float32 products and does not round their factors.

    Processors with AMX do round them, and have fast float32 products anyway.
    """
    if torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_bf16_supported():
        return False
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROBE, _PROBE, generator=draw, dtype=torch.float32, device="cpu")
    exact = rows.double() @ rows.double()
    with _BFLOAT16():
        error = (rows @ rows - exact).norm() / exact.norm()
    return float(error) < _FLOAT32_ERROR
