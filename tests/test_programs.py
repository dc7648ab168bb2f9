"""The demo and the benchmark: they run, and the benchmark refuses a wrong kernel."""

import json

import numpy as np
from conftest import FORMATS, WRONG

import gguf_io
import tbq
from tools import demo, tbq_bench
from tools.demo_data import DEMO_FILE, WIDTH, demo_tensors

# What comes back as something else, and how far off: negated, or under a wrong scale.
UNUSUAL = {f"llama-tq-cuda:ktq{bits}_1": (3, 5) for bits in (1, 2, 3, 4)}
UNUSUAL |= dict.fromkeys(WRONG, (0.3, 100))


def test_demo_prints_every_format_with_plausible_errors(capsys):
    demo.main(["all"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[3:] if line]
    rows = {first: rest for first, *rest in lines}
    for fmt in (fmt for fmt in tbq.formats() if not fmt.sibling):
        if not demo.fits(fmt):
            fixed = not (fmt.by_side or fmt.by_head_dim or fmt.group_values == 576)
            assert not (fixed and demo.in_files(fmt))
            assert rows[fmt.key] == []
            continue
        bits, *errors = map(float, rows[fmt.key])
        assert bits == round(8 * fmt.row_bytes(WIDTH) / WIDTH, 4)
        low, high = UNUSUAL.get(fmt.key, (0, 1.2))
        assert all(low < error < high for error in errors), (fmt.key, errors)


def test_demo_data_is_what_its_generator_makes():
    with gguf_io.open_gguf(DEMO_FILE) as f:
        for name, x in demo_tensors().items():
            assert np.allclose(f.tensors[name].dequantize(), x, rtol=1e-2)


def test_bench_measures_and_records(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tbq_bench, "VALUES", 1 << 14)
    monkeypatch.setattr(tbq_bench, "SECONDS", 0.01)
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
