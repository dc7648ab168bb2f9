"""llama-quantize's command lines as tbq-quantize takes them: operands, file types, overrides.

Source: ggml-org/llama.cpp pull request 21089 @ f112d6de7: tools/quantize/quantize.cpp,
src/llama-quant.cpp.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

import tbq
from tbq.errors import AmbiguousTypeError, BackendError, InputError, UnknownFormatError

if TYPE_CHECKING:
    from gguf_io.metadata import Field

COPY = "COPY"  # llama-quantize's TYPE that leaves every tensor as it is
# Flags of llama-quantize that cannot be carried out here, and why.
REFUSED = {
    "imatrix": "nothing: no format here is encoded with the weights of an importance matrix; "
    "llama-quantize does that for K- and IQ-quants",
    "prune_layers": "nothing: layers are left out by llama-quantize only; convert its output",
}
# File types that are mixtures, and the type of most of their tensors; of what the others get see
# `gguf_io.mixtures`. Q2_K_S is missing: llama-quantize does not make it without an importance
# matrix.
MIXTURES = {
    "q3_k_s": "q3_K",
    "q3_k_m": "q3_K",
    "q3_k_l": "q3_K",
    "q4_k_s": "q4_K",
    "q4_k_m": "q4_K",
    "q5_k_s": "q5_K",
    "q5_k_m": "q5_K",
}
# File types whose names are not those of the types they are made of.
FILE_TYPE_ALIASES = {"mxfp4_moe": "mxfp4"} | MIXTURES


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags that llama-quantize has and that need no more than being understood."""
    group = parser.add_argument_group("as llama-quantize has them")
    group.add_argument(
        "--tensor-type-file",
        metavar="FILE",
        action="append",
        default=[],
        help="REGEX=TYPE as in --tensor-type, separated by blanks or newlines",
    )
    group.add_argument(
        "--override-kv",
        metavar="KEY=TYPE:VALUE",
        action="append",
        default=[],
        help="set a metadata key of OUTPUT; TYPE: int, float, bool or str",
    )
    for flag in ("--include-weights", "--exclude-weights"):
        help_ = "taken and ignored: chooses whose importance matrix is used, and none is"
        group.add_argument(flag, metavar="NAME", action="append", default=[], help=help_)
    group.add_argument("--imatrix", metavar="FILE", help="refused: no format here uses one")
    group.add_argument("--prune-layers", metavar="L", help="refused: llama-quantize does that")


def refuse_unsupported(args: argparse.Namespace) -> None:
    """Raise InputError for a flag of llama-quantize that cannot be carried out here."""
    for name, need in REFUSED.items():
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')}", getattr(args, name), need)


# --- operands ------------------------------------------------------------------------------------


def name_operands(args: argparse.Namespace) -> None:
    """Tell the positional arguments apart: INPUT [OUTPUT] TYPE [NTHREADS].

    TYPE is optional with --type-k and --type-v. As in llama-quantize, a second argument that is a
    type leaves no OUTPUT, and then a number behind it is that of the threads.
    """
    args.input, *rest = args.operands
    args.type = args.output = None
    if args.to_dialect is not None:
        args.verify = True  # what the conversion costs is the question
    if args.type_k is not None or args.type_v is not None:
        if len(rest) > 2:
            _refuse_operands(args, "INPUT [OUTPUT] with --type-k and --type-v")
        if len(rest) == 2:
            args.type = rest.pop()
        args.output = rest[0] if rest else None
        return
    if args.to_dialect is not None and len(rest) < 2:
        if not rest:
            _refuse_operands(args, "INPUT OUTPUT [TYPE] with --to-dialect")
        rest.append(COPY)
    versioned = getattr(args, "state_version", None) is not None and len(rest) == 1
    if versioned and not _names_type(rest[0], args.to_dialect or args.dialect):
        rest.append(COPY)
    count = bool(rest) and rest[-1].isdecimal() and rest[-1].isascii()
    place = args.to_dialect or args.dialect
    if len(rest) == 3 and count or len(rest) == 2 and count and _names_type(rest[0], place):
        _set_threads(args, rest.pop())
    if not 1 <= len(rest) <= 2:
        _refuse_operands(args, "INPUT [OUTPUT] TYPE [NTHREADS]")
    args.type = rest.pop()
    args.output = rest[0] if rest else None


def _refuse_operands(args: argparse.Namespace, need: str) -> None:
    raise InputError("arguments", f"{len(args.operands)} of them", need)


def _set_threads(args: argparse.Namespace, text: str) -> None:
    if args.threads is not None and args.threads != int(text):
        raise InputError("NTHREADS", text, f"the same as --threads {args.threads}, or one of them")
    args.threads = int(text)


def _names_type(text: str, dialect: str | None) -> bool:
    try:
        target_type(text, dialect)
    except (UnknownFormatError, AmbiguousTypeError):
        return False
    except BackendError:
        pass
    return True


# --- types ---------------------------------------------------------------------------------------


def target_type(text: str, dialect: str | None = None) -> tbq.Format | None:
    """Return the type that TYPE means: a format, or the name or number of a llama.cpp file type.

    None stands for COPY.

    Raises:
        UnknownFormatError, AmbiguousTypeError: nothing, or more than one, is called so.
        BackendError: it is a mixture that cannot be produced.
    """
    from gguf_io import resolve_type

    name = text.strip().lower()
    if name == COPY.lower():
        return None
    if name.isdecimal() and name.isascii():
        return _by_number(int(name), dialect)
    try:
        return resolve_type(FILE_TYPE_ALIASES.get(name, name), dialect)
    except UnknownFormatError:
        if _is_file_type(name):
            reason = (
                f"cannot produce {text.upper()}, whose types, or weights of errors, are "
                f"llama-quantize's alone; of mixtures there are {', '.join(MIXTURES).upper()}"
            )
            raise BackendError("gguf-py", reason) from None
        raise


def mixture(text: str) -> str:
    """Return the mixture that TYPE means, such as "q4_k_m"; empty if it names a type."""
    name = text.strip().lower()
    if name.isdecimal() and name.isascii():
        numbers = {number: name for name, number in _file_types().items()}
        name = numbers.get(int(name), "")
    return name if name in MIXTURES else ""


def _file_types() -> dict[str, int]:
    """Return the numbers of llama.cpp's file types by name."""
    import gguf

    return {
        member.name.removeprefix("MOSTLY_").lower(): int(member) for member in gguf.LlamaFileType
    }


def _is_file_type(name: str) -> bool:
    return name in _file_types()


def _by_number(number: int, dialect: str | None) -> tbq.Format:
    """Return the type of one of llama.cpp's file types, or of a fork's."""
    import gguf

    from tbq.registry import get_dialect, split_dialect

    places = [split_dialect(dialect)[0].name] if dialect is not None else tbq.dialects()
    found = {
        fmt.key: fmt
        for place in map(get_dialect, places)
        for release in place.releases
        for name, own in release.file_types.items()
        if own == number
        for fmt in place.named(name, release.name)
    }
    if len(found) > 1:
        remedy = "name one of these in full, or pass --dialect"
        raise AmbiguousTypeError(f"file type {number}", list(found), remedy)
    if found:
        return next(iter(found.values()))
    try:
        name = gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        need = "a llama.cpp file type, or a type by name"
        raise UnknownFormatError(str(number), (), need) from None
    return target_type(name, dialect)


# --- what a file or a flag sets ------------------------------------------------------------------


def tensor_types(args: argparse.Namespace) -> list[str]:
    """Return every REGEX=TYPE, those of --tensor-type-file behind those of --tensor-type.

    Raises:
        OSError: a file cannot be read.
        InputError: a file is not text.
    """
    found = list(args.tensor_type)
    for path in args.tensor_type_file:
        try:
            found += Path(path).read_text(encoding="utf-8").split()
        except UnicodeDecodeError:
            raise InputError("--tensor-type-file", path, "text") from None
    return found


def metadata_overrides(args: argparse.Namespace) -> dict[str, Field]:
    """Return the metadata fields that --override-kv sets, of the types llama-quantize gives them.

    Raises:
        InputError: not KEY=TYPE:VALUE, or VALUE is none of that type.
    """
    return dict(map(_override, args.override_kv))


def _override(text: str) -> tuple[str, Field]:
    from gguf import GGUFValueType

    from gguf_io.metadata import Field

    match = re.fullmatch(r"([^=]{1,127})=(int|float|bool|str):(.*)", text, re.DOTALL)
    if match is None:
        need = "KEY=TYPE:VALUE, TYPE one of int, float, bool, str"
        raise InputError("--override-kv", text, need)
    key, kind, value = match.groups()
    try:
        if kind == "int":  # as llama-quantize, which has no sign there
            return key, Field.of(abs(int(value)), GGUFValueType.UINT32)
        if kind == "float":
            return key, Field.of(float(value), GGUFValueType.FLOAT32)
    except (ValueError, OverflowError):
        raise InputError("--override-kv", text, f"a number of 32 bits behind {kind}:") from None
    if kind == "bool":
        if value not in ("true", "false"):
            raise InputError("--override-kv", text, "true or false behind bool:")
        return key, Field.of(value == "true", GGUFValueType.BOOL)
    if len(value.encode("utf-8", "surrogateescape")) > 127:
        raise InputError("--override-kv", text, "at most 127 bytes behind str:")
    return key, Field.of(value)
