"""Tensors that few models have: without values, scalars, integers, float64, with long names."""

import contextlib
import os
import struct
import subprocess
import sys

import gguf
import gguf_bytes as g
import numpy as np
import pytest
from conftest import HERE

import gguf_io
import tbq
from gguf_io.writer import OutputTensor

WEIGHT = np.linspace(-1, 1, 1024, dtype="<f4").tobytes()
ODD = {
    "marker": ((0,), 0, b""),
    "no rows": ((4, 0), 0, b""),
    "rows without values": ((0, 4), 0, b""),
    "scalar": ((), 0, struct.pack("<f", 2.5)),
    "scalar of an unknown type": ((), 100, b"\1" * 32),
    "empty and unknown": ((5, 0, 3), 100, b""),
}


def model(path, name, ne, type_id, data, last=False):
    """Write an odd tensor beside an ordinary weight, after it if `last`."""
    data += bytes(-len(data) % 32)
    odd = g.tensor(name, ne, type_id, len(WEIGHT) if last else 0)
    weight = g.tensor("blk.0.ffn_up.weight", (256, 4), 0, 0 if last else len(data))
    tensors, body = ([weight, odd], WEIGHT + data) if last else ([odd, weight], data + WEIGHT)
    path.write_bytes(g.gguf_file([], tensors, body))
    return path


@pytest.fixture(params=[False, True], ids=["first", "last"])
def last(request):
    return request.param


@pytest.mark.parametrize("name", ODD)
def test_tensors_without_values_and_scalars(inspect, quantize, tmp_path, name, last):
    ne, type_id, data = ODD[name]
    path = model(tmp_path / "m.gguf", name, ne, type_id, data, last)
    with gguf_io.open_gguf(path) as f:
        t = f.tensors[name]
        assert t.ggml_shape == ne
        assert t.n_values == int(np.prod(ne))
        assert t.raw.tobytes() == data
        if type_id == 0:
            assert t.dequantize().shape == ne[::-1]
            assert t.dequantize().tobytes() == data
            assert len(t.dequantize_rows(0, 9)) == t.n_rows == len(t.rows(0, 9))
        else:
            with pytest.raises(tbq.InputError, match="unknown"):
                t.dequantize()
    code, out, err = inspect(path)
    assert code == 0, err
    assert name in out
    assert inspect("--json", "--candidates", "q8_0", "--reference", path, path)[0] == 0
    for argv in (("--pure",), ("--verify",), ("--dry-run", "--json")):
        code, out, err = quantize(*argv, path, tmp_path / "o.gguf", "q8_0")
        assert code == 0, err
    with gguf_io.open_gguf(tmp_path / "o.gguf") as f:
        assert f.tensors[name].ggml_shape == ne
        assert f.tensors[name].raw.tobytes() == data
        assert f.tensors["blk.0.ffn_up.weight"].format.name == "q8_0"
    if type_id == 0:
        read = {t.name: t for t in gguf.GGUFReader(tmp_path / "o.gguf").tensors}
        assert tuple(read[name].shape) == ne


@pytest.mark.parametrize("kind", ["I8", "I16", "I32", "I64", "F64"])
def test_integers_and_float64_are_left_alone_and_named(inspect, quantize, tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    data = bytes(range(256)) * size
    path = model(tmp_path / "m.gguf", "blk.0.odd.weight", (64, 4), int(kind), data)
    assert inspect("--candidates", "q8_0", path)[0] == 0
    for argv in ((), ("--pure",), ("--tensor-type", "odd=q4_0")):
        code, out, err = quantize("--verify", *argv, path, tmp_path / "o.gguf", "q8_0")
        assert code == 0, err
        assert f"blk.0.odd.weight: left alone: {kind.name.lower()} is no weight's type" in err
        with gguf_io.open_gguf(tmp_path / "o.gguf") as f:
            assert f.tensors["blk.0.odd.weight"].raw.tobytes() == data
            assert f.tensors["blk.0.ffn_up.weight"].format.name == "q8_0"


@pytest.mark.parametrize("length", [63, 64, 127, 128])
def test_long_names(inspect, quantize, tmp_path, length):
    name = "中" * (length // 3) + "x" * (length % 3)
    path = model(tmp_path / "m.gguf", name, (32,), 0, bytes(128))
    code, out, err = inspect("--json", path)
    if length == 128:
        assert code == 3
        return
    assert code == 0
    assert ("stock llama.cpp reads 63" in out) == (length > 63)
    with gguf_io.open_gguf(path) as f:
        assert list(f.tensors)[0] == name
        assert len(f.warnings) == (length > 63)
    code, out, err = quantize(path, tmp_path / "o.gguf", "q8_0")
    assert code == (0 if length == 63 else 2)
    assert length == 63 or "at most 63 bytes" in err


def test_rows_of_an_unknown_type_do_not_fall_into_rows(inspect, quantize, tmp_path):
    path = model(tmp_path / "m.gguf", "t", (3, 7), 100, bytes(32))
    with gguf_io.open_gguf(path) as f, pytest.raises(tbq.InputError, match="unknown"):
        f.tensors["t"].rows(0, 1)
    for argv in ((), ("--json",), ("--candidates", "q8_0"), ("--reference", path)):
        assert inspect(*argv, path)[0] == 0
    assert quantize("--verify", path, tmp_path / "o.gguf", "q8_0")[0] == 0


def test_an_id_that_no_candidate_knows_beside_an_ambiguous_one(inspect, quantize, tmp_path):
    """Id 41 means several things, 33 means nothing: both are explained, neither is decoded."""
    data = bytes(32 * 256)
    for ids in ((42, 33), (42, 999), (33, 42)):
        tensors = [g.tensor(f"t{i}.weight", (256, 2), i, n * 4096) for n, i in enumerate(ids)]
        path = tmp_path / "m.gguf"
        path.write_bytes(g.gguf_file([], tensors, data))
        code, out, err = inspect(path)
        assert code == 0, err
        assert quantize("--pure", path, tmp_path / "o.gguf", "f16")[0] == 2


@pytest.mark.parametrize("program", ["tbq_inspect", "tbq_quantize"])
def test_pipes_and_devices_are_refused_unopened(tmp_path, program):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    rest = [str(tmp_path / "o.gguf"), "q8_0"] if program == "tbq_quantize" else []
    for flags, path in (([], pipe), ([], "/dev/zero"), (["--model", pipe], HERE / "absent")):
        if flags:
            path = next((HERE / "samples" / "state").glob("*.f16.seq0.bin"))
        done = subprocess.run(
            [sys.executable, "-m", f"tools.{program}", *map(str, flags), str(path), *rest],
            cwd=HERE.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 3, done.stderr
        assert done.stderr.count("\n") == 1
        assert "not a regular file" in done.stderr


def test_written_scalars_and_empty_tensors_are_what_gguf_py_reads(tmp_path):
    arrays = {
        "scalar": np.float32(2.5),
        "none": np.empty((3, 0), "f4"),
        "w": np.ones((2, 32), "f4"),
    }
    tensors = [OutputTensor.from_array(name, x) for name, x in arrays.items()]
    gguf_io.write_gguf(tmp_path / "o.gguf", {}, tensors)
    for t in gguf.GGUFReader(tmp_path / "o.gguf").tensors:
        assert t.data.tobytes() == np.asarray(arrays[t.name]).tobytes()


@pytest.mark.parametrize("ne", [(1 << 62, 0), (0, 1 << 62), (0, 1 << 40, 1 << 20), (1, 0, 1 << 62)])
def test_nothing_of_a_vast_shape(inspect, quantize, tmp_path, ne):
    """NumPy has no such arrays, empty or not: an error of ours, where one is asked for."""
    path = tmp_path / "m.gguf"
    tensors = [g.tensor("a.weight", ne), g.tensor("b.weight", (32, 2))]
    path.write_bytes(g.gguf_file([], tensors, b"1" * 256))
    with gguf_io.open_gguf(path) as file:
        t = file.tensors["a.weight"]
        for read in (lambda: t.raw, t.dequantize, lambda: t.dequantize_rows(0, 0)):
            with contextlib.suppress(tbq.InputError):
                assert read().size == 0
    assert inspect("--json", path)[0] == 0
    assert quantize("--verify", path, tmp_path / "o.gguf", "q8_0")[0] == 0
