"""ggml's own types: beside gguf-py, and what their arithmetic says of itself.

gguf-py reads blocks of finite scales as C does, which is an oracle of the decoders apart from the
vectors. Where it does otherwise, C is right, and the difference is named here.
"""

import gguf
import numpy as np
import pytest
from test_turbo import same

import tbq
from tbq.families.ggml import ThroughGguf
from tbq.families.small_floats import E4M3
from tbq.format import GGML
from tbq.registry import all_formats, get_dialect


def gguf_type(fmt):
    return getattr(gguf.GGMLQuantizationType, fmt.name.upper(), None)


def does(function, fmt, *array):
    try:
        function(*array, gguf_type(fmt))
    except NotImplementedError:
        return False
    return True


def decodes(fmt):
    return does(gguf.dequantize, fmt, np.zeros((1, fmt.block_bytes), np.uint8))


def encodes(fmt):
    return does(gguf.quantize, fmt, np.zeros((1, fmt.block_values), np.float32))


GGMLS = [f for f in tbq.formats() if f.dialect == GGML and gguf_type(f) is not None]
OWN = [f for f in GGMLS if decodes(f)]
by_gguf = pytest.mark.parametrize("fmt", OWN, ids=lambda fmt: fmt.name)


def blocks_of_any_codes(fmt, rng):
    """Return rows of random bits whose scales are finite."""
    packed = rng.integers(0, 256, (300, fmt.row_bytes(2 * fmt.block_values)), np.uint8)
    blocks = fmt.codec.blocks(packed).reshape(-1)
    for name in fmt.layout.scales:
        scale = 10.0 ** rng.uniform(-6, 3, len(blocks)) * rng.choice([-1, 1], len(blocks))
        blocks[name] = scale.astype(np.float16)
    return packed


# What gguf-py reads otherwise than C: E4M3 of nvfp4 has no sign in either, but C takes only 0x7F
# for NaN, so that the byte with the high bit set means 240.
OTHERWISE = {"nvfp4": lambda blocks: (blocks["d"] & 0x7F == 0x7F).any(axis=1)}


@by_gguf
def test_gguf_py_decodes_the_same(fmt, rng):
    packed = blocks_of_any_codes(fmt, rng)
    y = tbq.dequantize(packed, fmt)
    with np.errstate(over="ignore"):
        theirs = gguf.dequantize(packed, gguf_type(fmt))
    keep = np.ones(len(packed) * 2, bool)
    if fmt.name in OTHERWISE:
        keep = ~OTHERWISE[fmt.name](fmt.codec.blocks(packed).reshape(-1))
        assert not keep.all()
    ours, theirs = (a.reshape(len(keep), -1)[keep] for a in (y, theirs))
    assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("fmt", [f for f in GGMLS if encodes(f)], ids=lambda fmt: fmt.name)
def test_gguf_py_encodes_finite_values_the_same(fmt, rng):
    x = rng.standard_normal((300, 2 * fmt.block_values)).astype(np.float32)
    assert np.array_equal(tbq.quantize(x, fmt), gguf.quantize(x, gguf_type(fmt)))


def test_minima_keep_the_sign_of_their_zero():
    """gguf-py keeps that of any zero, C that of the first."""
    zeros = np.zeros((1, 32), np.float32)
    mixed = np.concatenate([zeros, -zeros], axis=1)
    for name in ("q4_1", "q5_1"):
        assert tbq.quantize(zeros, name)[0, 2:4].view("<u2") == 0
        assert tbq.quantize(-zeros, name)[0, 2:4].view("<u2") == 0x8000
        assert tbq.quantize(mixed[:, 16:48], name)[0, 2:4].view("<u2") == 0
        assert tbq.quantize(mixed[:, ::-1][:, 16:48], name)[0, 2:4].view("<u2") == 0x8000
    for name in ("q4_0", "q5_0"):
        assert tbq.quantize(zeros, name)[0, :2].view("<u2") == 0x8000


# --- other writers of the same types -------------------------------------------------------------


def test_the_cpu_cache_rounds_ties_to_even_and_marks_what_does_not_fit():
    x = np.zeros((4, 32), np.float32)
    x[0, :5] = 127, 0.5, 1.5, 2.5, -0.5
    x[1, :2] = np.nan, 1
    x[2, :2] = np.inf, 1
    x[3] = 1e-41  # the scale is gone, its inverse infinite
    ref, cpu = (tbq.quantize(x, name)[:, 2:].view(np.int8) for name in ("q8_0", "ggml-cpu:q8_0"))
    assert ref[0, :5].tolist() == [127, 1, 2, 3, -1]
    assert cpu[0, :5].tolist() == [127, 0, 2, 2, 0]
    assert (ref[1:] != -128).all()
    assert cpu[1, 0] == cpu[2, 0] == -128
    assert (cpu[3] == -128).all()
    assert (ref[3] == 0).all()


def test_a_searched_scale_is_no_worse(rng):
    x = rng.standard_normal((400, 32)).astype(np.float32)
    error = {}
    for name in ("ggml:iq4_nl", "llama-quantize:iq4_nl"):
        y = tbq.dequantize(tbq.quantize(x, name), name)
        error[name] = (x**2 * (y - x) ** 2).sum()  # what is minimised
    assert error["llama-quantize:iq4_nl"] < 0.95 * error["ggml:iq4_nl"]


@pytest.mark.parametrize("name", ["ggml-cpu:q8_0", "llama-quantize:iq4_nl"])
def test_another_writer_is_read_and_repacked_as_ggmls_own(name, rng):
    fmt = tbq.get_format(name)
    own = tbq.get_format(fmt.name)
    x = rng.standard_normal((9, 96)).astype(np.float32)
    packed = tbq.quantize(x, fmt)
    assert same(tbq.dequantize(packed, fmt), tbq.dequantize(packed, own))
    assert np.array_equal(tbq.repack(packed, fmt, own), packed)
    assert get_dialect(fmt.dialect).type_id(fmt) == get_dialect(GGML).type_id(own)


def test_two_bits_of_prismml_are_wider(rng):
    x = rng.standard_normal((5, 256)).astype(np.float32)
    x[:, ::64] = 9  # every group of either width has the same scale
    wide = tbq.quantize(x, "prismml:pq2_0").reshape(5, 2, 34)
    narrow = tbq.quantize(x, "q2_0").reshape(5, 2, 2, 18)
    assert np.array_equal(wide[:, :, 2:].reshape(5, 2, 2, 16), narrow[..., 2:])
    assert np.array_equal(wide[:, :, :2], narrow[:, :, 0, :2])


# --- small floats --------------------------------------------------------------------------------


def test_f8_has_the_values_and_ties_that_gguf_py_tests():
    codes = np.array([0x00, 0x80, 0x38, 0xB8, 0x7E, 0xFE, 0x01, 0x81, 0x7F, 0xFF], np.uint8)
    y = tbq.dequantize(codes, "f8_e4m3")
    assert y[:8].tolist() == [0, 0, 1, -1, 448, -448, 2.0**-9, -(2.0**-9)]
    assert np.signbit(y[1])
    assert np.isnan(y[8:]).all()
    ties = np.array([1.0625, 1.1875, -1.0625, -1.1875, -0.0], np.float32)
    assert tbq.quantize(ties, "f8_e4m3").tolist() == [0x38, 0x3A, 0xB8, 0xBA, 0x80]


def test_f8_is_that_of_ml_dtypes_within_its_range(rng):
    import ml_dtypes

    x = rng.standard_normal(4000) * 10.0 ** rng.uniform(-4, 2.5, 4000)
    x = np.concatenate([x, E4M3[:127], (E4M3[1:127] + E4M3[:126]) / 2, [np.nan, -np.nan]])
    x = np.clip(x, -464, 464).astype(np.float32)
    expected = x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(tbq.quantize(x, "f8_e4m3"), expected)


def test_four_bits_are_the_nearest_level(rng):
    x = rng.standard_normal((50, 64)).astype(np.float32)
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for name, values in (("mxfp4", 32), ("nvfp4", 16)):
        y = tbq.dequantize(tbq.quantize(x, name), name).reshape(-1, values)
        size = np.abs(y).max(axis=1, keepdims=True)
        scales = size / levels[1:]  # one of these it is
        runs = np.abs(x.reshape(-1, values))
        best = np.full(len(runs), np.inf)
        for s in scales.T:
            off = np.abs(runs[..., None] - levels * s[:, None, None]).min(axis=-1)
            best = np.minimum(best, np.abs(off - np.abs(runs - np.abs(y))).max(axis=1))
        assert (best < 1e-6).all()


# --- what is still gguf-py's ---------------------------------------------------------------------


def test_what_is_left_to_gguf_py_has_no_better_codec_here():
    left = {f.name for f in all_formats() if isinstance(f.codec, ThroughGguf)}
    assert not left & {f.name for f in OWN}
    assert {f.name for f in all_formats() if f.evidence == "gguf-py"} == left


@pytest.mark.parametrize("fmt", [f for f in all_formats() if f.dialect == GGML], ids=str)
def test_sizes_are_those_of_gguf_py(fmt):
    """But for q8_1: d and s are float16 in ggml-common.h, four bytes each in gguf-py's table."""
    if gguf_type(fmt) is None:
        return
    values, size = gguf.GGML_QUANT_SIZES[gguf_type(fmt)]
    assert fmt.block_values == values
    assert fmt.block_bytes == (size - 4 if fmt.name == "q8_1" else size)
