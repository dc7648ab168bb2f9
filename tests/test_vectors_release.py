"""The archive of golden vectors: the same bytes whenever, wherever and by whom it is built."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile

import pytest
from jsonschema import Draft202012Validator

import tbq
from tools import vectors_release

FORMATS = [tbq.get_format(name) for name in ("tbq3_0", "ktq2_1", "q4_0")]
CASE = "pr21089/tbq3_0/dequantize/normal"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return vectors_release.release(tmp_path_factory.mktemp("release"), FORMATS)


@pytest.fixture(scope="module")
def folder(archive):
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(archive.parent)
    return archive.with_suffix("")


def test_the_same_bytes_from_another_folder_at_another_time(archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    monkeypatch.setattr(time, "time", lambda: 2e9)
    umask = os.umask(0o077)
    try:
        again = vectors_release.release(tmp_path / "deep" / "er", FORMATS)
    finally:
        os.umask(umask)
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (archive, again)}
    assert len(digests) == 1
    assert archive.name == f"tbq-vectors-{tbq.__version__}.zip"


def test_every_file_is_there_and_summed(archive, folder):
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    summed = dict(reversed(line.split("  ")) for line in lines)
    with zipfile.ZipFile(archive) as opened:
        names = {name.partition("/")[2] for name in opened.namelist()}
    assert set(summed) == names - {"SHA256SUMS"}
    for name, digest in summed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    manifest = json.loads((folder / "manifest.json").read_text())
    schema = json.loads((folder / "tbq-vectors.schema.json").read_text())
    assert not [*Draft202012Validator(schema).iter_errors(manifest)]
    assert manifest["generator"]["version"] == tbq.__version__
    assert manifest["size"] == "full"
    assert set(manifest["files"]) < names
    assert {"README.md", "LICENSE", "tbq_vectors.h", "cases.tsv"} < names
    readme = (folder / "README.md").read_text()
    assert f"Golden vectors of {len(manifest['formats'])} formats" in readme
    assert not re.search("VERSION|FORMATS|CASES|FILES", readme)


def test_the_verifier_takes_it(folder, tmp_path):
    command = [sys.executable, "-m", "tools.tbq_vectors", "list", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert CASE in done.stdout, done.stderr


def reader(folder, language):
    blocks = re.findall(rf"```{language}\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) <= 45
    return blocks[0]


def expected(folder):
    """Return what a reader says of a case: kind:role, number of values, the first."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (case,) = (case for case in manifest["cases"] if case["id"] == CASE)
    return {f"in:{role}" for role in case["inputs"]} | {f"out:{case['output']['role']}"}


def test_the_reader_in_python(folder):
    script = folder / "reader.py"
    script.write_text(reader(folder, "python"))
    command = [sys.executable, "-S", script.name, CASE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert expected(folder) <= {line.split()[0] for line in done.stdout.splitlines()}


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_the_reader_in_c_says_the_same(folder):
    (folder / "reader.c").write_text(reader(folder, "c"))
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "reader.c", "-o", "reader"]
    subprocess.run(command, cwd=folder, check=True)
    done = subprocess.run(["./reader", CASE], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0
    told = [line.split() for line in done.stdout.splitlines()]
    assert expected(folder) <= {fields[0] for fields in told}
    script = folder / "reader.py"
    script.write_text(reader(folder, "python"))
    command = [sys.executable, script.name, CASE]
    python = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    assert sorted(told) == sorted(line.split()[:3] for line in python.splitlines())
    assert subprocess.run(["./reader", "nothing"], cwd=folder).returncode == 1
