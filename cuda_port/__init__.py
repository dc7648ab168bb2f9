"""The numba.cuda port: `quantize`, `dequantize`, `scores` and `weighted_sum` on a GPU.

Importing this package touches neither Numba nor CUDA; the first call does. Results are those of
`tbq` to the bit.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from cuda_port.errors import DeviceMemoryError
from tbq.errors import BackendError
from tbq.extras import install_command
from tbq.format import Format

__all__ = [
    "DeviceMemoryError",
    "dequantize",
    "is_available",
    "quantize",
    "require_device",
    "scores",
    "weighted_sum",
]

# NumPy 2.5 has this no more, and numba-cuda up to 0.30.4 cannot compile without.
if not hasattr(np, "row_stack"):
    np.row_stack = np.vstack


def _api() -> ModuleType:
    try:
        from cuda_port import api
    except (ImportError, AttributeError) as error:  # missing, or too old for another package
        need = f"numba.cuda cannot be imported ({error}); {install_command('cuda12')}"
        raise BackendError("numba.cuda", need) from None
    return api


def is_available() -> bool:
    """Tell whether there is a device to run on."""
    try:
        return _api().has_device()
    except BackendError:
        return False


def require_device() -> None:
    """Raise BackendError, which says what to install, if there is no device to run on."""
    _api().require_device()


def quantize(x: Any, fmt: str | Format, **options: Any) -> Any:
    """Quantise rows; see `cuda_port.api.quantize`."""
    return _api().quantize(x, fmt, **options)


def dequantize(packed: Any, fmt: str | Format, **options: Any) -> Any:
    """Dequantise rows; see `cuda_port.api.dequantize`."""
    return _api().dequantize(packed, fmt, **options)


def scores(q: Any, packed_k: Any, fmt: str | Format, **options: Any) -> Any:
    """Return q . K for packed keys; see `cuda_port.api.scores`."""
    return _api().scores(q, packed_k, fmt, **options)


def weighted_sum(p: Any, packed_v: Any, fmt: str | Format, **options: Any) -> Any:
    """Return sums of packed values; see `cuda_port.api.weighted_sum`."""
    return _api().weighted_sum(p, packed_v, fmt, **options)
