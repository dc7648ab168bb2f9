"""Outputs: never an input, all or none, with the mode and under any name that the system takes."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import MODELS, SAMPLES, STATES

import gguf_io
from gguf_io import atomic
from gguf_io.atomic import AtomicFiles

F32 = SAMPLES / "small.f32.gguf"
STATE = STATES / "pr21089.llama.nonunified.session.bin"
MODEL = MODELS / "llama.metadata.gguf"


def aliases(path):
    """Return other paths of a file: relative, through a folder, links of both kinds, a chain."""
    folder = path.parent
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "linked").symlink_to(folder)
    soft, hard, chain = (folder / f"{path.name}.{kind}" for kind in ("soft", "hard", "chain"))
    soft.symlink_to(path)
    os.link(path, hard)
    chain.symlink_to(soft.name)
    relative = os.path.relpath(path)
    return [path, folder / "sub" / ".." / path.name, soft, hard, chain, relative] + [
        folder / "linked" / path.name
    ]


@pytest.fixture
def copies(tmp_path):
    """Copies of a model, a dump and its model, which no program may change."""
    paths = {}
    for name, source in (("f32", F32), ("twin", F32), ("state", STATE), ("model", MODEL)):
        paths[name] = tmp_path / f"{name}.bin"
        paths[name].write_bytes(source.read_bytes())
    before = {name: path.read_bytes() for name, path in paths.items()}
    yield paths
    assert {name: path.read_bytes() for name, path in paths.items()} == before


@pytest.mark.parametrize("victim", ["f32", "twin", "state", "model"])
def test_a_page_over_an_input(inspect, copies, victim):
    f = copies
    for alias in aliases(f[victim]):
        if victim in ("f32", "twin"):
            args = ["--reference", f["twin"], f["f32"]]
        else:
            args = ["--model", f["model"], f["state"]]
        code, out, err = inspect("--html", alias, *args)
        assert (code, out) == (2, ""), err
        assert "a file that is not read" in err


@pytest.mark.parametrize("victim", ["f32", "state", "model"])
def test_a_conversion_over_an_input(quantize, copies, victim):
    f = copies
    for alias in aliases(f[victim]):
        source = [f["f32"]] if victim == "f32" else ["--model", f["model"], f["state"]]
        for extra in ([], ["--dry-run"]):
            code, out, err = quantize(*extra, *source, alias, "f16")
            assert code == 2, err
            assert "a file that is not read" in err


def test_vectors_over_their_own_files(vectors, tmp_path):
    folder = tmp_path / "set"
    assert vectors("generate", "--out", folder, "--formats", "tbq3_0")[0] == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    link = tmp_path / "link"
    link.symlink_to(folder / "manifest.json")
    for junit in (folder / "manifest.json", link, next(folder.rglob("*.f32"))):
        code, _, err = vectors("check", "--junit", junit, folder, folder)
        assert code == 2
        assert "a file that is not read" in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_shards_over_shards(quantize, tmp_path):
    shards = write_set(tmp_path / "m", 1.0)
    before = [path.read_bytes() for path in shards]
    for output in (tmp_path / "m.gguf", tmp_path / "m"):
        assert quantize("--keep-split", shards[0], output, "q8_0")[0] == 2
    os.link(shards[2], tmp_path / "o-00001-of-00003.gguf")
    assert quantize("--keep-split", shards[0], tmp_path / "o", "q8_0")[0] == 2
    for path in shards:
        assert quantize(shards[0], path, "q8_0")[0] == 2
    assert [path.read_bytes() for path in shards] == before


def test_a_dump_over_itself_through_the_library(copies):
    with gguf_io.open_state(copies["state"]) as state:
        for alias in aliases(copies["state"]):
            with pytest.raises(gguf_io.state_writer.InputError, match="a file that is not read"):
                gguf_io.write_state(alias, state)


# --- modes and names -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o664, 0o600, 0o755, 0o640])
def test_an_existing_output_keeps_its_mode(quantize, inspect, tmp_path, mode):
    model, page = tmp_path / "o.gguf", tmp_path / "o.html"
    for path in (model, page):
        path.write_bytes(b"old")
        path.chmod(mode)
    assert quantize(F32, model, "q8_0")[0] == 0
    assert inspect("--html", page, F32)[0] == 0
    assert [path.stat().st_mode & 0o7777 for path in (model, page)] == [mode, mode]


def test_a_new_output_has_the_usual_mode(tmp_path):
    before = os.umask(0o027)
    try:
        with AtomicFiles() as output:
            output.create(tmp_path / "x").write(b"x")
        with atomic.new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


NAMES = {
    "cjk": "中" * 83 + ".gguf",
    "emoji": "🙂" * 62 + "ab.gguf",
    "combining": "e\u0301" * 83 + ".gguf",
    "longest": "x" * 250 + ".gguf",
    "not UTF-8": os.fsdecode(b"c\xff\xfe" * 80 + b".gguf"),
    "newline": "a\nb\x1b[2J.gguf",
    "dash": "-o.gguf",
}


@pytest.mark.parametrize("name", NAMES)
def test_names(quantize, tmp_path, name):
    out = tmp_path / NAMES[name]
    assert len(os.fsencode(out.name)) <= atomic.MAX_FILE_NAME
    code, text, err = quantize(F32, out, "q8_0")
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert "\x1b" not in text
    temporary = atomic.temporary_path(out)
    assert len(os.fsencode(temporary.name)) <= atomic.MAX_FILE_NAME
    os.fsencode(temporary.name).decode()  # a valid name, whatever the other is
    assert atomic._TEMPORARY.fullmatch(temporary.name)


# --- all or none ---------------------------------------------------------------------------------


def write_set(prefix, value):
    shards = [
        [gguf_io.OutputTensor.from_array(f"t{i}.weight", np.full((2, 32), value, np.float32))]
        for i in range(3)
    ]
    gguf_io.write_gguf_shards(prefix, {}, shards)
    return [Path(f"{prefix}-0000{i}-of-00003.gguf") for i in (1, 2, 3)]


def fail_in(monkeypatch, name, call, error):
    """Have a function of os fail in one of its calls, counted from 1; 0 for all."""
    plain, calls = getattr(os, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if call in (0, len(calls)):
            raise error
        return plain(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)
    return calls


@pytest.mark.parametrize("call", [1, 2, 3])
def test_shards_are_all_or_none_when_the_disk_fills(monkeypatch, tmp_path, call):
    old = [path.read_bytes() for path in write_set(tmp_path / "m", 1.0)]
    fail_in(monkeypatch, "fsync", call, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        write_set(tmp_path / "m", 2.0)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == old


def test_everything_is_on_the_disk_before_anything_is_renamed(monkeypatch, tmp_path):
    done = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, n=name, plain=plain: (done.append(n), plain(*args))[1]
        )
    write_set(tmp_path / "m", 1.0)
    assert done == ["fsync"] * 3 + ["replace"] * 3 + ["fsync"]  # the last is of the folder


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES])
@pytest.mark.parametrize("call", [0, 4])  # everything, or the folder only
def test_what_cannot_be_synced_is_no_failure(monkeypatch, tmp_path, number, call):
    calls = fail_in(monkeypatch, "fsync", call, OSError(number, "as SMB, FUSE and WSL have it"))
    shards = write_set(tmp_path / "m", 1.0)
    assert len(calls) == 4
    with gguf_io.open_gguf(shards[0]) as file:
        assert len(file.tensors) == 3


def test_a_folder_that_cannot_be_opened_is_no_failure(monkeypatch, tmp_path):
    plain = os.open

    def refuse(path, flags, *args):
        if flags == os.O_RDONLY and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    write_set(tmp_path / "m", 1.0)
    with atomic.new_folder(tmp_path / "folder") as folder:
        (folder / "x").write_bytes(b"x")
    assert (tmp_path / "folder" / "x").read_bytes() == b"x"


def test_a_folder_that_fails_to_sync_is_said_with_the_files(quantize, monkeypatch, tmp_path):
    """The error is real, and so are the files: the message says both."""
    fail_in(monkeypatch, "fsync", 2, OSError(errno.ENOSPC, "No space left on device"))
    code, _, err = quantize(F32, tmp_path / "o.gguf", "q8_0")
    assert code == 3
    assert f"no space left on the device; {tmp_path / 'o.gguf'} was written before" in err


def test_a_rename_that_fails_leaves_no_temporary(monkeypatch, tmp_path):
    fail_in(monkeypatch, "replace", 2, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OSError, match="Input/output"):
        write_set(tmp_path / "m", 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["m-00001-of-00003.gguf"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    def fail():
        with atomic.new_folder(tmp_path / "set") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "x").write_bytes(b"x")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "set").mkdir()
    with atomic.new_folder(tmp_path / "set") as folder:
        (folder / "x").write_bytes(b"x")
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "x"]
