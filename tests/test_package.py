"""The wheel: installs and runs without the checkout, and installs nothing it should not."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import SAMPLES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    names = files or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    for name in names:
        if not name.startswith(("tests/", ".")) and (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(command, check=True, timeout=300)
    (path,) = folder.glob("*.whl")
    return path


def test_top_level_names(wheel):
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    packages = {name for name in names if not name.endswith(".dist-info")}
    assert packages == {"tbq", "gguf_io", "cuda_port", "tbq_tools"}


def test_every_module_is_in_the_wheel(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    names = {"tbq": "tbq", "gguf_io": "gguf_io", "cuda_port": "cuda_port", "tools": "tbq_tools"}
    for package, name in names.items():
        for path in (ROOT / package).rglob("*.py"):
            assert f"{name}/{path.relative_to(ROOT / package).as_posix()}" in packed


def test_runs_without_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*args):
        command = [sys.executable, *map(str, args)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    where = run("-c", "import tbq, gguf_io, tbq_tools; print(tbq.__file__, tbq_tools.__file__)")
    assert where.stdout.count(str(site)) == 2
    done = run(
        "-m", "tbq_tools.tbq_quantize", "--pure", SAMPLES / "small.f32.gguf", "o.gguf", "tbq3_0"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o.gguf").exists()
    planned = run("-m", "tbq_tools.tbq_plan", SAMPLES / "planner" / "gemma3-270m.metadata.gguf")
    assert "pr21089:tbq3_0" in planned.stdout, planned.stderr
    demo = run("-m", "tbq_tools.demo", "tbq3_0")
    assert "pr21089:tbq3_0" in demo.stdout, demo.stderr


def test_console_script_is_installed():
    script = Path(sys.executable).with_name("tbq-quantize")
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert done.stdout.startswith("usage: tbq-quantize [options] INPUT [OUTPUT] TYPE")
