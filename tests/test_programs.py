"""The demo and the benchmark: they run, and the benchmark refuses a wrong kernel."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import FORMATS, WRONG

import gguf_io
import tbq
from tbq import registry
from tools import bench_cases, demo, tbq_bench
from tools.demo_data import DEMO_FILE, WIDTH, demo_tensors

# What comes back as something else, and how far off: negated, or under a wrong scale.
UNUSUAL = {f"llama-tq-cuda:ktq{bits}_1": (3, 5) for bits in (1, 2, 3, 4)}
UNUSUAL |= dict.fromkeys(WRONG, (0.3, 100))


def test_demo_prints_every_type_with_plausible_errors(capsys):
    assert demo.main(["--all"]) == 0
    table, _, notes = capsys.readouterr().out.partition("Errors that large")
    rows = {line[:30].strip(): line[30:] for line in table.splitlines()[3:]}
    for fmt in (fmt for fmt in tbq.formats() if not fmt.sibling):
        row = rows[fmt.label]
        if WIDTH % fmt.group_values:
            assert row == "needs a positive multiple of 576 values for " + fmt.label
            continue
        found = dict(zip(("bits", "K", "V", "gauss"), re.split(r"  +", row.strip()), strict=True))
        for side in {"K", "V"} - set(fmt.side):
            assert found.pop(side) == f"{fmt.side} only"
        fitting = fmt.fitting(head_dim=demo.HEAD_DIM, side=fmt.side[0])
        assert float(found.pop("bits")) == round(8 * fitting.row_bytes(WIDTH) / WIDTH, 4)
        low, high = UNUSUAL.get(fmt.key, (0, 0.5 if fmt.bpw > 2.3 else 0.8))
        assert all(low < float(error) < high for error in found.values()), (fmt.key, found)
    assert "llama-tq-cuda:ktq2_1: Decodes to the negative of what was encoded" in notes


def test_demo_has_a_type_of_every_fork_that_was_run():
    proven = {fmt.dialect for fmt in tbq.formats() if fmt.evidence == "vectors"}
    forks = {name for name in proven if not registry.get_dialect(name).backend_of}
    chosen = [tbq.get_format(name) for name in demo.selected([], everything=False)]
    assert {fmt.dialect for fmt in chosen} == forks
    assert all(fmt.evidence == "vectors" and not fmt.release for fmt in chosen)


def test_demo_leaves_quietly_when_nobody_reads_on():
    command = [sys.executable, "-m", "tools.demo", "q8_0", "q4_0", "q5_0", "q4_1"]
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "cwd": Path(demo.__file__).parents[1],
    }
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline().startswith("Relative MSE")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=300) == 141


def test_demo_says_which_types_there_are(capsys):
    assert demo.main(["tbq33"]) == 2
    assert "demo: error: no format is called 'tbq33'; did you mean" in capsys.readouterr().err


def test_demo_data_is_what_its_generator_makes():
    with gguf_io.open_gguf(DEMO_FILE) as f:
        for name, x in demo_tensors().items():
            assert np.allclose(f.tensors[name].dequantize(), x, rtol=1e-2)


def test_bench_measures_and_records(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_cases, "VALUES", 1 << 14)
    monkeypatch.setattr(bench_cases, "SECONDS", 0.01)
    out = tmp_path / "bench.jsonl"
    every = "4608"  # what the groups of all formats divide
    assert tbq_bench.main(["--rows", every, "--rounds", "1", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 3 + 2 * len(FORMATS)
    assert all(record["mvalues_per_s"] > 0 and record["cpu"] for record in records)
    assert all(0 < record["values"] <= 1 << 14 for record in records)
    assert "pr21089:tbq3_0 quantize" in capsys.readouterr().out


def test_bench_does_not_time_a_wrong_kernel(monkeypatch, capsys):
    codec = type(tbq.get_format("tbq3_0").codec)
    right = codec.quantize

    def off_by_one(self, x, index):
        blocks = right(self, x, index)
        blocks["qs"][0, 0] ^= 1
        return blocks

    monkeypatch.setattr(codec, "quantize", off_by_one)
    assert tbq_bench.main(["--rows", "256", "--rounds", "1", "tbq3_0"]) == 1
    assert "not exact, not timed: pr21089:tbq3_0" in capsys.readouterr().err


def test_bench_arguments(capsys):
    for args in (["--rows", "x"], ["--rounds", "0"], ["nope"]):
        assert tbq_bench.main(args) == 2
        assert "tbq-bench: error: " in capsys.readouterr().err
