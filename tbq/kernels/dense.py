"""Dense matrices and norms, four vectors at a time: each sum keeps its order, four hide latency."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tbq.kernels.compile import jit
from tbq.kernels.simd import Lanes, Tables, on_lanes

ZERO = np.float32(0.0)
TOGETHER = 4  # vectors that share what is loaded of a matrix
WIDTH, HEIGHT = 8, 2  # values of a register, and registers of outputs per vector
OUTPUTS = WIDTH * HEIGHT
UNROLLED = 4


def tiles(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix (n, n) as multipliers take it: columns, sixteen outputs of all together."""
    n = len(matrix)
    return np.ascontiguousarray(matrix.reshape(n // OUTPUTS, OUTPUTS, n).transpose(0, 2, 1))


def _tile(n: int):
    """Return an intrinsic that multiplies four vectors of n values for sixteen outputs of each.

    Sums stay in registers from the first product to the last, which no loop in Python gets the
    compiler to do. Products and sums are instructions of their own without flags, so nothing is
    contracted or reordered; a lane is an output.
    """

    @intrinsic
    def tile(context, matrix, x, y, number):
        signature = types.void(matrix, x, y, types.intp)

        def generate(context, builder, signature, arguments):
            *arrays, number = arguments
            found = zip(signature.args, arrays)  # noqa: B905 (the number has no array)
            data = [context.make_array(kind)(context, builder, a).data for kind, a in found]
            _multiply_tile(builder, n, number, *data)
            return context.get_dummy_value()

        return signature, generate

    return tile


def _multiply_tile(
    b: ir.IRBuilder, n: int, number: ir.Value, matrix: ir.Value, x: ir.Value, y: ir.Value
) -> None:
    """Write the instructions for a tile by its number; the arrays are float pointers."""
    value, i32, i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
    vector = ir.VectorType(value, WIDTH)
    matrix = b.gep(matrix, [b.mul(number, i64(n * OUTPUTS))])
    y = b.gep(y, [b.mul(number, i64(OUTPUTS))])
    before, loop = b.block, b.append_basic_block("inputs")
    after = b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    j = b.phi(i64)
    j.add_incoming(i64(0), before)
    zero = ir.Constant(vector, [0.0] * WIDTH)
    sums = [[b.phi(vector) for _ in range(HEIGHT)] for _ in range(TOGETHER)]
    for phi in (phi for row in sums for phi in row):
        phi.add_incoming(zero, before)

    def register(pointer: ir.Value, at: ir.Value) -> ir.Value:
        return b.bitcast(b.gep(pointer, [at]), vector.as_pointer())

    current = [list(row) for row in sums]
    for step in range(UNROLLED):
        at = b.add(j, i64(step))
        row = b.mul(at, i64(OUTPUTS))
        columns = []
        for k in range(HEIGHT):
            columns.append(b.load(register(matrix, b.add(row, i64(WIDTH * k)))))
            columns[-1].align = 4
        for k in range(TOGETHER):
            one = b.load(b.gep(x, [b.add(at, i64(n * k))]))
            single = b.insert_element(ir.Constant(vector, ir.Undefined), one, i32(0))
            same = ir.Constant(ir.VectorType(i32, WIDTH), [0] * WIDTH)
            spread = b.shuffle_vector(single, ir.Constant(vector, ir.Undefined), same)
            for m, column in enumerate(columns):
                current[k][m] = b.fadd(current[k][m], b.fmul(column, spread))
    following = b.add(j, i64(UNROLLED))
    j.add_incoming(following, loop)
    for k in range(TOGETHER):
        for m in range(HEIGHT):
            sums[k][m].add_incoming(current[k][m], loop)
    b.cbranch(b.icmp_signed("<", following, i64(n)), loop, after)
    b.position_at_end(after)
    for k in range(TOGETHER):
        for m in range(HEIGHT):
            b.store(current[k][m], register(y, i64(n * k + WIDTH * m))).align = 4


def multiplier(n: int):
    """Return a kernel that multiplies four vectors of n values; n is a multiple of sixteen."""
    tile = _tile(n)

    @jit
    def multiply(matrix, x, y):
        """Set each vector of y (4 * n,) to the sum over j, ascending, of column j times x_j.

        matrix is what `tiles` returns; x (4 * n,) float32, both contiguous.
        """
        for number in range(n // OUTPUTS):
            tile(matrix, x, y, number)

    return multiply


def chooser(bits: int, n: int, factor: np.float32):
    """Return choose(v, edges, codes): int32 codes of n values, whose vectors lie one by one.

    A code is the first cell with factor times the value below its upper edge; edges is a
    `search_table`.
    """
    own = float(factor)

    @on_lanes(WIDTH, "edges", times=n // (4 * WIDTH), v=4, codes=4)
    def choose(v: Lanes, edges: Tables, codes: Lanes) -> None:
        for i in range(4):
            codes[i] = -edges.search(bits, v[i] * own, "not <")

    return choose


@jit
def norms_of_four(x, norm):
    """Set norm (4,) to the L2 norms of four rows of x (4, n), summed from the first value on."""
    s0 = s1 = s2 = s3 = ZERO
    for j in range(x.shape[1]):
        s0 += x[0, j] * x[0, j]
        s1 += x[1, j] * x[1, j]
        s2 += x[2, j] * x[2, j]
        s3 += x[3, j] * x[3, j]
    norm[0], norm[1], norm[2], norm[3] = np.sqrt(s0), np.sqrt(s1), np.sqrt(s2), np.sqrt(s3)
