"""A set of golden vectors on disk: `manifest.json`, `cases.tsv` for C, and raw little-endian files.

`manifest.json` is the truth; `data/tbq-vectors.schema.json` is its schema. `cases.tsv` repeats what
a C program needs, one file per line: case, operation, format, kind:role, path, dtype, count, values
that are compared together, match rule, limit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tbq
from gguf_io.atomic import new_folder
from tbq import FileFormatError, Format, InputError, TbqError
from tbq.format import EVIDENCE
from tbq.registry import get_dialect
from tbq.vectors import NOTES, Case
from tbq.vectors.cases import GRAPH

from .vector_manifest import DTYPES, check_case, check_manifest

SCHEMA = "tbq-vectors/1"
MANIFEST, TABLE, HEADER = "manifest.json", "cases.tsv", "tbq_vectors.h"
LICENSE = "CC0-1.0"
HEADER_SOURCE = Path(__file__).parent / "data" / HEADER
MAX_MANIFEST = 1 << 28


def write_set(folder: Path, cases: Iterable[Case], seed: int, size: str) -> dict:
    """Write a set to a new folder, which appears when it is complete; returns the manifest.

    Raises:
        InputError: the folder exists and is not empty.
        OSError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("--out", str(folder), "a new or an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as scratch:
        return _write(scratch, cases, seed, size)


def _write(folder: Path, cases: Iterable[Case], seed: int, size: str) -> dict:
    files: dict[str, dict] = {}
    entries, lines, formats, flags = [], [], {}, set()

    def put(path: str, data: bytes) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
        files[path] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    for case in cases:
        roles = {}
        for role, array in case.arrays.items():
            kind = "u8" if array.dtype == np.uint8 else "f32"
            path = f"{case.id}.{role}.{kind}"
            put(path, np.ascontiguousarray(array, DTYPES[kind]).tobytes())
            roles[role] = {"path": path, "dtype": kind, "shape": list(array.shape)}
        entries.append(_entry(case, roles))
        lines += _lines(case, roles)
        flags.update(case.flags)
        if case.format is not None:
            formats[case.format.label] = _format(case.format)
    put(TABLE, "".join(lines).encode())
    put(HEADER, HEADER_SOURCE.read_bytes())
    manifest = {
        "schema": SCHEMA,
        "generator": {"name": "tbq-vectors", "version": tbq.__version__},
        "license": LICENSE,
        "endianness": "little",
        "seed": seed,
        "size": size,
        "notes": {flag: note for flag, note in NOTES.items() if flag in flags},
        "formats": formats,
        "cases": entries,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", newline="\n")
    return manifest


def _entry(case: Case, roles: dict) -> dict:
    return {
        "id": case.id,
        "op": case.op,
        "format": case.format.label if case.format else None,
        "rotation": case.rotation,
        "flags": list(case.flags),
        "comment": case.comment,
        "inputs": {role: roles[role] for role in case.inputs},
        "output": {"role": case.output} | roles[case.output],
        "taps": {role: roles[role] for role in case.taps},
        "mask": roles.get("mask"),
        "match": case.match,
    }


def _lines(case: Case, roles: dict) -> list[str]:
    key = case.format.label if case.format else case.rotation or GRAPH
    limit = case.match.get("max", 0)
    lines = []
    for role, entry in roles.items():
        kind = "out" if role == case.output else "in" if role in case.inputs else "tap"
        kind = "mask" if role == "mask" else kind
        count = int(np.prod(entry["shape"]))
        row = case.match.get("group", entry["shape"][-1])
        fields = [case.id, case.op, key, f"{kind}:{role}", entry["path"], entry["dtype"]]
        fields += [str(count), str(row), case.match["mode"], f"{limit:g}"]
        lines.append("\t".join(fields) + "\n")
    return lines


def _format(fmt: Format) -> dict:
    dialect = get_dialect(fmt.dialect)
    entry = {
        "dialect": fmt.dialect,
        "name": fmt.name,
        "type_id": dialect.type_id(fmt) if dialect.numbers(fmt) else None,
        "block_values": fmt.block_values,
        "block_bytes": fmt.block_bytes,
        "block_index": fmt.codec.position,
        "fields": _fields(fmt.layout.stored),
        "source": fmt.source,
        "evidence": EVIDENCE[fmt.evidence],
        "notes": fmt.notes,
    }
    if fmt.choice:
        entry["choice"] = fmt.choice
    if fmt.group_values != fmt.block_values:
        entry["group_values"] = fmt.group_values
    if fmt.layout.per_row:
        entry["row_header"] = _fields(fmt.layout.header)
    return entry


def _fields(block: np.dtype) -> list[dict]:
    return [
        {"name": name, "offset": int(offset), "type": kind.base.str, "count": _items(kind)}
        for name, (kind, offset, *_) in block.fields.items()
    ]


def _items(kind: np.dtype) -> int:
    return int(np.prod(kind.shape)) if kind.shape else 1


# --- reading -------------------------------------------------------------------------------------


@dataclass
class VectorSet:
    """A set that was opened: its manifest, checked, and the folder with the files."""

    folder: Path
    manifest: dict

    def entries(self, formats: list[Format] | None, operations: list[str] | None) -> list[dict]:
        """Return the manifest's cases, of some formats and operations or of all."""
        keys = None
        if formats is not None:
            keys = {variant.label for fmt in formats for variant in fmt.variants()}
        return [
            entry
            for entry in self.manifest["cases"]
            if (keys is None or entry["format"] in keys)
            and (operations is None or entry["op"] in operations)
        ]

    def load(self, entry: dict) -> Case:
        """Read a case and check its files against the manifest.

        Raises:
            FileFormatError: a file is missing or has other bytes; a format is not registered.
        """
        fmt = self.format(entry)
        output = entry["output"]
        case = Case(
            id=entry["id"],
            op=entry["op"],
            format=fmt,
            flags=tuple(entry["flags"]),
            comment=entry["comment"],
            inputs={role: self.read(file) for role, file in entry["inputs"].items()},
            output=output["role"],
            expected=self.read(output),
            taps={role: self.read(file) for role, file in entry["taps"].items()},
            match=entry["match"],
            mask=self.read(entry["mask"]) if entry["mask"] else None,
            rotation=entry["rotation"],
        )
        try:
            check_case(case)
        except (ValueError, TypeError) as error:
            reason = f"case {case.id!r} is none: {error}"
            raise FileFormatError(self.folder / MANIFEST, None, reason) from None
        return case

    def format(self, entry: dict) -> Format | None:
        """Return the format of a case, with its choices made; None for rotations.

        Raises:
            FileFormatError: it is not registered, or has no such choice.
        """
        label = entry["format"]
        if label is None:
            return None
        try:
            found = tbq.get_format(label.partition("[")[0])
        except TbqError as error:
            raise FileFormatError(self.folder / MANIFEST, None, f"{entry['id']}: {error}") from None
        for variant in found.variants():
            if variant.label == label:
                return variant
        text = f"{entry['id']}: {found.label} has no choice {label!r}"
        raise FileFormatError(self.folder / MANIFEST, None, text)

    def read(self, file: dict) -> np.ndarray:
        """Read one file of the set."""
        path = self.folder / file["path"]
        record = self.manifest["files"][file["path"]]
        data = read_exactly(path, record["bytes"])
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise FileFormatError(path, None, "its SHA-256 is not the one in the manifest")
        return np.frombuffer(data, DTYPES[file["dtype"]]).reshape(file["shape"])


def read_exactly(path: Path, n: int) -> bytes:
    """Read a file that must have n bytes; FileFormatError if it is missing or has not."""
    if not path.is_file():
        raise FileFormatError(path, None, "the file is missing")
    size = path.stat().st_size
    if size != n:
        raise FileFormatError(path, None, f"has {size} bytes, {n} are expected")
    return path.read_bytes()


def open_set(folder: Path) -> VectorSet:
    """Open a set and check its manifest, the files not yet.

    Raises:
        FileFormatError: there is no manifest, or it is damaged or of another schema.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileFormatError(path, None, "there is no manifest; is this a set of vectors?")
    if path.stat().st_size > MAX_MANIFEST:
        raise FileFormatError(path, None, "the manifest is larger than any this program writes")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(path, None, f"the manifest is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise FileFormatError(path, None, f"schema is {found!r}, {SCHEMA!r} is supported")
    try:
        check_manifest(manifest)
    except (TypeError, ValueError) as error:
        raise FileFormatError(path, None, f"the manifest is damaged: {error}") from None
    return VectorSet(folder, manifest)
