"""Run the tests under every Python that is here, and with the oldest packages.

`make test-versions`; SUBSET="tests/test_errors.py ..." names files. Virtual environments are kept
in .versions, one per Python, and one with the oldest packages that pyproject.toml allows.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENVS = Path(os.environ.get("VENVS", ROOT / ".versions"))
MINORS = range(10, 15)


def interpreters():
    """Return the command of each Python: on the path, or pyenv's."""
    found = {}
    for minor in MINORS:
        version = f"3.{minor}"
        kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        for command in (f"python{version}", *map(str, reversed(kept))):
            try:
                done = subprocess.run([command, "-V"], capture_output=True, text=True)
            except OSError:
                continue
            if done.returncode == 0:
                found[version] = command
                break
    return found


def oldest():
    """Return the packages of pyproject.toml, each at the lowest version that it allows."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)[1]
    return [need.replace(">=", "==") + ".*" for need in re.findall(r'"(.*?)"', listed)]


def run(name, command, pins, subset):
    """Run the tests in a virtual environment, made if it is not there; return a line about it."""
    python = VENVS / name / "bin" / "python"
    if not python.exists():
        subprocess.run([command, "-m", "venv", VENVS / name], check=True)
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    installed = subprocess.run([*pip, "--editable", ".[test]", *pins], cwd=ROOT)
    if installed.returncode:
        return f"{name}: cannot be installed", 1
    done = subprocess.run([python, "-m", "pytest", *subset], cwd=ROOT)
    listing = "import sys, numpy, numba; print(sys.version.split()[0], 'NumPy', numpy.__version__,"
    listing += " 'Numba', numba.__version__)"
    what = subprocess.run([python, "-c", listing], capture_output=True, text=True).stdout.strip()
    return f"{name}: Python {what}: {'failed' if done.returncode else 'passed'}", done.returncode


def main():
    """Run all; exit with 1 if any fails."""
    subset, found = sys.argv[1:], interpreters()
    if not found:
        print("no Python from 3.10 to 3.14 is on the path")
        return 1
    runs = [(version, command, []) for version, command in found.items()]
    runs.append(("oldest", next(iter(found.values())), oldest()))
    results = [run(*each, subset) for each in runs]
    print(*(line for line, _ in results), sep="\n")
    missing = [f"3.{minor}" for minor in MINORS if f"3.{minor}" not in found]
    print("not here:", ", ".join(missing) or "none")
    return max(code for _, code in results)


if __name__ == "__main__":
    sys.exit(main())
