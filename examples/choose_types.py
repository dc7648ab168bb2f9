"""For whoever runs a model: which types its K and V tolerate, and what the cache takes then.

python examples/choose_types.py [MODEL [DUMP]]: by default bundled files of a small model. A dump is
what llama-server saves of a slot, or llama-cli as a prompt cache; docs/dumps.md says how.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import tbq_inspect, tbq_plan  # noqa: E402

SAMPLES = ROOT / "tests" / "samples"
MODEL = SAMPLES / "models" / "llama.metadata.gguf"
DUMP = SAMPLES / "state" / "pr21089.f16-same-prompt-as-q8_0.seq0.bin"
CANDIDATES = "q8_0,q4_0,tbq4_0,tbq3_0"
CONTEXT = "1024"


def main(model: str = str(MODEL), dump: str = str(DUMP)) -> int:
    """Measure candidates on a dump, and plan with the cheapest that pass; returns the exit code."""
    print(f"What {CANDIDATES} do to the attention of {Path(dump).name}:\n", flush=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        flags = ["--model", model, "--candidates", CANDIDATES, "--max-kl", "0.02"]
        code = tbq_inspect.main([*flags, dump])
    print(said.getvalue()[said.getvalue().find("Candidates for K") :])
    found = re.search(r"-ctk (\S+) -ctv (\S+)", said.getvalue())
    if code or not found:
        return code
    print(f"What a cache of these takes in {Path(model).name}:\n", flush=True)
    k, v = found.groups()
    code = tbq_plan.main(["-c", CONTEXT, "-ctk", k, "-ctv", v, model])
    print(f"\nEvery pair of types, the smallest first: tbq-plan -c {CONTEXT} {model}")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
