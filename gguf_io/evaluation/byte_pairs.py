"""Byte-level BPE ("gpt2" in GGUF) by the `tokenizers` library, fed from a model's metadata.

The library is Hugging Face's, in Rust; the joining of pairs is not worth writing again, nor fast
enough in Python. What it is told here is how llama.cpp cuts text before pairs are joined, for the
cuts below; another is refused by name.

Source: ggml-org/llama.cpp, src/llama-vocab.cpp: llm_tokenizer_bpe
"""

from __future__ import annotations

from collections.abc import Sequence

from tbq import BackendError, InputError
from tbq.extras import install_command

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = f"{_CONTRACTIONS}|{_REST % '{1,3}'}", f"{_CONTRACTIONS}|{_REST % ''}"
# `tokenizer.ggml.pre`: the expression that cuts, and whether a part that is a token stays whole.
CUTS = {
    "llama-bpe": (_LLAMA3, True),
    "llama3": (_LLAMA3, True),
    "llama-v3": (_LLAMA3, True),
    "qwen2": (_QWEN2, False),
    "gpt-2": (_GPT2, False),
}


class BytePairs:
    """A tokenizer for text without tokens that are always whole.

    Args:
        pieces: the tokens, in the letters that stand for bytes.
        merges: pairs to join, "left right", the first first.
        cut: `tokenizer.ggml.pre`.

    Raises:
        InputError: the cut is not known.
        BackendError: the library is not installed.
    """

    def __init__(self, pieces: Sequence[str], merges: Sequence[str], cut: str | None) -> None:
        if cut not in CUTS:
            got = f"a model whose text is cut as {str(cut)[:64]!r}"
            need = f"one of {', '.join(CUTS)}; or token ids, such as llama-tokenize --ids gives"
            raise InputError("--text", got, need)
        try:
            from tokenizers import Regex, Tokenizer, models, pre_tokenizers
        except ImportError:
            need = f"--text needs it for this model: {install_command('bpe')}"
            raise BackendError("tokenizers", need) from None
        expression, whole = CUTS[cut]
        vocabulary = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        known = [p for p in pairs if len(p) == 2 and {*p, "".join(p)} <= vocabulary.keys()]
        self._library = Tokenizer(models.BPE(vocabulary, known, ignore_merges=whole))
        self._library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(expression), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._library.encode(text, add_special_tokens=False).ids
