"""The examples run as they stand, on bundled files, and find what they say."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = {
    "verify_a_kernel": [
        "FAIL q4_0 dequantize: 4 wrong",
        "> codes paired as neighbours: explains 100%",
    ],
    "choose_types": [
        "Cheapest types with",
        "-ctk tbq3_0 -ctv tbq4_0",
        "in all 0.67 MiB",
    ],
    "convert_and_check": ["cache_v_l0", "tbq4_0 relative MSE 0.01", "f32 relative MSE 0.03"],
}


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_example(name, tmp_path):
    if name == "verify_a_kernel" and not shutil.which("cc"):
        pytest.skip("no C compiler")
    command = [sys.executable, EXAMPLES / f"{name}.py"]
    check(command, SAYS[name], tmp_path)


def test_the_kernel_in_python_has_the_same_bug(tmp_path):
    command = [sys.executable, EXAMPLES / "verify_a_kernel.py", "python"]
    check(command, SAYS["verify_a_kernel"], tmp_path)


def check(command, said, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for words in said:
        assert words in done.stdout, done.stdout
    assert not any(folder.iterdir())
