"""K-quants: what ggml's text says of blocks that are easy to work out by hand."""

import gguf
import numpy as np
import pytest

import tbq
from gguf_io.health import BlockHealth
from tbq.families.k_quants import WithMinimum, WithSign, nearest

NAMES = ("q2_K", "q3_K", "q4_K", "q5_K", "q6_K")
CODECS = {
    name: WithSign(int(name[1])) if name[1] in "36" else WithMinimum(int(name[1])) for name in NAMES
}


def test_nearest_is_what_the_bits_say():
    """Ties to even, infinities the least, NaN 0; 2^23 makes 20971520 = 2^24 + 2 * 2097152."""
    f = np.array([0.5, 1.5, -0.5, -1.5, 2.5, 4194303, -4194304, 2**23], np.float32)
    assert nearest(f).tolist() == [0, 2, 0, -2, 2, 4194303, -4194304, -(2**21)]
    special = np.array([np.inf, -np.inf, np.nan, 1e30], np.float32)
    assert nearest(special)[:3].tolist() == [-4194304, -4194304, 0]


@pytest.mark.parametrize("name", NAMES)
def test_gguf_py_decodes_the_same(name, rng):
    """Random codes and scales of all sub-blocks: float32, in the same order."""
    fmt = tbq.get_format(name)
    packed = rng.integers(0, 256, (64, fmt.block_bytes), np.uint8)
    blocks = packed.view(fmt.block)
    for field in fmt.layout.scales:
        blocks[field] = rng.standard_normal(blocks.shape).astype(np.float16)
    y = gguf.dequantize(packed, gguf.GGMLQuantizationType[name.upper()])
    assert tbq.dequantize(packed, fmt).tobytes() == y.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_multiples_of_a_step_come_back(name):
    """Whole steps from the least to the largest code, in every sub-block."""
    codec = CODECS[name]
    if isinstance(codec, WithSign):
        steps = np.resize(np.arange(-codec.half, codec.half), 256)
        steps = np.where(np.arange(256) % 16 == 0, -codec.half, steps)
    else:
        steps = np.resize([0, codec.top, *range(codec.top)], 256)
        steps[:: codec.search.values] = 0
        steps[1 :: codec.search.values] = codec.top
    x = steps.astype(np.float32)[None] * np.float32(0.25)
    y = tbq.dequantize(tbq.quantize(x, name), name)
    assert np.abs(y - x).max() <= np.abs(x).max() * 2e-3


@pytest.mark.parametrize("name", NAMES)
def test_zeros(name):
    """All bytes are 0: scales that are stored with 32 more are so only where there is a d."""
    zeros = np.zeros((1, 256), np.float32)
    assert not tbq.quantize(zeros, name).any()
    y = tbq.dequantize(tbq.quantize(zeros, name), name)
    assert (y == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_search_is_worth_it(name, rng):
    """Errors are less than without it: in squares for q3_K to q6_K, in magnitudes for q2_K."""
    x = rng.standard_normal((64, 256)).astype(np.float32)
    codec = CODECS[name]
    plain = type(codec)(codec.bits, searched=False)
    power = 1 if name == "q2_K" else 2
    errors = [
        (np.abs(c.dequantize(c.quantize(x, np.arange(64))) - x).astype(np.float64) ** power).mean()
        for c in (codec, plain)
    ]
    assert errors[0] < 0.98 * errors[1]


def test_nothing_is_wrong_with_usual_blocks(rng):
    """Scales of sub-blocks need not have every value, nor d float16's normal range."""
    x = rng.standard_normal((256, 256)).astype(np.float32) / 32
    for name in NAMES:
        fmt, health = tbq.get_format(name), BlockHealth()
        packed = tbq.quantize(x, fmt)
        health.add(packed, fmt, 0)
        assert health.problems() == []
        assert list(health.histograms) == ["codes"]
        blocks = packed.view(fmt.block)
        blocks["d"][:3] = np.nan
        health.add(packed, fmt, 0)
        assert health.problems() == ["3 blocks have a scale that is NaN or infinite"]


def test_a_wrong_codec_has_no_kernels():
    for codec in CODECS.values():
        (_, _, mutant), *_ = codec.mutants()
        with pytest.raises(NotImplementedError):
            mutant.kernels  # noqa: B018
