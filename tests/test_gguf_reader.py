"""Reading GGUF: real files, files of gguf-py, and files that lie."""

import dataclasses
import struct
import tracemalloc

import gguf
import gguf_bytes as g
import numpy as np
import pytest
from conftest import NUMBERED, SAMPLES

import gguf_io
import tbq
from tbq.registry import get_dialect, type_id

F32_DATA = np.arange(256, dtype="<f4").tobytes()
GOOD = g.gguf_file(
    [
        g.kv("general.architecture", g.STRING, g.string("llama")),
        g.kv("n", g.U32, struct.pack("<I", 7)),
        g.kv_array("words", g.STRING, 3, g.string("a") + g.string("") + g.string("höhe")),
        g.kv_array("numbers", g.I16, 2, struct.pack("<2h", -1, 5)),
        g.kv_array("none", g.F32, 0, b""),
        g.kv("empty", g.STRING, g.string("")),
        g.kv("flag", g.BOOL, b"\1"),
    ],
    [g.tensor("a", (4, 64), 0, 0), g.tensor("b", (256,), 1, 1024)],
    F32_DATA + np.arange(256, dtype="<f2").tobytes(),
)


def opened(tmp_path, data, **kwargs):
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    return gguf_io.open_gguf(path, **kwargs)


def test_a_file_written_out_by_hand(tmp_path):
    with opened(tmp_path, GOOD) as f:
        assert f.version == 3
        assert f.alignment == 32
        assert f.dialect is None
        assert list(f.metadata) == [
            "general.architecture",
            "n",
            "words",
            "numbers",
            "none",
            "empty",
            "flag",
        ]
        assert f.metadata["general.architecture"] == "llama"
        assert f.metadata["n"] == 7
        assert list(f.metadata["words"]) == ["a", "", "höhe"]
        assert f.metadata["words"][1:] == ["", "höhe"]
        assert f.metadata["numbers"].tolist() == [-1, 5]
        assert len(f.metadata["none"]) == 0
        assert f.metadata["empty"] == ""
        assert f.metadata["flag"] is True
        assert f.metadata.get("absent") is None
        a, b = f.tensors.values()
        assert (a.shape, a.ggml_shape, a.n_rows) == ((64, 4), (4, 64), 64)
        assert (a.format.name, b.format.name) == ("f32", "f16")
        assert a.raw.shape == (64, 16)
        assert np.array_equal(a.dequantize().ravel(), np.arange(256))
        assert np.array_equal(b.dequantize(), np.arange(256))
        assert not a.raw.flags.writeable


def test_version_2_is_read_alike(tmp_path):
    data = bytearray(GOOD)
    data[4] = 2
    assert opened(tmp_path, bytes(data)).metadata["n"] == 7


def test_every_truncation_is_refused(tmp_path):
    """Cut at every byte: an error of ours that names the file, never a crash or a short tensor."""
    path = tmp_path / "cut.gguf"
    for n in range(len(GOOD)):
        path.write_bytes(GOOD[:n])
        with pytest.raises(tbq.FileFormatError, match="cut.gguf"):
            gguf_io.open_gguf(path)


def test_random_corruption_never_escapes_our_errors(tmp_path, rng):
    path = tmp_path / "bent.gguf"
    parsed = 0
    for _ in range(2000):
        data = bytearray(GOOD)
        data[rng.integers(len(GOOD) - 1536)] = rng.integers(256)
        path.write_bytes(data)
        try:
            with gguf_io.open_gguf(path) as f:
                for value in f.metadata.values():
                    if isinstance(value, gguf_io.StringArray):
                        list(value)
                for t in f.tensors.values():
                    if not isinstance(t.format, gguf_io.Unknown):
                        t.dequantize()
            parsed += 1
        except tbq.TbqError:
            pass
    assert 0 < parsed < 2000


def one(**kwargs):
    return g.gguf_file([], [g.tensor(**kwargs)], F32_DATA)


HOSTILE = {
    "empty file": (b"", "empty"),
    "four bytes": (b"GGUF", "version"),
    "magic": (g.gguf_file(magic=b"GGML"), "magic"),
    "version 1": (g.gguf_file(version=1), "version 1"),
    "version 99": (g.gguf_file(version=99), "version 99"),
    "big-endian": (g.gguf_file(version=0x03000000), "big-endian"),
    "tensor count": (g.gguf_file(n_tensors=1 << 62), "tensor count"),
    "kv count": (g.gguf_file(n_kv=1 << 62), "metadata count"),
    "five dimensions": (one(ne=(1, 1, 1, 1, 256)), "5 dimensions"),
    "2^31 dimensions": (one(n_dims=1 << 31), "dimensions"),
    "empty and beyond": (one(ne=(0, 1 << 32, 1 << 32)), "2\\^63"),
    "row of an empty tensor": (one(ne=(100, 0), type_id=2), "multiple of 32"),
    "unknown type without bytes": (
        g.gguf_file([], [g.tensor("a", (64,), 100), g.tensor("b", (256,))], F32_DATA),
        "takes 0 bytes",
    ),
    "negative dimension": (one(ne=(2**64 - 1,)), "2\\^63"),
    "product overflow": (one(ne=(1 << 32, 1 << 32)), "2\\^63"),
    "nbytes overflow": (one(ne=(1 << 62,)), "bytes"),
    "beyond the file": (one(ne=(257,)), "1028 bytes"),
    "unaligned offset": (one(offset=4), "alignment"),
    "offset wraps": (one(offset=2**64 - 32), "offset"),
    "hole before the data": (one(offset=32), "offset 32"),
    "overlap": (
        g.gguf_file([], [g.tensor("a", (64,)), g.tensor("b", (64,))], F32_DATA),
        "offset 0, not at 256",
    ),
    "same name": (
        g.gguf_file([], [g.tensor("a", (64,)), g.tensor("a", (64,), 0, 256)], F32_DATA),
        "twice",
    ),
    "long name": (one(name="n" * 128), "tensor name"),
    "huge name": (
        g.gguf_file([], [g.string("n", 1 << 62) + bytes(64)], F32_DATA),
        "tensor name",
    ),
    "NUL in name": (one(name="a\0b"), "NUL"),
    "path in name": (one(name="../../etc/passwd"), "parent"),
    "name not UTF-8": (one(name=b"\xff\xfe"), "UTF-8"),
    "row not divisible": (one(ne=(100,), type_id=2), "multiple of 32"),
    "key twice": (g.gguf_file([g.kv("k", g.U8, b"1")] * 2), "twice"),
    "key not UTF-8": (g.gguf_file([g.kv(b"\xc3\x28", g.U8, b"1")]), "UTF-8"),
    "key length": (g.gguf_file([g.string("k", 1 << 62) + bytes(64)]), "metadata key"),
    "value length": (g.gguf_file([g.kv("k", g.STRING, g.string("v", 1 << 62))]), "value of"),
    "value type": (g.gguf_file([g.kv("k", 13, bytes(8))]), "13"),
    "item type": (g.gguf_file([g.kv_array("k", 77, 1, bytes(8))]), "77"),
    "array length": (g.gguf_file([g.kv_array("k", g.U8, 1 << 40, bytes(64))]), "items"),
    "array too long": (g.gguf_file([g.kv_array("k", g.U64, 1 << 28, bytes(64))]), "array"),
    "string count": (g.gguf_file([g.kv_array("k", g.STRING, 1 << 29, bytes(64))]), "strings"),
    "string in array": (
        g.gguf_file([g.kv_array("k", g.STRING, 2, g.string("a", 1 << 63) + bytes(64))]),
        "string 0",
    ),
    "nested arrays": (
        g.gguf_file([g.kv_array("k", g.ARRAY, 1, struct.pack("<IQ", g.ARRAY, 1) * 200)]),
        "array of arrays",
    ),
    "alignment 0": (g.gguf_file([g.kv("general.alignment", g.U32, bytes(4))]), "alignment"),
    "alignment 1": (g.gguf_file([g.kv("general.alignment", g.U32, b"\1\0\0\0")]), "alignment"),
    "alignment 48": (g.gguf_file([g.kv("general.alignment", g.U32, b"0\0\0\0")]), "alignment"),
    "alignment type": (g.gguf_file([g.kv("general.alignment", g.U64, bytes(8))]), "UINT32"),
    "alignment huge": (
        g.gguf_file(
            [g.kv("general.alignment", g.U32, struct.pack("<I", 1 << 31))],
            [g.tensor()],
            F32_DATA,
        ),
        "bytes",
    ),
    "split without name": (
        g.gguf_file([g.kv("split.count", g.U16, struct.pack("<H", 3))]),
        "00001-of-00003",
    ),
    "split count a string": (
        g.gguf_file([g.kv("split.count", g.STRING, g.string("3"))]),
        "not an integer",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(tmp_path, name):
    data, words = HOSTILE[name]
    tracemalloc.start()
    with pytest.raises(tbq.FileFormatError, match=words) as caught:
        opened(tmp_path, data)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert caught.value.path.endswith("file.gguf")
    assert "\n" not in str(caught.value)


def test_metadata_value_that_is_not_utf8_keeps_its_bytes(tmp_path):
    f = opened(tmp_path, g.gguf_file([g.kv("k", g.STRING, g.string(b"\xff!"))]))
    assert f.metadata["k"].encode("utf-8", "surrogateescape") == b"\xff!"


def test_not_a_regular_file(tmp_path):
    with pytest.raises(OSError, match="directory"):
        gguf_io.open_gguf(tmp_path)
    with pytest.raises(FileNotFoundError):
        gguf_io.open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(tbq.FileFormatError, match="regular"):
        gguf_io.open_gguf("/dev/null")


def test_a_vocabulary_opens_without_an_object_per_string(tmp_path):
    words = [f"token-{i}" for i in range(262_144)]
    data = g.gguf_file(
        [
            g.kv_array("tokens", g.STRING, len(words), b"".join(map(g.string, words))),
            g.kv_array("scores", g.F32, len(words), bytes(4 * len(words))),
        ]
    )
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    f = gguf_io.open_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    tokens = f.metadata["tokens"]
    assert len(tokens) == 262_144
    assert (tokens[0], tokens[-1]) == (words[0], words[-1])
    assert list(tokens) == words


def test_every_ggml_type_that_gguf_py_can_write_reads_back(tmp_path, rng):
    """Files of gguf.GGUFWriter, decoded as gguf-py decodes them."""
    x = rng.standard_normal((4, 512)).astype(np.float32)
    path = tmp_path / "own.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("list", [1, 2, 3])
    expected = {}
    for kind in get_dialect("ggml").formats:
        qtype = getattr(gguf.GGMLQuantizationType, kind.name.upper(), None)
        if qtype is not None:
            try:
                packed = gguf.quantize(x, qtype)
            except NotImplementedError:
                continue
            assert type_id(kind) == qtype
            writer.add_tensor(kind.name, packed, raw_dtype=qtype)
            expected[kind.name] = gguf.dequantize(packed, qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert {"f32", "f16", "bf16", "q8_0", "q4_0"} <= set(expected)
    with gguf_io.open_gguf(path) as f:
        assert list(f.tensors) == list(expected)
        assert f.metadata["list"].tolist() == [1, 2, 3]
        for name, y in expected.items():
            t = f.tensors[name]
            assert t.format.name == name
            assert np.array_equal(t.dequantize(), y)
            assert np.array_equal(t.dequantize_rows(1, 3), y[1:3])


def test_k_quants_decode():
    with gguf_io.open_gguf(SAMPLES / "small.tbq4_0.mostly.gguf") as f:
        t = f.tensors["output.weight"]
        assert t.format.name == "q6_K"
        with gguf_io.open_gguf(SAMPLES / "small.f32.gguf") as source:
            x = source.tensors["output.weight"].dequantize()
        assert np.abs(t.dequantize() - x).max() < 0.05 * np.abs(x).max()


# --- dialects ---


def fork_file(fmt, n_blocks=8, number=None, kvs=(), negate=False, extra=0):
    x = np.random.default_rng(5).standard_normal((n_blocks, fmt.group_values))
    packed = tbq.quantize(x, fmt)
    if negate:
        packed[:, -1] |= 0x80
    record = g.tensor("t", (fmt.group_values, n_blocks), number or type_id(fmt))
    return g.gguf_file(kvs, [record], packed.tobytes() + bytes(extra)), packed


@pytest.mark.parametrize("fmt", NUMBERED, ids=lambda fmt: fmt.label)
def test_dialect_is_inferred_and_said_to_be(tmp_path, fmt):
    data, packed = fork_file(fmt)
    release = next(
        r.name
        for r in get_dialect(fmt.dialect).releases
        if any(f.key == fmt.key for f in r.types.values())
    )
    f = opened(tmp_path, data, dialect=f"{fmt.dialect}@{release}")
    assert (f.dialect, f.release, f.dialect_guessed) == (fmt.dialect, release, False)
    assert f.tensors["t"].format.key == fmt.key
    assert np.array_equal(f.tensors["t"].raw, packed)
    if fmt.choice:  # a model's tensor does not say for which side or heads it is
        with pytest.raises(tbq.InputError, match="head_dim|side"):
            f.tensors["t"].dequantize()
    else:
        y = tbq.dequantize(packed, fmt, original=True)
        assert np.array_equal(f.tensors["t"].dequantize(), y)
    f = opened(tmp_path, data)
    if f.dialect is not None:
        assert f.dialect_guessed
        assert "only registered dialect" in f.dialect_reason


def test_dialect_stated_by_the_file(tmp_path):
    fmt = tbq.get_format("tbq3_0")
    stated = [g.kv("tbq.dialect", g.STRING, g.string("pr21089"))]
    f = opened(tmp_path, fork_file(fmt, kvs=stated)[0])
    assert (f.dialect, f.dialect_guessed) == ("pr21089", False)
    foreign = [g.kv("tbq.dialect", g.STRING, g.string("from-the-future"))]
    f = opened(tmp_path, fork_file(fmt, kvs=foreign)[0])
    assert f.dialect is None
    assert isinstance(f.tensors["t"].format, gguf_io.Unknown)


def test_scales_in_the_wrong_place_are_not_this_dialect(tmp_path):
    """AmesianX has the same id, name and size, with d in front: half of ours are negative then."""
    data, _ = fork_file(tbq.get_format("amesianx:tbq3_0").at(head_dim=256), n_blocks=64)
    f = opened(tmp_path, data)
    assert (f.dialect, f.dialect_guessed) == ("amesianx", True)
    data, _ = fork_file(tbq.get_format("pr21089:tbq3_0"), n_blocks=64)
    f = opened(tmp_path, data)
    assert (f.dialect, f.dialect_guessed) == ("pr21089", True)


def test_negative_scales_are_no_dialect(tmp_path):
    """With d in front or at the end alike."""
    data, packed = fork_file(tbq.get_format("pr21089:tbq3_0"), negate=True)
    packed[:, 1] |= 0x80
    data = data[: -packed.size] + packed.tobytes()
    f = opened(tmp_path, data)
    assert f.dialect is None
    assert isinstance(f.tensors["t"].format, gguf_io.Unknown)
    with pytest.raises(tbq.FileFormatError, match="negative scales"):
        opened(tmp_path, data, dialect="pr21089")


def test_unknown_types_keep_their_bytes(tmp_path):
    records = [
        g.tensor("a", (64,), 0, 0),
        g.tensor("b", (96, 2), 77, 256),
        g.tensor("c", (64,), 0, 256 + 96),
        g.tensor("d", (100,), 4, 256 + 96 + 256),
    ]
    body = bytes(range(256)) * 3
    f = opened(tmp_path, g.gguf_file([], records, body))
    b, d = f.tensors["b"], f.tensors["d"]
    assert b.format == gguf_io.Unknown(77)
    assert b.raw.tobytes() == body[256 : 256 + 96]
    assert d.raw.tobytes() == body[256 + 96 + 256 :]  # id 4 was Q4_2, removed long ago
    with pytest.raises(tbq.InputError, match=r"unknown\(77\)"):
        b.dequantize()


def test_wrong_dialect_is_refused(tmp_path):
    data, _ = fork_file(tbq.get_format("tbq3_0"), number=99)
    with pytest.raises(tbq.FileFormatError, match="no type id 99"):
        opened(tmp_path, data, dialect="pr21089")
    with pytest.raises(tbq.UnknownFormatError, match="pr21089"):
        opened(tmp_path, data, dialect="pr21088")


def test_two_dialects_that_fit_are_both_named(tmp_path, registered_twin):
    """As soon as a second dialect fits, decoding asks for dialect= and names both."""
    codec = dataclasses.replace(tbq.get_format("tbq3_0").codec, transposed=True)
    twin = registered_twin("twin", codec=codec)
    data, packed = fork_file(tbq.get_format("pr21089:tbq3_0"))
    f = opened(tmp_path, data)
    assert f.dialect is None
    with pytest.raises(tbq.AmbiguousTypeError, match="pr21089:tbq3_0.*twin:tbq3_0.*dialect="):
        f.tensors["t"].dequantize()
    assert opened(tmp_path, data, dialect="twin").tensors["t"].format is twin


def test_two_dialects_of_the_same_codecs_are_one_answer(tmp_path, registered_twin):
    """Another name for the same bytes leaves nothing to ask."""
    registered_twin("twin")
    data, packed = fork_file(tbq.get_format("pr21089:tbq3_0"), n_blocks=64)
    f = opened(tmp_path, data)
    assert f.dialect == "pr21089"
    assert np.array_equal(f.tensors["t"].dequantize(), tbq.dequantize(packed, "pr21089:tbq3_0"))


def test_an_old_release_is_read_and_stated(tmp_path, registered_twin):
    """The same name under another number: what a release means is read with that release."""
    registered_twin("twin", older={98: "tbq3_0"})
    fmt = tbq.get_format("twin@old:tbq3_0")
    data, packed = fork_file(fmt, number=98)
    f = opened(tmp_path, data)
    assert (f.dialect, f.release, f.tensors["t"].format) == ("twin", "old", fmt)
    path = tmp_path / "own.gguf"
    tensor = gguf_io.OutputTensor.from_packed("t", packed, fmt)
    gguf_io.write_gguf(path, {}, [tensor], dialect="twin@old")
    with gguf_io.open_gguf(path) as own:
        assert own.metadata["tbq.release"] == "old"
        assert (own.dialect, own.dialect_guessed, own.tensors["t"].type_id) == ("twin", False, 98)
        assert np.array_equal(own.tensors["t"].raw, packed)


# --- shards ---


def shard(no, count, total, records, body, kvs=()):
    numbers = [
        g.kv("split.no", g.U16, struct.pack("<H", no)),
        g.kv("split.count", g.U16, struct.pack("<H", count)),
        g.kv("split.tensors.count", g.I32, struct.pack("<i", total)),
    ]
    return g.gguf_file([*kvs, *numbers], records, body)


def write_shards(tmp_path, count=3, total=3, names="abc"):
    for i in range(count):
        path = gguf_io.split_path(tmp_path / "m", i, count)
        kvs = [g.kv("general.name", g.STRING, g.string("split"))] if i == 0 else []
        body = np.full(64, i, "<f4").tobytes()
        path.write_bytes(shard(i, count, total, [g.tensor(names[i], (64,))], body, kvs))
    return gguf_io.split_path(tmp_path / "m", 0, count)


def test_shards_read_as_one(tmp_path):
    first = write_shards(tmp_path)
    with gguf_io.open_gguf(first) as f:
        assert list(f.tensors) == ["a", "b", "c"]
        assert [t.shard for t in f.tensors.values()] == [0, 1, 2]
        assert [t.dequantize()[0] for t in f.tensors.values()] == [0, 1, 2]
        assert len(f.shard_paths) == 3
        assert f.metadata["general.name"] == "split"
    with gguf_io.open_gguf(first, follow_splits=False) as f:
        assert list(f.tensors) == ["a"]


def test_broken_splits(tmp_path):
    first = write_shards(tmp_path)
    second = gguf_io.split_path(tmp_path / "m", 1, 3)
    with pytest.raises(tbq.FileFormatError, match="not the first shard, open .*00001-of-00003"):
        gguf_io.open_gguf(second)
    good = second.read_bytes()
    second.write_bytes(shard(2, 3, 3, [g.tensor("b", (64,))], bytes(256)))
    with pytest.raises(tbq.FileFormatError, match="split.no"):
        gguf_io.open_gguf(first)
    second.unlink()
    with pytest.raises(tbq.FileFormatError, match="shard 2 of 3 is missing"):
        gguf_io.open_gguf(first)
    second.write_bytes(good)
    assert write_shards(tmp_path, total=4) == first
    with pytest.raises(tbq.FileFormatError, match="hold 3 tensors"):
        gguf_io.open_gguf(first)
    write_shards(tmp_path, names="aba")
    with pytest.raises(tbq.FileFormatError, match="earlier shard"):
        gguf_io.open_gguf(first)
