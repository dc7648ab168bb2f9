"""What a manifest of golden vectors, and a case of it, may hold: anything else is refused."""

from __future__ import annotations

import math
import re

import numpy as np

from tbq import Format
from tbq.rotations import KINDS
from tbq.vectors import OPERATIONS, Case

DTYPES = {"f32": np.dtype("<f4"), "u8": np.dtype("u1")}
MATCH_MODES = ("exact", "boundary", "cost", "nmse")
FIELDS = {"seed": int, "size": str, "notes": dict, "files": dict, "cases": list}
MAX_COUNT = 1 << 40  # of values or bytes; anything larger is in no file
MAX_AXES = 8
# The roles of each operation's inputs, and of its output, but for the blocks of a sibling.
ROLES = {
    "quantize": (("x",), "packed"),
    "dequantize": (("packed",), "y"),
    "scores": (("q", "packed"), "scores"),
    "weighted_sum": (("p", "packed"), "sum"),
    "rotation": (("x",), "y"),
    "sigmoid_back": (("x", "dy"), "dx"),
    "silu_back": (("x", "dy"), "dx"),
}
# What says of which thing a case is, by operation.
SUBJECTS = {"rotation": "rotation", "sigmoid_back": None, "silu_back": None}


def check_manifest(manifest: dict) -> None:
    """Raise a TypeError or ValueError where a manifest is not what this program writes."""
    for key, kind in FIELDS.items():
        _typed(manifest, key, kind)
    for note in manifest["notes"].values():
        _typed(_is(note, dict), "bug", str)
    for path, record in manifest["files"].items():
        _stays_inside(path)
        _count(_is(record, dict), "bytes")
        _typed(record, "sha256", str)
    seen = set()
    for entry in manifest["cases"]:
        _check_entry(_is(entry, dict), manifest["files"])
        if entry["id"] in seen:
            raise ValueError(f"case {entry['id']!r} is there twice")
        seen.add(entry["id"])


def _check_entry(entry: dict, files: dict) -> None:
    _stays_inside(_typed(entry, "id", str))
    if _typed(entry, "op", str) not in OPERATIONS:
        raise ValueError(f"case {entry['id']!r}: unknown operation {entry['op']!r}")
    for flag in _typed(entry, "flags", list):
        _is(flag, str)
    _typed(entry, "comment", str)
    subject = SUBJECTS.get(entry["op"], "format")
    for key in ("format", "rotation"):
        _typed(entry, key, str if key == subject else (str, type(None)))
    match = _typed(entry, "match", dict)
    if _typed(match, "mode", str) not in MATCH_MODES:
        raise ValueError(f"case {entry['id']!r}: unknown match rule {match['mode']!r}")
    if match["mode"] in ("cost", "nmse"):
        limit = _typed(match, "max", (int, float))
        if not 0 <= limit < 1e300:
            raise ValueError(f"case {entry['id']!r}: max is {limit!r:.80}")
    output = _typed(entry, "output", dict)
    _typed(output, "role", str)
    inputs, taps = _typed(entry, "inputs", dict), _typed(entry, "taps", dict)
    mask = _typed(entry, "mask", (dict, type(None)))
    for file in (output, *inputs.values(), *taps.values(), *([mask] if mask else [])):
        _check_file(_is(file, dict), files)
    width = output["shape"][-1]
    if match["mode"] == "nmse" and not (_count(match, "group") > 0 and width % match["group"] == 0):
        raise ValueError(f"case {entry['id']!r}: rows of {width}, groups of {match['group']!r:.80}")


def _check_file(file: dict, files: dict) -> None:
    path = _typed(file, "path", str)
    dtype = DTYPES.get(_typed(file, "dtype", str))
    shape = _typed(file, "shape", list)
    if path not in files or dtype is None or not 1 <= len(shape) <= MAX_AXES:
        raise ValueError(f"{path!r}: not listed, or of an unknown type or shape")
    counts = [_count(shape, i) for i in range(len(shape))]
    if files[path]["bytes"] != dtype.itemsize * math.prod(counts):
        raise ValueError(f"{path!r}: size and shape differ")


def _typed(record: dict | list, key: str | int, kind: type | tuple[type, ...]):
    """Return an item of a record, which has to be there and of a type."""
    if isinstance(record, dict) and key not in record:
        raise ValueError(f"{key!r} is missing")
    return _is(record[key], kind, key)


def _is(value: object, kind: type | tuple[type, ...], what: object = "an item"):
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{what} is {type(value).__name__} {value!r:.60}")
    return value


def _count(record: dict | list, key: str | int) -> int:
    value = _typed(record, key, int)
    if not 0 <= value < MAX_COUNT:
        raise ValueError(f"{key!r} is {value!r:.60}")
    return value


def _stays_inside(path: str) -> None:
    """Raise ValueError if a path, or an id that paths are made of, is none within a folder."""
    parts = re.split(r"[/\\]", path)
    if not all(parts) or ".." in parts or "." in parts or "\0" in path or ":" in parts[0]:
        raise ValueError(f"{path!r:.200} leaves the folder, or is no path")


# --- cases whose files were read -----------------------------------------------------------------


def check_case(case: Case) -> None:
    """Raise a TypeError or ValueError where the arrays of a case do not belong together."""
    roles, output = ROLES[case.op]
    arrays = case.inputs | {case.output: case.expected}
    fmt = case.format
    lends = ("sibling",) if fmt is not None and fmt.sibling else ()
    if case.output != output or set(case.inputs) != {*roles, *lends}:
        raise ValueError(f"{case.op} makes {output} of {', '.join((*roles, *lends))}")
    for role, array in arrays.items():
        packed = role in ("packed", "sibling")
        if (array.dtype == np.uint8) != packed or array.ndim < 2 or not array.size:
            raise ValueError(f"{role} is {array.dtype} of shape {array.shape}")
    if (case.match["mode"] == "nmse") == (output == "packed"):
        raise ValueError(f"{case.match['mode']} is no match rule for {output}")
    if fmt is None:
        if case.op == "rotation" and case.rotation not in KINDS:
            raise ValueError(f"rotation is {case.rotation!r}")
        for role in roles:
            _same(arrays[role].shape, case.expected.shape)
        return
    rows = arrays["packed"]
    values = fmt.row_values(rows.shape[-1])
    if "sibling" in arrays:
        _same(arrays["sibling"].shape[:-1], rows.shape[:-1])
    shapes = {
        "quantize": lambda: _same(arrays["x"].shape, (*rows.shape[:-1], values)),
        "dequantize": lambda: _same(case.expected.shape, (*rows.shape[:-1], values)),
        "scores": lambda: (
            _same(arrays["q"].shape[-1:], (values,)),
            _same(case.expected.shape, (len(arrays["q"]), len(rows))),
        ),
        "weighted_sum": lambda: (
            _same(arrays["p"].shape[-1:], (len(rows),)),
            _same(case.expected.shape, (len(arrays["p"]), values)),
        ),
    }
    shapes[case.op]()
    if case.match["mode"] == "boundary":
        _check_boundary(case, fmt)


def _same(shape: tuple, expected: tuple) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(f"shape {shape} does not go with {expected}")


def _check_boundary(case: Case, fmt: Format) -> None:
    if case.mask is None or case.mask.dtype != np.uint8:
        raise ValueError("there is no mask of bits")
    _same(case.mask.shape, case.expected.shape)
    n_blocks = case.inputs["x"].size // fmt.block_values
    for place in _typed(case.match, "positions", list):
        limits = n_blocks, fmt.block_values
        if len(_is(place, list)) != 2 or any(_count(place, i) >= limits[i] for i in (0, 1)):
            raise ValueError(f"position {place!r:.60}")
    scales = _typed(case.match, "scales", list)
    if any(_count(scales, i) >= n_blocks for i in range(len(scales))):
        raise ValueError("scales of blocks that are not there")
    _typed(case.match, "ulps", (int, float))
