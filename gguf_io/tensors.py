"""The mapping of names to tensors that an open file has."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
# Names in the text that stands for a mapping.
SHOWN = 3


class Tensors(dict[str, T]):
    """Tensors by name, in file order. Models have hundreds, so the text for it names a few."""

    def __repr__(self) -> str:
        names = ", ".join([*self][:SHOWN])
        return f"<{len(self)} tensors{': ' if self else ''}{names}{', …' * (len(self) > SHOWN)}>"


def as_array(values: np.ndarray, dtype: Any, copy: bool | None) -> np.ndarray:
    """Return decoded values as `__array__` has to: ValueError if no copy may be made of them."""
    if copy is False:
        raise ValueError("values are decoded, which is no view of the file; see .raw")
    return values if dtype is None else values.astype(dtype, copy=False)
