"""Arrays of NumPy's own files, read with errors that say what is wrong with the file."""

from __future__ import annotations

import os
import zipfile
import zlib

import numpy as np

from tbq import FileFormatError

_BROKEN = (ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz by name; nothing in it is executed.

    Raises:
        FileFormatError: it is no .npz, or what is in it is damaged or no array of numbers.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("one array")
            return {name: loaded[name] for name in loaded.files}
    except (*_BROKEN, NotImplementedError):  # NumPy's words are about pickles
        raise FileFormatError(path, None, "no .npz of arrays") from None


def read_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the array of an .npy; errors as for `read_npz`."""
    try:
        with open(path, "rb") as file:
            return np.load(file, allow_pickle=False)
    except _BROKEN as error:
        raise FileFormatError(path, None, f"no array of numbers: {error}") from None
