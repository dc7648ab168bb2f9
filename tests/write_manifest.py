"""Write manifest.json again after data came or went: `python tests/write_manifest.py WHAT`.

WHAT says where the files that are not in it yet come from. Run from anywhere; sizes and hashes of
files that are in it already are not renewed, because data does not change.
"""

import hashlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
MANIFEST = HERE / "manifest.json"


def main(what: str) -> None:
    """Add files that are there, drop those that are not."""
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    known = manifest["files"]
    paths = [p for folder in ("vectors", "samples") for p in (HERE / folder).rglob("*.*")]
    files = {}
    for path in sorted(p for p in paths if p.is_file()):
        name, data = path.relative_to(HERE).as_posix(), path.read_bytes()
        new = {"what": what, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        files[name] = known.get(name, new)
    order = [name for name in known if name in files]
    order += [name for name in files if name not in known]
    manifest["files"] = {name: files[name] for name in order}
    MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
