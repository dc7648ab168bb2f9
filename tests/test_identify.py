"""Whose types bare files hold: files of the forks themselves, and files that say nothing."""

import re

import gguf_bytes as g
import numpy as np
import pytest
from conftest import FORMATS, NUMBERED, SAMPLES, STATES

import gguf_io
import tbq
from tbq import registry

# Every sample that holds a fork's types, by the name of the program that wrote it; what only
# upstream's types are in means the same everywhere.
WRITERS = {"pr21089": "pr21089", "llama-tq": "llama-tq", "small": "pr21089"}
FORK_TYPES = re.compile("tbq|ktq|vtq|lfm2-hybrid|llama.nonunified|qwen2vl")


@pytest.mark.parametrize("path", sorted(STATES.glob("*.bin")), ids=lambda p: p.name)
def test_dumps_of_the_forks(path):
    with gguf_io.open_state(path) as state:
        writer = path.name.partition(".")[0]
        stated = writer == "llama-tq" or FORK_TYPES.search(path.name)
        assert state.dialect == (WRITERS[writer] if stated else None), state.dialect_reason
        assert not any(isinstance(t.format, gguf_io.Unknown) for t in state.tensors.values())


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("small.*.gguf")), ids=lambda p: p.name)
def test_models_of_the_forks(path):
    with gguf_io.open_gguf(path) as f:
        assert f.dialect == ("pr21089" if "tbq" in path.name else None)


def bare_file(fmt, release, rows=16):
    """Return a GGUF of encoded Gaussian rows that states nothing, with another tensor behind."""
    x = np.random.default_rng(5).standard_normal((rows, 2 * fmt.group_values)).astype(np.float32)
    packed = tbq.quantize(x, fmt)
    body = packed.tobytes() + bytes(-packed.size % 32)
    records = [
        g.tensor("t", (x.shape[1], rows), registry.type_id(fmt, fmt.dialect, release)),
        g.tensor("u", (64,), 0, len(body)),
    ]
    return g.gguf_file([], records, body + bytes(256)), packed


def releases(fmt):
    """Return the releases of the format's dialect that list it."""
    dialect = registry.get_dialect(fmt.dialect)
    return [r.name for r in dialect.releases if any(f.key == fmt.key for f in r.types.values())]


@pytest.mark.parametrize("fmt", [f for f in NUMBERED if f.release], ids=lambda fmt: fmt.label)
def test_a_dialect_without_a_release_is_the_one_that_the_file_states(fmt, tmp_path):
    path = tmp_path / "stated.gguf"
    x = np.ones((2, 2 * fmt.group_values), np.float32)
    packed = tbq.quantize(x, fmt)
    gguf_io.write_gguf(path, {}, [gguf_io.OutputTensor.from_packed("t", packed, fmt)])
    for dialect in (None, fmt.dialect):
        with gguf_io.open_gguf(path, dialect=dialect) as f:
            assert f.tensors["t"].format.key == fmt.key


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_bare_files_are_read_as_what_they_are_or_not_at_all(fmt, tmp_path):
    """Either the codec that wrote them, or a question that has it among its answers."""
    for release in releases(fmt):
        data, packed = bare_file(fmt, release)
        path = tmp_path / "bare.gguf"
        path.write_bytes(data)
        with gguf_io.open_gguf(path) as f:
            found = f.tensors["t"].format
            if not isinstance(found, gguf_io.Unknown):
                backends = {fmt.dialect, registry.get_dialect(fmt.dialect).backend_of}
                alike = found.block == fmt.block and found.name == fmt.name
                same = found.codec == fmt.codec or (alike and found.dialect in backends)
                assert same or fmt.codec in codecs(found), (release, f.dialect_reason)
            elif fmt.is_ggml and found is fmt:
                assert np.array_equal(f.tensors["t"].dequantize(), tbq.dequantize(packed, fmt))
            else:
                with pytest.raises(tbq.AmbiguousTypeError) as caught:
                    f.tensors["t"].dequantize()
                assert any(c.startswith(own) for own in bases(fmt) for c in caught.value.candidates)
        if f.dialect is not None:  # what was found can be said
            with gguf_io.open_gguf(path, dialect=f.dialect) as again:
                assert again.tensors["t"].format is found
        with gguf_io.open_gguf(path, dialect=f"{fmt.dialect}@{release}") as f:
            assert f.tensors["t"].format.key == fmt.key
            assert np.array_equal(f.tensors["t"].raw, packed)


def codecs(fmt):
    """Return every codec that a format can be."""
    return [variant.codec for variant in fmt.variants()]


def bases(fmt):
    """Return the dialects under whose names a format can be asked for."""
    base = registry.get_dialect(fmt.dialect).backend_of
    return [fmt.dialect] + ([base] if base else [])
