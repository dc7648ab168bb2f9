"""Token ids: from files, and from text by SentencePiece's rules."""

import sys

import gguf
import numpy as np
import pytest
from conftest import STATES

import gguf_io
from gguf_io.evaluation import tokenizer, tokens
from tbq import BackendError, FileFormatError, InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
# piece, score, type; the higher score is joined first
PIECES = [
    ("<unk>", 0, UNKNOWN),
    ("<s>", 0, CONTROL),
    ("a", -9, NORMAL),
    ("b", -9, NORMAL),
    ("c", -9, NORMAL),
    ("\u2581", -9, NORMAL),
    ("ab", -3, NORMAL),
    ("bc", -2, NORMAL),
    ("abc", -5, NORMAL),
    ("\u2581a", -1, NORMAL),
    ("cc", -4, NORMAL),
    ("ca", -6, USER_DEFINED),
    ("  ", -6, USER_DEFINED),
    *((f"<0x{b:02X}>", 0, BYTE) for b in range(256)),
]
IDS = {piece: i for i, (piece, _, _) in enumerate(PIECES)}


@pytest.fixture
def model(tmp_path):
    def make(kind="llama", **flags):
        path = tmp_path / "tokenizer.gguf"
        w = gguf.GGUFWriter(path, "llama")
        w.add_tokenizer_model(kind)
        w.add_token_list([piece for piece, _, _ in PIECES])
        w.add_token_scores([float(score) for _, score, _ in PIECES])
        w.add_token_types([kind for _, _, kind in PIECES])
        w.add_bos_token_id(1)
        for name, value in flags.items():
            w.add_bool(f"tokenizer.ggml.{name}", value)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.close()
        return gguf_io.open_gguf(path)

    return make


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("b", ["b"]),
        ("abc", ["abc"]),  # b and c first, then a with both
        ("abb", ["ab", "b"]),
        ("ccc", ["cc", "c"]),  # of equals the leftmost
        ("bcc", ["bc", "c"]),
        ("b a", ["b", "\u2581a"]),
        ("bcab", ["b", "ca", "b"]),  # a user's token is whole whatever its neighbours are
        ("b   b", ["b", "  ", "\u2581", "b"]),
        ("<s>", ["<0x3C>", "<0x73>", "<0x3E>"]),  # control tokens are text here
        ("é", ["<0xC3>", "<0xA9>"]),
        ("a\nb", ["a", "<0x0A>", "b"]),
    ],
)
def test_sentencepiece_by_hand(text, pieces, model):
    with model(add_space_prefix=False) as file:
        assert tokenizer.tokenize(file, text).tolist() == [IDS[p] for p in pieces]


def test_space_in_front(model):
    with model() as file:
        assert tokenizer.tokenize(file, "ab").tolist() == [IDS["\u2581a"], IDS["b"]]
        got = tokenizer.tokenize(file, "caab").tolist()
        assert got == [IDS["ca"], IDS["\u2581a"], IDS["b"]]


def test_other_tokenizers_are_refused_by_name(model):
    with model("bert") as file, pytest.raises(InputError, match="'bert'.*llama-tokenize"):
        tokenizer.tokenize(file, "a")


def byte_pair_model(path, cut):
    w = gguf.GGUFWriter(path, "qwen2")
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(cut)
    pieces = [
        "<|end|>",
        "<tool>",
        *"abc12",
        "\u0120",
        "\u010a",
        "ab",
        "\u0120ab",
        "12",
        "\u00c3",
        "\u00a9",
    ]
    w.add_token_list(pieces)
    w.add_token_types([CONTROL, USER_DEFINED, *[NORMAL] * (len(pieces) - 2)])
    w.add_token_merges(["a b", "\u0120 ab", "1 2"])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    return pieces


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("ab ab", "ab \u0120ab"),
        ("ab\n", "ab \u010a"),
        ("a<tool>b", "a <tool> b"),
        ("\u00e9", "\u00c3 \u00a9"),
        ("12a", None),  # qwen2 cuts digits one by one
    ],
)
@pytest.mark.parametrize("cut", ["qwen2", "llama-bpe", "gpt-2"])
def test_byte_pairs(cut, text, want, tmp_path):
    pytest.importorskip("tokenizers")
    pieces = byte_pair_model(tmp_path / "m.gguf", cut)
    want = want or ("1 2 a" if cut == "qwen2" else "12 a")
    with gguf_io.open_gguf(tmp_path / "m.gguf") as file:
        got = [pieces[i] for i in tokenizer.tokenize(file, text)]
    assert " ".join(got) == want


def test_unknown_cuts_are_refused_by_name(tmp_path):
    byte_pair_model(tmp_path / "m.gguf", "tekken")
    with (
        gguf_io.open_gguf(tmp_path / "m.gguf") as file,
        pytest.raises(InputError, match="'tekken', need one of llama-bpe"),
    ):
        tokenizer.tokenize(file, "a")


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    byte_pair_model(tmp_path / "m.gguf", "qwen2")
    with (
        gguf_io.open_gguf(tmp_path / "m.gguf") as file,
        pytest.raises(BackendError, match=r"tokenizers: .*\[bpe\]"),
    ):
        tokenizer.tokenize(file, "a")


@pytest.mark.parametrize(
    ("kind", "flags", "want"),
    [
        ("llama", {}, 1),
        ("llama", {"add_bos_token": False}, None),
        ("gpt2", {}, None),
        ("gpt2", {"add_bos_token": True}, 1),
    ],
)
def test_first_token(kind, flags, want, model):
    with model(kind, **flags) as file:
        assert tokenizer.bos_token(file) == want


@pytest.mark.parametrize("dtype", ["<i4", ">i8", "u2"])
def test_arrays(dtype, tmp_path):
    np.save(tmp_path / "t.npy", np.array([3, 1, 60000], dtype))
    got = tokens.read_tokens(tmp_path / "t.npy")
    assert (got.dtype, got.tolist()) == (np.int32, [3, 1, 60000])


def test_plain_integers(tmp_path):
    np.array([5, 6, 7], "<i4").tofile(tmp_path / "t.bin")
    assert tokens.read_tokens(tmp_path / "t.bin").tolist() == [5, 6, 7]


def test_state_files():
    path = STATES / "pr21089.f16.seq0.bin"
    with gguf_io.open_state(path) as s:
        want = s.container.tokens.tolist()
    assert len(want) > 1
    assert tokens.read_tokens(path).tolist() == want


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(3), "need integers"),
        (np.zeros((2, 2), int), "need integers"),
        (np.array([-1]), "no token ids"),
        (np.array([None]), "no array of numbers"),
    ],
)
def test_bad_arrays(array, words, tmp_path):
    np.save(tmp_path / "t.npy", array, allow_pickle=True)
    with pytest.raises(FileFormatError, match=words):
        tokens.read_tokens(tmp_path / "t.npy")


@pytest.mark.parametrize("data", [b"", b"abc", b"12345"])
def test_bad_bytes(data, tmp_path):
    (tmp_path / "t.bin").write_bytes(data)
    with pytest.raises(FileFormatError, match="whole number of int32"):
        tokens.read_tokens(tmp_path / "t.bin")


def test_windows():
    ids = np.arange(10, 33)
    got = tokens.windows(ids, 5, None, 40, 1)
    assert [w.tolist() for w in got[:2]] == [[1, 11, 12, 13, 14], [1, 16, 17, 18, 19]]
    assert len(got) == 4
    assert [w[0] for w in tokens.windows(ids, 5, 2, 40, None)] == [10, 15]
    with pytest.raises(InputError, match="at least one window of 24"):
        tokens.windows(ids, 24, None, 40, 1)
    with pytest.raises(InputError, match="token 29"):
        tokens.windows(ids, 5, None, 29, 1)
