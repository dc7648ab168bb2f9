"""Eight rows of float32 turned into columns, in registers.

Kernels that work on many blocks side by side first turn rows into lanes, and lanes into rows again
at the end. Value by value, that is as dear as a Hadamard transform.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

SIDE = 8


def _transposer(columns: int):
    """Return the intrinsic for eight rows of so many columns, 4 or 8."""

    @intrinsic
    def transpose(context, x, start, stride, y, to, step):
        """Set y[to + step*c + r] to x[start + stride*r + c], rows r below eight, and columns c.

        x and y are float32 arrays, contiguous and not the same, indexed as if they were flat.
        """
        for array in (x, y):
            if array.layout != "C" or array.dtype != types.float32:
                raise TypingError(f"a contiguous float32 array is needed, not {array}")
        signature = types.void(x, types.intp, types.intp, y, types.intp, types.intp)

        def generate(context, builder, signature, arguments):
            x, start, stride, y, to, step = arguments
            kinds = signature.args
            source = context.make_array(kinds[0])(context, builder, x).data
            target = context.make_array(kinds[3])(context, builder, y).data
            _transpose(builder, (source, start, stride), (target, to, step), columns)
            return context.get_dummy_value()

        return signature, generate

    return transpose


transpose8, transpose4 = _transposer(8), _transposer(4)


def _transpose(b: ir.IRBuilder, source: tuple, target: tuple, columns: int) -> None:
    """Write the instructions; source and target are a pointer, a first index and a stride."""
    half, i32 = ir.VectorType(ir.FloatType(), SIDE // 2), ir.IntType(32)

    def place(where: tuple, row: int, column: int) -> ir.Value:
        pointer, first, stride = where
        at = b.add(first, b.add(b.mul(stride, stride.type(row)), stride.type(column)))
        return b.gep(pointer, [at])

    def read(row: int, column: int) -> ir.Value:
        value = b.load(b.bitcast(place(source, row, column), half.as_pointer()))
        value.align = 4
        return value

    def shuffle(a: ir.Value, c: ir.Value, order: list[int]) -> ir.Value:
        return b.shuffle_vector(a, c, ir.Constant(ir.VectorType(i32, len(order)), order))

    for column in range(0, columns, 4):
        # Rows r and r + 4 in one register: two squares of four are turned at once.
        rows = [shuffle(read(r, column), read(r + 4, column), [*range(SIDE)]) for r in range(4)]
        low = [shuffle(rows[r], rows[r + 1], [0, 8, 1, 9, 4, 12, 5, 13]) for r in (0, 2)]
        high = [shuffle(rows[r], rows[r + 1], [2, 10, 3, 11, 6, 14, 7, 15]) for r in (0, 2)]
        for c, pair in ((0, low), (2, high)):
            for k, order in ((0, [0, 1, 8, 9, 4, 5, 12, 13]), (1, [2, 3, 10, 11, 6, 7, 14, 15])):
                turned = shuffle(*pair, order)
                to = b.bitcast(place(target, column + c + k, 0), turned.type.as_pointer())
                b.store(turned, to).align = 4
