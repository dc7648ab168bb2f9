"""Golden vectors of backward passes: against derivatives in float64, and through the programs."""

import json

import jsonschema
import numpy as np
import pytest
from conftest import HERE

from tbq.vectors import EXACT, ROUNDING, WRONG, cases, compare, diagnose
from tbq.vectors.backward import BACKWARD, exp, sigmoid

SCHEMA = json.loads((HERE.parent / "tools/data/tbq-vectors.schema.json").read_text())
OPS = tuple(BACKWARD)


def forward(op, x):
    s = 1 / (1 + np.exp(-x))
    return s if op == "sigmoid_back" else x * s


def found(op):
    return list(cases([], [op]))


@pytest.mark.parametrize("op", OPS)
def test_the_derivative(op):
    for case in found(op):
        x, dy = (case.inputs[role].astype(np.float64) for role in ("x", "dy"))
        step = 1e-5
        slope = (forward(op, x + step) - forward(op, x - step)) / (2 * step)
        assert np.allclose(case.expected, dy * slope, rtol=1e-5, atol=1e-7), case.id
        assert case.expected.dtype == np.float32
        assert np.isfinite(case.expected).all()


def test_the_order_of_operations():
    one = np.float32(1)
    for x, dy in ((0.7, 1.3), (-2.5, 0.1), (11.0, -3.0)):
        x, dy = np.float32(x), np.float32(dy)
        s = one / (one + exp(-x[None])[0])
        half = s * (one - s)
        assert BACKWARD["sigmoid_back"](x[None], dy[None])[0] == dy * half
        expected = (dy * s) * (one + x * (one - s))
        assert BACKWARD["silu_back"](x[None], dy[None])[0] == expected


def test_saturated_values():
    x = np.array([100, -100, 89, -89, 0], np.float32)
    assert sigmoid(x).tolist()[:2] == [1, 0]
    one = np.ones(5, np.float32)
    assert BACKWARD["sigmoid_back"](x, one).tolist() == [0, 0, 0, 0, 0.25]
    assert BACKWARD["silu_back"](x, one).tolist() == [1, 0, 1, 0, 0.5]


def test_exp_is_rounded_once():
    x = np.linspace(-20, 20, 999, dtype=np.float32)
    assert np.array_equal(exp(x), np.exp(x.astype(np.longdouble)).astype(np.float32))


@pytest.mark.parametrize("op", OPS)
def test_right_and_wrong_kernels(op):
    for case in found(op):
        assert compare(case, case.expected).verdict == EXACT
        nearly = np.nextafter(case.expected, np.float32(2))
        assert compare(case, nearly).verdict in (EXACT, ROUNDING)
        assert compare(case, case.inputs["dy"]).verdict == WRONG
        halves = case.expected.astype(np.float16).astype(np.float32)
        assert compare(case, halves).verdict == WRONG
    wrong = [compare(case, -case.expected) for case in found(op)]
    assert diagnose(wrong)[0].bug == "negated"


def test_a_set_on_disk(vectors, tmp_path):
    folder = tmp_path / "set"
    assert vectors("generate", "--ops", ",".join(OPS), "--out", folder)[0] == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    jsonschema.validate(manifest, SCHEMA)
    assert {case["op"] for case in manifest["cases"]} == set(OPS)
    assert all(case["format"] is case["rotation"] is None for case in manifest["cases"])
    assert vectors("check", folder, folder)[0] == 0
    path = folder / manifest["cases"][0]["output"]["path"]
    actual = tmp_path / "actual"
    for case in manifest["cases"]:
        target = actual / case["output"]["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / case["output"]["path"]).read_bytes())
    (actual / path.relative_to(folder)).write_bytes(bytes(path.stat().st_size))
    code, out, _ = vectors("check", folder, actual)
    assert code == 1
    assert "graph" in out
