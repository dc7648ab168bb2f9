"""The GPU port against the CPU oracle, to the bit.

Runs on a device. Without one it is skipped here, and test_cuda_port.py runs it in Numba's
simulator, in a process of its own: `NUMBA_ENABLE_CUDASIM=1 pytest tests/test_cuda_kernels.py`.
"""

import os

import numpy as np
import pytest
from conftest import FORMATS, FULL, PROVEN, REPRESENTATIVES, vectors_path
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_port
import tbq
from cuda_port import compare
from tbq.families import trellis
from tbq.numerics import fp16_bits

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
if SIMULATED:
    from cuda_port import attention, tiles  # before anything takes the numbers from them

    tiles.MOST_THREADS, attention.THREADS = 4, 8  # threads cost it more than what they do
if not cuda_port.is_available():
    pytest.skip("no CUDA device; test_cuda_port.py simulates one", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy scalars do overflow
api = pytest.importorskip("cuda_port.api")
PORTED = [f for f in FORMATS if api.ported(f)]
SEARCHED = [f for f in PORTED if isinstance(f.codec, trellis.Trellis)]
# 65536 states are too many for the simulator: see the small trellis below
ENCODED = [f for f in PORTED if not (SIMULATED and f in SEARCHED)]
# Hundreds of states take it a second per group: one of a kind, beside the forks' own bytes
DRAWN = [f for f in ENCODED if not (SIMULATED and f.codec.searches) or f in REPRESENTATIVES or FULL]
KEYS = 2 if SIMULATED else 3
EXAMPLES = settings(max_examples=2 if SIMULATED else 100, deadline=None, derandomize=True)
each = pytest.mark.parametrize("fmt", PORTED, ids=lambda fmt: fmt.label)
# Attention adds to the kernels of a kind what no table of a format changes
OF_KINDS = [f for f in PORTED if f in REPRESENTATIVES or not SIMULATED or FULL]
each_kind = pytest.mark.parametrize("fmt", OF_KINDS, ids=lambda fmt: fmt.label)
each_encoder = pytest.mark.parametrize("fmt", DRAWN, ids=lambda fmt: fmt.label)

NO_CACHES = {f"tbq.families.{name}" for name in ("ternary", "small_floats", "k_quants")}
SPECIALS = [
    0.0,
    -0.0,
    np.nan,
    -np.float32(np.nan),
    np.inf,
    -np.inf,
    1e-42,
    -1e-20,
    65504.0,
    1e30,
    3e38,
]


def shapes(fmt):
    """Rows, and groups per row: in the simulator one of what is a lot of work, else two at most."""
    if not SIMULATED:
        return st.tuples(st.integers(1, 2), st.integers(1, 2))
    heavy = fmt.codec.searches or fmt.group_values >= 256
    return st.just((1, 1)) if heavy else st.sampled_from([(1, 2), (2, 1)])


@st.composite
def rows(draw, fmt):
    """Float32 rows, normal or with specials, on a few scales."""
    n_rows, groups = draw(shapes(fmt))
    shape = n_rows, groups * fmt.group_values
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    x = rng.standard_normal(shape).astype(np.float32)
    x *= np.float32(draw(st.sampled_from([1.0, 1e-8, 1e4, 1e-22])))
    for value in draw(st.lists(st.sampled_from(SPECIALS), max_size=2)):
        x[rng.integers(shape[0]), rng.integers(shape[1])] = value
    if draw(st.booleans()):
        x[0, : fmt.group_values] = 0
    return x


def equal(a, b):
    """Equal in dtype, shape and bits; any NaN equals any other."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return not len(compare.wrong_values(a, b)) if a.dtype.kind == "f" else np.array_equal(a, b)


def test_formats_are_ported():
    """All but where chance, a whole row, or sines that no two libraries round alike decide.

    And those of weights, which no cache takes.
    """
    left_out = {f.label for f in FORMATS} - {f.label for f in PORTED}
    by_chance = {f"llama-tq-cuda:ktq{bits}_1" for bits in (1, 2, 3, 4)}
    of_weights = {f.label for f in FORMATS if type(f.codec).__module__ in NO_CACHES}
    assert left_out == by_chance | of_weights | {"amesianx:amx3_1", "ik_llama:q8_KV"}


@pytest.mark.parametrize("fmt", [f for f in PORTED if f in PROVEN], ids=lambda fmt: fmt.label)
def test_kernels_reproduce_the_forks_own_bytes(fmt):
    """Not only the oracle's: rows of each category of the vectors, special values among them."""
    with np.load(vectors_path(fmt)) as file:
        v = {name: file[name] for name in file.files}
    _, first = np.unique(v["category"], return_index=True)
    some, blocks = first, 2 * fmt.group_values
    if SIMULATED:
        some, blocks = first[:2], blocks // 2 if fmt.codec.searches else blocks
        some = some[:1] if fmt.group_values >= 256 or fmt.codec.searches else some
    if fmt in ENCODED and fmt.codec.position != "tensor":
        expected = v["packed"][some][:, : fmt.row_bytes(blocks)]
        x = np.ascontiguousarray(v["x"][some][:, :blocks])
        written = ~v["undefined"][some][:, : expected.shape[1]] if "undefined" in v else ...
        assert np.array_equal(cuda_port.quantize(x, fmt)[written], expected[written])
    if "y" in v:
        packed = np.ascontiguousarray(v["packed"][some][:, : fmt.row_bytes(blocks)])
        assert equal(cuda_port.dequantize(packed, fmt), v["y"][some][:, :blocks])


@each_encoder
@EXAMPLES
@given(st.data())
def test_quantize_is_the_oracles(fmt, data):
    x = data.draw(rows(fmt))
    assert not len(compare.wrong_bytes(fmt, cuda_port.quantize(x, fmt), tbq.quantize(x, fmt)))


@each
@EXAMPLES
@given(st.data())
def test_dequantize_is_the_oracles(fmt, data):
    n_rows, groups = data.draw(shapes(fmt))
    shape = n_rows, groups * fmt.block_bytes * fmt.codec.group_blocks
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    packed = rng.integers(0, 256, shape, dtype=np.uint8)  # every field at random
    blocks = packed.view(fmt.block)
    if fmt.layout.outliers:
        blocks[fmt.layout.outliers[0]] %= fmt.block_values
    if data.draw(st.booleans()):
        for name in fmt.layout.scales:
            blocks[name] = np.float16(0.37)
    assert equal(cuda_port.dequantize(packed, fmt), tbq.dequantize(packed, fmt))


@each_kind
@EXAMPLES
@given(st.data())
def test_attention_is_the_oracles(fmt, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    _, blocks = data.draw(shapes(fmt))
    x = rng.standard_normal((KEYS, blocks * fmt.group_values)).astype(np.float32)
    packed = tbq.quantize(x, fmt)
    if fmt.layout.signs and data.draw(st.booleans()):
        packed.view(fmt.block)[fmt.layout.signs][1] ^= 0x5A  # rows that differ in their signs
    if fmt.sibling:
        with pytest.raises(tbq.BackendError, match=r"not ported; tbq.scores"):
            cuda_port.scores(np.ones(blocks * 32, np.float32), packed, fmt)
        return
    if "K" in fmt.side:
        q = rng.standard_normal((2, blocks * fmt.group_values)).astype(np.float32)
        assert equal(cuda_port.scores(q, packed, fmt), tbq.scores(q, packed, fmt))
    if "V" in fmt.side:
        p = rng.random((2, KEYS), dtype=np.float32)
        assert equal(cuda_port.weighted_sum(p, packed, fmt), tbq.weighted_sum(p, packed, fmt))


def walked(fmt, x, table, state_bits):
    """Encode blocks (n, 128) with a trellis of 2^state_bits states, as the specification does."""
    bits, count = fmt.codec.bits, fmt.codec.outliers
    blocks = np.zeros(len(x), fmt.block)
    for block, row in zip(blocks, x.copy(), strict=True):
        picked = trellis.pick_outliers(row, count) if count else []
        if count:
            block["pos"][: len(picked)] = picked
            block["val"][: len(picked)] = fp16_bits(row[picked]).view(np.float16)
            row[picked] = 0
        norm = np.sqrt((row.astype(np.float64) ** 2).cumsum()[-1]).astype(np.float32)
        if norm < trellis.TINY:
            continue
        states = trellis.viterbi(row * (np.float32(1) / norm), bits)
        rn = np.sqrt((table[states[1:]].astype(np.float64) ** 2).cumsum()[-1]).astype(np.float32)
        block["start"] = states[0]
        block["qs"] = trellis.pack(states[1:] >> (state_bits - bits), bits)
        block["d"] = fp16_bits(norm / rn).view(np.float16)
    return blocks.view(np.uint8).reshape(len(x), -1)


@pytest.mark.parametrize("fmt", SEARCHED, ids=lambda fmt: fmt.key)
def test_the_search_is_the_specifications_on_a_small_trellis(fmt, monkeypatch, rng):
    from numba import cuda

    from cuda_port.families import trellis as port

    state_bits = 8
    table = np.sort(rng.standard_normal(1 << state_bits)).astype(np.float32)[
        rng.permutation(1 << state_bits)
    ] * np.float32(0.09)
    table[5::7] = table[4::7][: len(table[5::7])]  # equal levels: ties that order decides
    monkeypatch.setattr(trellis, "STATES", 1 << state_bits)
    monkeypatch.setattr(trellis, "code_table", lambda: table)
    x = rng.standard_normal((1 if fmt.codec.outliers else 2, 128)).astype(np.float32)
    x[-1] = np.round(4 * x[-1])  # equal values: equal costs, equal outliers
    expected = walked(fmt, x, table, state_bits)
    packed = cuda.to_device(np.zeros(expected.size // 2, np.uint16))
    bits = fmt.codec.bits
    scratch = cuda.to_device(np.zeros((1, port.scratch_values(bits, state_bits)), np.float32))
    tables = cuda.to_device(table), cuda.to_device(port.side_by_side(table, bits))
    kernel = port.encoder(fmt.codec, state_bits, 8)
    kernel[1, 8](cuda.to_device(x.reshape(-1)), *tables, scratch, packed)
    found = packed.copy_to_host().view(np.uint8)
    assert np.array_equal(found.reshape(expected.shape), expected)


def test_sums_have_the_codecs_order(rng):
    """Stored norms are rounded to float16, which hides the order in nearly all blocks."""
    from numba import cuda

    from cuda_port import sums
    from tbq.families.vllm import ADDED

    v = rng.standard_normal((20, 128)).astype(np.float32)
    assert set(sums.ORDERS) == ADDED.keys()
    found = np.empty((len(ADDED), len(v)), np.float32)
    for k, order in enumerate(sums.ORDERS):
        add_up = sums.squares(128, order)

        @cuda.jit
        def run(v, out, add_up=add_up):
            out[0] = add_up(v)

        for i, row in enumerate(v):
            out = cuda.to_device(np.empty(1, np.float32))
            run[1, 1](cuda.to_device(row), out)
            found[k, i] = out.copy_to_host()[0]
        assert equal(found[k], ADDED[order](v * v)), order
    assert len(np.unique(found, axis=0)) == len(ADDED)


def test_device_arrays_stay_on_the_device():
    from numba import cuda

    fmt = tbq.get_format("vtq2_1")
    x = np.random.default_rng(0).standard_normal((2, 2, 64)).astype(np.float32)
    stream = cuda.stream()
    packed = cuda_port.quantize(cuda.to_device(x), fmt, stream=stream)
    assert packed.shape == (2, 2, 20)
    y = cuda_port.dequantize(packed, fmt, stream=stream)
    stream.synchronize()
    assert equal(packed.copy_to_host(), tbq.quantize(x, fmt))
    assert equal(y.copy_to_host(), tbq.dequantize(tbq.quantize(x, fmt), fmt))
    keys = cuda_port.quantize(cuda.to_device(x[0]), "ktq1_1")
    q = x[1, 0]
    assert equal(
        cuda_port.scores(q, keys, "ktq1_1"), tbq.scores(q, tbq.quantize(x[0], "ktq1_1"), "ktq1_1")
    )


def test_signs_of_rows_on_the_device_are_looked_at(rng):
    from numba import cuda

    x, q = rng.standard_normal((3, 64)).astype("f4"), rng.standard_normal(64).astype("f4")
    packed = tbq.quantize(x, "ktq2_1")
    for change in (0, 1):
        packed.view(tbq.get_format("ktq2_1").block)["sb"][2, 1, 3] ^= change
        found = cuda_port.scores(q, cuda.to_device(packed), "ktq2_1")
        assert equal(found, tbq.scores(q, packed, "ktq2_1"))


def test_host_arrays_go_through_in_chunks(monkeypatch, rng):
    from cuda_port import api

    fmt = tbq.get_format("vtq1_1")
    x = rng.standard_normal((5, 32)).astype(np.float32)
    monkeypatch.setattr(api, "CHUNK_VALUES", 64)
    packed = cuda_port.quantize(x, fmt)
    assert equal(packed, tbq.quantize(x, fmt))
    assert equal(cuda_port.dequantize(packed, fmt), tbq.dequantize(packed, fmt))
    keys = tbq.quantize(x, "ktq1_1")
    assert equal(cuda_port.scores(x[:1], keys, "ktq1_1"), tbq.scores(x[:1], keys, "ktq1_1"))


def test_runs_of_keys_are_summed_apart(monkeypatch, rng):
    from cuda_port import api, attention

    keys, run = (11, 4) if SIMULATED else (1100, 512)  # the simulator is slow
    for module in (api, attention, tbq.attention):
        monkeypatch.setattr(module, "RUN_KEYS", run)
    monkeypatch.setattr(api, "CHUNK_VALUES", 32 * run)
    row = tbq.quantize(rng.standard_normal((7, 32)).astype("f4"), "vtq2_1")
    packed, p = np.resize(row, (keys, 10)), rng.random((1, keys), dtype=np.float32)
    found = cuda_port.weighted_sum(p, packed, "vtq2_1")
    assert equal(found, tbq.weighted_sum(p, packed, "vtq2_1"))


class Foreign:
    """An array of another library: all that is known of it is its interface."""

    def __init__(self, array):
        self.array = array  # where it is alive
        of_device = getattr(array, "__cuda_array_interface__", None)
        self.__cuda_array_interface__ = of_device or {"version": 3, "data": (0, True)}


def foreign(array):
    """Return an array as another library has it on the device."""
    from numba import cuda

    return Foreign(array) if SIMULATED else Foreign(cuda.to_device(array))


@pytest.fixture
def interfaces(monkeypatch):
    """Let the simulator, which knows no interface, read one."""
    from numba import cuda

    if SIMULATED:
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        monkeypatch.setattr(cuda, "as_cuda_array", lambda x: FakeCUDAArray(x.array), raising=False)


@pytest.mark.usefixtures("interfaces")
def test_arrays_of_other_libraries(rng):
    """As CuPy's and PyTorch's are: strided, read-only, of no values, on a stream."""
    from numba import cuda

    wide = rng.standard_normal((3, 2, 128)).astype(np.float32)
    frozen = wide[:, 0].copy()
    frozen.setflags(write=False)
    if not SIMULATED:  # strides of the device's own arrays
        wide = cuda.to_device(wide)
    stream = cuda.stream()
    for x, host in (
        (wide[:, 1, ::2], None),
        (wide[1:, :, :64], None),
        (frozen, frozen),
        (frozen[:0], frozen[:0]),
    ):
        host = np.ascontiguousarray(x if SIMULATED else x.copy_to_host()) if host is None else host
        given = foreign(x) if SIMULATED or host is x else x
        packed = cuda_port.quantize(given, "vtq2_1", stream=stream)
        stream.synchronize()
        assert equal(packed.copy_to_host(), tbq.quantize(host, "vtq2_1"))
    rows = tbq.quantize(frozen, "ktq2_1")
    every = np.repeat(rows, 2, axis=0)
    q = foreign(frozen[:2, ::1])
    found = cuda_port.scores(q, foreign(every) if SIMULATED else cuda.to_device(every), "ktq2_1")
    assert equal(found.copy_to_host(), tbq.scores(frozen[:2], every, "ktq2_1"))


def test_results_go_where_they_are_told(rng):
    from numba import cuda

    x = rng.standard_normal((2, 64)).astype(np.float32)
    packed = np.zeros((2, 20), np.uint8)
    assert cuda_port.quantize(x, "vtq2_1", out=packed) is packed
    assert equal(packed, tbq.quantize(x, "vtq2_1"))
    there = cuda.to_device(np.zeros((2, 64), np.float32))
    cuda_port.dequantize(cuda.to_device(packed), "vtq2_1", out=there)
    assert equal(there.copy_to_host(), tbq.dequantize(packed, "vtq2_1"))
    p = rng.random((3, 2), dtype=np.float32)
    total = cuda.to_device(np.zeros((3, 64), np.float32))
    cuda_port.weighted_sum(cuda.to_device(p), packed, "vtq2_1", out=total)
    assert equal(total.copy_to_host(), tbq.weighted_sum(p, packed, "vtq2_1"))
    for out in (np.zeros((2, 20), np.int8), np.zeros((2, 21), np.uint8), there):
        with pytest.raises(tbq.InputError, match="out"):
            cuda_port.quantize(x, "vtq2_1", out=out)


def test_memory_that_is_not_there(monkeypatch, rng):
    """Host arrays go in smaller chunks; what has to fit and does not is refused with its size."""
    from numba import cuda

    from cuda_port import arrays
    from cuda_port.errors import DeviceMemoryError

    x = rng.standard_normal((5, 32)).astype(np.float32)
    monkeypatch.setattr(arrays, "free_bytes", lambda: 2048)
    assert list(api._chunks(5, 32)) == [(0, 2), (2, 4), (4, 5)]
    assert equal(cuda_port.quantize(x, "vtq1_1"), tbq.quantize(x, "vtq1_1"))
    there = cuda.to_device(x)

    def full(*args, **options):
        raise MemoryError("out of memory")

    monkeypatch.setattr(arrays.cuda, "device_array", full)
    with pytest.raises(DeviceMemoryError, match="30 bytes, 2048 are free: out of memory"):
        cuda_port.quantize(there, "vtq1_1")


def test_many_queries(rng):
    """More than the second axis of a grid could have."""
    keys = tbq.quantize(rng.standard_normal((2, 32)).astype("f4"), "ktq2_1")
    q = rng.standard_normal((6 if SIMULATED else 70000, 32)).astype("f4")
    assert equal(cuda_port.scores(q, keys, "ktq2_1"), tbq.scores(q, keys, "ktq2_1"))


def test_only_a_nan_may_differ():
    fmt = tbq.get_format("q4_1")
    packed = np.zeros((1, 40), np.uint8)
    packed.view("<u2")[0, 0] = 0x7E00
    other = packed.copy()
    other.view("<u2")[0, 0] = 0xFE00
    assert not len(compare.wrong_bytes(fmt, other, packed))
    other[0, [1, 30]] = 0x7C, 1  # no NaN any more, and a code
    assert list(compare.wrong_bytes(fmt, other, packed)) == [1, 30]
    y = np.array([np.nan, 0.0, -0.0], np.float32)
    assert list(compare.wrong_values(-y, y)) == [1, 2]


def test_empty_arrays():
    x = np.empty((0, 64), np.float32)
    packed = cuda_port.quantize(x, "vtq2_1")
    assert packed.shape == (0, 20)
    assert cuda_port.dequantize(packed, "vtq2_1").shape == (0, 64)
    q = np.ones((2, 64), np.float32)
    assert cuda_port.scores(q, np.empty((0, 28), np.uint8), "ktq2_1").shape == (2, 0)


def test_wrong_calls():
    for call, error, words in (
        (lambda: cuda_port.quantize(np.ones(64), "vtq2_1"), tbq.InputError, "float32 array"),
        (lambda: cuda_port.quantize(np.ones(60, "f4"), "vtq2_1"), tbq.InputError, "multiple of 32"),
        (lambda: cuda_port.quantize(np.ones(64, "f4"), "nope"), tbq.UnknownFormatError, "nope"),
        (
            lambda: cuda_port.quantize(np.ones(64, "f4"), "llama-tq-cuda:ktq2_1"),
            tbq.BackendError,
            "not ported",
        ),
        (
            lambda: cuda_port.scores(np.ones(64, "f4"), np.ones((1, 20), "u1"), "vtq2_1"),
            tbq.InputError,
            "for K",
        ),
        (
            lambda: cuda_port.scores(np.ones(32, "f4"), np.ones((1, 28), "u1"), "ktq2_1"),
            tbq.InputError,
            "64",
        ),
        (
            lambda: cuda_port.weighted_sum(np.ones(2, "f4"), np.ones((1, 20), "u1"), "vtq2_1"),
            tbq.InputError,
            "2 in a row",
        ),
    ):
        with pytest.raises(error, match=words):
            call()
    corrupt = tbq.quantize(np.ones((2, 128), np.float32), "vtq2_3")
    corrupt.view(tbq.get_format("vtq2_3").block)["pos"][1, 0, 3] = 200
    with pytest.raises(tbq.CorruptBlockError, match="block 1"):
        cuda_port.dequantize(corrupt, "vtq2_3")
