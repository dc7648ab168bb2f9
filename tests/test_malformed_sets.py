"""Sets of vectors whose manifest is of any shape: our own errors, in one line."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tools import tbq_vectors

# Small and of every operation; a format that borrows codes, one whose boundaries are masked.
FORMATS = "tbq3_0,vtq2_2,xktq2_1"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "set"
    assert tbq_vectors.main(["generate", "--out", str(folder), "--formats", FORMATS]) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    kept, seen = [], set()
    for entry in manifest["cases"]:  # one case of each kind
        kind = entry["op"], entry["format"], entry["match"]["mode"]
        if kind not in seen:
            kept.append(entry)
        seen.add(kind)
    manifest["cases"] = kept
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "set", copy_function=os.link))


def put(folder, manifest):
    path = folder / "manifest.json"
    path.unlink()  # it is linked to the good one
    path.write_text(json.dumps(manifest), encoding="utf-8", errors="surrogatepass")


VALUES = (
    *(None, True, 0, -1, 5, 0.5, 2**62, 2**64, 10**400, float("inf"), float("nan")),
    *("", "x", "\x1b]0;PWNED\x07", "\ud800", "../../../../../../etc/passwd", "/etc/passwd", "a\0b"),
    *([], [1, 2], [-4, -1], [2**62, 4], [0], ["x"], [[1]], {}, {"x": 1}),
)


def places(value, path=(), most=2):
    """Yield the path of what is in a JSON value: one item of a list, some of a mapping."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in list(value)[:most]:
            yield from places(value[key], (*path, key), 12)
    elif isinstance(value, list):
        for i in range(min(len(value), 1)):
            yield from places(value[i], (*path, i), 12)


def runs(folder):
    yield ["list", folder]
    yield ["check", "--verbose", "--junit", folder.parent / "j.xml", folder, folder]


def test_the_set_is_good(vectors, folder):
    for args in runs(folder):
        assert vectors(*args)[0] == 0


@pytest.mark.parametrize("top", ["case", "seed", "size", "notes", "files", "cases", "schema"])
def test_every_field(vectors, folder, top):
    original = json.loads((folder / "manifest.json").read_text())
    original["cases"] = original["cases"][:1]
    root = ("cases", 0) if top == "case" else (top,)
    value = original
    for key in root:
        value = value[key]
    most = {"case": 12, "cases": 0}.get(top, 1)
    found = places(value, (), most) if top != "cases" else []
    for number, path in enumerate([root, *(root + path for path in found)]):
        for change in (*VALUES, "missing")[number % 3 :: 3]:
            manifest = json.loads(json.dumps(original))
            parent = manifest
            for key in path[:-1]:
                parent = parent[key]
            if change == "missing":
                del parent[path[-1]]
            else:
                parent[path[-1]] = change
            put(folder, manifest)
            for args in runs(folder):
                code, out, err = vectors(*args)
                assert code in (0, 1, 2, 3), (path, change, err)
                assert "Traceback" not in err
                assert err.count("\n") == (code > 1), (path, change, err)
                assert "\x1b" not in out + err, (path, change)
                assert "root:" not in out + err


@pytest.mark.parametrize(
    "bad", ["../x", "/etc/passwd", "a/../../x", "C:x", "a\\..\\x", "a//b", "."]
)
def test_an_id_that_leaves_its_folder(vectors, folder, bad):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["cases"][0]["id"] = bad
    put(folder, manifest)
    for args in runs(folder):
        code, _, err = vectors(*args)
        assert code == 3
        assert "leaves the folder" in err


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", "[" * 100_000, '{"schema": 1}', "\ufeff{}", "1e999", '"\\ud800"'],
)
def test_what_is_no_manifest(vectors, folder, text):
    path = folder / "manifest.json"
    path.unlink()
    path.write_text(text)
    for args in runs(folder):
        code, out, err = vectors(*args)
        assert (code, out) == (3, ""), err
        assert err.count("\n") == 1


def test_cases_that_swap_their_files(vectors, folder):
    """Every file is right and of a right size, but not for this case."""
    original = json.loads((folder / "manifest.json").read_text())
    for i, entry in enumerate(original["cases"]):
        for other in original["cases"][i - 2 : i] or original["cases"][-1:]:
            for key in ("op", "format", "inputs", "output", "match", "mask"):
                manifest = json.loads(json.dumps(original))
                manifest["cases"] = [manifest["cases"][i] | {key: other[key]}]
                if manifest["cases"] == [entry]:
                    continue
                put(folder, manifest)
                code, _, err = vectors("check", "--verbose", folder, folder)
                assert code in (0, 1, 3), (entry["id"], key, other["id"], err)
                assert err.count("\n") == (code == 3), err
