"""`python -m tbq`: which version this is, what it knows and what to run."""

from collections import Counter

import tbq

PROGRAMS = {
    "tbq-quantize": "convert a model or a dump of a KV cache",
    "tbq-inspect": "explain one, and compare types on it",
    "tbq-plan": "what a model's KV cache takes",
    "tbq-eval": "what a type of cache costs a model",
    "tbq-vectors": "golden vectors for whoever writes a kernel",
    "tbq-bench": "measure this machine",
    "tbq-cuda-check": "whether the GPU port is exact here",
}


def main() -> None:
    """Print a few lines."""
    own = Counter(fmt.dialect for fmt in tbq.formats())
    print(f"tbq {tbq.__version__}: {own.total()} formats of {len(own)} dialects")
    for dialect, n in own.items():
        print(f"  {dialect:16} {n}")
    print("programs (--help says more; from a checkout: python -m tools.tbq_quantize ...):")
    for name, does in PROGRAMS.items():
        print(f"  {name:16} {does}")


if __name__ == "__main__":
    main()
