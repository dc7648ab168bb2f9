"""A stdout that is closed, full, or left by its reader: the work is done, its exit code stands."""

import io
import subprocess
import sys

import gguf_bytes as g
import numpy as np
import pytest
from conftest import HERE, SAMPLES, STATES

import gguf_io
from gguf_io import convert
from tools import console, streams

F32 = SAMPLES / "small.f32.gguf"
STATE = STATES / "pr21089.f16.seq0.bin"

# Runs a program; --verify fails if asked to.
DRIVER = """
import sys
from gguf_io import convert
if sys.argv.pop(1) == "fail":
    convert.Outcome.failed = property(lambda self: True)
from importlib import import_module
sys.exit(import_module("tools." + sys.argv[1]).main(sys.argv[2:]))
"""


def shell(line, *args, fail=False):
    """Run a shell line in which `"$@"` is a program with its arguments."""
    command = [sys.executable, "-c", DRIVER, "fail" if fail else "", *map(str, args)]
    return subprocess.run(
        ["bash", "-c", line, "bash", *command],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=100,
    )


# What becomes of stdout, and how the exit code of the program gets out.
SINKS = {
    "left": '"$@" | true; exit ${PIPESTATUS[0]}',
    "closed": '"$@" >&-',
    "full": '"$@" >/dev/full',
    "all closed": '"$@" >&- 2>&-',
    "all full": '"$@" >/dev/full 2>/dev/full',
}


@pytest.mark.parametrize(("sink", "source"), [*((s, F32) for s in SINKS), ("left", STATE)])
def test_a_conversion_goes_on(tmp_path, sink, source):
    out = tmp_path / "out"
    done = shell(SINKS[sink], "tbq_quantize", "--verify", source, out, "q8_0")
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 1000
    assert "Traceback" not in done.stderr
    assert "rror" not in done.stderr
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("sink", ["left", "closed", "all full"])
def test_a_verification_that_fails_does_not_exit_0(tmp_path, sink):
    args = ("tbq_quantize", "--verify", F32, tmp_path / "out.gguf", "q8_0")
    done = shell(SINKS[sink], *args, fail=True)
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("sink", ["left", "full"])
def test_an_error_after_some_output_keeps_its_code(tmp_path, sink):
    """What was printed before it is still in a buffer, which Python flushes at its end."""
    source = tmp_path / "big.gguf"
    big = np.full((2, 256), 1e6, np.float32)
    gguf_io.write_gguf(source, {}, [gguf_io.OutputTensor.from_array("a.weight", big)])
    out = tmp_path / "out.gguf"
    done = shell(SINKS[sink], "tbq_quantize", source, out, "f16")
    assert (done.returncode, out.exists()) == (1, False)
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("sink", ["left", "closed", "full"])
def test_a_listing_that_nobody_reads_ends(sink):
    done = shell(SINKS[sink], "tbq_inspect", F32)
    assert done.returncode == 141, done.stderr
    assert done.stderr == ""


def test_a_listing_of_which_the_first_line_is_read(tmp_path):
    """The listing does not fit what a pipe holds, so it cannot be over when the reader leaves."""
    path = tmp_path / "m.gguf"
    tensors = [g.tensor(f"{'n' * 50}{i}", (0,)) for i in range(2000)]
    path.write_bytes(g.gguf_file([], tensors))
    done = shell('"$@" | head -1; exit ${PIPESTATUS[0]}', "tbq_inspect", path)
    assert done.returncode == 141, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert len(shell('"$@"', "tbq_inspect", path).stdout) > 1 << 16


@pytest.mark.parametrize("sink", ["left", "closed"])
def test_a_page_is_written_all_the_same(tmp_path, sink):
    done = shell(SINKS[sink], "tbq_inspect", "--html", tmp_path / "page.html", F32)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(("sink", "fail"), [("left", True), ("all full", True), ("full", False)])
def test_a_check_of_vectors_keeps_its_verdict(tmp_path, vectors, sink, fail):
    folder = tmp_path / "set"
    vectors("generate", "--out", folder, "--formats", "tbq3_0", "--ops", "quantize")
    actual = tmp_path / "actual"
    actual.mkdir()
    for path in folder.rglob("*.u8"):
        copy = actual / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(bytes(path.stat().st_size) if fail else path.read_bytes())
    junit = tmp_path / "j.xml"
    done = shell(SINKS[sink], "tbq_vectors", "check", "--junit", junit, folder, actual)
    assert done.returncode == int(fail), done.stderr
    assert junit.stat().st_size > 100


@pytest.mark.parametrize("line", ['"$@" 2>&-', '"$@" 2>/dev/full', '"$@" >&-'])
def test_an_error_keeps_its_code(tmp_path, line):
    done = shell(line, "tbq_quantize", tmp_path / "absent", tmp_path / "o", "q8_0")
    assert done.returncode == 3, done.stderr


def test_usage_and_help_keep_theirs():
    assert shell('"$@" 2>/dev/full', "tbq_quantize", "--nope").returncode == 2
    assert shell('"$@" 2>&-', "tbq_quantize").returncode == 2
    for sink in ("left", "closed"):
        done = shell(SINKS[sink], "tbq_quantize", "--help")
        assert done.returncode in (0, 141), done.stderr
        assert done.stderr == ""


# --- the stream itself ---------------------------------------------------------------------------


class Broken(io.StringIO):
    """A stream that takes so many characters."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def write(self, text):
        self.room -= len(text)
        if self.room < 0:
            raise BrokenPipeError
        return super().write(text)


def test_what_cannot_be_written_is_swallowed():
    inner = Broken(10)
    stream = streams.PatientStream(inner)
    assert stream.write("12345678") == 8
    assert not stream.lost
    assert stream.write("9" * 8) == 8
    assert stream.lost
    stream.write("x")
    stream.flush()
    assert inner.getvalue() == "12345678"


def test_or_ends_the_program_if_there_is_nothing_else_to_do():
    stream = streams.PatientStream(Broken(3))
    stream.gives_up = True
    stream.write("abc")
    for _ in range(2):
        with pytest.raises(streams.Unread):
            stream.write("d")
    with pytest.raises(streams.Unread):
        stream.flush()


def test_nothing_is_no_terminal():
    stream = streams.PatientStream(None)
    assert not stream.isatty()
    assert stream.write("x") == 1
    assert stream.lost


def test_a_fault_keeps_its_traceback_and_exits_70(monkeypatch, quantize, tmp_path):
    def fault(*args, **kwargs):
        raise ZeroDivisionError("of this program")

    monkeypatch.setattr(convert, "plan_model", fault)
    code, _, err = quantize(F32, tmp_path / "o.gguf", "q8_0")
    assert code == console.FAULT == 70
    assert "ZeroDivisionError: of this program" in err


def test_streams_come_back(capsys):
    before = sys.stdout, sys.stderr

    def fail():
        with streams.patient_streams():
            assert sys.stdout is not before[0]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (sys.stdout, sys.stderr) == before
