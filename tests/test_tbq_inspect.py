"""tbq-inspect: what it says, what it warns of, its JSON schema and its page."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import HERE, MODELS, NUMBERED, SAMPLES, STATES, STATES_V3, WRONG

import tbq
from gguf_io import OutputTensor, open_state, resolve_type, write_gguf
from gguf_io.health import BlockHealth
from tbq.registry import get_dialect

SCHEMA = json.loads((HERE.parent / "tools/data/tbq-inspect.schema.json").read_text())
F32 = STATES / "pr21089.f32.seq0.bin"
Q8_0 = STATES / "pr21089.q8_0.seq0.bin"
TWIN = STATES / "pr21089.f16-same-prompt-as-q8_0.seq0.bin"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


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
    assert max(len(line) for line in text.splitlines()[1:]) <= 100


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
    for words in (
        "sequence file (GGSQ) v2, architecture gemma3, 200 tokens",
        "iswa: sections that explain the file to its last byte",
        "base      stream 0: 204 cells, positions 0 to 203, sequence 0 in 204",
        "keys hadamard: the default for tbq4_0 caches",
        "heads are the model's",
        "3.56 bits per value, 4.49 times smaller than f16",
    ):
        assert words in text
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
    assert "no rotation would explain it" in inspect("--reference", TWIN, disabled)[1].replace(
        "\n    ", " "
    )
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


def test_page(inspect, tmp_path):
    page = tmp_path / "page.html"
    args = ("--reference", F32, "--candidates", "q8_0,tbq3_0,vtq4_1", "--html", page)
    code, out, _ = inspect(*args, STATES / "pr21089.k_tbq4_0_v_tbq3_0.seq0.bin")
    assert code == 0
    assert f"wrote {page}" in out
    text = page.read_text()
    for words in (
        "Error per layer",
        "Channels: root mean square",
        "K tbq4_0, codes",
        "Size against error",
        "Cheapest types with",
    ):
        assert words in text
    assert text.count("<svg") == 4
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", text)  # self-contained
    before = page.read_bytes()
    inspect(*args, STATES / "pr21089.k_tbq4_0_v_tbq3_0.seq0.bin")
    assert page.read_bytes() == before


def test_page_of_a_file_with_nothing_to_plot(inspect, tmp_path):
    page = tmp_path / "page.html"
    assert inspect("--html", page, STATES / "pr21089.mamba-recurrent.seq0.bin")[0] == 0
    assert "<svg" not in page.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to render the page")
def test_page_renders(inspect, tmp_path):
    from matplotlib.image import imread

    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    inspect("--candidates", "q8_0,tbq3_0", "--html", page, F32)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1200,2000", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (2000, 1200)
    ink = (pixels < 0.9).any(axis=-1)
    assert 0.01 < ink.mean() < 0.5
    colours = {tuple((p * 255).round().astype(int)) for p in pixels[::2, ::2].reshape(-1, 3)}
    assert {(37, 99, 235), (217, 119, 6)} <= colours  # the two candidates' marks


def test_page_without_matplotlib(inspect, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = inspect("--html", tmp_path / "page.html", F32)
    assert code == 4
    assert "pip install 'tbq-reference[html]'" in err
    assert not list(tmp_path.iterdir())


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
    _, out, _ = inspect(path)
    assert f"{'32.00' if known else '-'} bits per value where the type is known" in out


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


def test_the_text_fits_a_screen(inspect):
    code, text, _ = inspect(STATES_V3 / "deepseek32.q8_0.seq.bin")
    assert code == 0
    head = text[: text.index("Tensors (")].splitlines()
    assert len(head) <= 26
    assert max(map(len, head)) <= 100
    for words in ("written by", "layout", "rotation", "heads", "loads in"):
        assert any(line.strip().startswith(words) for line in head)
    joined = " ".join(" ".join(head).split())
    assert "dsa and iswa write the same" in joined
    assert "memory= or model= decides" in joined
    assert "it wants version 4" in joined
