"""Patterns of tensor names: POSIX classes mean what they say, and what matches nothing is said."""

import re
import string

import gguf_bytes as g
import pytest
from conftest import STATES

import tbq
from tools.patterns import CLASSES, compiled

STATE = STATES / "pr21089.f16.seq0.bin"
# What C's functions say of the characters of ASCII.
EXPECTED = {
    "alnum": string.ascii_letters + string.digits,
    "alpha": string.ascii_letters,
    "blank": " \t",
    "cntrl": "".join(map(chr, [*range(32), 127])),
    "digit": string.digits,
    "graph": string.ascii_letters + string.digits + string.punctuation,
    "lower": string.ascii_lowercase,
    "print": string.ascii_letters + string.digits + string.punctuation + " ",
    "punct": string.punctuation,
    "space": " \t\n\v\f\r",
    "upper": string.ascii_uppercase,
    "xdigit": string.hexdigits,
    "w": string.ascii_letters + string.digits + "_",
}
ASCII = "".join(map(chr, range(128)))


@pytest.mark.parametrize("name", CLASSES)
def test_classes(name):
    same = {"d": "digit", "s": "space", "word": "w"}.get(name, name)
    inside = set(EXPECTED[same])
    if same == "space":  # Python counts separators of files too
        inside |= set("\x1c\x1d\x1e\x1f")
    positive, negative = compiled("f", f"[[:{name}:]]"), compiled("f", f"[^[:{name}:]]")
    assert {c for c in ASCII if positive.fullmatch(c)} == inside
    assert {c for c in ASCII if negative.fullmatch(c)} == set(ASCII) - inside


@pytest.mark.parametrize(
    ("text", "yes", "no"),
    [
        (r"blk\.[[:digit:]]+\.ffn", "blk.17.ffn", "blk.x.ffn"),
        ("[_[:alpha:]-]x", "-x", "1x"),
        ("[]x]y", "]y", "ay"),
        ("[^]x]y", "ay", "]y"),
        ("[[]x", "[x", "]x"),
        (r"\[[:a]", "[:", "[b"),
        (r"[\]:]x", ":x", "ax"),
        ("[a-z&&x]1", "&1", "|1"),
        ("(?:a|b){2}$", "ab", "ac"),
    ],
)
def test_brackets(text, yes, no):
    assert compiled("f", text).search(yes)
    assert not compiled("f", text).search(no)


@pytest.mark.parametrize(
    "text",
    ["[:digit:]", "x[:digit:]y", "[[:digits:]]", "[[.a.]]", "[[=a=]]", "[[:digit]", "(", "a{2,1}"]
    + ["a{99999999999}", "(" * 5000, "[z-a]"],
)
def test_what_is_refused(text):
    with pytest.raises(tbq.InputError, match="a regular expression"):
        compiled("--include", text)


@pytest.fixture
def model(tmp_path):
    tensors = [g.tensor(f"blk.{i}.ffn_up.weight", (32, 2), 0, 256 * i) for i in range(3)]
    path = tmp_path / "m.gguf"
    path.write_bytes(g.gguf_file([], tensors, bytes(768)))
    return path


def types(out):
    return re.findall(r"converting to (\w+)", out)


def test_tensor_type(quantize, model, tmp_path):
    flags = ["--tensor-type", "blk.[[:digit:]].ffn=q8_0"]
    code, out, err = quantize(*flags, model, tmp_path / "o.gguf", "q4_0")
    assert (code, types(out), err.count("warning")) == (0, ["q8_0"] * 3, 0)


UNMATCHED = [["--tensor-type", "attn=q8_0"], ["--include", "nope"], ["--exclude", "[[:upper:]]"]]


@pytest.mark.parametrize("flags", UNMATCHED, ids=lambda flags: flags[0])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_matches_nothing_is_said(quantize, model, tmp_path, flags, dry):
    for source in (model, STATE):
        code, _, err = quantize(*dry, *flags, source, tmp_path / "o", "q8_0")
        text = flags[1].partition("=")[0]
        assert code == 0
        assert err.count(f"warning: {flags[0]} {text} matches no tensor\n") == 1, err


def test_what_matches_is_not(quantize, model, tmp_path):
    flags = ["--tensor-type", "1=q8_0", "--include", "ffn", "--exclude", "blk.0"]
    code, out, err = quantize(*flags, model, tmp_path / "o", "q4_0")
    assert (code, types(out)) == (0, ["q8_0", "q4_0"])
    assert "warning" not in err
