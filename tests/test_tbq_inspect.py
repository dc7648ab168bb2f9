"""tbq-inspect: what it says, what it warns of, its JSON schema and its page."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import HERE, MODELS, NUMBERED, SAMPLES, STATES, STATES_V3, WRONG

import tbq
from gguf_io import OutputTensor, open_state, resolve_type, write_gguf
from gguf_io.health import BlockHealth
from tbq.registry import get_dialect
from tools import console

SCHEMA = json.loads((HERE.parent / "tools/data/tbq-inspect.schema.json").read_text())
F32 = STATES / "pr21089.f32.seq0.bin"
Q8_0 = STATES / "pr21089.q8_0.seq0.bin"
TWIN = STATES / "pr21089.f16-same-prompt-as-q8_0.seq0.bin"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture
def report(inspect):
    """Run tbq-inspect --json; returns the object, checked against the schema."""

    def run(*args: object) -> dict:
        code, out, err = inspect("--json", *args)
        assert code == 0, err
        found = json.loads(out)
        jsonschema.validate(found, SCHEMA)
        return found

    return run


def edited(path: Path, tmp_path: Path, edit) -> Path:
    """Return a copy of a state file in which `edit` changed the raw rows of its tensors."""
    data = bytearray(path.read_bytes())
    with open_state(path) as s:
        for t in s.tensors.values():
            for part in t.parts:
                rows = np.frombuffer(data, np.uint8, part.end - part.data, part.data)
                edit(t, rows.reshape(part.cells, part.row_bytes))
    out = tmp_path / "edited.bin"
    out.write_bytes(data)
    return out


@pytest.mark.parametrize("path", sorted(STATES.glob("*.bin")), ids=lambda path: path.stem)
def test_every_sample(path, report, inspect):
    found = report(path)
    assert found["kind"] == "state"
    with open_state(path) as s:
        assert found["dialect"] == s.dialect
        assert [t["name"] for t in found["tensors"]] == [
            n for n, t in s.tensors.items() if t.n_bytes
        ]
    assert found["warnings"] == []
    text = inspect(path)[1]
    assert str(path) == text.splitlines()[0]
    assert "no fault found in" in text or not found["tensors"]


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.gguf")), ids=lambda path: path.stem)
def test_models(path, report, inspect):
    found = report(path)
    assert found["gguf"]["architecture"] == "llama"
    assert {t["kind"] for t in found["tensors"]} == {"T"}
    assert found["warnings"] == []
    assert "GGUF v3, architecture llama" in inspect(path)[1]
    reference = report("--reference", SAMPLES / "small.f32.gguf", path)
    errors = [t["reference"]["relative_mse"] for t in reference["tensors"]]
    assert all(error < 0.05 for error in errors)
    assert ("f32" in path.name) == (max(errors) == 0)


def test_what_the_text_says(inspect):
    code, text, _ = inspect(
        "--model",
        MODELS / "gemma3.metadata.gguf",
        STATES / "pr21089.gemma3-iswa.k_tbq4_0_v_tbq3_0.seq0.bin",
    )
    assert code == 0
    joined = " ".join(text.split())
    for words in (
        "sequence file (GGSQ) v2, architecture gemma3, 200 tokens",
        "iswa: sections that explain the file to its last byte",
        "base stream 0: 204 cells, positions 0 to 203, sequence 0 in 204",
        "keys hadamard: the default for tbq4_0 caches",
        "heads are the model's",
        "3.56 bits per value, 4.49 times smaller than f16",
    ):
        assert words in joined
    assert re.search(r"base.cache_k_l5 +tbq4_0 +256x204 +4.06", text)


def test_small_error_against_the_twin_and_a_large_one_unrotated(report, inspect):
    found = report("--reference", TWIN, Q8_0)
    assert found["reference"] == {"path": str(TWIN), "cells": 94}
    assert found["warnings"] == []
    for t in found["tensors"]:
        r = t["reference"]
        assert r["relative_mse"] < 1e-4
        assert r["attention"]["kl"] < 1e-4
        assert r["attention"]["output_error"] < 1e-4
    found = report("--reference", TWIN, "--rotation", "off", Q8_0)
    assert all(t["reference"]["relative_mse"] > 1 for t in found["tensors"])
    k, v = found["warnings"]
    assert re.search(
        "^cache_k_l0, cache_k_l1, .*rotation hadamard on heads of 128 would explain", k
    )
    assert "check --rotation" in k
    assert "rotation hadamard on heads of 64 would explain it" in v
    disabled = STATES / "pr21089.q8_0-rotation-disabled.seq0.bin"
    text = " ".join(inspect("--reference", TWIN, disabled)[1].split())
    assert "no rotation would explain it" in text
    assert report("--reference", TWIN, "--rotation", "off", disabled)["warnings"] == []


def test_staged_rows_that_are_misread_are_explained(report):
    staging = STATES / "llama-tq.ktq2-staging-as-f16.seq0.bin"
    found = report("--reference", TWIN, staging)
    assert found["reference"]["cells"] == 90
    assert found["warnings"] == []
    (warning,) = report("--reference", TWIN, "--rotation", "on", staging)["warnings"]
    assert warning.startswith("cache_v_l0")
    assert "no rotation would explain it" in warning


def test_reference_of_another_prompt_or_kind(tmp_path, inspect, report):
    other = tmp_path / "other.bin"
    data = bytearray(TWIN.read_bytes())
    data[12] ^= 1  # the first token
    other.write_bytes(data)
    found = report("--reference", other, Q8_0)
    assert "the reference was made from other tokens" in found["warnings"]
    code, _, err = inspect("--reference", SAMPLES / "small.f32.gguf", Q8_0)
    assert (code, "another kind of file" in err) == (2, True)
    found = report("--reference", Q8_0, TWIN)
    assert any("the reference is quantised itself: q8_0" in w for w in found["warnings"])


def test_damaged_scales_are_named(tmp_path, report):
    def damage(t, rows):
        if t.name == "cache_k_l0":
            rows[0, 128:130] = 0x00, 0x7C  # infinity
            rows[1, 128:130] = 0x00, 0x7B  # near overflow
            rows[2, 128:130] = 0x01, 0x00  # subnormal
            rows[3, 128:130] = 0  # zero
            rows[4, 129] |= 0x80  # negative

    path = edited(STATES / "pr21089.k_tbq4_0_v_tbq3_0.seq0.bin", tmp_path, damage)
    found = report(path)
    health = found["tensors"][0]["health"]
    keys = ("blocks", "zero_blocks", "nonfinite_scales", "large_scales", "subnormal_scales")
    assert [health[k] for k in keys] == [44, 1, 1, 1, 1]
    assert health["anomalies"] == {"scales with a sign": 1}
    assert found["warnings"] == [
        "cache_k_l0: 1 blocks have a scale that is NaN or infinite",
        "cache_k_l0: 1 blocks have a scale near float16 overflow",
        "cache_k_l0: 1 blocks have a scale below float16's normal range",
        "cache_k_l0: 1 blocks have scales with a sign",
    ]


def test_flat_block_index_and_dead_codes_are_named(tmp_path, report, rng):
    def damage(t, rows):
        blocks = rows.view(t.format.block)
        if t.kind == "K":  # as a kernel that counts blocks from the start of the tensor
            flat = np.arange(blocks.size).reshape(blocks.shape)
            signs = tbq.families.ktq.sign_bits(tbq.families.ktq.block_seed(flat.ravel()))
            blocks["sb"] = np.packbits(signs, axis=-1, bitorder="little").reshape(*flat.shape, 4)
        else:
            blocks["qs"] |= 0x11  # no code is even

    source = STATES / "llama-tq.k_ktq4_1_v_vtq4_1.assembled.seq0.bin"
    found = report(edited(source, tmp_path, damage))
    assert found["warnings"] == [
        "cache_k_l0, cache_k_l1: 344 blocks have signs that do not match their seed",
        "cache_v_l0, cache_v_l1: 8 codes never occur",
    ]
    assert found["tensors"][2]["health"]["histograms"]["codes"][0::2] == [0] * 8


def test_padding_and_outliers_are_named(tmp_path, report, rng):
    x = rng.standard_normal((8, 256)).astype(np.float32)
    for key, field, words in (
        ("vtq3_1", "pad", "padding that is not zero"),
        ("vtq_mixed", "qs", "padding that is not zero"),
        ("vtq2_3", "pos", "outliers out of order"),
    ):
        fmt = tbq.get_format(key)
        packed = tbq.quantize(x, fmt)
        blocks = packed.view(fmt.block)
        if key == "vtq_mixed":
            blocks["qs"][:, :, 3] |= 1
        else:
            blocks[field][:, 0] = blocks[field][:, 0, ::-1] + 1
        path = tmp_path / f"{fmt.name}.gguf"
        write_gguf(path, {}, [OutputTensor.from_packed("t", packed, fmt)])
        found = report(path)
        n = 8 if key != "vtq_mixed" else blocks.size
        assert f"t: {n} blocks have {words}" in found["warnings"]


def encoded(fmt, rng):
    """Return packed rows, uint8 (16, row_bytes), of noise; row 3 is all zeros."""
    x = rng.standard_normal((16, max(1, 1024 // fmt.group_values) * fmt.group_values))
    x[3] = 0
    return tbq.quantize(x.astype(np.float32), fmt)


def test_every_format_is_healthy_as_encoded(fmt, rng):
    packed = encoded(fmt, rng)
    health = BlockHealth()
    health.add(packed, fmt, 0)
    assert not any(health.anomalies.values())
    assert health.nonfinite_scales == 0
    assert (health.dead_codes > 0) == (fmt.key in WRONG)
    blocks = fmt.codec.blocks(packed).reshape(-1)
    assert health.blocks == len(blocks)
    scales = (*fmt.layout.scales, *fmt.layout.small_scales)
    zero = [(blocks[name].reshape(len(blocks), -1) == 0).all(axis=1) for name in scales]
    zero = np.all(zero, axis=0) if scales else np.zeros(len(blocks), bool)
    assert health.zero_blocks == zero.sum()
    for kind, counts in health.histograms.items():
        per_block = fmt.codec.codes(blocks)[kind][0].shape[1]
        assert counts.sum() == (~zero).sum() * min(per_block, fmt.codec.coded_values)


@pytest.mark.parametrize("fmt", NUMBERED, ids=lambda fmt: fmt.label)
def test_what_is_healthy_causes_no_warning(fmt, tmp_path, report, rng):
    path = tmp_path / "t.gguf"
    packed = encoded(fmt, rng)
    write_gguf(path, {}, [OutputTensor.from_packed("t", packed, fmt)])
    found = report(path)
    (t,) = found["tensors"]
    assert t["type"] == (fmt.name if fmt.is_ggml else fmt.key)
    if fmt.choice:  # a model's tensor does not say which it is
        assert any(need in w for w in found["warnings"] for need in ("side", "head_dim"))
        return
    health = BlockHealth()
    health.add(packed, fmt, 0)
    assert t["health"]["zero_blocks"] == health.zero_blocks
    counted = {kind: counts.tolist() for kind, counts in health.histograms.items()}
    assert t["health"]["histograms"] == counted
    dead = [w for w in found["warnings"] if "codes never occur" in w]
    assert found["warnings"] == dead
    assert bool(dead) == (fmt.key in WRONG)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_codes_of_ggmls_own_types(name, tmp_path, report, rng):
    from gguf_io.types import dequantize_rows, quantize_rows

    kind = resolve_type(name)
    x = rng.standard_normal((4, 256)).astype(np.float32)
    packed = quantize_rows(x, kind)
    blocks = kind.codec.blocks(packed).reshape(-1)
    codes = kind.codec.codes(blocks)["codes"][0].astype(np.float32)
    d = blocks["d"].astype(np.float32)[:, None]
    offset = {"q4_0": -8, "q5_0": -16, "q8_0": -128}.get(name)
    y = codes * d + blocks["m"][:, None] if offset is None else (codes + offset) * d
    assert np.allclose(y.reshape(4, 256), dequantize_rows(packed, kind), rtol=1e-6)
    path = tmp_path / "t.gguf"
    write_gguf(path, {}, [OutputTensor("t", (4, 256), kind, packed.nbytes, lambda: [packed])])
    assert report(path)["tensors"][0]["health"]["blocks"] == 32


# --- statistics ---


def test_statistics_see_an_outlier_channel_and_the_rotation_spreads_it(tmp_path, report, rng):
    x = rng.standard_normal((500, 2, 128)).astype(np.float32)
    x[:, 1, 17] *= 30

    def fill(t, rows):
        rows[:] = x[: len(rows)].reshape(len(rows), -1).view(np.uint8)

    found = report(edited(F32, tmp_path, fill))
    plain, outlier = found["tensors"][0]["statistics"]["heads"]
    assert plain["channel_ratio"] < 1.6
    assert plain["kurtosis"] == pytest.approx(3, abs=0.3)
    assert outlier["channel_ratio"] > 20
    assert np.argmax(outlier["channel_rms"]) == 17
    assert outlier["kurtosis"] > 50
    assert outlier["kurtosis_rotated"] < 6
    assert plain["marginal_distance"] < 0.02 < outlier["marginal_distance"]
    norms = np.sqrt((x[:44, 0].astype(np.float64) ** 2).sum(axis=1))
    assert plain["norm_mean"] == pytest.approx(norms.mean())
    assert (plain["norm_min"], plain["norm_max"]) == pytest.approx((norms.min(), norms.max()))


def test_rows_that_look_rotated_are_suspected(tmp_path, report, rng):
    x = rng.standard_normal((44, 2, 128)).astype(np.float32)
    x[:, :, 5] *= 30
    rotated = tbq.rotation("hadamard", 128).forward(x)

    def fill(t, rows):
        rows[:] = rotated.reshape(44, 256).view(np.uint8)

    path = edited(F32, tmp_path, fill)
    warnings = report(path)["warnings"]
    assert re.search("^cache_k_l0, .*: the tails are heavier .* not assumed", warnings[0])
    found = report("--rotation", "k", path)
    assert found["tensors"][0]["statistics"]["heads"][0]["kurtosis"] > 50


def test_nonfinite_values_are_counted_not_spread(tmp_path, report):
    def damage(t, rows):
        if t.name == "cache_v_l1":
            rows.view("<f4")[3, 5:7] = np.nan, -np.inf

    found = report(edited(F32, tmp_path, damage))
    assert found["warnings"] == ["cache_v_l1: 2 values are NaN or infinite"]
    assert found["tensors"][3]["statistics"]["heads"][0]["kurtosis"] == pytest.approx(3, abs=0.5)


# --- attention and candidates ---


def test_attention_error_is_that_of_the_formula(rng):
    from tbq.quality import ExactAttention, visible

    k, v = rng.standard_normal((2, 30, 2, 64)).astype(np.float32)
    k2 = k + 0.1 * rng.standard_normal(k.shape).astype(np.float32)
    v2 = v + 0.1 * rng.standard_normal(v.shape).astype(np.float32)
    q = rng.standard_normal((12, 4, 64)).astype(np.float32)  # two query heads share one of K
    positions, window, scale = np.arange(8, 20), 5, 0.3
    seen = visible(positions, np.arange(30), window)
    found = ExactAttention(k, v, q, seen, scale).error(k2, v2)
    squared, kl, wrong, right = [], [], 0.0, 0.0
    for head in range(4):
        for i, position in enumerate(positions):
            cells = range(position - window + 1, position + 1)
            query = q[i, head].astype(np.float64)
            a, b = (x[cells, head // 2].astype(np.float64) @ query * scale for x in (k, k2))
            p, p2 = (np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in (a, b))
            squared += list((a - b) ** 2)
            kl.append((p * np.log(p / p2)).sum())
            exact = p @ v[cells, head // 2]
            wrong += ((p2 @ v2[cells, head // 2] - exact) ** 2).sum()
            right += (exact**2).sum()
    assert found.logit_rmse == pytest.approx(np.sqrt(np.mean(squared)), rel=1e-4)
    assert found.kl == pytest.approx(np.mean(kl), rel=1e-3)
    assert found.output_error == pytest.approx(wrong / right, rel=1e-3)
    same = ExactAttention(k, v, q, seen, scale).error(k, v)
    assert (same.logit_rmse, same.output_error) == (0, 0)
    assert same.kl < 1e-6


def test_queries_see_their_own_sequence_up_to_themselves():
    from tbq.quality import visible

    cells = np.array([0 << 32 | 0, 0 << 32 | 1, 1 << 32 | 0, 0 << 32 | 2])
    seen = visible(cells, cells).astype(int)
    assert seen.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]]
    assert visible(cells, cells, 1).astype(int).tolist() == np.eye(4, dtype=int).tolist()


def test_candidates_do_to_a_dump_what_conversion_does(report, tmp_path, quantize):
    kinds = "q8_0,tbq4_0,tbq3_0,ktq2_1,vtq2_2"
    found = report("--candidates", kinds, F32)
    assert quantize("--type-k", "tbq4_0", "--type-v", "tbq3_0", F32, tmp_path / "o")[0] == 0
    converted = report("--reference", F32, tmp_path / "o")
    for before, after in zip(found["tensors"], converted["tensors"], strict=True):
        tried = {c["type"]: c for c in before["candidates"]}
        assert list(tried) == ["q8_0", *(tbq.get_format(k).key for k in kinds.split(",")[1:])]
        own = tried[after["type"]]
        assert own["relative_mse"] == pytest.approx(after["reference"]["relative_mse"], rel=1e-6)
        if before["kind"] == "K":
            assert own["attention"]["kl"] == pytest.approx(after["reference"]["attention"]["kl"])
        other_side = "llama-tq:vtq2_2" if before["kind"] == "K" else "llama-tq:ktq2_1"
        assert "only" in tried[other_side]["unfit"]


def test_the_cheapest_combination_obeys_its_limits(report):
    kinds = "q8_0,q4_0,tbq3_0,tbq4_0,ktq4_1,vtq4_1"
    for max_kl, max_output in ((0.05, 0.04), (0.05, 0.01), (0.001, 0.001), (1e-9, 1e-9)):
        found = report(
            "--candidates", kinds, "--max-kl", max_kl, "--max-output-error", max_output, F32
        )
        choice = found["choice"]
        assert (choice["max_kl"], choice["max_output_error"]) == (max_kl, max_output)
        assert [c["dialect"] for c in choice["combinations"]].count("pr21089") == 1
        for c in choice["combinations"]:
            for side, limit, number in (("K", max_kl, "kl"), ("V", max_output, "output_error")):
                passing = None
                for t in (t for t in found["tensors"] if t["kind"] == side):
                    good = {
                        x["type"]
                        for x in t["candidates"]
                        if x["attention"] and x["attention"][number] <= limit
                    }
                    passing = good if passing is None else passing & good
                bits = {
                    name: resolve_type(name).bpw
                    for name in passing
                    if name.partition(":")[0] in (name, c["dialect"])
                }
                cheapest = min(bits.values(), default=16)
                assert resolve_type(c[side.lower()]).bpw == cheapest
            assert c["layers_bpw"] <= c["bpw"]


def test_layers_are_chosen_each(tmp_path, report):
    with open_state(F32) as s:
        k1 = s.tensors["cache_k_l1"].values().copy()

    def fill(t, rows):
        if t.name == "cache_k_l1":  # small keys: flat attention, which tolerates anything
            rows[:] = (k1 * np.float32(0.01)).reshape(44, 256).view(np.uint8)

    path = edited(F32, tmp_path, fill)
    found = report("--candidates", "q8_0,tbq3_0", "--max-kl", 0.01, "--max-output-error", 1, path)
    (c,) = found["choice"]["combinations"]
    assert (c["k"], c["v"]) == ("q8_0", "pr21089:tbq3_0")
    assert [layer["k"] for layer in c["layers"]] == ["q8_0", "pr21089:tbq3_0"]
    assert c["layers_bpw"] < c["bpw"]


def test_candidates_for_a_model(report, inspect):
    path = SAMPLES / "small.f32.gguf"
    found = report("--candidates", "all", path)
    names = {c["type"] for c in found["tensors"][0]["candidates"]}
    dialects = {name for name in tbq.dialects() if not get_dialect(name).backend_of}
    forks = [f for f in tbq.formats() if f.dialect in dialects and not f.is_ggml]
    own = {f.key for f in forks if not f.sibling}
    own = {key for key in own if [*tbq.get_format(key).variants()] == [tbq.get_format(key)]}
    assert own | {"q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"} < names
    assert not names & {"q1_0", "q2_0", "mxfp4", "tq2_0", "f8_e4m3"}  # no cache has these
    assert all(c["attention"] is None for c in found["tensors"][0]["candidates"])
    assert found["choice"] is None


def test_selected_layers(report, inspect):
    found = report("--layers", "1-4", F32)
    assert [t["name"] for t in found["tensors"]] == ["cache_k_l1", "cache_v_l1"]
    code, _, err = inspect("--layers", "7", F32)
    assert (code, "--layers: got 7, need layers that the file has" in err) == (2, True)


def test_sampled_rows_agree_with_all_of_them(report):
    path = STATES / "pr21089.gemma3-iswa.k_tbq4_0_v_tbq3_0.seq0.bin"
    few, every = report("--max-rows", 64, path), report("--max-rows", 0, path)
    for a, b in zip(few["tensors"], every["tensors"], strict=True):
        assert (a["statistics"]["rows"], b["statistics"]["rows"]) == (64, 204)
        assert a["health"] == b["health"]
        x, y = (t["statistics"]["heads"][0]["norm_mean"] for t in (a, b))
        assert x == pytest.approx(y, rel=0.05)


# --- the page ---


class Page(HTMLParser):
    """What a page consists of: tags with their attributes, and the text inside each kind of tag."""

    VOID = ("meta", "image", "rect", "line", "circle", "path", "polyline")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.inside: dict[str, str] = {}
        self.parents: list[str] = []
        self.children: list[tuple[str, str]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.parents, "a tag that is not closed"

    def handle_starttag(self, tag, attrs):
        self.children += [(parent, tag) for parent in set(self.parents)]
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.parents.append(tag)

    def handle_endtag(self, tag):
        assert self.parents.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.children += [(parent, tag) for parent in set(self.parents)]
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        for tag in set(self.parents):
            self.inside[tag] = self.inside.get(tag, "") + data + " "

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)

    def text(self, tag="body"):
        return " ".join(self.inside.get(tag, "").split())


QUANTISED = STATES / "pr21089.k_tbq4_0_v_tbq3_0.seq0.bin"
PAGES = {
    "everything": (
        "--reference",
        F32,
        "--candidates",
        "q8_0,tbq3_0,vtq4_1,amesianx:tbq4_4",
        QUANTISED,
    ),
    "all": ("--candidates", "all", F32),
    "plain": (Q8_0,),
    "model": ("--candidates", "q8_0,tbq4_0", SAMPLES / "small.tbq4_0.mostly.gguf"),
    "nothing": (STATES / "pr21089.mamba-recurrent.seq0.bin",),
}


@pytest.fixture
def page(inspect, tmp_path):
    """Write a page; returns its path and what the same command prints."""

    def write(name: str) -> tuple[Path, str]:
        path = tmp_path / f"{name}.html"
        code, out, err = inspect("--details", "--html", path, *PAGES[name])
        assert code == 0, err
        assert f"wrote {path}" in out
        return path, out

    return write


@pytest.mark.parametrize("name", PAGES)
def test_the_page_says_what_the_text_says(name, page, report):
    path, text = page(name)
    found = Page(path)
    shown = found.text()
    from tools import inspect_facts, inspect_tables

    data = report(*PAGES[name])
    data["path"] = str(PAGES[name][-1])
    tables = [inspect_tables.reference_table(data), inspect_tables.candidate_table(data)]
    tables += [inspect_tables.side_table(data, side) for side in "KVT"]
    tables = [inspect_tables.tensor_table(data), *filter(None, tables)]
    sentences = [text for _, text in inspect_facts.verdict(data) + inspect_facts.facts(data)]
    sentences += data["warnings"] + inspect_tables.notes(data)
    sentences += [note for table in tables for note in table.notes]
    sentences += [cell.strip() for table in tables for row in table.rows for cell in row]
    assert len(sentences) > 8
    printed = " ".join(text.split())
    for sentence in sentences:
        sentence = " ".join(console.in_flags(sentence).split())
        assert sentence in shown
        assert sentence in printed


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_well_made(name, page):
    found = Page(page(name)[0])
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert found.tags[0][1] == {"lang": "en"}
    for tag, attrs in found.tags:  # nothing is fetched, nothing is run
        assert tag not in ("script", "link", "img", "iframe")
        for key in ("src", "href"):
            assert attrs.get(key, "data:").startswith("data:")
    assert "url(" not in found.source
    assert "@import" not in found.source
    n_tables = found.count("table")
    assert n_tables == found.count("caption") == found.count("thead") == found.count("tbody")
    assert found.count("th") > 2 * n_tables
    regions = [attrs for _, attrs in found.tags if attrs.get("class") == "scroll"]
    assert len(regions) == n_tables
    assert all(r["tabindex"] == "0" and r["aria-label"] for r in regions)
    drawings = [attrs for tag, attrs in found.tags if tag == "svg"]
    assert found.children.count(("svg", "title")) == len(drawings)
    assert found.children.count(("svg", "desc")) == len(drawings)
    assert all(attrs["role"] == "img" for attrs in drawings)
    widths = re.findall(r"[^-]width: ?(\d+)(px|rem)", found.source)
    assert not [w for w, unit in widths if float(w) * (16 if unit == "rem" else 1) > 360]
    footer = found.text("footer")
    assert tbq.__version__ in footer
    assert "tbq-inspect --details --html" in footer
    assert PAGES[name][-1].name in footer
    assert (len(drawings) == 0) == (name == "nothing")


def test_the_page_has_a_panel_for_each_series(page):
    found = Page(page("everything")[0])
    headings = found.text("h3")
    for words in ("Types for keys", "Keys, layer by layer", "how loud each channel", "each code"):
        assert words in headings
    titles = found.text("svg")
    for words in ("this file, pr21089:tbq4_0", "K tbq4_0, codes", "limit 0.01", "KL, nats"):
        assert words in titles
    loud = Page(page("all")[0])
    assert "more types, all outdone, are in the table" in loud.text("figcaption")
    assert sum(tag == "details" for tag, _ in loud.tags) >= 3  # long tables are folded


def test_a_page_is_the_same_again(inspect, tmp_path):
    path = tmp_path / "page.html"
    args = ("--reference", F32, "--candidates", "q8_0,tbq3_0", "--html", path, QUANTISED)
    inspect(*args)
    before = path.read_bytes()
    inspect(*args)
    assert path.read_bytes() == before


def luminance(colour: str) -> float:
    """Return WCAG's relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["LIGHT", "DARK"])
def test_contrasts(theme):
    from tools import inspect_html

    colours = getattr(inspect_html, theme)

    def contrast(front: str, back: str) -> float:
        a, b = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
        return (a + 0.05) / (b + 0.05)

    for back in ("page", "panel"):
        for front in ("text", "muted", "warning", "good"):
            assert contrast(front, back) >= 4.5, (front, back)
    for front in ("mark", "quiet", "limit"):
        assert contrast(front, "page") >= 3, front


def test_axes_end_at_powers_of_ten():
    from tools.inspect_plots import LogAxis

    axis = LogAxis.over([3e-4, 0.02, 0.0, float("nan")], [0.01, None])
    assert axis.ticks == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    place = axis.placed(100, 400)
    assert [place(v) for v in (1e-4, 1e-2, 1e-1, 0.0, float("nan"))] == [100, 300, 400, 100, 400]
    assert len(LogAxis(-20, 0).labels) <= 6
    assert LogAxis.over([0.0], []).ticks == [0.1, 1.0]


FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
FLAGS += " --disable-background-networking --disable-component-update --disable-sync"
THEMES = {"dark": 0, "light": 1}


def chromium(tmp_path: Path, page: Path, width: int, height: int, theme: str, *flags: str) -> str:
    """Show a page in a browser without a window; returns what it prints."""
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={THEMES[theme]}"]
    command += [f"--window-size={width},{height}", *flags, page.as_uri()]
    return subprocess.run(
        command, check=True, capture_output=True, timeout=240, encoding="utf-8"
    ).stdout


# Puts how far the page reaches, and what does and is in no box that scrolls, into its title.
MEASURE = """<script>
const wide = [...document.querySelectorAll('body *')].filter(
  e => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1);
document.title = `${document.documentElement.scrollWidth} of ${innerWidth}: `
  + wide.map(e => e.tagName + '.' + e.className).join(' ');
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to render the page")
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", ["everything", "all"])
def test_the_page_fits_its_window(name, width, page, tmp_path):
    path, _ = page(name)
    measured = tmp_path / "measured.html"
    measured.write_text(path.read_text().replace("</body>", MEASURE))
    shown = chromium(tmp_path, measured, width, 900, "light", "--dump-dom")
    assert re.search("<title>(.*?)</title>", shown)[1] == f"{width} of {width}: "


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to render the page")
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_is_drawn_in_both_themes(width, theme, page, tmp_path):
    from PIL import Image

    from tools import inspect_html

    picture = tmp_path / "page.png"
    chromium(tmp_path, page("everything")[0], width, 3000, theme, f"--screenshot={picture}")
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape[:2] == (3000, width)
    colours = getattr(inspect_html, theme.upper())
    drawn = {tuple(p) for p in pixels.reshape(-1, 3)}
    for name in ("page", "panel", "mark", "limit"):
        colour = tuple(int(colours[name][i : i + 2], 16) for i in (1, 3, 5))
        assert colour in drawn, name
    ink = (pixels != pixels[-1, 0]).any(axis=-1)
    assert 0.02 < ink.mean() < 0.6


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([], 2, "required: FILE"),
        (["{0}/absent"], 3, "absent: No such file"),
        (["{0}/text"], 3, "magic is b'hell'"),
        (["{0}/cut"], 3, "no memory layout fits"),
        (["--candidates", "tbq5", F32], 2, "did you mean .*tbq4"),
        (["--candidates", "xktq2_1", F32], 2, "types that rows can be quantised to"),
        (["--max-kl", "1", F32], 2, "--candidates to choose from"),
        (["--max-kl", "-1", "--candidates", "q8_0", F32], 2, "from 0 up"),
        (["--max-rows", "1", F32], 2, "at least 2"),
        (["--layers", "a", F32], 2, "such as 0,5-8"),
        (["--threads", "0", F32], 2, "--threads"),
        (["--memory", "kv", SAMPLES / "small.f32.gguf"], 2, "a GGUF file, need a state file"),
        (["--dialect", "nope", F32], 2, "nope"),
    ],
)
def test_bad_calls(inspect, tmp_path, args, code, words):
    (tmp_path / "text").write_text("hello, this is no dump at all")
    (tmp_path / "cut").write_bytes(F32.read_bytes()[:-5])
    got, out, err = inspect(*(str(arg).format(tmp_path) for arg in args))
    assert (got, out) == (code, "")
    assert re.search(words, err.splitlines()[-1])


def test_unknown_types_are_listed_raw(tmp_path, report):
    import state_bytes as sb

    path = tmp_path / "s.bin"
    path.write_bytes(sb.sequence(sb.kv(4, ((60, 100), (60, 100)))))
    found = report(path)
    assert all("unknown(60)" in t["undecodable"] for t in found["tensors"])
    assert all(t["statistics"] is None and t["bpw"] is None for t in found["tensors"])
    assert any("a type that can be decoded" in w for w in found["warnings"])


@pytest.mark.parametrize("type_ids", [(0, 77), (77, 77)])
def test_bits_of_unknown_types_are_not_guessed(tmp_path, report, inspect, type_ids):
    """A file says where an unknown tensor ends at most, not how many bytes of that are its own."""
    import gguf_bytes as g

    records = [g.tensor(f"t{i}", (64,), number, 256 * i) for i, number in enumerate(type_ids)]
    path = tmp_path / "model.gguf"
    path.write_bytes(g.gguf_file([], records, bytes(256 + 1408)))  # the last has room for 176 bits
    found = report(path)
    assert [t["bpw"] for t in found["tensors"]] == [32 if i == 0 else None for i in type_ids]
    assert all(t["compression"] is None for t in found["tensors"] if t["bpw"] is None)
    known = 0 in type_ids
    assert found["totals"]["bpw"] == (32 if known else None)
    assert found["totals"]["compression"] == (0.5 if known else None)
    out = " ".join(inspect(path)[1].split())
    assert f"{'32.00' if known else '-'} bits per value where the type is known" in out
    unread = type_ids.count(77)
    assert f"{unread} of 2 tensors not looked into; {unread} warning" in out


def test_help_needs_no_numba():
    code = "import sys; from tools.tbq_inspect import build_parser; build_parser().format_help(); "
    code += "sys.exit('numba' in sys.modules or 'gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parent).returncode == 0


EACH_CLASS = sorted(p.name for p in STATES_V3.glob("*.q8_0.se*.bin") if "norot" not in p.name)


@pytest.mark.parametrize("name", EACH_CLASS)
def test_every_memory_class_is_reported(report, name):
    found = report(STATES_V3 / name)["state"]
    assert found["origin"]["program"].startswith("llama.cpp")
    old = name.startswith("v9.")
    assert [loads["loads"] for loads in found["loads"]] == [old, not old, False]
    assert len(found["memories"]) == len({m["name"] for m in found["memories"]})
    names = {m["name"] for m in found["memories"]}
    assert {c["part"] for c in found["rotation"]["caches"]} <= names
    several = found["memory"] in ("iswa", "dsa", "msa")
    assert ("write the same sections" in found["layout_reason"]) == several
    assert ("only layout" in found["layout_reason"]) == (not several)


def test_the_first_screen_answers(inspect):
    code, text, _ = inspect(STATES_V3 / "deepseek32.q8_0.seq.bin")
    assert code == 0
    answer = text[: text.index("The file")].splitlines()
    assert len(answer) <= 10
    for words in ("what", "types", "size", "health", "loads in"):
        assert any(line.strip().startswith(words) for line in answer)
    head = text[: text.index("Tensors\n")].splitlines()
    assert len(head) <= 40
    for words in ("written by", "layout", "rotation", "heads", "loads in", "dialect"):
        assert any(line.strip().startswith(words) for line in head)
    joined = " ".join(" ".join(head).split())
    assert "dsa and iswa write the same" in joined
    assert "--memory or --model decides" in joined
    assert "it wants version 4" in joined


def test_the_answer_says_what_to_choose_and_how_far_it_is(inspect):
    args = ("--candidates", "q8_0,tbq3_0,tbq4_0", "--reference", TWIN)
    answer = inspect(*args, Q8_0)[1]
    answer = " ".join(answer[: answer.index("The file")].split())
    assert "choose -ctk tbq4_0 -ctv tbq4_0 pr21089: 4.06 bits per value" in answer
    assert re.search(r"error at most softmax KL \d\.\de-\d\d \(cache_k_l\d\)", answer)
    assert "no fault found in 4512 blocks; 1 warning, see below" in answer


def test_faults_are_in_the_answer(tmp_path, inspect):
    def damage(t, rows):
        if t.name == "cache_k_l0":
            rows[0, 128:130] = 0x00, 0x7C  # infinity

    path = edited(STATES / "pr21089.k_tbq4_0_v_tbq3_0.seq0.bin", tmp_path, damage)
    text = inspect(path)[1]
    assert "faults in 1 of 4 tensors; 1 warning, see below" in text
    answer = text[: text.index("The file")]
    assert "! cache_k_l0: 1 blocks have a scale that is NaN or infinite" in answer


ANYTHING = sorted([*SAMPLES.rglob("*.bin"), *SAMPLES.rglob("*.gguf")])


def too_long(text: str, width: int = 80) -> list[str]:
    """Return the lines that are too long, but for those that are one word and its indentation."""
    return [x for x in text.splitlines() if len(x) > width and len(x.split()) > 1]


@pytest.mark.parametrize("path", ANYTHING, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_lines_fit_80_columns(path, inspect):
    for args in ((), ("--candidates", "q8_0,tbq3_0,ktq2_1,amesianx:tbq4_4", "--details")):
        code, text, err = inspect(*args, path)
        assert code == 0, err
        assert not too_long(text)
    broken = re.compile(r"[a-z0-9]-$", re.M)  # a flag or a name that goes on below
    assert not broken.search(text)


def test_all_candidates_fit_80_columns(inspect):
    for args in ((), ("--details", "--reference", F32)):
        code, text, err = inspect("--candidates", "all", *args, F32)
        assert code == 0, err
        assert not too_long(text)
        assert "[" not in re.search("choose.*?loads in", text, re.S)[0]  # these are no flags


def test_a_terminal_has_its_own_width(monkeypatch):
    import os
    import shutil

    from tools import columns

    class Terminal:
        def isatty(self):
            return True

    assert columns.line_width() == 80
    for columns_there, width in ((132, 132), (40, 60)):
        size = os.terminal_size((columns_there, 24))
        monkeypatch.setattr(shutil, "get_terminal_size", lambda size=size: size)
        monkeypatch.setattr(sys, "stdout", Terminal())
        found = columns.line_width()
        monkeypatch.undo()
        assert found == width


def test_a_long_name_has_a_line_of_its_own(capsys):
    from tools.columns import table

    long = "blk.0." + "x" * 70
    table(("tensor", "type", "bits"), [(long, "q8_0", "8.50"), ("short", "f32", "32.00")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"  {long}"
    assert [line.split() for line in lines[2:]] == [["q8_0", "8.50"], ["short", "f32", "32.00"]]
    assert len({len(line) for line in (lines[0], *lines[2:])}) == 1


def test_layers_without_v_and_without_cells_have_candidates(report):
    (c,) = report("--candidates", "q8_0", STATES_V3 / "qwen4exp.f32.seq.bin")["choice"][
        "combinations"
    ]
    assert (c["k"], c["v"], c["bpw"]) == ("q8_0", "q8_0", 8.5)
    assert None in {layer["v"] for layer in c["layers"]}  # the indexer's keys
    found = report("--candidates", "q8_0", STATES_V3 / "deepseek4-i128.q8_0.seq.bin")
    assert any("no cells of its own: attention to it is not" in w for w in found["warnings"])


# --- keys and tensors ---

KEYS_SCHEMA = json.loads((HERE.parent / "tools/data/tbq-inspect-keys.schema.json").read_text())


@pytest.fixture
def listing(inspect):
    """Run tbq-inspect --json --keys --tensors; returns the keys by name, and the tensors."""

    def run(*args: object) -> tuple[dict, list]:
        code, out, err = inspect("--json", "--keys", "--tensors", *args)
        assert code == 0, err
        found = json.loads(out)
        jsonschema.validate(found, KEYS_SCHEMA)
        keys = {key["key"]: key for key in found["keys"]}
        assert len(keys) == len(found["keys"])
        return keys, found["tensors"]

    return run


@pytest.mark.parametrize("path", ANYTHING, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_sample_is_listed(path, listing, inspect):
    keys, tensors = listing(path)
    code, text, _ = inspect("--keys", "--tensors", path)
    assert code == 0
    assert not too_long(text)
    lines = text.splitlines()
    assert f"{len(keys)} keys" in lines
    assert f"{len(tensors)} tensors" in lines
    for key in keys:
        assert re.search(rf"^  \S* +{re.escape(key)} =", text, re.M)
    for t in tensors:
        assert re.search(rf"^  {re.escape(t['name'])} .* {t['type_id']} ", text, re.M)
    size = path.stat().st_size
    assert all(0 <= at <= size - t["n_bytes"] for t in tensors for at in t["offsets"][:1])


def test_keys_of_a_model_are_gguf_pys(listing):
    import gguf

    path = MODELS / "gemma3.metadata.gguf"
    theirs = gguf.GGUFReader(path).fields
    ours, _ = listing(path)
    assert list(ours)[3:] == [name for name in theirs if not name.startswith("GGUF.")]
    for name, key in ours.items():
        value = theirs[name].contents()
        if key["count"] is None:
            assert key["value"] == value
            assert key["type"] == theirs[name].types[0].name.lower()
        else:
            assert key["count"] == len(value)
            assert key["value"] == value[:6]
            assert key["type"] == f"{theirs[name].types[-1].name.lower()}[{len(value)}]"


def test_arrays_and_texts_are_short(tmp_path, listing, inspect):
    path = tmp_path / "m.gguf"
    words = [f"word{i}" for i in range(1000)]
    metadata = {"a.words": words, "a.numbers": np.arange(300), "a.text": "long " * 500}
    write_gguf(path, metadata, [])
    keys, tensors = listing(path)
    assert tensors == []
    assert keys["a.words"] == {
        "key": "a.words",
        "type": "string[1000]",
        "value": words[:6],
        "count": 1000,
    }
    assert keys["a.numbers"]["value"] == [0, 1, 2, 3, 4, 5]
    assert keys["a.text"]["value"] == "long " * 500  # a text is whole where programs read it
    text = inspect("--keys", path)[1]
    assert "a.words = ['word0', 'word1', " in text
    assert "(2500 characters)" in text
    assert len(text) < 1500
    assert "tensors" not in text.replace("tensor_count", "")


def test_fields_of_a_dump(listing):
    path = STATES / "pr21089.k_tbq4_0_v_tbq3_0.session.bin"
    keys, tensors = listing(path)
    data = path.read_bytes()
    words = np.frombuffer(data, "<u4", 3)
    assert keys["container.magic"]["value"] == hex(words[0])
    assert keys["container.version"]["value"] == words[1]
    assert keys["container.tokens"]["count"] == words[2]
    tokens = np.frombuffer(data, "<i4", 6, 12)
    assert keys["container.tokens"]["value"] == tokens.tolist()
    with open_state(path) as s:
        assert keys["memory.at_byte"]["value"] == s.container.memory_at
        cells = s.cells(0)[0]
        assert keys["kv.stream.0.cell_count"]["value"] == len(cells)
        assert keys["kv.stream.0.positions"]["value"] == cells.positions[:6].tolist()
        for t in tensors:
            mine = s.tensors[t["name"]]
            start = t["offsets"][0]
            assert data[start : start + 64] == mine.rows()[0].tobytes()[:64]
            assert (t["type"], t["type_id"]) == (mine.format.label, mine.type_id)


def test_unknown_ids_are_listed_and_named_where_they_are_known(tmp_path, inspect, listing):
    import gguf_bytes as g

    records = [g.tensor(f"t{i}", (64,), n, 256 * i) for i, n in enumerate((0, 77, 42))]
    path = tmp_path / "model.gguf"
    path.write_bytes(g.gguf_file([], records, bytes(512 + 26)))
    _, tensors = listing(path)
    assert [t["type_id"] for t in tensors] == [0, 77, 42]
    assert [t["type"] for t in tensors][:2] == ["f32", "unknown(77)"]
    text = " ".join(inspect("--tensors", path)[1].split())
    assert "type id 77: no dialect that is known has it" in text
    assert re.search(r"type id 42: .*tbq3_0 of pr21089.*--dialect says whose", text)


@pytest.mark.parametrize("flag", ["--html", "--reference", "--candidates", "--layers"])
def test_a_listing_is_nothing_else(inspect, flag):
    code, out, err = inspect("--keys", flag, "1", F32)
    assert (code, out) == (2, "")
    assert f"{flag}: got it with --keys or --tensors" in err
