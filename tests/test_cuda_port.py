"""The GPU port where there is no GPU: in the simulator, as PTX, and as clear errors."""

import importlib.util
import json
import os
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import FORMATS, HERE

import cuda_port
from tbq import BackendError
from tbq.families.trellis import Trellis

SIMULATOR = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(HERE)}
PARTS = 3  # of the cross-check, each a process
# numba-cuda, and NVIDIA's wheels with NVVM in them
HAS_COMPILER = all(importlib.util.find_spec(name) for name in ("numba_cuda", "nvidia"))

PTX_SCRIPT = r"""
import json, re
from cuda_port.signatures import Signature, all_kernels, ptx
PATTERN = r"\bfma\.\w+|\.f64\b|\.approx|\.ftz|\.local\b|(?:div|sqrt)\.[a-z.]*f32"

def shape(value):
    "Kernels of one shape are the same code but for numbers, of which the signs are kept."
    function = getattr(value, "py_func", value)
    if hasattr(function, "__code__"):
        cells = function.__closure__ or ()
        return function.__code__, tuple(shape(cell.cell_contents) for cell in cells)
    return bool(value > 0), bool(value < 0)

shapes = {}
for kernel in all_kernels():
    shapes.setdefault((shape(kernel.function), kernel.arguments), []).append(kernel)
families = set()
for same in shapes.values():
    family = type(same[0].fmt.codec).__module__
    for cc in [(9, 0)] + [(7, 5)] * (family not in families):
        text = ptx(same[-1], cc)
        found = sorted(set(re.findall(PATTERN, text)))
        right = ".target sm_%d%d" % cc in text
        labels = sorted({kernel.fmt.label for kernel in same})
        print(json.dumps([labels, same[-1].operation, found, right]))
    families.add(family)

def control(x):
    x[0] = x[1] * x[2] + x[3]
    x[4] = x[5] * 0.1

fused = ptx(Signature(None, "control", control, ("f4[1]",)), (9, 0))
print(json.dumps([["control"], "", sorted(set(re.findall(PATTERN, fused))), True]))
"""


def in_simulator(*args: str, timeout: int = 400) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", *args]
    return subprocess.run(
        command, cwd=HERE.parent, env=SIMULATOR, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize("part", range(PARTS))
def test_cross_check_in_the_simulator(tmp_path, part):
    """Every format of some families, and in one part what is no format's."""
    xml = tmp_path / "report.xml"
    options = ["-p", "no:cacheprovider", "-p", "family_parts", f"--junitxml={xml}"]
    options += [f"--part={part}", f"--parts={PARTS}"]
    ran = in_simulator("-m", "pytest", *options, "tests/test_cuda_kernels.py")
    assert ran.returncode == 0, ran.stdout[-3000:]
    suite = ElementTree.parse(xml).getroot().find("testsuite")
    assert int(suite.get("tests")) >= 70
    assert suite.get("skipped") == suite.get("failures") == suite.get("errors") == "0"


def test_check_program_in_the_simulator(tmp_path):
    out = tmp_path / "report.json"
    args = ["vtq1_1", "--rows", "1", "--rounds", "1", "--out", str(out)]
    script = "import sys; from tools import cuda_check; cuda_check.ROW = 64; "
    script += "cuda_check.CHECKED_ROWS = 1; sys.exit(cuda_check.main(sys.argv[1:]))"
    ran = in_simulator("-c", script, *args)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(out.read_text())
    assert report["schema"] == "tbq-cuda-check/1"
    (result,) = report["formats"]
    assert result["exact"]
    assert set(result["checks"]) == {"quantize", "dequantize", "weighted_sum"}
    assert all(t["gb_s"] > 0 for t in result["timings"].values())


@pytest.mark.skipif(not HAS_COMPILER, reason="no NVVM: pip install 'tbq-reference[cuda12]'")
def test_ptx_keeps_the_arithmetic():
    """Nothing fused, flushed or approximate, no spilled buffers.

    Of kernels that differ in numbers only one is compiled, for sm_90, and one of each family for
    sm_75 too.
    """
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PTX_SCRIPT],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    *rows, control = [json.loads(line) for line in ran.stdout.splitlines()]
    assert {"fma.rn", ".f64"} <= set(control[2])  # what has to be looked for is found
    from cuda_port import api

    seen = {label for labels, *_ in rows for label in labels}
    assert seen == {f.label for f in FORMATS if api.ported(f)}
    double = {f.label for f in FORMATS if isinstance(f.codec, Trellis)}  # its C code has it too
    for labels, operation, found, right_target in rows:
        assert right_target
        allowed = {"div.rn.f32", "sqrt.rn.f32"}
        if operation == "quantize" and double.issuperset(labels):
            allowed.add(".f64")
        assert set(found) <= allowed, (labels, operation, found)


def test_every_operation_says_what_is_missing():
    if cuda_port.is_available():
        pytest.skip("there is a device")
    x = np.ones((2, 64), np.float32)
    for call in (
        lambda: cuda_port.quantize(x, "vtq2_1"),
        lambda: cuda_port.dequantize(np.ones((2, 20), np.uint8), "vtq2_1"),
        lambda: cuda_port.scores(x, np.ones((2, 28), np.uint8), "ktq2_1"),
        lambda: cuda_port.weighted_sum(x, np.ones((64, 20), np.uint8), "vtq2_1"),
    ):
        with pytest.raises(BackendError, match=r"no CUDA device or driver; pip install"):
            call()


def test_without_numba_cuda(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda_port.api", None)
    monkeypatch.delattr(cuda_port, "api", raising=False)
    with pytest.raises(BackendError, match=r"cannot be imported .* pip install"):
        cuda_port.quantize(np.ones((2, 64), np.float32), "vtq2_1")
    assert not cuda_port.is_available()


def test_importing_touches_neither_numba_nor_cuda():
    script = "import sys, cuda_port; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=HERE.parent).returncode == 0


def test_check_program_without_a_device(capsys):
    if cuda_port.is_available():
        pytest.skip("there is a device")
    from tools import cuda_check

    assert cuda_check.main([]) == 4
    assert "no CUDA device or driver" in capsys.readouterr().err
    assert cuda_check.main(["--rows", "0"]) == 2
