"""Input that changes while it is read, and input that is no file: refused, never a crash."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import HERE, MODELS, SAMPLES, STATES

import gguf_io
from gguf_io import convert, inspection, state_writer
from gguf_io.mapped import map_file
from tbq import FileFormatError
from tools import tbq_bench, tbq_vectors

F32 = SAMPLES / "small.f32.gguf"
STATE = STATES / "pr21089.f16.seq0.bin"
COLUMNS = STATES / "pr21089.f16_vtrans.seq0.bin"


def truncate(path):
    os.truncate(path, 4000)


def overwrite(path):
    with open(path, "r+b") as file:
        file.seek(3000)
        file.write(b"other bytes")


def touch(path):
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def grow(path):
    with open(path, "ab") as file:
        file.write(b"more")


each_change = pytest.mark.parametrize("change", [truncate, overwrite, touch, grow])


@pytest.fixture
def numbered(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(np.arange(40000, dtype="<u2").tobytes())
    return path


def test_what_is_read_is_what_is_there(numbered):
    mapped, whole = map_file(numbered), np.fromfile(numbered, np.uint8)
    assert np.array_equal(mapped.read_at(10, 500), whole[10:510])
    assert np.array_equal(mapped.read_grid(6, 100, 7, 10), whole[6:706].reshape(7, 100)[:, :10])
    assert np.array_equal(mapped.read_grid(6, 10, 7, 10), whole[6:76].reshape(7, 10))
    for rows in ([], [3], [0, 1, 2, 7, 8, 5, 5, 6], [9, 8, 7]):
        rows = np.array(rows, np.int64)
        assert np.array_equal(mapped.read_rows(4, 50, rows), whole[4:504].reshape(10, 50)[rows])


def test_nothing_is_read_beyond_the_end(numbered):
    mapped = map_file(numbered)
    for read in (lambda: mapped.read_at(79_000, 1001), lambda: mapped.read_grid(0, 79_999, 2, 2)):
        with pytest.raises(FileFormatError, match="at byte 80000: the file ends here"):
            read()


def test_a_read_that_gives_little_is_continued(numbered, monkeypatch):
    plain = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: plain(fd, [to[0][:1000]], at))
    assert np.array_equal(
        map_file(numbered).read_at(1, 50001), np.fromfile(numbered, "u1")[1:50002]
    )


def test_no_descriptor_is_left_open(numbered):
    before = os.listdir("/proc/self/fd")
    mapped = map_file(numbered)
    view = np.frombuffer(mapped, np.uint8)
    assert len(os.listdir("/proc/self/fd")) > len(before)
    del mapped
    assert view[2] == 1  # the map lives as long as what views it
    del view
    assert len(os.listdir("/proc/self/fd")) == len(before)


@each_change
def test_every_read_notices(numbered, change):
    mapped = map_file(numbered)
    change(numbered)
    for read in (
        lambda: mapped.read_at(3000, 1000),
        lambda: mapped.read_grid(0, 300, 5, 10),
        lambda: mapped.read_rows(0, 100, np.array([0, 5, 30])),
        mapped.check_unchanged,
    ):
        with pytest.raises(FileFormatError, match=r"when it was opened and has|written to while"):
            read()


@pytest.fixture
def changed_when(monkeypatch):
    """Have a file changed where a function is called for the second time."""

    def arrange(path, change, owner, name):
        plain, calls = getattr(owner, name), []

        def changing(*args, **kwargs):
            calls.append(name)
            if len(calls) == 2:
                change(path)
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, changing)
        return calls

    return arrange


@each_change
@pytest.mark.parametrize("target", ["q8_0", "f32"])  # all is converted, all is copied
def test_model_that_changes_while_it_is_converted(quantize, tmp_path, changed_when, change, target):
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    source.write_bytes(F32.read_bytes())
    calls = changed_when(source, change, gguf_io.GgufTensor, "read")
    code, _, err = quantize(source, out, target)
    assert (code, len(calls) >= 2) == (3, True), err
    assert f"error: {source}: " in err
    assert not out.exists()
    assert list(tmp_path.iterdir()) == [source]


@each_change
@pytest.mark.parametrize("source", [STATE, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("target", ["f32", "f16"])
def test_state_that_changes_while_it_is_converted(
    quantize, tmp_path, changed_when, change, source, target
):
    path, out = tmp_path / "in.bin", tmp_path / "out.bin"
    path.write_bytes(source.read_bytes())
    calls = changed_when(path, change, state_writer._Serialiser, "_rows")
    code, _, err = quantize(path, out, target)
    assert (code, len(calls) >= 2) == (3, True), err
    assert f"error: {path}: " in err
    assert list(tmp_path.iterdir()) == [path]


@each_change
@pytest.mark.parametrize("name", ["in.gguf", "in.bin"])
def test_file_that_changes_while_it_is_inspected(inspect, tmp_path, changed_when, change, name):
    path = tmp_path / name
    path.write_bytes((F32 if name == "in.gguf" else STATE).read_bytes())
    changed_when(path, change, inspection, "_look_at")
    code, out, err = inspect(path)
    assert code == 3, err
    assert out == ""
    assert f"error: {path}: " in err


def test_a_change_after_the_last_read_counts(quantize, tmp_path, monkeypatch):
    """Nobody can tell whether it came after it."""
    path = tmp_path / "in.gguf"
    tensor = gguf_io.OutputTensor.from_array("a.weight", np.ones((4, 32), np.float32))
    gguf_io.write_gguf(path, {}, [tensor])
    plain = convert._converted

    def touching(*args):
        packed = plain(*args)
        touch(path)
        return packed

    monkeypatch.setattr(convert, "_converted", touching)
    assert quantize(path, tmp_path / "o.gguf", "q8_0")[0] == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def specials(tmp_path):
    """Paths that are no regular files: nobody writes into the FIFO, so opening it would hang."""
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "loop").symlink_to("loop")
    names = ("fifo", "socket", "folder", "link", "loop")
    return [*(tmp_path / name for name in names), "/dev/zero", "/dev/tty", "a\0b"]


def test_no_special_file_is_an_input(specials, inspect, quantize, vectors, tmp_path):
    out = tmp_path / "out"
    for path in specials:
        for run, args in (
            (inspect, [path]),
            (inspect, ["--reference", path, F32]),
            (inspect, ["--reference", path, STATE]),
            (inspect, ["--model", path, STATE]),
            (quantize, [path, out, "q8_0"]),
            (quantize, ["--model", path, STATE, out, "q8_0"]),
            (vectors, ["list", path]),
            (vectors, ["check", path, tmp_path]),
        ):
            code, _, err = run(*args)
            assert code == 3, (args, err)
            assert err.count("\n") == 1, err
    assert not out.exists()


def test_no_special_file_is_a_part_of_a_set(specials, vectors, tmp_path):
    folder = tmp_path / "set"
    assert tbq_vectors.main(["generate", "--out", str(folder), "--formats", "tbq3_0"]) == 0
    inside = next(folder.rglob("*.u8"))
    for path in specials[:5]:
        inside.unlink()
        inside.symlink_to(path)
        code, out, err = vectors("check", folder, folder)
        assert code in (1, 3), (path, err)
        assert "Traceback" not in err
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/dev/zero")
    assert vectors("check", folder, folder)[0] == 3


def test_no_special_file_is_a_library(specials, vectors, tmp_path):
    folder = tmp_path / "set"
    assert tbq_vectors.main(["generate", "--out", str(folder), "--formats", "tbq3_0"]) == 0
    for path in specials:
        code, _, err = vectors("check", folder, "--libggml", path)
        assert code == 4, (path, err)
        assert err.count("\n") == 1


def test_no_special_file_is_a_shard(specials, quantize, tmp_path):
    source = gguf_io.open_gguf(F32)
    tensors = [gguf_io.OutputTensor.from_tensor(t) for t in source.tensors.values()]
    gguf_io.write_gguf_shards(tmp_path / "m", source.metadata, [tensors[:2], tensors[2:]])
    second = tmp_path / "m-00002-of-00002.gguf"
    for path in specials[:5]:
        second.unlink()
        second.symlink_to(path)
        code, _, err = quantize(tmp_path / "m-00001-of-00002.gguf", tmp_path / "o.gguf", "q8_0")
        assert code == 3, err
        assert "m-00002-of-00002.gguf" in err


def test_bench_does_not_wait_for_a_reader(specials, capsys):
    for path in specials[:5]:
        assert tbq_bench.main(["--rows", "256", "--out", str(path), "tbq3_0"]) in (2, 3)
        assert capsys.readouterr().err.count("\n") == 1


def test_standard_input_is_not_a_file(tmp_path):
    """`… < FIFO` names a device, whatever stands behind it."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.tbq_inspect", "/dev/stdin"],
        cwd=HERE.parent,
        input=MODELS.joinpath("llama.metadata.gguf").read_bytes(),
        capture_output=True,
        timeout=100,
    )
    assert done.returncode == 3
    assert b"not a regular file" in done.stderr
