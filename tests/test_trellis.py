"""The fast trellis search against the plain one, where rounding and ties decide.

In CI a sample. `TBQ_FULL=1 python -m pytest tests/test_trellis.py -s` runs 2 000 random blocks per
K and many more adversarial ones (a quarter of an hour on two cores) and prints a summary.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from naive_trellis import best_walk

import tbq
from tbq.families import trellis
from tbq.kernels import trellis as kernels

FULL = os.environ.get("TBQ_FULL") == "1"
RANDOM_BLOCKS = 2000 if FULL else 16


def random_blocks(rng, n):
    """Gaussian, heavy-tailed and offset blocks at scales from 1e-10 to 1e10."""
    x = np.concatenate(
        [
            rng.standard_normal((n // 2, 128)),
            rng.standard_t(3, (n // 4, 128)),
            rng.laplace(size=(n - n // 2 - n // 4, 128)) + rng.standard_normal(),
        ]
    )
    return (x * 10.0 ** rng.uniform(-10, 10, (n, 1))).astype(np.float32)


def adversarial_blocks(rng):
    """Blocks in which predecessors tie: exactly, or only after rounding."""
    code = trellis.code_table()
    t = np.arange(128)
    blocks = {
        "constant": np.ones(128),
        "alternating": np.where(t % 2, 1.0, -1.0),
        "ramp": t - 63.5,
        "grid": rng.integers(-2, 3, 128),
        "coarse grid": rng.integers(-1, 2, 128),
        "sparse": np.where(rng.random(128) < 0.05, rng.standard_normal(128), 0),
        "one-hot": (t == 77) * 1.0,
        "first": (t == 0) * 1.0,
        "last": (t == 127) * 1.0,
        "two levels": rng.choice([1e-3, 1.0], 128),
        "huge and tiny": np.where(t == 5, 1e6, 1e-6 * rng.standard_normal(128)),
        "codes": code[rng.integers(0, 1 << 16, 128)],
        "code midpoints": (np.sort(code)[:-1] + np.sort(code)[1:])[rng.integers(0, 65535, 128)] / 2,
        "beyond the table": np.where(t % 3, 30.0, -0.01),
        "powers of two": 2.0 ** rng.integers(-20, 1, 128),
        "infinity": np.where(t == 64, np.inf, rng.standard_normal(128)),
        "NaN": np.where(t == 64, np.nan, rng.standard_normal(128)),
    }
    return {name: np.asarray(x, np.float32) for name, x in blocks.items()}


def walks(x, bits):
    """Return the fast and the plain walk of a block, normalised as the encoder does it."""
    with np.errstate(all="ignore"):
        norm = np.sqrt((x.astype(np.float64) ** 2).sum()).astype(np.float32)
        u = x * (np.float32(1) / norm)
    fast, plain = np.empty(129, np.int64), np.empty(129, np.int64)
    code = trellis.code_table()
    scratch = kernels.make_scratch(bits)
    kernels.search(u, code, kernels._by_branch(bits), bits, scratch, fast)
    best_walk(u, code, bits, plain)
    return fast, plain


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fast_search_equals_the_plain_one(bits, rng):
    blocks = random_blocks(rng, RANDOM_BLOCKS)
    named = [(f"random {i}", x) for i, x in enumerate(blocks)]
    for _ in range(20 if FULL else 1):
        named += adversarial_blocks(rng).items()
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda item: (item[0], *walks(item[1], bits)), named)
        different = [name for name, fast, plain in results if not np.array_equal(fast, plain)]
    print(f"K = {bits}: {len(named) - len(different)} of {len(named)} walks identical")
    assert not different


def test_specification_equals_the_plain_search(rng):
    """The NumPy form in the family module, on a block of each K that has ties."""
    for bits in (2, 3, 4):
        u = adversarial_blocks(rng)["grid"]
        u = u / np.linalg.norm(u)
        plain = np.empty(129, np.int64)
        best_walk(u, trellis.code_table(), bits, plain)
        assert np.array_equal(trellis.viterbi(u, bits), plain)


def test_rounding_ties_do_occur(rng):
    """Without C's choice of predecessor some walk would differ: two costs tie after rounding."""
    code = trellis.code_table()
    u = rng.standard_normal(128).astype(np.float32)
    u /= np.linalg.norm(u)
    groups, found = 1 << 12, 0
    cost = np.zeros(1 << 16, np.float32)
    for i in range(128):
        branch = ((u[i] - code) * (u[i] - code)).reshape(16, groups)
        before = cost.reshape(groups, 16)
        total = before + branch[..., None]
        found += int((total.argmin(axis=-1) != before.argmin(axis=-1)).sum())
        cost = total.min(axis=-1).reshape(-1)
    assert found > 0


def test_code_table_is_gaussian():
    """65536 quantiles of N(0, 1) over sqrt(128): moments, symmetry, range, no duplicates lost."""
    table = trellis.code_table().astype(np.float64) * np.sqrt(128)
    assert abs(table.mean()) < 1e-4
    assert abs(table.std() - 1) < 1e-3
    assert 4.0 < np.abs(table).max() < 5.0
    assert len(np.unique(table)) > 60_000


def test_any_value_decodes_alone(rng):
    """Changing emission i changes at most the values whose 16-bit window holds it."""
    for name, bits in (("vtq2_2", 2), ("vtq3_2", 3), ("vtq4_2", 4)):
        packed = tbq.quantize(rng.standard_normal(128).astype(np.float32), name)
        y = tbq.dequantize(packed, name)
        changed = packed.copy()
        changed[4] ^= 1  # the lowest bit of emission 0
        differs = np.flatnonzero(tbq.dequantize(changed, name) != y)
        assert differs.max() < -(-16 // bits)


@pytest.mark.parametrize("name", ["vtq2_3", "vtq3_3", "vtq4_3", "vtq3_v8"])
def test_outliers_survive_exactly(name, rng):
    fmt = tbq.get_format(name)
    count = fmt.codec.outliers
    x = rng.standard_normal((3, 128)).astype(np.float32)
    positions = np.sort(rng.permuted(np.tile(np.arange(128), (3, 1)), axis=1)[:, :count], axis=1)
    np.put_along_axis(x, positions, np.float32(100.0) + positions, axis=1)
    packed = tbq.quantize(x, fmt)
    y = tbq.dequantize(packed, fmt)
    assert np.array_equal(packed.view(fmt.block)["pos"][:, 0], positions)
    assert np.array_equal(np.take_along_axis(y, positions, axis=1), np.float32(100.0) + positions)


def test_memory_per_thread():
    """What one search writes to and reads, at most 8 MiB."""
    for bits in (2, 3, 4):
        scratch = sum(array.nbytes for array in kernels.make_scratch(bits))
        tables = trellis.code_table().nbytes + kernels._by_branch(bits).nbytes
        assert scratch + tables < 8 << 20


def test_outliers_outside_the_block_are_refused(rng):
    fmt = tbq.get_format("vtq3_v8")
    packed = tbq.quantize(rng.standard_normal((4, 256)).astype(np.float32), fmt)
    packed.reshape(-1, fmt.block_bytes).view(fmt.block)["pos"][5, 0, 1] = 128
    with pytest.raises(tbq.CorruptBlockError, match="block 5 of llama-tq:vtq3_v8") as caught:
        tbq.dequantize(packed, fmt, threads=1)
    assert caught.value.block == 5
