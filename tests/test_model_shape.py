"""What a model's metadata says about its cache."""

import pytest

from gguf_io import model_shape, write_gguf
from tbq import FileFormatError


@pytest.fixture
def shape(tmp_path):
    def read(architecture="llama", **keys):
        keys = {"block_count": 8, "embedding_length": 512, "attention.head_count": 4} | keys
        metadata = {f"{architecture}.{k}": v for k, v in keys.items() if v is not None}
        path = tmp_path / "model.gguf"
        write_gguf(path, {"general.architecture": architecture} | metadata, [])
        return model_shape(path)

    return read


def test_defaults(shape):
    s = shape()
    assert s.n_head_kv == (4,) * 8  # as many as query heads
    assert s.head_dim("K", 0) == s.head_dim("V", 7) == 128
    assert (s.mrope, s.mla, s.is_swa, s.is_recurrent) == (False, False, (False,) * 8, (False,) * 8)
    assert s.cache_layers("kv", 0) == list(range(8))


def test_heads(shape):
    keys = {"attention.head_count_kv": 2, "attention.key_length": 192, "attention.value_length": 64}
    s = shape(**keys)
    assert (s.n_head_kv[0], s.head_dim("K", 0), s.head_dim("V", 0)) == (2, 192, 64)
    latent = {"attention.key_length_mla": 192, "attention.head_count_kv": 1}
    assert not shape("deepseek2", **latent).mla  # llama.cpp wants both
    assert shape("deepseek2", **latent, **{"attention.value_length_mla": 128}).mla
    assert shape("qwen2vl", **{"rope.dimension_sections": [16, 24, 24, 0]}).mrope
    assert shape(nextn_predict_layers=1).n_layer == 7
    assert shape(**{"attention.shared_kv_layers": 3}).attention_layers == list(range(5))


def test_sliding_windows(shape):
    window = {"attention.sliding_window": 64}
    s = shape("gemma3", **window)
    assert s.cache_layers("iswa", 0) == [5]
    assert s.cache_layers("iswa", 1) == [0, 1, 2, 3, 4, 6, 7]
    assert shape("gpt-oss", **window).cache_layers("iswa", 0) == [1, 3, 5, 7]
    key = "attention.sliding_window_pattern"
    assert shape("gemma3", **window, **{key: 4}).cache_layers("iswa", 0) == [3, 7]
    flags = [True, False, True, True, False, True, True, True]
    assert shape("new", **window, **{key: flags}).cache_layers("iswa", 0) == [1, 4]
    assert shape("new", **window).cache_layers("iswa", 0) is None
    assert shape("new", **window).cache_layers("kv", 0) == list(range(8))
    assert shape("smallthinker", **window).cache_layers("iswa", 0) == [0, 4]
    assert shape("plamo3", **window).cache_layers("iswa", 0) == [7]
    assert shape("phi3", **window).cache_layers("kv", 0) == list(range(8))
    assert shape("llama4").cache_layers("iswa", 0) == [3, 7]  # chunks of 8192 without a key
    assert shape("llama4", **{"attention.sliding_window": 0}).cache_layers("iswa", 1) == []
    own = {"attention.key_length": 256, "attention.key_length_swa": 128}
    s = shape("gemma4", **window, **own, **{key: flags})
    assert [s.head_dim("K", il) for il in range(3)] == [128, 256, 128]


def test_hybrids(shape):
    s = shape("lfm2", **{"attention.head_count_kv": [0, 2, 0, 0, 2, 0, 2, 0]})
    assert s.attention_layers == [1, 4, 6]
    assert [il for il, r in enumerate(s.is_recurrent) if r] == [0, 2, 3, 5, 7]
    s = shape("qwen3next", **{"attention.head_count_kv": 2})
    assert s.attention_layers == [3, 7]
    assert s.is_recurrent[:4] == (True, True, True, False)
    s = shape("mamba", **{"attention.head_count": 0})
    assert (s.attention_layers, all(s.is_recurrent)) == ([], True)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"block_count": None}, "block_count is missing"),
        ({"block_count": 0}, "1 to 1024 layers"),
        ({"block_count": 1 << 19}, "1 to 1024 layers"),
        ({"block_count": "8"}, "block_count is '8', need a number"),
        ({"attention.head_count_kv": [2, 2]}, "one number per layer, 8 in all"),
        ({"attention.sliding_window": 8, "attention.sliding_window_pattern": -1}, "a period"),
        ({"attention.sliding_window": 8, "attention.sliding_window_pattern": "x"}, "is 'x'"),
    ],
)
def test_what_is_wrong_is_named(shape, keys, words):
    with pytest.raises(FileFormatError, match=words):
        shape(**keys)


def test_a_model_without_an_architecture(tmp_path):
    write_gguf(tmp_path / "m.gguf", {}, [])
    with pytest.raises(FileFormatError, match="general.architecture is missing"):
        model_shape(tmp_path / "m.gguf")
