"""Vectors, comparison and diagnosis of formats that are like no registered one."""

import json

import jsonschema
import numpy as np
import pytest
import strangers
from conftest import HERE
from scipy.linalg import hadamard
from strangers import FORMATS

import tbq
from tbq.vectors import EXACT, OPERATIONS, ROUNDING, WRONG, cases, compare, diagnose, quantize_case
from tbq.vectors.cases import case_id
from tbq.vectors.inputs import Input

SCHEMA = json.loads((HERE.parent / "tools" / "data" / "tbq-vectors.schema.json").read_text())
GROUPED, WIDE, RESIDUAL, HEADED = FORMATS
every = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def registered():
    strangers.register()
    yield
    strangers.unregister()


def run(case, fmt):
    """Return what the codec itself makes of a case."""
    given = case.inputs
    return {
        "quantize": lambda: tbq.quantize(given["x"], fmt),
        "dequantize": lambda: tbq.dequantize(given["packed"], fmt),
        "scores": lambda: tbq.scores(given["q"], given["packed"], fmt),
        "weighted_sum": lambda: tbq.weighted_sum(given["p"], given["packed"], fmt),
    }[case.op]()


@every
def test_the_codec_passes_its_own_cases(fmt):
    found = list(cases([fmt]))
    assert {case.op for case in found} == set(OPERATIONS)
    for case in found:
        if case.format is not None:
            assert compare(case, run(case, fmt)).verdict == EXACT, case.id


@every
def test_float64_passes_and_only_by_rounding(fmt):
    """Values that are close to the expected ones, for attention by way of decoded rows."""
    for case in cases([fmt], OPERATIONS[1:4]):
        y = tbq.dequantize(case.inputs["packed"], fmt, original=case.op == "scores")
        y = y.astype(np.float64)
        if case.op == "scores":
            y = case.inputs["q"] @ y.T
        elif case.op == "weighted_sum":
            y = case.inputs["p"] @ y
        assert compare(case, y.astype(np.float32)).verdict in (EXACT, ROUNDING), case.id


def test_names_are_paths():
    names = [case_id(fmt, "quantize", "normal").split("/")[1] for fmt in FORMATS]
    assert names == ["grouped.head_dim-other", "grouped.head_dim-256", "residual", "headed"]


def test_a_set_on_disk(tmp_path, vectors):
    folder = tmp_path / "set"
    assert vectors("generate", "--formats", "strangers", "--out", folder)[0] == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    jsonschema.validate(manifest, SCHEMA)
    assert list(manifest["formats"]) == [fmt.label for fmt in FORMATS]
    wide, headed = (manifest["formats"][fmt.label] for fmt in (WIDE, HEADED))
    assert (wide["choice"], wide["group_values"], wide["block_values"]) == ("head_dim=256", 256, 32)
    assert headed["row_header"][1] == {"name": "version", "offset": 2, "type": "<u2", "count": 1}
    assert headed["block_index"] == "cell"
    code, out, _ = vectors("check", folder, folder)
    assert code == 0
    assert all(line.startswith("ok   strangers:") for line in out.splitlines())
    listed = vectors("check", "--formats", "strangers:grouped", folder, folder)[1].splitlines()
    assert len(listed) == 8
    code, _, err = vectors("check", folder, "--libggml", __file__)
    assert (code, "cannot load" in err) == (4, True)


def test_taps_of_several_kinds_and_scales():
    case = next(cases([RESIDUAL], ["quantize"]))
    assert list(case.taps) == [
        "norm",
        "coordinates",
        "coordinates_residual_signs",
        "codes",
        "codes_residual_signs",
        "scale",
        "scale_rest",
    ]
    blocks = case.expected.view(RESIDUAL.block)
    for field, tap in (("d", "scale"), ("rest", "scale_rest")):
        assert np.array_equal(case.taps[tap].astype(np.float16), blocks[field].reshape(-1))


def test_a_value_on_a_boundary_frees_every_scale_of_its_group():
    def on_an_edge(fmt, bits):
        x = np.zeros((2, 128), np.float32)
        x[0] = 1 + np.linspace(-1e-4, 1e-4, 128, dtype=np.float32)
        x[1, 0] = 1
        return x

    case = quantize_case(GROUPED, Input("edge", (), "", on_an_edge), 0)
    mask = case.mask.reshape(2, 4, 14)
    assert (mask[0, :, :2] == 0xFF).all()  # the scale that each of four blocks repeats
    assert not (mask[1, :, :2] == 0xFF).any()
    free = np.array(case.match["positions"])
    assert set(free[:, 0]) == {0, 1, 2, 3}
    for block, element in free:
        assert mask[0, block, 2 + element // 4] >> 2 * (element % 4) & 3 == 3
        assert mask[0, block, 10 + element // 8] >> element % 8 & 1
    moved = case.expected.copy().reshape(2, 4, 14)
    moved[0, 3, 0] ^= 1  # another scale in one of them
    moved[0, free[0, 0], 10 + free[0, 1] // 8] ^= 1 << free[0, 1] % 8
    assert compare(case, moved).verdict == ROUNDING
    moved[1, 0, 2] ^= 1
    assert compare(case, moved).verdict == WRONG


def test_a_value_on_a_boundary_of_any_kind_frees_its_codes_of_all_kinds():
    def near(fmt, bits):
        """Coordinates of norm 8: the first on an edge, the second a level, so nothing is left."""
        u = 0.6 + 0.01 * np.arange(64)
        u[:2] = 0.975, 0.45
        rest = 64 - (u[:2] ** 2).sum()
        u[2:] *= np.sqrt(rest / (u[2:] ** 2).sum())
        return (u @ hadamard(64) / 8).astype(np.float32)[None]

    case = quantize_case(RESIDUAL, Input("near", (), "", near), 0)
    assert case.match["positions"] == [[0, 0], [0, 1]]
    mask = case.mask.view(RESIDUAL.block)[0]
    assert mask["qs"][0].tolist() == [0b1111, *[0] * 15]
    assert mask["rs"][0].tolist() == [0b11, *[0] * 7]
    assert mask["d"].tobytes() == mask["rest"].tobytes() == b"\xff\xff"
    actual = case.expected.copy()
    actual.view(RESIDUAL.block)["rs"][..., 0] ^= 1
    found = compare(case, actual)
    assert found.verdict == ROUNDING
    assert found.detail.startswith("values (block:element) 0:0 (")


def test_padding_that_nobody_writes_is_not_compared():
    for case in cases([RESIDUAL], ["quantize"]):
        actual = case.expected.copy()
        actual.view(RESIDUAL.block)["no"] = 0xAB
        assert compare(case, actual).verdict == EXACT
        assert (case.mask.view(RESIDUAL.block)["no"] == 0xFF).all()
        assert not case.expected.view(RESIDUAL.block)["no"].any()
        actual.view(RESIDUAL.block)["rs"][..., 0] ^= 1
        assert compare(case, actual).verdict != EXACT


def test_headers_of_rows_are_compared():
    case = next(cases([HEADED], ["quantize"]))
    actual = case.expected.copy()
    actual[2, 2] ^= 1
    found = compare(case, actual)
    assert found.verdict == WRONG
    assert found.detail == "the headers of 1 rows differ, the first of row 2"
    assert found.bad_groups.tolist() == [6]


# --- bugs, written by hand ---


def bytes_of(case):
    return case.expected if case.op == "quantize" else case.inputs["packed"]


def misread(change):
    """Return a kernel that writes changed blocks, or decodes them."""

    def kernel(case, fmt):
        head = fmt.layout.header_bytes
        packed = bytes_of(case).copy()
        rows = packed.reshape(-1, packed.shape[-1])
        raw = rows[:, head:].reshape(-1, fmt.block_bytes).copy()
        rows[:, head:] = change(raw, case.op == "quantize").reshape(len(rows), -1)
        if case.op == "quantize":
            return packed
        case = type(case)(**{**vars(case), "inputs": case.inputs | {"packed": packed}})
        return run(case, fmt)

    return kernel


def at(start, stop, change):
    def edit(raw, writes):
        raw[:, start:stop] = change(raw[:, start:stop])
        return raw

    return misread(edit)


def exchanged(raw, writes):
    """norm, high, low instead of norm, low, high."""
    if writes:
        return np.concatenate([raw[:, :2], raw[:, 10:], raw[:, 2:10]], axis=1)
    return np.concatenate([raw[:, :2], raw[:, 6:], raw[:, 2:6]], axis=1)


def halved_rest(raw, writes):
    rest = raw[:, 16:18].copy().view(np.float16)
    raw[:, 16:18] = (rest * np.float16(0.5)).view(np.uint8)
    return raw


def codes_up(raw, writes):
    codes = np.unpackbits(raw[:, :16], axis=1, bitorder="little").reshape(len(raw), 64, 2)
    up = np.minimum(codes[..., 0] + 2 * codes[..., 1] + 1, 3)
    bits = np.stack([up & 1, up >> 1], axis=-1).reshape(len(raw), 128)
    raw[:, :16] = np.packbits(bits, axis=1, bitorder="little")
    return raw


def unrotated(case, fmt):
    if case.op == "quantize":
        return tbq.quantize(tbq.rotation("hadamard", 64).forward(case.inputs["x"]), fmt)
    y = fmt.codec.levels(fmt.codec.blocks(bytes_of(case)).reshape(-1))
    return y.reshape(case.expected.shape)


def scores_without_rotation(case, fmt):
    y = tbq.dequantize(case.inputs["packed"], fmt)
    return case.inputs["q"] @ y.T


def signs_of_the_tensor(case, fmt):
    """Row numbers taken for block numbers."""
    x = case.inputs["x"]
    if x.size == x.shape[-1]:
        return case.expected
    blocks = tbq.quantize(x.reshape(-1, 32), fmt)[:, 4:]
    rows = case.expected.copy()
    rows.reshape(-1, rows.shape[-1])[:, 4:] = blocks.reshape(-1, rows.shape[-1] - 4)
    return rows


def reverse(raw):
    return np.packbits(np.unpackbits(raw, axis=1), axis=1, bitorder="little")


BUGS = [
    (GROUPED, "quantize", at(10, 14, reverse), "bit order reversed", "in each byte of high"),
    (GROUPED, "dequantize", at(10, 14, reverse), "bit order reversed", "in each byte of high"),
    (GROUPED, "scores", at(2, 14, reverse), "bit order reversed", "in each byte"),
    (WIDE, "quantize", misread(exchanged), "fields in another order", "low and high exchanged"),
    (WIDE, "dequantize", misread(exchanged), "fields in another order", "low and high exchanged"),
    (GROUPED, "scores", scores_without_rotation, "not rotated", ""),
    (RESIDUAL, "quantize", unrotated, "not rotated", ""),
    (RESIDUAL, "dequantize", unrotated, "not rotated", ""),
    (RESIDUAL, "quantize", misread(halved_rest), "scaled by a constant", "by 0.5"),
    (RESIDUAL, "dequantize", misread(codes_up), "codes off by one", "+1, clamped of codes"),
    (RESIDUAL, "quantize", misread(codes_up), "codes off by one", "+1, clamped of codes"),
    (RESIDUAL, "dequantize", lambda c, f: -c.expected, "negated", ""),
    (HEADED, "quantize", signs_of_the_tensor, "another block index", "flat"),
    (HEADED, "weighted_sum", at(6, 10, reverse), "bit order reversed", "in each byte"),
]


@pytest.mark.parametrize(("fmt", "op", "kernel", "bug", "detail"), BUGS)
def test_bugs_are_named(fmt, op, kernel, bug, detail):
    found = [compare(case, kernel(case, fmt)) for case in cases([fmt], [op])]
    assert any(c.verdict == WRONG for c in found)
    first = diagnose(found)[0]
    assert (first.bug, first.detail) == (bug, detail), diagnose(found)
    assert first.explained > 0.8


def test_one_choice_taken_for_the_other():
    found = list(cases([WIDE], ["quantize"]))
    outputs = [tbq.quantize(case.inputs["x"], GROUPED) for case in found]
    first = diagnose([compare(c, x) for c, x in zip(found, outputs, strict=True)])[0]
    assert first.bug == "as another dialect does it"
    assert first.detail == GROUPED.label
