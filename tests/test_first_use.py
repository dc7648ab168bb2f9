"""What is compiled at the first use: that is said to people only, and can be done beforehand."""

import json
import logging
import os
import subprocess
import sys

import pytest
from conftest import HERE, SAMPLES

import tbq
from tools import bench_compile, console, tbq_bench

LINE = "compiling kernels for q8_0, once"
# What a program does with a file: it reads arrays that are mapped, and others.
FIRST_USE = """
import logging, sys
from tools import tbq_quantize, tbq_bench
if sys.argv[1] == "compile":
    assert tbq_bench.main(["--compile", "q8_0"]) == 0
logging.basicConfig(stream=sys.stderr, format="%(message)s")
logging.getLogger("tbq.compile").setLevel(logging.INFO)
sys.exit(tbq_quantize.main(["--pure", "--verify", *sys.argv[2:], "q8_0"]))
"""


def quantized(out, cache, stderr, *, code=FIRST_USE, mode="plain"):
    """Run tbq-quantize in a process of its own."""
    command = [sys.executable, "-c", code, mode, SAMPLES / "small.f32.gguf", out]
    return subprocess.run(
        list(map(str, command)),
        cwd=HERE.parent,
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=stderr,
        timeout=300,
    )


def on_a_terminal(out, cache, **kwargs):
    """Run it where stderr is a terminal; return what that shows."""
    ours, theirs = os.openpty()
    done = quantized(out, cache, theirs, **kwargs)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 1 << 16):
            shown += part
    except OSError:  # how Linux says that it is closed
        pass
    os.close(ours)
    assert done.returncode == 0, shown
    return shown.decode()


PLAIN = FIRST_USE.replace("logging.", "0 and logging.")


def test_it_is_said_once_for_each_format_and_on_terminals_only(tmp_path):
    shown = on_a_terminal(tmp_path / "o.gguf", tmp_path / "cache", code=PLAIN)
    assert shown.count(f"tbq-quantize: {LINE}") == shown.count("compiling") == 1
    shown = on_a_terminal(tmp_path / "o.gguf", tmp_path / "cache", code=PLAIN)
    assert "compiling" not in shown, "what is loaded from the cache is not compiled"
    piped = quantized(tmp_path / "o.gguf", tmp_path / "other", subprocess.PIPE, code=PLAIN)
    assert (piped.returncode, piped.stderr) == (0, b"")


def test_what_was_compiled_beforehand_is_all_that_is_needed(tmp_path):
    done = quantized(tmp_path / "o.gguf", tmp_path / "cache", subprocess.PIPE, mode="compile")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"q8_0" in done.stdout
    assert str(tmp_path / "cache").encode() in done.stdout
    done = quantized(tmp_path / "o.gguf", tmp_path / "other", subprocess.PIPE)
    assert set(done.stderr.decode().splitlines()) == {LINE}


class Terminal:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_lines_go_above_the_progress_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    log = logging.getLogger("tbq.compile")
    log.info("before")
    with console.compiling_is_said("tbq-x"), console.Progress(10, "work") as bar:
        monkeypatch.setattr(bar, "print", lambda line, file: file.write(f"<{line}>"))
        for _ in range(2):
            log.info("compiling kernels for %s, once", "a\x1b")
    log.info("after")
    assert terminal.text.count("<tbq-x: compiling kernels for a\x1b, once>") == 1
    assert "before" not in terminal.text
    assert "after" not in terminal.text


# --- tbq-bench --compile -------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", tbq.formats(), ids=lambda fmt: fmt.key)
def test_every_format_has_calls_for_all_that_it_needs(fmt):
    for variant in fmt.variants():
        found = set(bench_compile.calls(variant))
        assert {"quantize", "dequantize"} <= found
        assert ("restore" in found) == (variant.codec.gives != variant.codec.takes)
        sides = ("K" in variant.side, "V" in variant.side)
        assert ("scores" in found, "weighted sum" in found) == sides
        assert ("quantize paired" in found) == bool(fmt.sibling)


def test_compile_prints_and_records_processor_seconds(monkeypatch, capsys, tmp_path):
    ticks = iter(range(1000))
    monkeypatch.setattr(bench_compile, "processor_seconds", lambda: float(next(ticks)))
    out = tmp_path / "c.jsonl"
    assert tbq_bench.main(["--compile", "--out", str(out), "xktq2_1", "tbq3_0"]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {record["cpu_s"] for record in records} == {1.0}
    assert {(r["format"], r["operation"]) for r in records} >= {
        ("llama-tq:xktq2_1", "quantize paired"),
        ("llama-tq:xktq2_1", "scores"),
        ("pr21089:tbq3_0", "dequantize"),
        ("", "rotation"),
    }
    printed = capsys.readouterr().out
    assert "llama-tq:xktq2_1" in printed
    assert "__pycache__" in printed or os.environ.get("NUMBA_CACHE_DIR", "?") in printed
