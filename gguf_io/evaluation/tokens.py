"""Token ids from files, cut into windows."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from gguf_io.arrays import read_npy
from gguf_io.state import open_state
from gguf_io.state_container import MAGICS
from tbq import FileFormatError, InputError


def read_tokens(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the token ids in a file, int32 (n,).

    The file is a NumPy array (.npy), a llama.cpp state file, whose prompt is taken, or int32 and
    nothing else.

    Raises:
        FileFormatError: it is none of these, or a state file without tokens.
        OSError: it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        return _of_array(path)
    if int.from_bytes(start[:4], "little") in MAGICS:
        return _of_state(path)
    if path.stat().st_size % 4 or not start:
        reason = "neither .npy nor a state file, and no whole number of int32"
        raise FileFormatError(path, None, reason)
    return np.fromfile(path, "<i4").astype(np.int32)


def _of_array(path: Path) -> np.ndarray:
    found = read_npy(path)
    if found.dtype.kind not in "iu" or found.ndim != 1:
        reason = f"{found.dtype} array of shape {found.shape}, need integers (n,)"
        raise FileFormatError(path, None, reason)
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < 1 << 31:
        raise FileFormatError(path, None, "numbers that are no token ids")
    return found.astype(np.int32)


def _of_state(path: Path) -> np.ndarray:
    with open_state(path) as state:
        tokens = state.container.tokens
        if tokens is None or state.has_server_tokens or not len(tokens):
            raise FileFormatError(path, None, "a state file without a plain list of tokens")
        return np.array(tokens, np.int32)


def windows(
    tokens: np.ndarray, ctx: int, limit: int | None, n_vocab: int, bos: int | None
) -> list[np.ndarray]:
    """Cut tokens, int (n,), into windows of ctx; what is left over at the end is dropped.

    The first token of each is replaced by `bos` if there is one, as llama-perplexity does.

    Raises:
        InputError: no whole window; a token that the model does not have.
    """
    count = len(tokens) // ctx
    if not count:
        raise InputError("tokens", f"{len(tokens)}", f"at least one window of {ctx}; see --ctx")
    count = min(count, limit or count)
    used = tokens[: count * ctx].astype(np.int32).reshape(count, ctx)
    if used.min() < 0 or used.max() >= n_vocab:
        bad = int(used.max() if used.max() >= n_vocab else used.min())
        raise InputError("tokens", f"token {bad}", f"tokens of the model, 0 to {n_vocab - 1}")
    found = [np.array(window) for window in used]
    for window in found:
        window[0] = window[0] if bos is None else bos
    return found
