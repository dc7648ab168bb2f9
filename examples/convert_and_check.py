"""For whoever converts files: a model and a dump, quantised, verified, and brought back.

python examples/convert_and_check.py
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gguf_io  # noqa: E402
from tools import tbq_quantize  # noqa: E402

SAMPLES = ROOT / "tests" / "samples"
MODEL = SAMPLES / "small.f32.gguf"
DUMP = SAMPLES / "state" / "pr21089.f16.seq0.bin"


def compare(before: Mapping, after: Mapping) -> None:
    """Print the error of each tensor of two open files."""
    for name, tensor in before.items():
        x, y = np.asarray(tensor), np.asarray(after[name])
        error = ((x - y) ** 2).sum() / (x**2).sum()
        print(f"{name:<28} {after[name].format.name} relative MSE {error:.5f}")


def main() -> int:
    """Convert there and back; returns the exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        model, back, dump = (str(Path(scratch) / name) for name in ("t.gguf", "f.gguf", "t.bin"))
        runs = {
            "A model to tbq3_0": ["--pure", "--verify", str(MODEL), model, "tbq3_0"],
            "and back to f32": [model, back, "f32"],
            "K and V of a dump": [
                *("--type-k", "tbq4_0", "--type-v", "tbq3_0", "--head-dim", "128", "--verify"),
                *(str(DUMP), dump),
            ],
        }
        worst = 0
        for title, run in runs.items():
            print(f"\n{title}: tbq-quantize {' '.join(run)}\n", flush=True)
            worst = max(worst, tbq_quantize.main(run))
        print("\nThe same errors, by the library\n")
        with gguf_io.open_gguf(MODEL) as a, gguf_io.open_gguf(back) as b:
            compare(a.tensors, b.tensors)
        with gguf_io.open_state(DUMP) as a, gguf_io.open_state(dump) as b:
            compare(a.tensors, b.tensors)
        return worst


if __name__ == "__main__":
    sys.exit(main())
