"""Faster kernels for float32 matrix products that give the same numbers.

oneDNN may be allowed to take bfloat16 for the factors of a float32 product and float32 for its sums
(CUDA: TF32). Two uses of that permission lose nothing:

- Factors that came from bfloat16 are unchanged by it. Statistics of a network that runs in bfloat16
  are such products.
- Where the hardware has no such product oneDNN computes in float32 all the same, on some processors
  in half the time of the other library. A probe decides.
"""

from __future__ import annotations

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


@contextmanager
def _setting(backend: Any, precision: str) -> Iterator[None]:
    """Set the precision of float32 products and put it back."""
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before


def narrow_products(source: torch.dtype, device: torch.device) -> Any:
    """Context for float32 products whose factors are numbers of a narrower type.

    Args:
        source: What the factors were converted from; a type wider than bfloat16 changes nothing.
        device: Where they are.
    """
    if device.type == "cpu" and source == torch.bfloat16:
        return _setting(_MKLDNN.matmul, "bf16")
    if device.type == "cuda" and source in (torch.bfloat16, torch.float16):
        return _setting(torch.backends.cuda.matmul, "tf32")
    return nullcontext()


def float32_products(device: torch.device) -> Any:
    """Context for float32 products on a processor whose oneDNN computes them faster."""
    if device.type == "cpu" and _stays_float32():
        return _setting(_MKLDNN.matmul, "bf16")
    return nullcontext()


@lru_cache(maxsize=1)
def _stays_float32() -> bool:
    """Whether oneDNN takes float32 products and does not round their factors.

    Processors with AMX do round them, and have fast float32 products anyway.
    """
    if torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_bf16_supported():
        return False
    rows = torch.randn(_PROBE, _PROBE, generator=torch.Generator().manual_seed(0))
    exact = rows.double() @ rows.double()
    with _setting(_MKLDNN.matmul, "bf16"):
        error = (rows @ rows - exact).norm() / exact.norm()
    return float(error) < _FLOAT32_ERROR
