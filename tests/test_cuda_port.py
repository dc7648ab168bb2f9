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

COMPILE_SCRIPT = r"""
import json, re, sys, tempfile
from pathlib import Path
from cuda_port import sass
from cuda_port.port import Kernel
from cuda_port.signatures import all_kernels, ptx
PATTERN = r"\bfma\.\w+|\.f64\b|\.approx|\.ftz|\.local\b|(?:div|sqrt)\.[a-z.]*f32"
everything = sys.argv[1] == "all"

def judged(kernel, cc):
    text = ptx(kernel, cc)
    found = {"found": sorted(set(re.findall(PATTERN, text))), "target": "sm_%d%d" % cc in text}
    found["bytes"] = bool(re.search(r"(?:ld|st)\.global\.(?:nc\.)?[bsu]8", text))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        if sass.program("ptxas"):
            taken = sass.assemble(text, cc, cubin)
            found |= vars(taken)
            listing = sass.instructions(cubin)
            found["fused"] = sass.fused_beyond_division(listing) if listing else 0
    return found

seen, kinds = set(), set()
for fmt, operation, kernel in all_kernels():
    codec = fmt.codec
    kind = type(codec), codec.group_values, operation
    new = kind not in kinds and not operation.endswith("of 4") and operation != "gather"
    if kernel.function in seen or not (everything or new and fmt.label in sys.argv[2:]):
        continue
    seen.add(kernel.function)
    kinds.add(kind)
    for cc in [(9, 0)] + [(7, 5)] * everything:
        print(json.dumps([fmt.label, operation, kernel.threads, judged(kernel, cc)]), flush=True)

def control(x):
    x[0] = x[1] * x[2] + x[3]
    x[4] = x[5] * 0.1

print(json.dumps(["control", "", 1, judged(Kernel(control, 1, 1, ("f4[1]",)), (9, 0))]))
"""
# One of each way that kernels are made; TBQ_FULL=1 compiles all, for two architectures.
COMPILED = (
    "llama-tq:ktq2_1",
    "llama-tq:vtq2_1",
    "buun:turbo3",
    "pr21089:tbq3_0",
    "llama-tq:vtq2_2",
)
COMPILED += ("amesianx:tbqp3_0[head_dim=512]", "buun:turbo1_tcq[side=K]")
FULL = os.environ.get("TBQ_FULL") == "1"


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
    args = ["vtq1_1", "q4_0", "--simulate", "--out", str(out)]
    ran = in_simulator("-m", "tools.cuda_check", *args)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(out.read_text())
    assert report["schema"] == "tbq-cuda-check/2"
    assert report["finished"]
    results = {result["format"]: result for result in report["formats"]}
    assert set(results) == {"llama-tq:vtq1_1", "q4_0"}
    for result in results.values():
        assert result["exact"]
        assert {"quantize normal", "dequantize vectors", "weighted_sum"} <= set(result["checks"])
        assert all(t["gb_s"] > 0 for t in result["timings"].values())
    assert "scores" in results["q4_0"]["checks"]


def test_a_format_that_fails_is_reported_and_the_others_go_on(tmp_path):
    """A process that ends without an answer costs its format only."""
    out = tmp_path / "report.json"
    script = "import sys; from tools import cuda_check as c; "
    script += "c.TRIAL = (*c.TRIAL[:3], '-c', BROKEN); "
    script += "sys.exit(c.main(sys.argv[1:]))"
    broken = "import sys; from tools import cuda_trial as t; own = t.trial; "
    broken += "t.trial = lambda r: sys.exit(7) if 'vtq' in r['format'] else own(r); t.main()"
    args = ["vtq1_1", "q4_0", "--simulate", "--workers", "1", "--out", str(out)]
    ran = in_simulator("-c", script.replace("BROKEN", repr(broken)), *args)
    assert ran.returncode == 1, ran.stderr
    results = {result["format"]: result for result in json.loads(out.read_text())["formats"]}
    assert "SystemExit" in results["llama-tq:vtq1_1"]["error"]
    assert results["q4_0"]["exact"]


@pytest.fixture(scope="module")
def compiled():
    """What the compiler and the assembler make of kernels: (format, operation, threads, found)."""
    if not HAS_COMPILER:
        pytest.skip("no NVVM: pip install 'tbq-reference[cuda12]'")
    script = [sys.executable, "-W", "ignore", "-c", COMPILE_SCRIPT, "all" if FULL else "some"]
    ran = subprocess.run(
        [*script, *COMPILED], cwd=HERE.parent, capture_output=True, text=True, timeout=7200
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert {label for label, *_ in rows} >= set(COMPILED)
    return rows


def test_ptx_keeps_the_arithmetic(compiled):
    """Nothing fused, flushed or approximate; doubles where the C code has them."""
    *rows, control = compiled
    assert {"fma.rn", ".f64"} <= set(control[3]["found"])  # what has to be looked for is found
    double = {f.label for f in FORMATS if isinstance(f.codec, Trellis)}
    for label, operation, _, found in rows:
        allowed = {"div.rn.f32", "sqrt.rn.f32"}
        if operation == "quantize" and label in double:
            allowed.add(".f64")
        assert set(found["found"]) <= allowed, (label, operation, found)
        assert found["target"]


def test_kernels_stay_in_registers(compiled):
    """No local memory, nothing spilled, few enough registers for a block of threads to run."""
    *rows, control = compiled
    if "registers" not in control[3]:
        pytest.skip("no ptxas: pip install 'tbq-reference[cuda12]'")
    for label, operation, threads, found in rows:
        assert found["stack"] == found["spilled"] == 0, (label, operation, found)
        assert 0 < found["registers"] * threads <= 65536, (label, operation, found)
        assert found["shared"] <= 48 << 10
        assert found["fused"] == 0, (label, operation, found)


def test_packed_rows_are_read_and_written_in_words(compiled):
    for label, operation, _, found in compiled[:-1]:
        assert not found["bytes"], (label, operation)


def test_the_table_is_current():
    from tools import cuda_table

    text = cuda_table.DOCUMENT.read_text(encoding="utf-8")
    assert cuda_table.START + cuda_table.table() + cuda_table.END in text


def test_listings_are_read():
    """As nvdisasm prints them: blocks end at labels and branches, and say whether they repeat."""
    from cuda_port import sass

    listing = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   FMUL R2, R2, R3 ;
        /*0020*/              @!P0 FADD R2, R2, R3 ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   MUFU.RCP R4, R5 ;
        /*0050*/                   FFMA R4, R4, R5, R6 ;
        /*0060*/                   NOP;
"""
    found = sass.blocks(listing)
    assert [block.opcodes for block in found] == [
        ("LDC",),
        ("FMUL", "FADD", "BRA"),
        ("MUFU", "FFMA"),
    ]
    assert [block.loops for block in found] == [False, True, False]
    assert sass.hottest(found) is found[1]
    assert sass.fused_beyond_division(found) == 0
    assert sass.fused_beyond_division([sass.Block(("FFMA",), False)]) == 1


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
    assert cuda_check.main(["--minutes", "-1"]) == 2
