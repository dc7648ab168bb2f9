"""Text to token ids as llama.cpp does it, by the tokenizer that a GGUF file carries.

Of SentencePiece models (`tokenizer.ggml.model` = "llama"): neighbours are joined, the pair with the
highest score first, the leftmost of equals; what no token covers becomes its bytes. Of byte-level
BPE ("gpt2") see `byte_pairs`. Tokens of the user's are whole in either, control tokens are text.

Source: ggml-org/llama.cpp, src/llama-vocab.cpp: llm_tokenizer_spm_session, tokenizer_st_partition
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from gguf_io.evaluation.byte_pairs import BytePairs
from gguf_io.metadata import StringArray
from gguf_io.reader import GgufFile
from tbq import FileFormatError, InputError

# source: llama.cpp, include/llama.h: LLAMA_TOKEN_TYPE_USER_DEFINED
USER_DEFINED = 4
SPACE = "\u2581"
KEY = "tokenizer.ggml."


def bos_token(file: GgufFile) -> int | None:
    """Return the token that starts every window; None if the model wants none."""
    model = file.metadata.text(KEY + "model")
    add = file.metadata.get(KEY + "add_bos_token", model == "llama")
    return file.metadata.number(KEY + "bos_token_id") if add else None


def tokenize(file: GgufFile, text: str) -> np.ndarray:
    """Return the token ids of a text, int32 (n,), without a token at the start.

    Raises:
        InputError: the model's tokenizer is of another kind.
        BackendError: it needs a library that is not installed.
        FileFormatError: its tables are missing or do not fit each other.
    """
    kind = file.metadata.text(KEY + "model")
    if kind is None or kind not in TOKENIZERS:
        need = f"one of {', '.join(TOKENIZERS)}; or token ids, such as llama-tokenize --ids gives"
        raise InputError("--text", f"a model with tokenizer {str(kind)[:64]!r}", need)
    return np.array(list(TOKENIZERS[kind](file).tokens(text)), np.int32)


class _Tokenizer:
    """The tables that every kind has."""

    def __init__(self, file: GgufFile) -> None:
        self.pieces = self.strings(file, "tokens")
        types = self.numbers(file, "token_type")
        self.ids = {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}
        own = sorted((self.pieces[i] for i in np.flatnonzero(types == USER_DEFINED)), key=len)
        self.whole = [piece for piece in reversed(own) if piece]

    def strings(self, file: GgufFile, name: str) -> list[str]:
        found = file.metadata.get(KEY + name)
        if not isinstance(found, StringArray):
            raise FileFormatError(file.path, None, f"no {KEY}{name}")
        return found[:]

    def numbers(self, file: GgufFile, name: str) -> np.ndarray:
        found = file.metadata.get(KEY + name)
        if not isinstance(found, np.ndarray) or len(found) != len(self.pieces):
            raise FileFormatError(file.path, None, f"no {KEY}{name} for each token")
        return found

    def fragments(self, text: str) -> list[tuple[str, bool]]:
        """Split at tokens that are whole whatever stands beside them, the longest first."""
        parts = [(text, False)] if text else []
        for piece in self.whole:
            if piece not in text:
                continue
            split = []
            for part, is_token in parts:
                if is_token or piece not in part:
                    split.append((part, is_token))
                    continue
                for i, between in enumerate(part.split(piece)):
                    split += [(piece, True)] if i else []
                    split += [(between, False)] if between else []
            parts = split
        return parts


class _BytePairs(_Tokenizer):
    def __init__(self, file: GgufFile) -> None:
        super().__init__(file)
        cut = file.metadata.text(KEY + "pre")
        self._pairs = BytePairs(self.pieces, self.strings(file, "merges"), cut)

    def tokens(self, text: str) -> Iterator[int]:
        """Yield the ids of a text."""
        for part, is_token in self.fragments(text):
            yield from [self.ids[part]] if is_token else self._pairs.ids(part)


class _SentencePiece(_Tokenizer):
    def __init__(self, file: GgufFile) -> None:
        super().__init__(file)
        self.scores = self.numbers(file, "scores")
        self.unknown = file.metadata.number(KEY + "unknown_token_id") or 0
        self.add_space = bool(file.metadata.get(KEY + "add_space_prefix", True))
        self.bytes = [self.ids.get(f"<0x{b:02X}>", self.unknown) for b in range(256)]

    def tokens(self, text: str) -> Iterator[int]:
        """Yield the ids of a text."""
        before_is_token = True
        for part, is_token in self.fragments(text):
            if is_token:
                yield self.ids[part]
            else:
                prefix = " " if self.add_space and before_is_token else ""
                yield from self._merged((prefix + part).replace(" ", SPACE))
            before_is_token = is_token

    def _merged(self, text: str) -> Iterator[int]:
        """Yield the ids of a text without whole tokens: join neighbours, the best pair first."""
        parts: list[str] = list(text)
        after = list(range(1, len(parts) + 1))
        before = list(range(-1, len(parts) - 1))
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left < 0 or right >= len(parts):
                return
            joined = parts[left] + parts[right]
            found = self.ids.get(joined)
            if found is not None:
                heapq.heappush(queue, (-float(self.scores[found]), left, right, joined))

        for i in range(len(parts) - 1):
            offer(i, i + 1)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            if not parts[left] or not parts[right] or parts[left] + parts[right] != joined:
                continue  # one of them has been joined with another
            parts[left], parts[right] = joined, ""
            after[left] = after[right]
            if after[left] < len(parts):
                before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        for part in filter(None, parts):
            found = self.ids.get(part)
            if found is not None:
                yield found
            else:
                yield from (self.bytes[b] for b in part.encode("utf-8", "surrogateescape"))


TOKENIZERS: dict[str, type[_SentencePiece] | type[_BytePairs]] = {
    "llama": _SentencePiece,
    "gpt2": _BytePairs,
}
