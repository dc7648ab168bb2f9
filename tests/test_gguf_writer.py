"""Writing GGUF: round trips, metadata kept exactly, atomicity; read back by gguf-py too."""

import errno
import os
import struct

import gguf
import gguf_bytes as g
import numpy as np
import pytest
from conftest import NUMBERED
from gguf import GGUFValueType as V
from hypothesis import given
from hypothesis import strategies as st

import gguf_io
import tbq
from gguf_io import Field, OutputTensor
from gguf_io.reader import SPLIT_KEYS
from gguf_io.writer import OWN_KEYS
from tbq.registry import type_id, undisputed

EVERY_TYPE = [
    g.kv("u8", g.U8, b"\xfe"),
    g.kv("i8", g.I8, b"\xfe"),
    g.kv("u16", g.U16, b"\xfe\xff"),
    g.kv("i16", g.I16, b"\xfe\xff"),
    g.kv("u32", g.U32, b"\xfe\xff\xff\xff"),
    g.kv("i32", g.I32, b"\xfe\xff\xff\xff"),
    g.kv("f32", g.F32, struct.pack("<f", 1e-5)),
    g.kv("bool", g.BOOL, b"\0"),
    g.kv("string", g.STRING, g.string("grüße")),
    g.kv("not utf-8", g.STRING, g.string(b"\xff")),
    g.kv("empty string", g.STRING, g.string("")),
    g.kv("u64", g.U64, b"\xff" * 8),
    g.kv("i64", g.I64, b"\xff" * 8),
    g.kv("f64", g.F64, struct.pack("<d", float("nan"))),
    g.kv_array("strings", g.STRING, 2, g.string("") + g.string("x")),
    g.kv_array("no strings", g.STRING, 0, b""),
    g.kv_array("no floats", g.F32, 0, b""),
    g.kv_array("bools", g.BOOL, 3, b"\1\0\1"),
    g.kv_array("u64s", g.U64, 2, bytes(range(16))),
    g.kv("", g.U8, b"\1"),
]


def raw_fields(f):
    return {key: bytes(field.raw) for key, field in f.metadata.fields.items()}


def test_metadata_is_copied_key_for_key_and_byte_for_byte(tmp_path):
    source = tmp_path / "in.gguf"
    source.write_bytes(g.gguf_file(EVERY_TYPE, [g.tensor("t", (8,))], bytes(32)))
    f = gguf_io.open_gguf(source)
    gguf_io.write_gguf(
        tmp_path / "out.gguf", f.metadata, map(OutputTensor.from_tensor, f.tensors.values())
    )
    assert (tmp_path / "out.gguf").read_bytes() == source.read_bytes()
    values = dict(gguf_io.open_gguf(tmp_path / "out.gguf").metadata)
    assert values["empty string"] == ""
    assert len(values["no strings"]) == 0
    assert (values["u64"], values["i64"]) == (2**64 - 1, -1)
    assert values["bools"].tolist() == [True, False, True]


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_alignment_is_kept(tmp_path, alignment, rng):
    path = tmp_path / "a.gguf"
    x = rng.standard_normal((3, 7)).astype(np.float32)
    metadata = {"general.alignment": Field.of(alignment, V.UINT32)}
    tensors = [OutputTensor.from_array(name, x) for name in ("a", "b")]
    gguf_io.write_gguf(path, metadata, tensors)
    with gguf_io.open_gguf(path) as f:
        assert f.alignment == alignment
        for t in f.tensors.values():
            assert t.data_offset % alignment == 0
            assert np.array_equal(t.dequantize(), x)
    for t in gguf.GGUFReader(path).tensors:
        assert np.array_equal(t.data, x)


def test_gguf_py_reads_what_is_written(tmp_path, rng):
    x = rng.standard_normal((2, 3, 64)).astype(np.float32)
    path = tmp_path / "out.gguf"
    metadata = {"general.architecture": "llama", "list": ["a", "b"], "n": 3, "x": 0.5}
    tensors = [OutputTensor.from_array("w", x), OutputTensor.from_array("h", x.astype("f2"))]
    gguf_io.write_gguf(path, metadata, tensors)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("list").contents() == ["a", "b"]
    assert reader.get_field("n").contents() == 3
    assert reader.get_field("general.architecture").contents() == "llama"
    w, h = reader.tensors
    assert np.array_equal(w.data, x)
    assert np.array_equal(h.data, x.astype("f2"))


scalars = st.one_of(
    st.text(max_size=20),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(width=32),
    st.floats().map(np.float64),
    st.integers(0, 255).map(np.uint8),
)
sequences = st.one_of(
    st.lists(st.text(max_size=5), min_size=1),
    st.lists(st.booleans(), min_size=1),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1),
    st.lists(st.floats(width=32), min_size=1),
    st.lists(st.integers(0, 65535)).map(lambda v: np.array(v, np.uint16)),
)


@given(st.dictionaries(st.text(max_size=10), scalars | sequences, max_size=6))
def test_metadata_of_python_values_round_trips(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "values.gguf"
    for key in ("general.alignment", *SPLIT_KEYS, *OWN_KEYS):  # the writer's own business
        values.pop(key, None)
    gguf_io.write_gguf(path, values, [])
    with gguf_io.open_gguf(path) as f:
        assert list(f.metadata) == list(values)
        for key, value in values.items():
            got = f.metadata[key]
            if isinstance(value, (list, np.ndarray)):
                assert np.array_equal(
                    np.array(list(got)), np.array(value), equal_nan=got_is_float(got)
                )
            elif isinstance(value, float) and value != value:
                assert got != got
            else:
                assert got == value


def got_is_float(got):
    return isinstance(got, np.ndarray) and got.dtype.kind == "f"


def test_types_of_python_values_are_those_of_gguf_py():
    for value in ("s", True, 5, -5, 0.5):
        assert Field.of(value).type == V.get_type(value)
    assert Field.of(1 << 40).type is V.INT64
    assert Field.of(1 << 63).type is V.UINT64
    assert Field.of([1, 2]).item_type is V.INT32
    assert Field.of(np.zeros(0, np.int8)).item_type is V.INT8
    assert Field.of([], V.STRING).item_type is V.STRING
    assert Field.of(7, V.UINT8).raw.tobytes() == b"\0\0\0\0\7"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([], None),
        (300, V.UINT8),
        (-1, V.UINT32),
        (1 << 64, None),
        ([[1]], None),
        (None, None),
        (1j, None),
        (np.zeros(2, "f2"), None),
        ({}, None),
        ([1, "a"], None),
    ],
)
def test_metadata_that_gguf_cannot_hold(value, kind):
    with pytest.raises(tbq.InputError, match="metadata value"):
        Field.of(value, kind)


@given(st.data())
def test_quantise_write_read_dequantise(tmp_path_factory, data):
    """What is read back is bit for bit dequantize(quantize(x)), any shape up to four axes."""
    fmt = data.draw(st.sampled_from(NUMBERED))
    lead = data.draw(st.lists(st.integers(1, 4), max_size=3))
    n = fmt.group_values * data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((*lead, n)).astype(np.float32)
    x[rng.random(x.shape) < data.draw(st.sampled_from([0, 0.01]))] = np.nan
    packed = tbq.quantize(x, fmt)
    path = tmp_path_factory.getbasetemp() / "round-trip.gguf"
    tensors = [
        OutputTensor.from_packed("q", packed, fmt),
        OutputTensor.from_array("x", x),
    ]
    gguf_io.write_gguf(path, {"general.architecture": "test"}, tensors)
    with gguf_io.open_gguf(path) as f:
        q = f.tensors["q"]
        alone = fmt.is_ggml and undisputed(type_id(fmt)) is fmt  # its id means this everywhere
        assert (f.dialect, f.dialect_guessed) == (None if alone else fmt.dialect, False)
        assert q.format.key == fmt.key
        assert q.shape == x.shape
        assert q.raw.tobytes() == packed.tobytes()
        if not fmt.choice:  # the file does not say which
            y = tbq.dequantize(packed, fmt, original=True)
            assert q.dequantize().tobytes() == y.tobytes()
        assert f.tensors["x"].dequantize().tobytes() == x.tobytes()
        assert f.metadata.get("tbq.dialect") == (None if alone else fmt.dialect)
        assert alone or fmt.source in f.metadata["tbq.source"]


def test_own_keys_go_with_the_formats(tmp_path, rng):
    x = rng.standard_normal((1, 256)).astype(np.float32)
    packed = OutputTensor.from_packed("q", tbq.quantize(x, "tbq3_0"), tbq.get_format("tbq3_0"))
    gguf_io.write_gguf(tmp_path / "a.gguf", {}, [packed])
    a = gguf_io.open_gguf(tmp_path / "a.gguf")
    assert set(a.metadata) == set(OWN_KEYS)
    gguf_io.write_gguf(tmp_path / "b.gguf", a.metadata, [OutputTensor.from_array("x", x)])
    assert not gguf_io.open_gguf(tmp_path / "b.gguf").metadata


def tensor(name="t", shape=(4,), n_bytes=16, kind=None, chunks=None):
    kind = kind or gguf_io.resolve_type("f32")
    chunks = chunks or (lambda: [np.zeros(n_bytes, np.uint8)])
    return OutputTensor(name, shape, kind, n_bytes, chunks)


BAD_TENSORS = {
    "name": ([tensor("n" * 64)], "63 bytes"),
    "NUL": ([tensor("a\0")], "NUL"),
    "twice": ([tensor(), tensor()], "twice"),
    "five axes": ([tensor(shape=(1, 1, 1, 1, 4))], "axes"),
    "bytes of no values": ([tensor(shape=(0, 4))], "0 bytes"),
    "negative axis": ([tensor(shape=(-1, 4))], "axes"),
    "size": ([tensor(n_bytes=12)], "16 bytes"),
    "short chunks": ([tensor(chunks=lambda: [np.zeros(8, np.uint8)])], "8 bytes"),
    "row": ([tensor(shape=(100,), kind=gguf_io.resolve_type("q4_0"))], "multiple of 32"),
    "unknown beside known": (
        [
            OutputTensor.from_packed("q", np.zeros((1, 98), np.uint8), tbq.get_format("tbq3_0")),
            tensor("u", kind=gguf_io.Unknown(43)),
        ],
        "one dialect",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_leave_no_file(tmp_path, name):
    tensors, words = BAD_TENSORS[name]
    with pytest.raises(tbq.InputError, match=words):
        gguf_io.write_gguf(tmp_path / "out.gguf", {}, tensors)
    assert list(tmp_path.iterdir()) == []


def test_one_dialect_per_file(tmp_path, registered_twin):
    fmt = tbq.get_format("tbq3_0")
    other = registered_twin("other")
    data = np.zeros((1, 98), np.uint8)
    tensors = [OutputTensor.from_packed("a", data, fmt), OutputTensor.from_packed("b", data, other)]
    with pytest.raises(tbq.InputError, match="one dialect per file"):
        gguf_io.write_gguf(tmp_path / "out.gguf", {}, tensors)
    with pytest.raises(tbq.InputError, match="dialect"):
        gguf_io.write_gguf(tmp_path / "out.gguf", {}, tensors[:1], dialect="other")


def test_only_floats_are_stored_as_they_are():
    with pytest.raises(tbq.InputError, match="float32 or float16"):
        OutputTensor.from_array("x", np.zeros(4))
    big_endian = np.arange(4, dtype=">f4")
    (chunk,) = OutputTensor.from_array("x", big_endian).chunks()
    assert np.array_equal(chunk, big_endian)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "out.gguf"
    path.write_bytes(b"old")

    def chunks():
        yield np.zeros(8, np.uint8)
        raise failure

    with pytest.raises(type(failure)):
        gguf_io.write_gguf(path, {}, [tensor(chunks=chunks)])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_at_the_last_moment(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        gguf_io.write_gguf(tmp_path / "out.gguf", {}, [tensor()])
    assert list(tmp_path.iterdir()) == []


def test_permissions_and_links_survive(tmp_path):
    real, link = tmp_path / "real.gguf", tmp_path / "link.gguf"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    gguf_io.write_gguf(link, {}, [tensor()])
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert "t" in gguf_io.open_gguf(real).tensors
    umask = os.umask(0)
    os.umask(umask)
    gguf_io.write_gguf(tmp_path / "new.gguf", {}, [tensor()])
    assert (tmp_path / "new.gguf").stat().st_mode & 0o777 == 0o666 & ~umask


def test_devices_are_not_replaced():
    with pytest.raises(tbq.InputError, match="regular file"):
        gguf_io.write_gguf("/dev/null", {}, [tensor()])


def test_shards_are_written_together_or_not_at_all(tmp_path, rng):
    x = rng.standard_normal((2, 256)).astype(np.float32)
    fmt = tbq.get_format("tbq4_0")
    packed = tbq.quantize(x, fmt)
    metadata = {"general.alignment": Field.of(64, V.UINT32), "general.name": "m", "empty": ""}
    shards = [
        [OutputTensor.from_array("a", x)],
        [OutputTensor.from_packed("b", packed, fmt), OutputTensor.from_packed("c", packed, fmt)],
    ]
    gguf_io.write_gguf_shards(tmp_path / "m", metadata, shards)
    first = gguf_io.split_path(tmp_path / "m", 0, 2)
    with gguf_io.open_gguf(first) as f:
        assert list(f.tensors) == ["a", "b", "c"]
        assert f.tensors["c"].raw.tobytes() == packed.tobytes()
        assert f.metadata["split.tensors.count"] == 3
    with gguf_io.open_gguf(f.shard_paths[1], follow_splits=False) as second:
        assert second.alignment == 64
        assert second.dialect == "pr21089"
        assert "general.name" not in second.metadata
        assert second.metadata.fields["split.no"].type is V.UINT16
    for path in f.shard_paths:
        path.unlink()
    shards[1][1] = tensor(chunks=lambda: [])
    with pytest.raises(tbq.InputError):
        gguf_io.write_gguf_shards(tmp_path / "m", metadata, shards)
    assert list(tmp_path.iterdir()) == []
