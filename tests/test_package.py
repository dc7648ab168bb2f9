"""The wheel: installs and runs without the checkout, and installs nothing it should not."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import SAMPLES

import tbq
from tbq.extras import install_command

ROOT = Path(__file__).parents[1]


def tracked():
    """Return the names of what belongs to the project: what git has, or what an sdist had."""
    listing = [*sorted(ROOT.glob("*.egg-info/SOURCES.txt"))] if not (ROOT / ".git").exists() else []
    if listing:
        return listing[0].read_text().splitlines()
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    return [name for name in files if (ROOT / name).is_file()]


def copy_to(source, names):
    for name in names:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    copy_to(source, [name for name in tracked() if not name.startswith(("tests/", "."))])
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


def described(wheel):
    """Return the page that an index would show of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        message = email.message_from_bytes(archive.read(name))
    assert message["Version"] == tbq.__version__
    assert message["Description-Content-Type"] == "text/markdown"
    return message.get_payload(decode=True).decode()


def test_the_page_on_an_index_has_no_dead_links(wheel):
    page = described(wheel)
    assert page.startswith("# tbq-reference")
    assert "docs/formats.md" in page
    assert not [to for to in re.findall(r"\]\(([^)]*)\)", page) if not to.startswith("https://")]


def test_links_lead_to_the_version_where_a_home_is_known():
    code = "import setuptools; setuptools.setup = dict\n" + (ROOT / "setup.py").read_text()
    code += "\nprint(long_description())"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("Path(__file__).parent", f"Path({str(ROOT)!r})")],
        env=os.environ | {"TBQ_HOME": "https://forge.test/owner/name/"},
        capture_output=True,
        text=True,
        check=True,
    )
    link = f"(https://forge.test/owner/name/blob/v{tbq.__version__}/docs/formats.md)"
    assert link in done.stdout
    assert "](docs/" not in done.stdout


def test_every_link_of_the_readme_leads_to_a_file():
    for to in re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text()):
        assert to.startswith("https://") or (ROOT / to).exists(), to


def test_the_sdist_has_every_file(tmp_path):
    names = tracked()
    assert len(names) > 300
    source = tmp_path / "source"
    copy_to(source, names)
    for name in ("tbq/kernels/__pycache__/x.nbi", "tbq/__pycache__/x.pyc"):  # as after a run
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert not {name for name in names if not name.startswith("tbq_reference.egg-info")} - packed
    assert not [name for name in packed if "__pycache__/" in name]
    made = {name for name in packed if not (source / name).exists()}
    assert {name for name in made if "egg-info" not in name} <= {"", "PKG-INFO", "setup.cfg"}


def test_install_commands_fit_where_they_are_run(wheel, tmp_path):
    assert install_command("html") == f"pip install '{ROOT}[html]'"
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "from tbq.extras import install_command; print(install_command('html'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "pip install 'tbq-reference[html]'\n"
