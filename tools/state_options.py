"""The flags that say what a state file does not, shared by the programs that read one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tbq.errors import InputError

if TYPE_CHECKING:  # imported where it is used, --help needs none
    from gguf_io import StateFile

# The flags, as attributes of the parsed arguments; None or False where they were not given.
NAMES = (
    "model",
    "head_dim",
    "rotation",
    "memory",
    "mrope",
    "values",
    "recurrent_layers",
    "any_version",
    "keep_trailing",
)
# `gguf_io.memory_classes.NAMES`, which --help does without
MEMORY_CLASSES = (
    *("kv", "dsa", "iswa", "msa", "recurrent", "hybrid", "hybrid_iswa", "hybrid_idx"),
    *("dsa_iswa", "dsv4", "none"),
)


def add(parser: argparse._ArgumentGroup) -> None:
    """Add the flags to a parser or a group of one."""
    add = parser.add_argument
    add(
        "--model", metavar="GGUF", help="the model that wrote it (metadata suffices): heads, layers"
    )
    add("--head-dim", metavar="N[,N]", help="values per head of K and V, if there is no --model")
    add(
        "--rotation",
        choices=("auto", "on", "off", "k", "v"),
        help="whether K and V are stored rotated: as the fork does by default (auto), both, "
        "neither, only K, only V",
    )
    add("--memory", choices=MEMORY_CLASSES, help="the memory class, where several fit")
    add("--mrope", choices=("yes", "no"), help="whether cells have M-RoPE coordinates")
    add("--values", choices=("yes", "no"), help="whether there are V rows")
    add("--recurrent-layers", metavar="N", type=int, help="layers with recurrent state")
    add("--any-version", action="store_true", help="no longer needed: a version is only a hint")
    add(
        "--keep-trailing",
        action="store_true",
        help="keep bytes after the memory of a sequence file that nothing explains",
    )


def open_from(args: argparse.Namespace, path: str, **changes) -> StateFile:
    """Open a state file as the flags say; `changes` go to `gguf_io.open_state` instead."""
    from gguf_io import open_state

    yes_no = {"yes": True, "no": False, None: None}
    options = {
        "dialect": args.dialect,
        "model": args.model,
        "rotation": args.rotation or "auto",
        "head_dim": head_dim(args.head_dim),
        "memory": args.memory,
        "mrope": yes_no[args.mrope],
        "values": yes_no[args.values],
        "recurrent_layers": args.recurrent_layers,
        "trailing": args.keep_trailing,
    }
    return open_state(path, **(options | changes))


def head_dim(text: str | None) -> int | tuple[int, int] | None:
    """Parse `--head-dim`: one number, or one for K and one for V."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise InputError("--head-dim", text, "a positive number, or two for K and V")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
