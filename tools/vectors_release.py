"""Golden vectors as a product: one archive with the full set, the same bytes on every machine.

The archive is a .zip that is not compressed: it opens everywhere without further programs, and no
version of a compressor decides its bytes. Times, owners and permissions are constants.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import tbq
from gguf_io.atomic import AtomicFiles
from tbq import Format
from tbq.vectors import GRAPH_OPERATIONS, OPERATIONS, cases

from . import console
from .vector_files import HEADER_SOURCE, MANIFEST, write_set

DATA = HEADER_SOURCE.parent
README, SCHEMA, SUMS = DATA / "vectors-readme.md", DATA / "tbq-vectors.schema.json", "SHA256SUMS"
LICENSE = """\
The vectors in this archive, tbq_vectors.h and the readers in README.md are dedicated to the public
domain under CC0-1.0, https://creativecommons.org/publicdomain/zero/1.0/. They are data computed by
tbq-reference, which is under the MIT licence.
"""
# The earliest time that a .zip can state, and the permissions of every file.
TIME, MODE = (1980, 1, 1, 0, 0, 0), 0o100644


def archive_name() -> str:
    """Return the name of the archive, without its ending."""
    return f"tbq-vectors-{tbq.__version__}"


def release(folder: Path, formats: Iterable[Format] | None = None) -> Path:
    """Write the archive of all formats, or some, into a folder; returns its path.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{archive_name()}.zip"
    operations = OPERATIONS if formats is None else set(OPERATIONS) - set(GRAPH_OPERATIONS)
    chosen = tbq.formats() if formats is None else formats
    with tempfile.TemporaryDirectory() as scratch:
        vectors = Path(scratch) / archive_name()
        manifest = write_set(vectors, cases(chosen, operations, 0, "full"), 0, "full")
        _add_documents(vectors, manifest)
        with AtomicFiles() as output:
            _pack(vectors, output.create(path))
    return path


def _add_documents(folder: Path, manifest: dict) -> None:
    words = {
        "VERSION": tbq.__version__,
        "FORMATS": str(len(manifest["formats"])),
        "CASES": str(len(manifest["cases"])),
        "FILES": str(len(manifest["files"])),
    }
    text = README.read_text(encoding="utf-8")
    for word, value in words.items():
        text = text.replace(word, value)
    (folder / "README.md").write_bytes(text.encode())
    (folder / SCHEMA.name).write_bytes(SCHEMA.read_bytes())
    (folder / "LICENSE").write_bytes(LICENSE.encode())
    sums = [f"{_sha256(path)}  {_name(folder, path)}\n" for path in _files(folder)]
    (folder / SUMS).write_bytes("".join(sums).encode())


def _files(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(files, key=lambda path: _name(folder, path))


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _pack(folder: Path, output) -> None:
    with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as archive:
        for path in _files(folder):
            entry = zipfile.ZipInfo(f"{folder.name}/{_name(folder, path)}", TIME)
            entry.create_system, entry.external_attr = 3, MODE << 16
            archive.writestr(entry, path.read_bytes())


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    parser = argparse.ArgumentParser(prog="vectors_release", description=__doc__)
    parser.add_argument("--out", metavar="DIR", default="dist", help="default: dist")
    parser.add_argument("--formats", metavar="LIST", help="names of formats; default: all")
    return console.run(parser, run, argv)


def run(args: argparse.Namespace) -> int:
    """Write the archive and say what it is."""
    names = args.formats.split(",") if args.formats else None
    formats = None if names is None else [tbq.get_format(name) for name in names]
    path = release(Path(args.out), formats)
    with zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read(f"{archive_name()}/{MANIFEST}"))
    counts = f"{len(manifest['formats'])} formats, {len(manifest['cases'])} cases"
    console.say(f"{_sha256(path)}  {path}")
    console.say(f"{counts}, {path.stat().st_size / 1e6:.1f} MB")
    return console.OK


if __name__ == "__main__":
    raise SystemExit(main())
