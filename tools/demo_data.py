"""Make `data/demo.gguf`, the small file that `make demo` quantises.

Synthetic keys and values with the traits that make caches hard: keys with a few channels far above
the rest, values with heavy tails. Run `python -m tools.demo_data` to write it again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

DEMO_FILE = Path(__file__).with_name("data") / "demo.gguf"
CELLS, WIDTH = 64, 512


def demo_tensors() -> dict[str, np.ndarray]:
    """Return the demo's tensors, float16 (CELLS, WIDTH)."""
    rng = np.random.default_rng(21089)
    channel = np.ones(WIDTH)
    channel[rng.choice(WIDTH, 12, replace=False)] = 12.0
    arrays = {
        "cache_k.weight": rng.standard_normal((CELLS, WIDTH)) * channel,
        "cache_v.weight": rng.laplace(size=(CELLS, WIDTH)),
        "gauss.weight": rng.standard_normal((CELLS, WIDTH)),
    }
    return {name: x.astype(np.float16) for name, x in arrays.items()}


def main() -> None:
    """Write the file."""
    from gguf_io import OutputTensor, write_gguf

    DEMO_FILE.parent.mkdir(exist_ok=True)
    tensors = [OutputTensor.from_array(name, x) for name, x in demo_tensors().items()]
    write_gguf(DEMO_FILE, {"general.architecture": "demo", "general.name": "tbq demo"}, tensors)


if __name__ == "__main__":
    main()
