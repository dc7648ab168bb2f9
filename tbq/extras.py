"""What to type where an optional package is missing."""

from __future__ import annotations

import shlex
from pathlib import Path

PROJECT = "tbq-reference"


def install_command(extra: str) -> str:
    """Return the command that installs an extra: of this checkout, or from an index."""
    root = Path(__file__).parents[1]
    if (root / "pyproject.toml").is_file():
        return f"pip install {shlex.quote(f'{root}[{extra}]')}"
    return f"pip install '{PROJECT}[{extra}]'"
