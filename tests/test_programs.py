"""The demo and the benchmark: they run, and the benchmark refuses a wrong kernel."""

import dataclasses
import json

import numpy as np

import gguf_io
import tbq
from tbq import registry
from tools import demo, tbq_bench
from tools.demo_data import DEMO_FILE, demo_tensors


def test_demo_prints_every_format_with_plausible_errors(capsys):
    demo.main()
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[3:]}
    for fmt in (fmt for fmt in tbq.formats() if not fmt.sibling):
        bits, *errors = map(float, rows[fmt.key])
        assert bits == round(fmt.bpw, 4)
        inverted = fmt.dialect == "llama-tq-cuda" and fmt.side == "K"
        assert all(3 < error < 5 if inverted else 0 < error < 1.2 for error in errors)


def test_demo_data_is_what_its_generator_makes():
    with gguf_io.open_gguf(DEMO_FILE) as f:
        for name, x in demo_tensors().items():
            assert np.allclose(f.tensors[name].dequantize(), x, rtol=1e-2)


def test_bench_measures_and_records(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tbq_bench, "VALUES", 1 << 14)
    monkeypatch.setattr(tbq_bench, "SECONDS", 0.01)
    out = tmp_path / "bench.jsonl"
    assert tbq_bench.main(["--rows", "256", "--rounds", "1", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 3 + 2 * len(tbq.formats())
    assert all(record["mvalues_per_s"] > 0 and record["cpu"] for record in records)
    assert all(0 < record["values"] <= 1 << 14 for record in records)
    assert "pr21089:tbq3_0 quantize" in capsys.readouterr().out


def test_bench_does_not_time_a_wrong_kernel(monkeypatch, capsys):
    right = tbq.get_format("tbq3_0")

    def off_by_one(fmt, x, index):
        blocks = right.quantize_ref(right, x, index)
        blocks["qs"][0, 0] ^= 1
        return blocks

    wrong = dataclasses.replace(right, quantize_ref=off_by_one)
    monkeypatch.setitem(registry._FORMATS, right.key, wrong)
    assert tbq_bench.main(["--rows", "256", "--rounds", "1", "tbq3_0"]) == 1
    assert "not exact, not timed: pr21089:tbq3_0" in capsys.readouterr().err


def test_bench_arguments(capsys):
    for args in (["--rows", "x"], ["--rounds", "0"], ["nope"]):
        assert tbq_bench.main(args) == 2
        assert "tbq-bench: error: " in capsys.readouterr().err
