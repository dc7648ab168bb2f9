"""For whoever writes a kernel: vectors, a kernel that is wrong, and the name of its bug.

python examples/verify_a_kernel.py [c|python]: wrong_kernel.c, or where no C compiler is, the same
in Python.
"""

import csv
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import tbq_vectors  # noqa: E402


def run_c(vectors: Path, actual: Path) -> None:
    """Compile the kernel in C with tbq_vectors.h, and have it write its outputs."""
    program = actual / "kernel"
    source = ROOT / "examples" / "wrong_kernel.c"
    subprocess.run(
        ["cc", "-O2", "-std=gnu99", "-I", vectors, source, "-o", program, "-lm"], check=True
    )
    subprocess.run([program, vectors, actual])


def run_python(vectors: Path, actual: Path) -> None:
    """Write the outputs of a decoder in NumPy, whose bug is that of wrong_kernel.c."""
    with (vectors / "cases.tsv").open() as file:
        rows = list(csv.reader(file, delimiter="\t"))
    outputs = {case: path for case, _, _, role, path, *_ in rows if role == "out:y"}
    for case, _, _, role, path, *_ in rows:
        if role == "in:packed":
            blocks = np.fromfile(vectors / path, np.dtype([("d", "<f2"), ("qs", "u1", 16)]))
            codes = np.stack([blocks["qs"] & 15, blocks["qs"] >> 4], axis=-1)  # wrong: axis=-2
            y = blocks["d"][:, None].astype("<f4") * (codes.reshape(-1, 32).astype("<f4") - 8)
            (actual / outputs[case]).parent.mkdir(parents=True, exist_ok=True)
            y.astype("<f4").tofile(actual / outputs[case])


def main(kernel: str = "c" if shutil.which("cc") else "python") -> int:
    """Generate, run, check; returns 0 if the bug was found."""
    with tempfile.TemporaryDirectory() as scratch:
        vectors, actual = (Path(scratch) / name for name in ("vectors", "actual"))
        chosen = ["--formats", "q4_0", "--ops", "dequantize"]
        tbq_vectors.main(["generate", *chosen, "--out", str(vectors)])
        actual.mkdir()
        {"c": run_c, "python": run_python}[kernel](vectors, actual)
        return 0 if tbq_vectors.main(["check", str(vectors), str(actual)]) == 1 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
