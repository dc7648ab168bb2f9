"""The registry, its names, and the rules of the code base that can be checked by machine."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tbq
from tbq import registry
from tools.formats_table import DOCUMENT, formats_table

ROOT = Path(__file__).parents[1]


def test_fields_of_every_format_make_sense(fmt):
    assert fmt.key == f"{fmt.dialect}:{fmt.name}" == fmt.key.lower()
    assert fmt.block.isbuiltin == 0
    assert fmt.block_bytes == fmt.block.itemsize
    assert fmt.bpw == 8 * fmt.block_bytes / fmt.block_values
    assert fmt.group_values % fmt.block_values == 0 or fmt.block_values % fmt.group_values == 0
    assert all(fmt.block[name] == np.dtype("<f2") for name in fmt.scales)
    assert "@" in fmt.source
    assert fmt.notes
    assert fmt.key in repr(fmt)
    offsets = [offset for _, offset in sorted((f[1], f[1]) for f in fmt.block.fields.values())]
    assert offsets[0] == 0
    assert fmt.row_bytes(3 * fmt.block_values) == 3 * fmt.block_bytes
    assert fmt.row_values(3 * fmt.block_bytes) == 3 * fmt.block_values


def test_keys_and_ids_are_unique():
    keys = [fmt.key for fmt in tbq.formats()]
    ids = [(fmt.dialect, fmt.type_id) for fmt in tbq.formats()]
    assert len(set(keys)) == len(keys)
    assert len(set(ids)) == len(ids)


def test_names_resolve(fmt):
    assert tbq.get_format(fmt.key) is fmt
    assert tbq.get_format(fmt.key.upper()) is fmt
    assert tbq.get_format(fmt) is fmt
    for alias in fmt.aliases:
        assert tbq.get_format(f"{fmt.dialect}:{alias}") is fmt


def test_bare_names_mean_the_default_dialect():
    assert tbq.get_format("tbq3_0").key == "pr21089:tbq3_0"
    assert tbq.get_format(" TBQ4_0 ").key == "pr21089:tbq4_0"


def test_bare_names_of_several_dialects(monkeypatch):
    fmt = tbq.get_format("tbq3_0")
    for dialect in ("fork-a", "fork-b"):
        for name in ("tbq3_0", "own"):
            other = dataclasses.replace(fmt, dialect=dialect, name=name)
            monkeypatch.setitem(registry._FORMATS, other.key, other)
    assert tbq.get_format("tbq3_0") is fmt
    with pytest.raises(tbq.AmbiguousTypeError, match="fork-a:own, fork-b:own") as caught:
        tbq.get_format("own")
    assert caught.value.candidates == ("fork-a:own", "fork-b:own")


@pytest.mark.parametrize("name", ["tbq3", "tbq30", "pr21089:tbq3_1", "pr21098:tbq3_0"])
def test_unknown_names_get_near_misses(name):
    with pytest.raises(tbq.UnknownFormatError, match="did you mean .*tbq3_0") as caught:
        tbq.get_format(name)
    assert caught.value.near


def test_unknown_name_without_near_miss():
    with pytest.raises(tbq.UnknownFormatError, match=r"see tbq.formats\(\)"):
        tbq.get_format("zzzzzz")


def test_a_key_is_registered_once():
    fmt = tbq.get_format("tbq3_0")
    family = type("Family", (), {"FORMATS": (fmt, fmt)})
    with pytest.raises(AssertionError, match="twice"):
        registry._index([family])


def test_documentation_is_generated_from_the_registry():
    assert DOCUMENT.read_text(encoding="utf-8") == formats_table()


def test_family_docstrings_are_specifications():
    for family in registry.FAMILIES:
        for heading in ("What it is", "Block", "Quantise", "Dequantise", "Source"):
            assert f"\n{heading}" in family.__doc__, family.__name__


ARROWS = {
    "tbq": {"tbq"},
    "gguf_io": {"tbq", "gguf_io"},
    "cuda_port": {"tbq", "cuda_port"},
    "tools": {"tbq", "gguf_io", "cuda_port", "tools"},
}
# Inside tbq: the registry and the specifications never reach for the kernels or the door.
LAYERS = {
    "errors.py": set(),
    "numerics.py": set(),
    "bitpack.py": set(),
    "format.py": {"tbq.errors"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


@pytest.mark.parametrize("package", ARROWS)
def test_imports_point_one_way(package):
    own = {"tbq", "gguf_io", "cuda_port", "tools", "tbq_tools", "tests"}
    for path in (ROOT / package).rglob("*.py"):
        used = {name.partition(".")[0] for name in imported(path)} & own
        assert used <= ARROWS[package], path


@pytest.mark.parametrize("name", LAYERS)
def test_the_bottom_of_tbq_imports_nothing_above(name):
    used = {m for m in imported(ROOT / "tbq" / name) if m.startswith("tbq")}
    assert used <= LAYERS[name]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import tbq", ["numba", "gguf", "scipy"]),
        ("import tbq; tbq.formats()", ["numba", "gguf", "scipy"]),
        ("import gguf_io", ["numba", "scipy"]),
        ("import cuda_port", ["numba"]),
        ("import tools.tbq_quantize", ["numba", "gguf", "scipy"]),
    ],
)
def test_imports_are_light(statement, absent):
    code = f"import sys; {statement}; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
