"""Arrays on either side: what callers give, as the kernels take it, and back.

An array on the device is anything with `__cuda_array_interface__`: Numba's, CuPy's, PyTorch's.
Kernels read flat C-contiguous arrays, packed rows as words of two or four bytes; what lies
otherwise is copied there first, on the device.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from cuda_port.device import block, index, thread
from cuda_port.errors import DeviceMemoryError
from tbq.errors import InputError

WORD_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32}
COPY_THREADS = 128


def free_bytes() -> float:
    """Return the bytes that are free on the current device; infinity in the simulator."""
    context = getattr(cuda, "current_context", None)
    info = getattr(context() if context else None, "get_memory_info", None)
    return info()[0] if info else math.inf


def is_on_device(x: Any) -> bool:
    """Tell whether an array lives on the device."""
    return hasattr(x, "__cuda_array_interface__") or hasattr(x, "copy_to_host")


def on_device(x: Any, dtype: type, argument: str) -> Any:
    """Return a device array as Numba sees it, without a copy; InputError for another dtype."""
    array = x if hasattr(x, "copy_to_host") else cuda.as_cuda_array(x)
    if array.dtype != np.dtype(dtype) or array.ndim == 0:
        got = f"{array.dtype} array of shape {tuple(array.shape)}"
        raise InputError(argument, got, f"a {np.dtype(dtype)} array (..., n) on the device")
    return array


def on_host(x: Any, dtype: type, argument: str) -> np.ndarray:
    """Return a C-contiguous NumPy array; InputError for another dtype."""
    array = np.asarray(x)
    wanted = np.dtype(dtype)
    if array.dtype != wanted or array.ndim == 0:
        got = f"{array.dtype} array of shape {array.shape}"
        raise InputError(argument, got, f"a {wanted} array (..., n)")
    return np.ascontiguousarray(array)


def to_device(x: np.ndarray, stream: Any = 0) -> Any:
    """Copy a host array to the device; pageable memory, so it may be changed afterwards."""
    try:
        return cuda.to_device(np.ascontiguousarray(x), stream=stream)
    except Exception as error:
        raise DeviceMemoryError(x.nbytes, free_bytes(), error) from error


def new(shape: tuple[int, ...], dtype: type, stream: Any = 0) -> Any:
    """Allocate on the device; DeviceMemoryError if there is no room."""
    try:
        return cuda.device_array(shape, dtype, stream=stream)
    except Exception as error:
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        raise DeviceMemoryError(n_bytes, free_bytes(), error) from error


def fetch(array: Any, stream: Any, out: np.ndarray | None = None) -> np.ndarray:
    """Return a device array on the host when all that the stream has to do for it is done."""
    found = array.copy_to_host(stream=stream)
    wait(stream)
    if out is None:
        return found
    out[...] = found.reshape(out.shape)
    return out


def wait(stream: Any) -> None:
    """Wait for a stream."""
    if stream:
        stream.synchronize()
    elif hasattr(cuda, "synchronize"):
        cuda.synchronize()


@cuda.jit  # type: ignore[untyped-decorator]  # numba.cuda has no types
def copy_values(source: Any, target: Any) -> Any:
    """Copy an array of two axes, whatever its strides."""
    i = block() * COPY_THREADS + thread()
    n = source.shape[1]
    if i < source.shape[0] * n:
        target[index(i // n), index(i % n)] = source[index(i // n), index(i % n)]


def copy(source: Any, target: Any, stream: Any) -> None:
    """Copy a device array to another of its shape; the last two axes at a time, by a kernel."""
    shape = tuple(source.shape)
    for place in np.ndindex(*shape[:-2]):
        part, other = (source[place], target[place]) if place else (source, target)
        if len(shape) == 1:
            part, other = part.reshape(1, shape[0]), other.reshape(1, shape[0])
        grid = -(-part.shape[0] * part.shape[1] // COPY_THREADS)
        copy_values[grid, COPY_THREADS, stream](part, other)


def contiguous(array: Any, stream: Any, alignment: int = 1) -> Any:
    """Return a device array in C order that starts at a multiple of `alignment`, or a copy."""
    if array.size == 0 or (array.is_c_contiguous() and is_aligned(array, alignment)):
        return array
    found = new(tuple(array.shape), array.dtype, stream)
    copy(array, found, stream)
    return found


def flat(array: Any) -> Any:
    """Return a C-contiguous device array with one axis."""
    return array.reshape(array.size)


def words(packed: Any, unit: int) -> Any:
    """Return packed rows, flat uint8 on the device, as words of `unit` bytes."""
    return packed if unit == 1 or packed.size == 0 else packed.view(WORD_TYPES[unit])


def is_aligned(array: Any, n_bytes: int) -> bool:
    """Tell whether a device array starts at a multiple of so many bytes."""
    interface = getattr(array, "__cuda_array_interface__", None)
    return interface is None or interface["data"][0] % n_bytes == 0
