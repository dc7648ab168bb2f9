"""docs/dumps.md: every command of ours in it does what it says, on files of the kinds it names."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import MODELS, STATES, STATES_V3

import gguf_io
from tools import tbq_inspect, tbq_quantize

PAGE = (Path(__file__).parents[1] / "docs" / "dumps.md").read_text()
FILES = {
    "model.gguf": MODELS / "llama.metadata.gguf",
    "slot.bin": STATES / "pr21089.f16-same-prompt-as-q8_0.seq0.bin",
    "slot.f16.bin": STATES / "pr21089.f16-same-prompt-as-q8_0.seq0.bin",
    "slot.q8_0.bin": STATES / "pr21089.q8_0.seq0.bin",
    "session.bin": STATES / "pr21089.tbq3_0.session.bin",
    "seq.bin": STATES / "pr21089.q8_0.seq0.bin",
    "state.raw": STATES_V3 / "llama.q8_0.raw.rawstate.bin",
    "seq.raw": STATES_V3 / "llama.q8_0.raw.raw.bin",
}
KINDS = {
    "slot.bin": "sequence file (GGSQ)",
    "session.bin": "session file (GGSN)",
    "state.raw": "state blob",
    "seq.raw": "sequence blob",
}
PROGRAMS = {"tbq-inspect": tbq_inspect, "tbq-quantize": tbq_quantize}
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("tbq-")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, path in FILES.items():
        shutil.copy(path, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_commands_for_every_kind():
    assert len(COMMANDS) >= 10
    assert all(any(name in command for command in COMMANDS) for name in FILES)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, folder, capsys):
    program, *args = shlex.split(command)
    assert PROGRAMS[program].main(args) == 0, capsys.readouterr().err
    for output in set(args) - set(FILES):
        if output.endswith((".bin", ".raw")):
            gguf_io.open_state(folder / output).close()


@pytest.mark.parametrize("name", KINDS)
def test_kinds_are_called_so(name, folder, capsys):
    assert tbq_inspect.main([name]) == 0
    assert KINDS[name] in " ".join(capsys.readouterr().out.split())
    assert KINDS[name] in PAGE


def test_the_python(folder):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})
    assert np.load("cache_k_l0.npy").ndim == 3
