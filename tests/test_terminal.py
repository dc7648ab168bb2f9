"""What comes out of a file reaches a terminal escaped, and no encoding decides about work."""

import json
import subprocess
import sys

import gguf_bytes as gb
import numpy as np
import pytest
from conftest import HERE

import gguf_io
from tools import console, tbq_inspect

HOSTILE = "blk.0.\x1b]0;PWNED\x07\n\u202e中.weight"
ESCAPED = r"blk.0.\x1b]0;PWNED\x07\n\u202e中.weight"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("blk.0.attn_k.weight", "blk.0.attn_k.weight"),
        ("two\nlines\r\tand \x1b[31mred\x9b", r"two\nlines\r\tand \x1b[31mred\x9b"),
        (b"mod\xe8le".decode("utf-8", "surrogateescape"), r"mod\xe8le"),
        ("\ud800 \u2028\u2066", r"\ud800 \u2028\u2066"),
        ("模型 é 🙂", "模型 é 🙂"),
    ],
)
def test_shown(text, line):
    assert console.shown(text) == line


@pytest.fixture
def hostile(tmp_path):
    """A model with a hostile name and an architecture that is not UTF-8."""
    path = tmp_path / "m.gguf"
    architecture = gb.kv("general.architecture", gb.STRING, gb.string(b"ll\xe9\x1b[2Jma"))
    data = np.ones(64, "<f4").tobytes()
    path.write_bytes(gb.gguf_file([architecture], [gb.tensor(HOSTILE, (32, 2))], data))
    return path


def test_inspect_shows_names_escaped(inspect, hostile):
    code, out, err = inspect(hostile)
    assert code == 0, err
    assert ESCAPED in out
    assert r"ll\xe9\x1b[2Jma" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_html_shows_names_escaped(inspect, hostile, tmp_path):
    assert inspect(hostile, "--html", tmp_path / "o.html")[0] == 0
    page = (tmp_path / "o.html").read_text(encoding="utf-8")
    assert ESCAPED in page
    assert "\x1b" not in page


def test_json_keeps_names(inspect, hostile):
    report = json.loads(inspect(hostile, "--json")[1])
    assert report["tensors"][0]["name"] == HOSTILE


def test_quantize_shows_names_escaped(quantize, hostile, tmp_path):
    code, out, err = quantize("--pure", hostile, tmp_path / "o.gguf", "q8_0")
    assert code == 0, err
    assert ESCAPED in out
    assert all(c.isprintable() or c == "\n" for c in out + err)
    with gguf_io.open_gguf(tmp_path / "o.gguf") as file:
        assert list(file.tensors) == [HOSTILE]


def test_errors_are_escaped_and_one_line(inspect, tmp_path):
    path = tmp_path / "a\x1b[31m\nb.gguf"
    path.write_bytes(b"GGUF\x09\0\0\0")
    code, out, err = inspect(path)
    assert code == 3
    assert not out
    assert err.count("\n") == 1
    assert "\x1b" not in err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8:strict", "latin-1:strict"])
@pytest.mark.parametrize("program", ["tbq_inspect", "tbq_quantize"])
def test_the_encoding_of_stdout_decides_nothing(program, encoding, hostile, tmp_path):
    output = tmp_path / "o.gguf"
    argv = {"tbq_inspect": [hostile], "tbq_quantize": ["--pure", hostile, output, "q8_0"]}[program]
    done = subprocess.run(
        [sys.executable, "-m", f"tools.{program}", *map(str, argv)],
        cwd=HERE.parent,
        env={"PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert output.exists() == (program == "tbq_quantize")


def test_a_fault_of_the_program_is_no_verdict(monkeypatch, capsys):
    def broken(args):
        raise KeyError("cache_s_l0")

    monkeypatch.setattr(tbq_inspect, "inspect_command", broken)
    assert tbq_inspect.main(["x"]) == console.FAULT
    assert "Traceback" in capsys.readouterr().err
