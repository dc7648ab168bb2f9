"""Queries for attention errors: real ones from files, stand-ins of a model's lengths."""

import numpy as np
import pytest
from conftest import STATES

import gguf_io
from gguf_io.queries import NONE, SHORTER, exact_attention, queries_of_model, read_queries
from tbq import FileFormatError, InputError
from tbq.quality import random_queries

F32 = STATES / "pr21089.f32.seq0.bin"


def test_stand_ins_are_as_long_as_asked_and_always_the_same():
    q = random_queries(20, 2, 64, 3.0)
    np.testing.assert_allclose(np.linalg.norm(q, axis=-1), 3.0, rtol=1e-5)
    np.testing.assert_array_equal(q, random_queries(20, 2, 64, 3.0))
    np.testing.assert_allclose(np.linalg.norm(random_queries(9, 1, 64), axis=-1), 8.0, rtol=1e-5)


def test_file_of_queries(tmp_path, rng):
    q = rng.standard_normal((9, 4, 64)).astype(np.float32)
    np.savez(tmp_path / "q.npz", q3=q, k3=q[:, :2], windows=[0, 0, 0, 5], scales=[0, 0, 0, 0.25])
    found = read_queries(tmp_path / "q.npz")
    assert set(found.layers) == {3}
    assert (found.layers[3].window, found.layers[3].scale) == (5, 0.25)
    k = rng.standard_normal((12, 2, 64)).astype(np.float32)
    exact = exact_attention(found, 3, False, np.arange(12), k, None)
    np.testing.assert_array_equal(exact.queries, q)  # of the tokens that the file has
    assert exact.seen.sum(axis=1).tolist() == [1, 2, 3, 4, 5, 5, 5, 5, 5]
    with pytest.raises(InputError, match="4 heads of 64 in layer 3.*need a multiple of 3 heads"):
        exact_attention(found, 3, False, np.arange(12), k[:, :1].repeat(3, 1), None)
    assert exact_attention(found, 3, False, np.arange(50, 60), k[:10], None) is None
    other = exact_attention(found, 0, False, np.arange(12), k, None)  # a layer without any
    assert other.queries.shape == (12, 2, 64)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"k0": np.zeros(3)}, "no arrays q0"),
        ({"q0": np.zeros((2, 3))}, r"q0 is float64 \(2, 3\), not floats"),
        ({"q0": np.zeros((2, 3, 4), int)}, "not floats"),
        ({"q1": np.zeros((2, 3, 4)), "windows": np.zeros(1)}, "windows has 1 numbers, none for q1"),
    ],
)
def test_files_that_are_none(tmp_path, arrays, message):
    np.savez(tmp_path / "q.npz", **arrays)
    with pytest.raises(FileFormatError, match=message):
        read_queries(tmp_path / "q.npz")


def test_other_files_are_refused(tmp_path):
    for name, data in (("a", b"PK\3\4 no zip"), ("b", b"text"), ("c", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FileFormatError, match=r"no \.npz"):
            read_queries(tmp_path / name)


def test_lengths_are_those_of_the_models_norm(tmp_path):
    weights = np.full(64, 2.0, np.float32)
    metadata = {"general.architecture": "qwen3", "qwen3.attention.sliding_window": np.uint32(7)}
    tensors = [gguf_io.OutputTensor.from_array("blk.1.attn_q_norm.weight", weights)]
    gguf_io.write_gguf(tmp_path / "m.gguf", metadata, tensors)
    found = queries_of_model(tmp_path / "m.gguf")
    assert found.lengths == {1: pytest.approx(SHORTER * 16)}
    assert found.window == 7
    k = np.ones((9, 1, 64), np.float32)
    exact = exact_attention(found, 1, True, np.arange(9), k, None)
    assert np.linalg.norm(exact.queries[0, 0]) == pytest.approx(SHORTER * 16)
    assert exact.seen[-1].sum() == 7
    gguf_io.write_gguf(tmp_path / "n.gguf", {"general.architecture": "llama"}, [])
    assert queries_of_model(tmp_path / "n.gguf") == NONE
