"""tbq-bench: what it makes of times. None is measured here: the clock is the tests'."""

import itertools
import json
import shutil
import subprocess
import time

import pytest
from conftest import program

import tbq
from tools import bench_cases, bench_plot, bench_report, tbq_bench
from tools.libggml import open_library

bench = program(tbq_bench.main)
NAMES = ("ggml:q8_0", "q4_0")
CC = shutil.which("cc")


class Clock:
    """Stands in for `bench_cases.measured`: a million values per second, times a case's rate."""

    def __init__(self):
        self.rate = {}

    def measured(self, found, rounds, clock):
        return {name: [1e6 * self.share(name)] * rounds for name in found}

    def share(self, name):
        rate = self.rate.get(name, 1.0)
        return rate.pop(0) if isinstance(rate, list) else rate


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(bench_cases, "VALUES", 1 << 13)
    monkeypatch.setattr(bench_cases, "SECONDS", 0.001)
    monkeypatch.setattr(bench_cases, "measured", found.measured)
    return found


def test_speeds_are_values_per_second(monkeypatch):
    ticks = itertools.accumulate([0.0, 9, *(0, 2, 0, 5), *(0, 1, 0, 2), *(0, 1, 0, 4)])
    monkeypatch.setattr(bench_cases, "WARM_UPS", 1)
    found = {"copy": bench_cases.Case(list, 100), "x quantize": bench_cases.Case(list, 10)}
    speeds = bench_cases.measured(found, 3, lambda: next(ticks))
    assert speeds == {"copy": [50.0, 100.0, 100.0], "x quantize": [2.0, 5.0, 2.5]}


def test_the_processor_s_time_counts_where_one_thread_works():
    assert bench_cases.clock_of(1) is time.thread_time
    assert bench_cases.clock_of(2) is time.perf_counter


def test_ratios_are_of_one_round():
    """A machine that is slow in one round is so for all cases of it."""
    speeds = {
        "copy": [100.0, 10.0, 80.0],
        "gguf-py q4_0 quantize": [10.0, 1.0, 8.0],
        "x quantize": [50.0, 5.0, 40.0],
        "C: x quantize": [20.0, 2.0, 20.0],
    }
    record = bench_report.record("x quantize", 256, 512, speeds)
    assert (record["ratio_to_copy"], record["ratio_to_gguf_q4_0"]) == (0.5, 5.0)
    assert (record["mvalues_per_s"], record["min"], record["max"]) == (4e-5, 5e-6, 5e-5)
    assert (record["c_mvalues_per_s"], record["ratio_to_c"]) == (2e-5, 2.5)
    assert "ratio_to_c" not in bench_report.record("copy", 256, 512, speeds)


# --- against a record ----------------------------------------------------------------------------


@pytest.fixture
def recorded(clock, bench, tmp_path):
    """A file with the cases of two formats, of rows of 256."""
    path = tmp_path / "before.jsonl"
    assert bench("--rows", "256", "--record", path, *NAMES)[0] == 0
    return path


def test_a_machine_of_another_speed_is_no_change(clock, recorded, bench):
    names = [f"{name} {op}" for name in ("q8_0", "q4_0") for op in bench_cases.OPERATIONS]
    yardsticks = [bench_cases.COPY, *map(bench_cases.peer, bench_cases.OPERATIONS)]
    clock.rate = dict.fromkeys([*yardsticks, *names], 0.25)
    code, out, _ = bench("--rows", "256", "--compare", recorded, *NAMES)
    assert (code, f"compared with {recorded}: 7 cases, 0 slower" in out) == (0, True)
    assert out.splitlines()[0].endswith("x record")
    assert all(line.endswith(" 1.00") for line in out.splitlines()[1:-1])


@pytest.mark.parametrize(("share", "code"), [(0.89, 1), (0.91, 0), (1.5, 0)])
def test_what_is_slower_fails(clock, recorded, bench, share, code):
    clock.rate = {"q8_0 dequantize": share}
    found, out, _ = bench("--rows", "256", "--compare", recorded, *NAMES)
    assert found == code
    assert (f"q8_0 dequantize, rows of 256: {share:.2f} of the recorded" in out) == bool(code)
    assert f"{share:>10.2f}\n" in out


def test_what_is_slower_by_one_yardstick_only_is_not(clock, recorded, bench):
    clock.rate = {bench_cases.COPY: 2.0}
    assert bench("--rows", "256", "--compare", recorded, *NAMES)[0] == 0


@pytest.mark.parametrize(("tries", "code"), [([0.5, 0.6, 0.95], 0), ([0.5, 0.6, 0.7], 1)])
def test_it_is_measured_again_before_it_counts(clock, recorded, bench, tries, code):
    clock.rate = {"q8_0 quantize": [*tries]}
    found, out, _ = bench("--rows", "256", "--compare", recorded, "q8_0")
    assert found == code
    assert ("q8_0 quantize, rows of 256: 0.70" in out) == bool(code)
    assert clock.rate["q8_0 quantize"] == []


def test_only_what_both_have_is_compared(clock, recorded, bench):
    code, out, _ = bench("--rows", "256,512", "--compare", recorded, "q8_0", "q5_0")
    assert (code, ": 5 cases, 0 slower" in out) == (0, True)  # three of them are yardsticks
    code, _, err = bench("--rows", "512", "--compare", recorded, "q8_0")
    assert (code, "which has none of 2 cases" in err) == (2, True)
    assert bench("--rows", "256", "--threads", "2", "--compare", recorded, "q8_0")[0] == 2


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"case": "copy", "row": 1, "threads": 1, "ratio_to_copy": 1}']
)
def test_a_damaged_record_is_named(clock, recorded, bench, text):
    whole = recorded.read_text()
    recorded.write_text(whole + text + "\n")
    code, _, err = bench("--rows", "256", "--compare", recorded, "q8_0")
    assert (code, f"line {whole.count(chr(10)) + 1} is no record of tbq-bench" in err) == (3, True)


# --- a fork's C ----------------------------------------------------------------------------------

HALVES = """
#include <stdint.h>
#include <string.h>
void quantize_row_q8_0_ref(const float * x, void * y, int64_t k) {
    memset(y, *x != 0, k / 32 * 34);
}
void dequantize_row_q8_0(const void * x, float * y, int64_t k) {
    memset(y, *(const char *) x, 4 * k);
}
"""


@pytest.mark.skipif(CC is None, reason="no C compiler")
def test_the_c_of_a_fork_is_timed_beside_ours(clock, bench, tmp_path):
    source, library, out = (tmp_path / name for name in ("c.c", "libggml.so", "out.jsonl"))
    source.write_text(HALVES)
    subprocess.run([CC, "-shared", "-fPIC", "-o", library, source], check=True)
    clock.rate = {"C: q8_0 quantize": 0.25}
    flags = ["--rows", "256", "--libggml", library]
    code, table, err = bench(*flags, "--out", out, *NAMES)
    assert (code, err) == (0, "")
    records = {r["case"]: r for r in map(json.loads, out.read_text().splitlines())}
    assert records["q8_0 quantize"]["ratio_to_c"] == 4.0
    assert records["q8_0 dequantize"]["ratio_to_c"] == 1.0
    assert "ratio_to_c" not in records["q4_0 quantize"]
    assert not any(name.startswith("C: ") for name in records)
    assert table.splitlines()[0].split()[-2:] == ["x", "C"]
    assert any(line.split()[-1] == "4.00" for line in table.splitlines())
    cases = bench_cases.cases(
        [tbq.get_format("q8_0")], 256, 1, open_library(str(library), {"ggml"})
    )
    for name in ("quantize", "dequantize"):
        assert cases[f"C: q8_0 {name}"].values == 1 << 13
        cases[f"C: q8_0 {name}"].call()
    code, _, err = bench(*flags, "q4_0")
    assert (code, "none of the functions, such as quantize_row_q4_0_ref" in err) == (4, True)
    code, _, err = bench(*flags, "--threads", "2", "q8_0")
    assert (code, "C runs on one" in err) == (2, True)


# --- plots ---------------------------------------------------------------------------------------


def test_a_plot_has_every_format_and_both_directions(clock, bench, tmp_path):
    path = tmp_path / "speeds.svg"
    assert bench("--rows", "256,1024", "--plot", path, "tbq3_0", *NAMES)[0] == 0
    text = path.read_text()
    for words in ("pr21089:tbq3_0", "q8_0", "encode", "decode", "memory copy", "rows of 1024"):
        assert f">{words}<" in text
    path = tmp_path / "speeds.png"
    assert bench("--rows", "256", "--plot", path, "q8_0")[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_color_still_tells_them_apart():
    assert len({marker for _, _, marker in bench_plot.STYLES.values()}) == 2


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--plot", "speeds.pdf"], 2, "ends in .svg or .png"),
        (["--plot", "."], 2, "ends in .svg or .png"),
        (["--compare", "{0}/none.jsonl"], 3, "No such file"),
        (["--compare", "{0}"], 3, "directory"),
        (["--libggml", "{0}/none.so"], 4, "none.so: no such file"),
        (["--libggml", "{0}/none.so", "ktq2_1"], 4, "a library is of one dialect"),
        (["--rounds", "1000000000"], 2, "at most 10000 rounds"),
        (["--compile", "--plot", "a.svg"], 2, "--plot: got beside --compile"),
        (["--compile", "--compare", "a"], 2, "--compare: got beside --compile"),
        (["--compile", "--libggml", "a"], 2, "--libggml: got beside --compile"),
        (["--compile", "--out", "{0}"], 2, "a regular file or a new path"),
    ],
)
def test_arguments(clock, bench, tmp_path, args, code, words):
    found, _, err = bench(*(arg.format(tmp_path) for arg in args), "q8_0")
    assert found == code
    assert words in err
