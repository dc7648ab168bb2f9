"""What a forward pass computed, written for other programs: queries, and K and V as a state file.

The state file is a sequence file of llama.cpp's with float32 rows of one sequence, unrotated, laid
out as `state_parser` describes: a model with windows has two caches, the other's rows first.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from gguf_io.evaluation.transformer import Decoder, Layer
from gguf_io.state_container import NEW_VERSIONS, SEQUENCE_MAGIC

F32_TYPE = 0


class QueryWriter:
    """Writes q, k and v of each layer into an .npz file, layer by layer.

    Arrays `q<layer>` (tokens, heads, head_dim), `k<layer>` and `v<layer>` (tokens, kv heads,
    head_dim), float32, after position has rotated them, q not scaled; `windows` int32 (layers,),
    how many positions a query of the layer sees, 0 for all before it; `scales` float32 (layers,).

    Args:
        file: where to, open for writing.
        model: whose layers they are.
    """

    def __init__(self, file: BinaryIO, model: Decoder) -> None:
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
        self._windows = np.zeros(model.n_layer, np.int32)
        self._scales = np.zeros(model.n_layer, np.float32)

    def add(self, layer: Layer, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Take in one layer; see `forward.Tap`."""
        for name, values in (("q", q), ("k", k), ("v", v)):
            self._array(f"{name}{layer.index}", values)
        self._windows[layer.index], self._scales[layer.index] = layer.window, layer.scale

    def _array(self, name: str, values: np.ndarray) -> None:
        with self._zip.open(f"{name}.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array(entry, np.ascontiguousarray(values), allow_pickle=False)

    def close(self) -> None:
        """Write the rest; the file stays open."""
        self._array("windows", self._windows)
        self._array("scales", self._scales)
        self._zip.close()


class StateDump:
    """Collects K and V of each layer, and writes them as a state file.

    Args:
        tokens: int (n,), the sequence.
    """

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens
        self._rows: list[tuple[int, np.ndarray, np.ndarray]] = []

    def add(self, layer: Layer, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Take in one layer; see `forward.Tap`."""
        n = len(k)
        self._rows.append((layer.window, k.reshape(n, -1), v.reshape(n, -1)))

    def pieces(self) -> Iterator[bytes | np.ndarray]:
        """Yield the file's bytes."""
        n = len(self._tokens)
        yield struct.pack("<3I", SEQUENCE_MAGIC, NEW_VERSIONS["sequence"], n)
        yield self._tokens.astype("<i4")
        everything = [r for r in self._rows if not r[0]]
        windows = [r for r in self._rows if r[0]]
        yield from self._memory(everything)
        if windows:
            yield from self._memory(windows)

    def _memory(self, layers: list[tuple[int, np.ndarray, np.ndarray]]) -> Iterator[Any]:
        """Yield one cache: its cells at positions 0 to n - 1 of sequence 0, then K, then V."""
        n = len(self._tokens)
        cells = np.zeros((n, 3), "<i4")
        cells[:, 0], cells[:, 1] = np.arange(n), 1
        yield struct.pack("<2I", 1, n)
        yield cells
        yield struct.pack("<2I", 0, len(layers))
        for side in (1, 2):
            for layer in layers:
                rows = np.ascontiguousarray(layer[side], "<f4")
                yield struct.pack("<iQ", F32_TYPE, rows.shape[1] * 4)
                yield rows
