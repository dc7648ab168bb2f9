"""Ctrl-C, SIGTERM and SIGHUP: exit codes, nothing left behind, and a message that is true."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HERE, SAMPLES, STATES

import gguf_io
from gguf_io import atomic, convert, inspection, state_writer
from tools import inspect_html, vector_files

F32 = SAMPLES / "small.f32.gguf"
STATE = STATES / "pr21089.f16.seq0.bin"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
VERBS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "the terminal is gone",
}
each_signal = pytest.mark.parametrize("number", CODES, ids=lambda n: n.name)


@pytest.fixture
def signal_when(monkeypatch):
    """Send this process a signal where a function is called."""

    def arrange(number, owner, name):
        plain = getattr(owner, name)

        def signalled(*args, **kwargs):
            signal.raise_signal(number)
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, signalled)

    return arrange


@each_signal
@pytest.mark.parametrize("kind", ["model", "state"])
def test_while_converting(quantize, tmp_path, signal_when, number, kind):
    out = tmp_path / "out"
    out.write_bytes(b"old")
    if kind == "model":
        signal_when(number, convert, "_converted")
    else:
        signal_when(number, state_writer, "quantize_rows")
    code, _, err = quantize(F32 if kind == "model" else STATE, out, "q8_0")
    assert code == CODES[number], err
    assert err.splitlines()[-1] == f"tbq-quantize: error: {VERBS[number]}; nothing was written"
    assert "Traceback" not in err
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


@each_signal
@pytest.mark.parametrize("kind", ["model", "state"])
def test_while_verifying(quantize, tmp_path, signal_when, number, kind):
    out = tmp_path / "out"
    signal_when(number, convert.Distortion, "add")
    code, _, err = quantize("--verify", F32 if kind == "model" else STATE, out, "q8_0")
    assert code == CODES[number], err
    last = err.splitlines()[-1]
    assert last == f"tbq-quantize: error: {VERBS[number]}; {out} was written before"
    assert out.stat().st_size > 1000
    assert list(tmp_path.iterdir()) == [out]


@each_signal
def test_between_the_renames_of_shards(quantize, tmp_path, signal_when, number):
    """All shards appear before the signal is obeyed, and the message says so."""
    with gguf_io.open_gguf(F32) as file:
        tensors = [gguf_io.OutputTensor.from_tensor(t) for t in file.tensors.values()]
        gguf_io.write_gguf_shards(tmp_path / "m", file.metadata, [tensors[:2], tensors[2:]])
    source, out = tmp_path / "m-00001-of-00002.gguf", tmp_path / "o"
    signal_when(number, atomic.os, "replace")
    code, _, err = quantize("--keep-split", source, out, "q8_0")
    assert code == CODES[number]
    shards = [Path(f"{out}-0000{i}-of-00002.gguf") for i in (1, 2)]
    assert f"{shards[0]}, {shards[1]} were written before" in err
    assert len(list(tmp_path.iterdir())) == 4
    with gguf_io.open_gguf(shards[0]) as file:
        assert len(file.tensors) == len(tensors)


@each_signal
def test_while_a_page_is_written(inspect, tmp_path, signal_when, number):
    signal_when(number, inspect_html, "_page")
    code, _, err = inspect("--html", tmp_path / "page.html", F32)
    assert code == CODES[number]
    assert err == f"tbq-inspect: error: {VERBS[number]}; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


@each_signal
def test_while_inspecting(inspect, signal_when, number):
    signal_when(number, inspection, "_look_at")
    code, out, err = inspect(F32)
    assert (code, out) == (CODES[number], "")
    assert err.count("\n") == 1


@each_signal
def test_while_a_set_of_vectors_is_written(vectors, tmp_path, signal_when, number):
    signal_when(number, vector_files, "_entry")
    code, _, err = vectors("generate", "--out", tmp_path / "set", "--formats", "tbq3_0")
    assert code == CODES[number]
    assert err == f"tbq-vectors: error: {VERBS[number]}; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_handlers_are_those_of_before(quantize, tmp_path):
    before = [signal.getsignal(number) for number in CODES]
    quantize(F32, tmp_path / "o.gguf", "q8_0")
    assert [signal.getsignal(number) for number in CODES] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_an_ignored_hangup_stays_ignored(quantize, tmp_path, signal_when, monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_when(signal.SIGHUP, convert, "_converted")
        assert quantize(F32, tmp_path / "o.gguf", "q8_0")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# Blocks in C, where no handler of Python runs; says so on stdout first.
STUCK = """
import ctypes, sys
from gguf_io import convert
from tools import tbq_quantize
def stuck(*args, **kwargs):
    print("stuck", flush=True)
    while True:
        ctypes.CDLL(None).sleep(1000)
convert.{place} = stuck
sys.exit(tbq_quantize.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("place", ["_converted", "verify_model"])
def test_a_kernel_that_takes_long(tmp_path, place):
    """The process is ended from another thread; it would not end by itself."""
    out = tmp_path / "out.gguf"
    command = [sys.executable, "-c", STUCK.format(place=place), "--verify", "--json", F32, out]
    with subprocess.Popen(
        [*map(str, command), "q8_0"],
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "stuck\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 143
    last = err.splitlines()[-1]
    if place == "_converted":
        assert last == "tbq-quantize: error: terminated; nothing was written"
        assert list(tmp_path.iterdir()) == []
    else:
        assert last == f"tbq-quantize: error: terminated; {out} was written before"
        assert list(tmp_path.iterdir()) == [out]


# Kills itself without warning while files and a folder are being written.
KILLED = """
import os, signal, sys
from pathlib import Path
from gguf_io.atomic import AtomicFiles, new_folder
folder = Path(sys.argv[1])
with AtomicFiles() as output, new_folder(folder / "set") as scratch:
    for name in ("a.gguf", "b.gguf"):
        output.create(folder / name).write(b"half")
    (scratch / "file").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def temporaries(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".tmp"))


def test_what_a_killed_process_left_goes_with_the_next_run(quantize, vectors, tmp_path):
    def kill():
        done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=HERE.parent)
        assert done.returncode == -signal.SIGKILL
        assert len(temporaries(tmp_path)) == 3

    kill()
    assert quantize(F32, tmp_path / "o.gguf", "q8_0")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["o.gguf"]
    kill()
    assert vectors("generate", "--out", tmp_path / "set", "--formats", "tbq3_0")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.gguf", "set"]


def dead_pid():
    """Return the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_is_alive_or_of_others_stays(tmp_path):
    end = f".{dead_pid()}-0123456789ab.tmp"
    living = [
        f".mine.{os.getpid()}-0123456789ab.tmp",
        f".of root.{1}-0123456789ab.tmp",
        f".no number.{'9' * 30}-0123456789ab.tmp",
        f"not hidden{end}",
        f".long{end}.more",
        f".upper{end.upper()}",
        ".vim.swp",
    ]
    for name in living:
        (tmp_path / name).write_bytes(b"")
    os.mkfifo(tmp_path / f".fifo{end}")  # opening it would wait
    (tmp_path / f".link{end}").symlink_to(".vim.swp")
    kept = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / f".dead{end}").write_bytes(b"")
    (tmp_path / f".dead folder{end}").mkdir()
    (tmp_path / f".dead folder{end}" / "x").write_bytes(b"")
    with atomic.AtomicFiles() as output:
        output.create(tmp_path / "out").write(b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "out"])


def test_a_locked_file_of_another_container_stays(tmp_path):
    """Its process has a number that nobody has here."""
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / f".x.{dead_pid()}-0123456789ab.tmp"
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        atomic.remove_stale(tmp_path)
        assert path.exists()
    atomic.remove_stale(tmp_path)
    assert not path.exists()


def test_one_process_may_run_several_programs(quantize, tmp_path, signal_when):
    """What the first wrote is none of the second's."""
    assert quantize(F32, tmp_path / "first.gguf", "q8_0")[0] == 0
    signal_when(signal.SIGINT, convert, "_converted")
    code, _, err = quantize(F32, tmp_path / "second.gguf", "q4_0")
    assert code == 130
    assert "nothing was written" in err


def test_json_says_nothing_of_what_was_stopped(quantize, tmp_path, signal_when):
    signal_when(signal.SIGINT, convert, "_converted")
    code, out, _ = quantize("--json", F32, tmp_path / "o.gguf", "q8_0")
    assert code == 130
    with pytest.raises(json.JSONDecodeError):
        json.loads(out)
