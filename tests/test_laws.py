"""Laws that hold for every format, on arbitrary shapes, strides, dtypes and values."""

import ml_dtypes
import numpy as np
import pytest
from conftest import FORMATS
from hypothesis import given
from hypothesis import strategies as st

import tbq

DTYPES = ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "g", ml_dtypes.bfloat16]
formats = st.sampled_from(FORMATS)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def arrays(draw, fmt):
    """Floats of any dtype, 1 to 4 axes and any strides, sometimes with NaN and infinities."""
    lead = draw(st.lists(st.integers(0, 3), max_size=3))
    n = fmt.group_values * draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(seeds))
    steps = [draw(st.sampled_from([1, 2, -1, -2])) for _ in range(len(lead) + 1)]
    padded = [abs(s) * m for s, m in zip(steps, [*lead, n], strict=True)]
    x = rng.standard_normal(padded) * 10.0 ** draw(st.integers(-3, 3))
    if draw(st.booleans()):
        x[rng.random(x.shape) < 0.01] = rng.choice([np.nan, np.inf, -np.inf])
    view = x.astype(draw(st.sampled_from(DTYPES)))[tuple(slice(None, None, s) for s in steps)]
    axes = draw(st.permutations(range(len(lead))))
    return view.transpose(*axes, len(lead))


@given(st.data())
def test_shape_stride_dtype_and_threads_change_no_byte(data):
    fmt = data.draw(formats)
    x = data.draw(arrays(fmt))
    threads = data.draw(st.sampled_from([1, 2, 5]))
    packed = tbq.quantize(x, fmt, threads=threads)
    plain = np.array(x, np.float32, order="C")
    assert packed.dtype == np.uint8
    assert packed.shape == (*x.shape[:-1], fmt.row_bytes(x.shape[-1]))
    assert np.array_equal(packed, tbq.quantize(plain, fmt, threads=1))
    y = tbq.dequantize(packed, fmt, threads=threads)
    assert y.dtype == np.float32
    assert y.shape == x.shape
    strided = np.repeat(packed, 2, axis=-1)[..., ::2]
    assert tbq.dequantize(strided, fmt).tobytes() == y.tobytes()


@given(st.data())
def test_rows_are_independent(data):
    fmt = data.draw(formats.filter(lambda f: f.codec.position in ("none", "row")))
    rows = data.draw(st.integers(1, 5))
    x = np.random.default_rng(data.draw(seeds)).standard_normal((rows, 2 * fmt.group_values))
    packed = tbq.quantize(x, fmt)
    for i in range(rows):
        assert np.array_equal(tbq.quantize(x[i], fmt), packed[i])


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_chunk_size_changes_no_byte(fmt, rng, monkeypatch, chunk):
    x = rng.standard_normal((37, 3 * fmt.group_values)).astype(np.float32)
    packed = tbq.quantize(x, fmt, threads=1)
    y = tbq.dequantize(packed, fmt, threads=1)
    monkeypatch.setattr("tbq.api.CHUNK_VALUES", chunk)
    for threads in (1, 3):
        assert np.array_equal(tbq.quantize(x, fmt, threads=threads), packed)
        assert tbq.dequantize(packed, fmt, threads=threads).tobytes() == y.tobytes()


def test_out_is_filled_and_returned(fmt, rng):
    x = rng.standard_normal((3, fmt.group_values)).astype(np.float32)
    packed = np.full((3, fmt.row_bytes(fmt.group_values)), 0xAA, np.uint8)
    assert tbq.quantize(x, fmt, out=packed) is packed
    assert np.array_equal(packed, tbq.quantize(x, fmt))
    y = np.full(x.shape, np.nan, np.float32)
    assert tbq.dequantize(packed, fmt, out=y) is y
    assert np.isfinite(y).all()


def test_inputs_are_not_modified(fmt, rng):
    x = rng.standard_normal((2, fmt.group_values)).astype(np.float32)
    before = x.copy()
    packed = tbq.quantize(x, fmt)
    packed_before = packed.copy()
    tbq.dequantize(packed, fmt)
    assert np.array_equal(x, before)
    assert np.array_equal(packed, packed_before)
