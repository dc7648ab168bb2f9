"""The error that only a device has."""

from __future__ import annotations

from tbq.errors import BackendError


class DeviceMemoryError(BackendError):
    """The device has no room for an array; says how many bytes are needed and how many are free."""

    def __init__(self, n_bytes: int, free: float, error: object = "") -> None:
        room = f"cannot allocate {n_bytes} bytes, {free} are free"
        super().__init__("numba.cuda", f"{room}: {error}" if error else room)
