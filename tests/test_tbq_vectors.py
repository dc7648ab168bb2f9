"""tbq-vectors: deterministic sets, checks with names, the C header, and libggml through ctypes."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import FORMATS, HERE

import tbq
from tbq.vectors import ROUNDING, Case, cases, compare
from tbq.vectors.cases import case_id
from tools import tbq_vectors, vector_check
from tools.vector_files import open_set

DATA = HERE.parent / "tools" / "data"
SCHEMA = json.loads((DATA / "tbq-vectors.schema.json").read_text())
PINNED = "504913828d512427a57421ecd65742c62b31057813cd6f6414135f1d3080543f"
GCC = shutil.which("gcc")
needs_gcc = pytest.mark.skipif(GCC is None, reason="no gcc to compile the consumer with")


# One format or operation at a time, so that one that cannot make its set fails alone.
SETS = {fmt.key: ("--formats", fmt.key) for fmt in tbq.formats()} | {
    "rotation": ("--ops", "rotation"),
    "several": ("--formats", "tbq3_0,ktq2_1,llama-tq-cuda:ktq2_1,xktq2_1,vtq1_1,vtq2_2"),
}


@pytest.fixture(scope="module")
def set_of(tmp_path_factory):
    """Make a small set by its name, once."""
    made = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("vectors") / "set"
            assert tbq_vectors.main(["generate", *SETS[name], "--out", str(made[name])]) == 0
        return made[name]

    return make


@pytest.fixture
def small_set(tmp_path, vectors):
    """A set of one format that tests may damage."""
    folder = tmp_path / "set"
    assert vectors("generate", "--formats", "tbq3_0", "--out", folder)[0] == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def checked_manifest(folder: Path) -> dict:
    """Return a manifest that fits its schema and its folder."""
    manifest = json.loads((folder / "manifest.json").read_text())
    jsonschema.validate(manifest, SCHEMA)
    files = contents(folder)
    widths = [fmt.group_values for fmt in FORMATS if fmt.label in manifest["formats"]]
    assert sum(len(data) for data in files.values()) < 2500 * max(256, sum(widths))
    assert set(files) == {*manifest["files"], "manifest.json"}
    ids = [case["id"] for case in manifest["cases"]]
    assert len(set(ids)) == len(ids)
    used = {flag for case in manifest["cases"] for flag in case["flags"]}
    assert used == set(manifest["notes"])
    for case in manifest["cases"]:  # what the C header has room for
        roles = [case["output"]["role"], *case["inputs"], *case["taps"], "mask"]
        assert len(roles) <= 12
        assert max(map(len, roles)) < 32
        assert max(len(case["format"] or ""), len(case["id"]) // 3) < 64
    return manifest


@pytest.mark.parametrize("listed", tbq.formats(), ids=lambda fmt: fmt.key)
def test_manifest(listed, set_of):
    manifest = checked_manifest(set_of(listed.key))
    assert set(manifest["formats"]) == {fmt.label for fmt in listed.variants()}
    ops = {(case["format"], case["op"]) for case in manifest["cases"]}
    for fmt in listed.variants():
        assert {(fmt.label, "quantize"), (fmt.label, "dequantize")} <= ops
        assert ((fmt.label, "scores") in ops) == ("K" in fmt.side)
        assert ((fmt.label, "weighted_sum") in ops) == ("V" in fmt.side)


def test_manifest_of_rotations(set_of):
    manifest = checked_manifest(set_of("rotation"))
    assert manifest["formats"] == {}
    assert {case["op"] for case in manifest["cases"]} == {"rotation"}


def test_cases_of_all_formats_have_file_names_of_their_own():
    names = [case_id(fmt, "quantize", "normal").casefold() for fmt in FORMATS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_.@/-]+", name) for name in names)


def test_the_same_command_gives_the_same_bytes(tmp_path, vectors):
    for name in ("a", "b"):
        flags = ["--formats", "ktq2_1,vtq2_2", "--seed", "3"]
        assert vectors("generate", *flags, "--out", tmp_path / name)[0] == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    vectors("generate", "--formats", "ktq2_1,vtq2_2", "--out", tmp_path / "c")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_inputs_are_pinned():
    """They come from integers alone, so these bytes are the same on every machine."""
    import hashlib

    digest = hashlib.sha256()
    for case in cases([tbq.get_format("tbq3_0")], ["quantize"]):
        digest.update(case.inputs["x"].astype("<f4").tobytes())
    assert digest.hexdigest() == PINNED


@pytest.mark.parametrize("fmt", [f for f in FORMATS if not f.sibling], ids=lambda f: f.label)
def test_expected_outputs_are_the_specifications(fmt):
    """Not only the kernels': NumPy's plain code gives the same bytes and bits."""
    operations = ["dequantize"] if fmt.codec.searches else ["quantize", "dequantize"]
    for case in cases([fmt], operations):
        (source,) = case.inputs.values()
        rows = source.reshape(-1, source.shape[-1])
        if case.op == "quantize":
            found = fmt.codec.quantize_rows(rows)
        else:
            found = fmt.codec.dequantize_rows(rows)
        assert np.array_equal(found.reshape(case.expected.shape), case.expected, equal_nan=True)


@pytest.mark.parametrize("name", SETS)
def test_our_own_outputs_are_exact(set_of, name, vectors):
    folder = set_of(name)
    code, out, err = vectors("check", folder, folder)
    assert (code, err) == (0, "")
    assert all(line.startswith("ok   ") for line in out.splitlines())
    assert len(out.splitlines()) >= 2
    report = json.loads(vectors("check", "--json", folder, folder)[1])
    assert not report["wrong"]
    assert all(g["counts"]["exact"] == len(g["cases"]) for g in report["groups"])


def test_a_wrong_kernel_fails_with_the_bugs_name(small_set, tmp_path, vectors):
    actual = tmp_path / "actual"
    shutil.copytree(small_set, actual)
    for path in actual.rglob("*.y.f32"):
        (-np.fromfile(path, "<f4")).tofile(path)
    code, out, _ = vectors("check", small_set, actual, "--junit", tmp_path / "junit.xml")
    assert code == 1
    assert "ok   pr21089:tbq3_0 quantize: 13 exact" in out
    assert "FAIL pr21089:tbq3_0 dequantize: 4 wrong" in out
    assert "> negated: explains 100%" in out
    assert re.search(r"normal: wrong: 12 of 12 groups of 256 differ; group \d+ with NMSE 4", out)
    assert (
        "the last blocks of a row left out" in vectors("check", "--verbose", small_set, actual)[1]
    )
    report = json.loads(vectors("check", "--json", small_set, actual)[1])
    (group,) = [g for g in report["groups"] if g["counts"]["wrong"]]
    assert group["diagnoses"][0] == {"bug": "negated", "detail": "", "explained": 1.0}
    assert group["cases"][0]["worst"]["nmse"] == pytest.approx(4)
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    suites = {s.get("name"): s.get("failures") for s in root}
    assert suites["pr21089:tbq3_0 dequantize"] == "4"
    assert suites["pr21089:tbq3_0 quantize"] == "0"
    assert "negated" in root.find(".//failure").text


def test_flags_hint_at_what_no_bug_explains(small_set, tmp_path, vectors):
    actual = tmp_path / "actual"
    shutil.copytree(small_set, actual)
    path = actual / "pr21089/tbq3_0/quantize/tiny.packed.u8"
    rng = np.random.default_rng(0)
    rng.integers(0, 256, path.stat().st_size, dtype=np.uint8).tofile(path)
    out = vectors("check", small_set, actual)[1]
    assert (
        "no known bug explains it; only cases of subnormal fail: float16 or float32 subnormals"
        in out
    )


def test_rounding_is_explained_with_positions(small_set, tmp_path, vectors):
    actual = tmp_path / "actual"
    shutil.copytree(small_set, actual)
    case = next(c for c in cases([tbq.get_format("tbq3_0")], ["quantize"]) if c.mask is not None)
    path = actual / f"{case.id}.packed.u8"
    np.frombuffer((case.expected ^ (case.mask & 1)).tobytes(), np.uint8).tofile(path)
    code, out, _ = vectors("check", "--verbose", small_set, actual)
    assert code == 0
    assert re.search(r"explained by rounding: .* lie within 8 ulps of a boundary", out)


def test_rounding_names_the_values_and_their_distance():
    found = cases([tbq.get_format("ktq2_1")], ["quantize"])
    case = next(c for c in found if c.mask is not None and c.match["positions"])
    block, element = case.match["positions"][0]
    output = case.expected.copy()
    raw = output.reshape(-1, 14)
    raw[block, 2 + element // 4] ^= 1 << 2 * (element % 4)
    found = compare(case, output)
    assert found.verdict == ROUNDING
    assert re.search(rf"values .block:element. {block}:{element} \(\d\.\d ulps\) lie", found.detail)


def test_selection(set_of, small_set, vectors):
    several = set_of("several")
    out = vectors("check", "--formats", "ktq2_1", "--ops", "scores", several, several)[1]
    assert out == "ok   llama-tq:ktq2_1 scores: 1 exact\n"
    code, _, err = vectors("check", "--formats", "ktq2_1", small_set, small_set)
    assert (code, "no case of the set" in err) == (2, True)
    lines = vectors("list", "--formats", "pr21089", "--ops", "quantize")[1].splitlines()
    assert len(lines) == 52  # 13 of each of four formats
    assert lines[0].startswith("pr21089/tbq3_0/quantize/normal")
    listed = json.loads(vectors("list", "--json", small_set)[1])["cases"]
    assert len(listed) == 19


def test_full_set_has_more(tmp_path, vectors):
    assert (
        vectors("generate", "--formats", "vtq4_1", "--size", "full", "--out", tmp_path / "f")[0]
        == 0
    )
    manifest = open_set(tmp_path / "f").manifest
    widths = {f for case in manifest["cases"] for f in case["flags"] if f.startswith("head_dim")}
    assert widths == {f"head_dim_{n}" for n in (64, 80, 96, 112, 192, 256, 576)}
    assert vectors("check", tmp_path / "f", tmp_path / "f")[0] == 0


# --- what goes wrong ---


def damage(folder, what):
    manifest = folder / "manifest.json"
    victim = folder / "pr21089/tbq3_0/quantize/normal.x.f32"
    data = json.loads(manifest.read_text())
    if what == "missing":
        victim.unlink()
    elif what == "size":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif what == "content":
        victim.write_bytes(bytes([victim.read_bytes()[0] ^ 1]) + victim.read_bytes()[1:])
    elif what == "no manifest":
        manifest.unlink()
    elif what == "no JSON":
        manifest.write_text("{")
    elif what == "schema":
        data["schema"] = "tbq-vectors/9"
    elif what == "escape":
        data["files"]["../../etc/passwd"] = data["files"].pop(next(iter(data["files"])))
    elif what == "shape":
        data["cases"][0]["inputs"]["x"]["shape"] = [1 << 31, 1 << 33]
    elif what == "operation":
        data["cases"][0]["op"] = "matmul"
    elif what == "format":
        data["cases"][0]["format"] = "pr21089:tbq9_9"
    elif what == "key":
        del data["cases"][0]["match"]
    if what in ("schema", "escape", "shape", "operation", "format", "key"):
        manifest.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "normal.x.f32: the file is missing"),
        ("size", "normal.x.f32: has 12287 bytes, 12288 are expected"),
        ("content", "normal.x.f32: its SHA-256 is not the one in the manifest"),
        ("no manifest", "there is no manifest"),
        ("no JSON", "the manifest is not JSON"),
        ("schema", "schema is 'tbq-vectors/9', 'tbq-vectors/1' is supported"),
        ("escape", "leaves the folder"),
        ("shape", "size and shape differ"),
        ("operation", "unknown operation"),
        ("format", "no format is called 'pr21089:tbq9_9'"),
        ("key", "the manifest is damaged: 'match' is missing"),
    ],
)
def test_damaged_sets_are_named(small_set, vectors, what, words):
    damage(small_set, what)
    code, out, err = vectors("check", small_set, small_set)
    assert (code, out) == (3, "")
    assert re.search(words, err)


def test_random_corruption_of_a_manifest_ends_in_our_error(small_set, vectors):
    path = small_set / "manifest.json"
    good = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    for _ in range(60):
        at = int(rng.integers(len(good)))
        kept, good[at] = good[at], int(rng.integers(32, 127))
        path.write_bytes(good)
        code, _, err = vectors("check", small_set, small_set)
        assert code in (0, 1, 3), err  # 1: a case of another name has no output
        good[at] = kept


def test_missing_and_misshapen_outputs_are_named(small_set, tmp_path, vectors):
    actual = tmp_path / "actual"
    shutil.copytree(small_set, actual)
    victim = actual / "pr21089/tbq3_0/scores/normal_6.scores.f32"
    victim.write_bytes(victim.read_bytes() + b"\0")
    code, out, _ = vectors("check", small_set, actual)
    assert (code, "has 73 bytes, 72 are expected" in out) == (1, True)
    victim.unlink()
    code, out, _ = vectors("check", small_set, actual)
    assert (code, "scores.f32: the file is missing" in out) == (1, True)
    assert "FAIL pr21089:tbq3_0 scores: 1 missing" in out
    assert "ok   pr21089:tbq3_0 weighted_sum" in out  # the rest is checked all the same
    code, out, _ = vectors("check", "--json", "--junit", tmp_path / "j.xml", small_set, actual)
    (group,) = (g for g in json.loads(out)["groups"] if g["op"] == "scores")
    assert (code, group["counts"]["missing"]) == (1, 1)
    assert 'errors="1"' in (tmp_path / "j.xml").read_text()
    assert vectors("check", "--ops", "quantize,dequantize", small_set, actual)[0] == 0


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["generate"], 2, "required: --out"),
        (["generate", "--formats", "tbq5", "--out", "{0}/new"], 2, "did you mean .*tbq4"),
        (["generate", "--formats", "ggml:f16", "--out", "{0}/new"], 2, "--formats: got"),
        (["generate", "--formats", "tbq3_0,f32", "--out", "{0}/new"], 2, "--formats: got f32"),
        (["generate", "--formats", "tbq3_0,iq3_s", "--out", "{0}/new"], 2, "--formats: got iq3_s"),
        (["generate", "--ops", "matmul", "--out", "{0}/new"], 2, "--ops: got matmul"),
        (["generate", "--seed", "-1", "--out", "{0}/new"], 2, "--seed"),
        (["generate", "--out", "{0}"], 2, "a new or an empty folder"),
        (["check", "{0}/set"], 2, "one of ACTUAL_DIR and --libggml"),
        (["check", "{0}/nowhere", "{0}/set"], 3, "there is no manifest"),
        (["check", "{0}/set", "{0}/nowhere"], 3, "not a folder with outputs"),
        (["check", "{0}/set", "--libggml", "{0}/none.so"], 4, "none.so: no such file"),
        (["check", "{0}/set", "--libggml", "{0}/set/manifest.json"], 4, "cannot load"),
        ([], 2, "required: COMMAND"),
    ],
)
def test_bad_calls(small_set, tmp_path, vectors, args, code, words):
    before = contents(tmp_path)
    got, out, err = vectors(*(arg.format(tmp_path) for arg in args))
    assert (got, out) == (code, "")
    assert re.search(words, err.splitlines()[-1])
    assert contents(tmp_path) == before


def test_a_failed_generation_leaves_nothing(tmp_path, vectors, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Case, "arrays", property(fail))
    assert vectors("generate", "--formats", "tbq3_0", "--out", tmp_path / "set")[0] == 3
    assert not list(tmp_path.iterdir())


# --- C ---


def compiled(source: str, tmp_path: Path, name: str, *flags: str) -> Path:
    (tmp_path / f"{name}.c").write_text(source)
    out = tmp_path / name
    command = [GCC, "-O1", "-Wall", "-Wextra", "-Werror", *flags, "-o", out, tmp_path / f"{name}.c"]
    subprocess.run([*command, "-lm"], check=True, capture_output=True, text=True)
    return out


# vtq1_1: a scale and 32 sign bits. The bug, if compiled in, reads the bits from the other end.
VTQ1_1 = """
static float half(uint16_t h) {
    const float s = h & 0x8000 ? -1.0f : 1.0f;
    const int e = h >> 10 & 31, m = h & 1023;
    if (e == 31) return m ? NAN : s * INFINITY;
    return s * (e ? ldexpf((float) (m + 1024), e - 25) : ldexpf((float) m, -24));
}
void dequantize_row_vtq1_1(const void * p, float * y, int64_t n) {
    const float level = 0.797885f * (1.0f / sqrtf(32.0f));
    for (int64_t b = 0; b < n / 32; b++) {
        const uint8_t * q = (const uint8_t *) p + 6 * b;
        const float d = half((uint16_t) (q[0] | q[1] << 8));
        for (int j = 0; j < 32; j++) {
            const int bit = q[2 + j / 8] >> (BUG ? 7 - j % 8 : j % 8) & 1;
            y[32 * b + j] = d < 1e-30f ? 0.0f : (bit ? level : -level) * d;
        }
    }
}
"""

CONSUMER = (
    """
#include "tbq_vectors.h"
#include <inttypes.h>
"""
    + VTQ1_1
    + """
int main(int argc, char ** argv) {
    tbqv_set set;
    int wrong = 0, n = 0;
    if (tbqv_open(&set, argv[argc - 1]) != 0) { fputs(set.error, stderr); return 3; }
    for (int i = 0; i < set.n_cases; i++) {
        tbqv_case * c = &set.cases[i];
        if (strcmp(c->op, "dequantize") || strcmp(c->format, "llama-tq:vtq1_1")) continue;
        if (tbqv_load(&set, c) != 0) { fputs(set.error, stderr); return 3; }
        const tbqv_file * in = tbqv_find(c, "packed"), * out = tbqv_output(c);
        float * y = (float *) malloc(out->n_bytes);
        dequantize_row_vtq1_1(in->data, y, (int64_t) out->count);
        const tbqv_result r = tbqv_compare(c, y);
        printf("%s: %s\\n", c->id, r.text);
        wrong += r.verdict == 2;
        n++;
        free(y);
        tbqv_unload(c);
    }
    tbqv_close(&set);
    return n == 0 ? 4 : wrong > 0;
}
"""
)


@needs_gcc
@pytest.mark.parametrize("language", [["-std=c99"], ["-x", "c++", "-std=c++11"]])
@pytest.mark.parametrize("bug", [0, 1])
def test_the_header_finds_what_a_c_kernel_got_wrong(set_of, tmp_path, language, bug):
    folder = set_of("several")
    flags = [f"-I{folder}", f"-DBUG={bug}", "-Wno-unused-function", *language]
    program = compiled(CONSUMER, tmp_path, "consumer", *flags)
    ran = subprocess.run([program, folder], capture_output=True, text=True, timeout=60)
    assert ran.returncode == bug, ran.stdout + ran.stderr
    assert len(ran.stdout.splitlines()) == 4
    assert ("wrong: NMSE" in ran.stdout) == bool(bug)
    ran = subprocess.run([program, tmp_path / "nowhere"], capture_output=True, text=True)
    assert (ran.returncode, "cannot open" in ran.stderr) == (3, True)


BYTES_CONSUMER = """
#include "tbq_vectors.h"
int main(int argc, char ** argv) {
    tbqv_set set;
    int counts[3] = {0, 0, 0};
    if (argc < 2 || tbqv_open(&set, argv[1]) != 0) return 3;
    for (int i = 0; i < set.n_cases; i++) {
        tbqv_case * c = &set.cases[i];
        if (tbqv_load(&set, c) != 0) return 3;
        const tbqv_file * out = tbqv_output(c), * mask = tbqv_find(c, "mask");
        uint8_t * copy = (uint8_t *) malloc(out->n_bytes);
        memcpy(copy, out->data, out->n_bytes);
        for (size_t k = 0; mask && k < out->n_bytes; k++) copy[k] ^= ((uint8_t *) mask->data)[k];
        counts[tbqv_compare(c, copy).verdict]++;
        if (!mask && !out->is_float) {
            copy[out->n_bytes / 2] ^= 1;
            counts[tbqv_compare(c, copy).verdict]++;
        }
        free(copy);
    }
    printf("%d %d %d\\n", counts[0], counts[1], counts[2]);
    tbqv_close(&set);
    return 0;
}
"""


@needs_gcc
def test_the_header_knows_rounding_from_errors(set_of, tmp_path):
    folder = set_of("several")
    program = compiled(BYTES_CONSUMER, tmp_path, "bytes", f"-I{folder}", "-std=c99")
    out = subprocess.run([program, folder], capture_output=True, text=True, check=True).stdout
    manifest = json.loads((folder / "manifest.json").read_text())
    masked = sum(case["mask"] is not None for case in manifest["cases"])
    unmasked = sum(
        case["mask"] is None and case["output"]["dtype"] == "u8" for case in manifest["cases"]
    )
    assert out.split() == [str(len(manifest["cases"]) - masked), str(masked), str(unmasked)]


@needs_gcc
@pytest.mark.parametrize("bug", [0, 1])
def test_libggml(tmp_path, vectors, bug):
    source = "#include <math.h>\n#include <stdint.h>\n" + VTQ1_1
    library = compiled(source, tmp_path, "libggml.so", f"-DBUG={bug}", "-shared", "-fPIC")
    folder = tmp_path / "set"
    vectors("generate", "--formats", "llama-tq:vtq1_1", "--out", folder)
    code, out, err = vectors("check", folder, "--libggml", library)
    assert (code, err) == (bug, "")
    assert "not run: " in out
    assert ("bit order reversed (in each byte): explains 100%" in out) == bool(bug)
    other = tmp_path / "other"
    vectors("generate", "--formats", "tbq3_0", "--out", other)
    code, _, err = vectors("check", other, "--libggml", library)
    assert (code, "has none of the functions, such as quantize_row_tbq3_0_ref" in err) == (4, True)


def kept_bits_kernel(case, mode):
    """A right encoder whose destination shows through, or one that leaves a byte unwritten."""
    outputs = []
    for old in (0, 0xFF):
        out = case.expected.copy()
        if case.op == "quantize":
            out[..., 5] = out[..., 5] | (old & 0x80) if mode == "ored" else old
        outputs.append(out)
    return vector_check.Output(*outputs)


@pytest.mark.parametrize(("mode", "words"), [("ored", "without being cleared"), ("left", "byte 5")])
def test_outputs_that_depend_on_old_bytes_are_named(small_set, mode, words):
    """As llama-tq's vtq_mixed does, into which the last code of a block is only ORed."""
    vectors_ = open_set(small_set)
    entries = vectors_.entries(None, ["quantize", "dequantize"])
    outcome = vector_check.check(vectors_, entries, lambda case: kept_bits_kernel(case, mode))
    quantize, dequantize = outcome.groups
    assert (quantize.failed, dequantize.failed) == (True, False)
    text = "\n".join(vector_check.lines(vectors_, outcome, False))
    assert f"> {vector_check.OLD_BYTES} (byte 5 of" in text
    assert words in text


@needs_gcc
def test_the_documented_example_compiles_as_c_and_as_cpp(set_of, tmp_path):
    """It prints the id of every case."""
    folder = set_of("several")
    text = (HERE.parent / "docs" / "vectors.md").read_text(encoding="utf-8")
    example = text.split("```c\n")[1].split("```")[0]
    kernel = "static void my_kernel(const void * in, float * y, size_t n) {"
    kernel += " memset(y, 0, 4 * n); (void) in; }\n"
    source = example.replace("int main", kernel + "int main").replace('"vectors"', f'"{folder}"')
    for language in (["-std=c99"], ["-x", "c++", "-std=c++11"]):
        flags = [f"-I{folder}", "-Wno-unused-function", *language]
        program = compiled(source, tmp_path, "example", *flags)
        out = subprocess.run([program], capture_output=True, text=True, timeout=60).stdout
        lines = out.splitlines()
        assert len(lines) == 4
        assert all(line.startswith("llama-tq/ktq2_1/dequantize/") for line in lines)


def test_a_library_is_of_one_dialect(set_of, vectors, tmp_path):
    code, _, err = vectors("check", set_of("several"), "--libggml", tmp_path / "x.so")
    assert (code, "a library is of one dialect" in err) == (4, True)
