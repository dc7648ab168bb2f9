"""The tensors of a model, as float32 when they are asked for."""

from __future__ import annotations

import numpy as np

from gguf_io.reader import GgufFile, GgufTensor
from gguf_io.types import dequantize_rows
from tbq import FileFormatError


class Weights:
    """Float32 values of a file's tensors; nothing is kept between two calls.

    Args:
        file: the open model.
        threads: worker threads of the codecs.
    """

    def __init__(self, file: GgufFile, threads: int | None = None) -> None:
        self.file = file
        self._threads = threads

    def __contains__(self, name: str) -> bool:
        return name in self.file.tensors

    def tensor(self, name: str) -> GgufTensor:
        """Return a tensor; FileFormatError if the model has none of that name."""
        try:
            return self.file.tensors[name]
        except KeyError:
            raise FileFormatError(self.file.path, None, f"no tensor {name!r}") from None

    def values(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """Return a tensor as float32; None in `shape` stands for any length.

        Raises:
            FileFormatError: it is missing or of another shape.
            InputError, BackendError, AmbiguousTypeError: nothing decodes its type.
        """
        found = self.tensor(name)
        fits = len(found.shape) == len(shape) and all(
            want in (None, have) for have, want in zip(found.shape, shape, strict=True)
        )
        if not fits:
            reason = f"tensor {name!r} is {found.shape}, need {shape}"
            raise FileFormatError(self.file.path, None, reason)
        return np.ascontiguousarray(found.dequantize(threads=self._threads), np.float32)

    def some_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return some rows, int (n,), of a matrix as float32 (n, width)."""
        found = self.tensor(name)
        different, where = np.unique(rows, return_inverse=True)
        found.require_decodable()
        values = dequantize_rows(found.rows_at(different), found.format, threads=self._threads)
        return np.asarray(values, np.float32)[where]

    def row_range(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) of a matrix as contiguous float32."""
        rows = self.tensor(name).dequantize_rows(start, stop, threads=self._threads)
        return np.ascontiguousarray(rows, np.float32)
