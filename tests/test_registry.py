"""The registry, its names, and the rules of the code base that can be checked by machine."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tbq
from tbq import registry
from tbq.dialect import Dialect, Release
from tbq.vectors.code_bits import affected
from tools import evidence_table
from tools.claims import claims
from tools.distortion_table import distortion_table
from tools.formats_table import formats_table
from tools.identification_table import identification_table

ROOT = Path(__file__).parents[1]


def test_fields_of_every_format_make_sense(fmt):
    assert tbq.get_format(fmt.key.lower()).key == tbq.get_format(fmt.key.upper()).key == fmt.key
    assert "@" in fmt.source
    assert fmt.notes
    assert fmt.group_values % fmt.block_values == 0
    assert fmt.group_values % fmt.codec.rotation_values == 0
    assert fmt.bpw < 16
    assert hash(fmt.codec) == hash(dataclasses.replace(fmt.codec))


def test_every_field_has_one_role_and_its_type(fmt):
    """Whoever asks the layout, not the names, is told of every byte of a block once."""
    layout = fmt.layout
    fields = layout.dtype.fields
    named = [*layout.scales, *layout.codes, *layout.floats, *layout.padding, *layout.opaque]
    named += (*layout.derived, *layout.small_scales)
    named += [name for name in (layout.signs, layout.state) if name]
    named += layout.outliers or ()
    assert sorted(named) == sorted(fields) == sorted(layout.roles)
    assert sum(kind.itemsize for kind, *_ in fields.values()) == layout.dtype.itemsize
    assert [layout.offset(name) for name in layout.dtype.names] == sorted(
        layout.offset(name) for name in fields
    )
    for name in (*layout.scales, *layout.floats, *(layout.outliers or ())[1:]):
        assert fields[name][0].base in (np.dtype("<f2"), np.dtype("<f4")), name
    assert all(fields[name][0].base == np.uint8 for name in layout.small_scales)
    assert layout.per_row == layout.dtype.names[: len(layout.per_row)]
    assert layout.header_bytes + fmt.block_bytes == layout.dtype.itemsize
    assert layout.scales or layout.small_scales or not fmt.is_quantized
    assert set(layout.unwritten) <= set(layout.padding)


def test_codes_are_where_the_layout_says(fmt):
    """Any bit of the fields of codes changes some code, no bit of another field does."""
    fields = {name: bits for name, bits in code_fields(fmt).items() if bits}
    expected = {*fmt.layout.codes, *([fmt.layout.state] if fmt.layout.state in fields else [])}
    assert set(fields) == expected


def code_fields(fmt):
    """Return in how many bits of each field some code lies."""
    owned = np.zeros(8 * fmt.block.itemsize, bool)
    for changes in affected(fmt.codec).values():
        owned |= changes.any(axis=1)
    spans = {name: fmt.layout.span(name) for name in fmt.block.names}
    return {n: int(owned[8 * s.start : 8 * s.stop].sum()) for n, s in spans.items()}


def test_row_sizes(fmt):
    group = fmt.codec.group_blocks * fmt.block_bytes
    head = fmt.layout.header_bytes
    assert fmt.row_bytes(3 * fmt.group_values) == head + 3 * group
    assert fmt.row_values(head + 3 * group) == 3 * fmt.group_values
    divides = fmt.group_values == 1  # any row
    for n in (0,) if divides else (0, fmt.group_values + fmt.group_values // 2):
        with pytest.raises(tbq.InputError, match=re.escape(fmt.label)):
            fmt.row_bytes(n)
    for n in (head,) if divides else (head, head + group + 1):
        with pytest.raises(tbq.InputError, match=re.escape(fmt.label)):
            fmt.row_values(n)


def test_keys_are_unique_and_formats_have_ids_or_are_said_to_have_none():
    keys = [fmt.key for fmt in registry.all_formats()]
    assert len(set(keys)) == len(keys)
    for fmt in registry.all_formats():
        dialect = registry.get_dialect(fmt.dialect)
        if fmt in dialect.unnumbered:
            with pytest.raises(tbq.InputError, match="any release"):
                dialect.type_id(fmt)
            continue
        type_id = dialect.type_id(fmt)
        assert any(listed is fmt for _, _, listed in registry.meanings(type_id))


def test_names_resolve():
    for fmt in registry.all_formats():
        assert tbq.get_format(fmt.key) is fmt
        assert tbq.get_format(fmt.key.upper()) is fmt
        assert tbq.get_format(fmt) is fmt
        for alias in fmt.aliases:
            assert tbq.get_format(f"{fmt.dialect}:{alias}") is fmt


def test_bare_names_mean_the_default_dialect():
    assert tbq.get_format("tbq3_0").key == "pr21089:tbq3_0"
    assert tbq.get_format(" TBQ4_0 ").key == "pr21089:tbq4_0"


@pytest.fixture
def forks():
    """Two dialects without precedence that share two names, one of them the default dialect's."""
    fmt = tbq.get_format("tbq3_0")
    names = ("fork-a", "fork-b")
    for dialect in names:
        types = {
            42 + i: dataclasses.replace(fmt, dialect=dialect, name=name)
            for i, name in enumerate(("tbq3_0", "own"))
        }
        registry.register(Dialect(dialect, dialect, (Release("1", types),)))
    yield names
    for dialect in names:
        registry.unregister(dialect)


def test_bare_names_of_several_dialects(forks):
    assert tbq.get_format("tbq3_0").dialect == "pr21089"
    with pytest.raises(tbq.AmbiguousTypeError, match="fork-a:own, fork-b:own") as caught:
        tbq.get_format("own")
    assert caught.value.candidates == ("fork-a:own", "fork-b:own")


@pytest.mark.parametrize("name", ["tbq30", "pr21089:tbq3_1", "pr21098:tbq3_0"])
def test_unknown_names_get_near_misses(name):
    with pytest.raises(tbq.UnknownFormatError, match="did you mean .*tbq3_0") as caught:
        tbq.get_format(name)
    assert caught.value.near


def test_unknown_name_without_near_miss():
    with pytest.raises(tbq.UnknownFormatError, match=r"see tbq.formats\(\)"):
        tbq.get_format("zzzzzz")


def test_a_name_is_registered_once(forks):
    with pytest.raises(ValueError, match="fork-a is registered twice"):
        registry.register(registry.get_dialect("fork-a"))
    fmt = dataclasses.replace(tbq.get_format("tbq3_0"), dialect="fork-c")
    twins = {1: fmt, 2: dataclasses.replace(fmt)}
    with pytest.raises(ValueError, match="two formats of one key"):
        registry.register(Dialect("fork-c", "", (Release("1", twins),)))
    assert "fork-c" not in tbq.dialects()


@pytest.mark.parametrize(
    ("name", "generate"),
    [
        ("formats.md", formats_table),
        ("identification.md", identification_table),
        ("distortion.md", distortion_table),
        ("claims.md", claims),
    ],
)
def test_documentation_is_generated_from_the_registry(name, generate):
    current = (ROOT / "docs" / name).read_text(encoding="utf-8") == generate()
    assert current, f"docs/{name} is not current: run python -m tools.{generate.__name__}"


def test_the_readme_says_what_exactness_rests_on():
    text = evidence_table.DOCUMENT.read_text(encoding="utf-8")
    assert evidence_table.BEGIN in text
    assert all(f"| `{name}` |" in text for name in tbq.dialects())
    assert text == evidence_table.current(text), "run python -m tools.evidence_table"


def test_family_docstrings_are_specifications():
    """Of those whose arithmetic is ours."""
    modules = {type(fmt.codec).__module__ for fmt in tbq.formats()}
    families = [family for family in registry.families() if family.__name__ in modules]
    assert len(families) == len(modules)
    for family in families:
        for heading in ("What it is", "Block", "Quantise", "Dequantise", "Source"):
            assert f"\n{heading}" in family.__doc__, family.__name__


ARROWS = {
    "tbq": {"tbq"},
    "gguf_io": {"tbq", "gguf_io"},
    "cuda_port": {"tbq", "cuda_port"},
    "tools": {"tbq", "gguf_io", "cuda_port", "tools"},
}
# Inside tbq: what each room may import of the package. Specifications never reach for the kernels
# or for the doors (api, attention, rotations); a codec finds its kernels by name when they run.
SPECIFICATION = ("errors", "numerics", "bitpack", "cells", "nearest", "codec", "families")
NAMES = (*SPECIFICATION, "format", "dialect", "dialects", "registry")
LAYERS = {
    "errors.py": (),
    "numerics.py": (),
    "bitpack.py": (),
    "nearest.py": (),
    "cells.py": ("numerics",),
    "codec.py": ("errors",),
    "format.py": ("errors", "codec"),
    "dialect.py": ("errors", "format"),
    "rotations.py": ("errors", "numerics", "kernels"),
    "families": SPECIFICATION,
    "dialects": NAMES,
    "registry.py": NAMES,
    "kernels": (*SPECIFICATION, "kernels"),
    "vectors": (*NAMES, "rotations", "vectors"),
}


def imported(path):
    """Yield the modules that a file imports, those that it names to import_module among them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


@pytest.mark.parametrize("package", ARROWS)
def test_imports_point_one_way(package):
    own = {"tbq", "gguf_io", "cuda_port", "tools", "tbq_tools", "tests"}
    for path in (ROOT / package).rglob("*.py"):
        used = {name.partition(".")[0] for name in imported(path)} & own
        assert used <= ARROWS[package] | above(path), path
        assert not [name for name in imported(path) if name.startswith("tbq.integrations")], path


def above(path):
    """Return what a module for another library may import beside what its package may."""
    return {"gguf_io"} if path.is_relative_to(ROOT / "tbq" / "integrations") else set()


@pytest.mark.parametrize("name", LAYERS)
def test_rooms_of_tbq_import_nothing_above(name):
    place = ROOT / "tbq" / name
    for path in place.rglob("*.py") if place.is_dir() else [place]:
        used = {m for m in imported(path) if m.startswith("tbq.")} | extended(path)
        rooms = {m.split(".")[1] for m in used}
        assert rooms <= set(LAYERS[name]), path


def extended(path):
    """Yield the modules behind `from tbq import x`."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    return {f"tbq.{alias.name}" for n in nodes if n.module == "tbq" for alias in n.names}


def test_specifications_run_without_kernels():
    """Every encoder and decoder, stage and rotation in NumPy alone."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERNELS], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


WITHOUT_KERNELS = """
import sys
import numpy as np
import tbq
from tbq.rotations import KINDS

for fmt in (v for listed in tbq.formats() for v in listed.variants()):
    codec = fmt.codec
    x = np.zeros((1, fmt.group_values), np.float32)  # which searches need not search for
    packed = codec.quantize_rows(x)
    blocks = codec.blocks(packed).reshape(-1)
    codec.dequantize_rows(packed), codec.levels(blocks), codec.restore(blocks)
    codec.stages(x, np.zeros(1, int), blocks)
    codec.rotate(x, blocks), codec.unrotate(x, blocks)
    codec.codes(blocks), codec.anomalies(blocks, np.zeros(len(blocks), int)), codec.boundaries
    list(codec.mutants())
for kind in KINDS:
    tbq.rotation(kind, 64).forward_ref(np.zeros((1, 64), np.float32))
print([m for m in sys.modules if m == "numba" or m.startswith("tbq.kernels")])
"""


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import tbq", ["numba", "gguf", "scipy"]),
        ("import tbq; tbq.formats()", ["numba", "gguf", "scipy", "tbq.vectors"]),
        ("import tbq.vectors", ["numba", "gguf", "scipy", "gguf_io", "tools"]),
        ("import gguf_io", ["numba", "scipy"]),
        ("import cuda_port", ["numba"]),
        ("import tools.tbq_quantize", ["numba", "gguf", "scipy"]),
    ],
)
def test_imports_are_light(statement, absent):
    code = f"import sys; {statement}; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_nobody_asks_which_dialect_a_format_is_of():
    """What a dialect or a block has of its own is a trait of it, not a name that others compare."""
    asks = re.compile(r"\.dialect ==|block\.names")
    for package in ("tbq", "gguf_io", "cuda_port", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            if path.parent.name not in ("families", "dialects"):
                assert not asks.search(path.read_text(encoding="utf-8")), path
