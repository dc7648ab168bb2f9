"""Straight-line kernels on vectors of eight lanes, written as Python over symbolic vectors.

Numba leaves it to LLVM to find vectors in loops. Where a loop's body is long, or short enough to be
unrolled first, LLVM finds none and a kernel is several times slower. Here the vectors are said.
Instructions carry no flags, so nothing is contracted or reordered, and each lane is computed as
scalar code would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.core.errors import TypingError
from numba.extending import intrinsic

from tbq.kernels.compile import closure_tag

WIDTH = 8
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), WIDTH), ir.VectorType(ir.IntType(32), WIDTH)


class Vector:
    """Eight float32, int32 or booleans in a register, with the operators that kernels need."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    def _is_float(self) -> bool:
        return self.value.type == _FLOATS

    def _new(self, value: ir.Value) -> Vector:
        return Vector(self.builder, value)

    def _other(self, other: Vector | float | Sequence[int]) -> ir.Value:
        if isinstance(other, Vector):
            return other.value
        each = list(other) if isinstance(other, Sequence) else [other] * WIDTH
        return ir.Constant(self.value.type, each)

    def _apply(self, floats: str, ints: str, other: Vector | float) -> Vector:
        operation = getattr(self.builder, floats if self._is_float() else ints)
        return self._new(operation(self.value, self._other(other)))

    def __add__(self, other: Vector | float) -> Vector:
        return self._apply("fadd", "add", other)

    def __sub__(self, other: Vector | float) -> Vector:
        return self._apply("fsub", "sub", other)

    def __mul__(self, other: Vector | float) -> Vector:
        return self._apply("fmul", "mul", other)

    def __truediv__(self, other: Vector | float) -> Vector:
        return self._new(self.builder.fdiv(self.value, self._other(other)))

    def __and__(self, other: Vector | int) -> Vector:
        return self._new(self.builder.and_(self.value, self._other(other)))

    def __or__(self, other: Vector | int) -> Vector:
        return self._new(self.builder.or_(self.value, self._other(other)))

    def __xor__(self, other: Vector | int) -> Vector:
        return self._new(self.builder.xor(self.value, self._other(other)))

    def __lshift__(self, count: int) -> Vector:
        return self._new(self.builder.shl(self.value, self._other(count)))

    def unsigned_shift(self, count: int | Sequence[int]) -> Vector:
        """Shift int32 to the right, zeros coming in; count is one for all lanes, or eight."""
        return self._new(self.builder.lshr(self.value, self._other(count)))

    def __rshift__(self, count: int) -> Vector:
        """Shift int32 to the right, the sign coming in."""
        return self._new(self.builder.ashr(self.value, self._other(count)))

    def __neg__(self) -> Vector:
        return self._new(self.builder.neg(self.value))

    def __invert__(self) -> Vector:
        return self._new(self.builder.not_(self.value))

    def __ge__(self, other: Vector | float) -> Vector:
        return self._apply_comparison(">=", other)

    def __gt__(self, other: Vector | float) -> Vector:
        return self._apply_comparison(">", other)

    def not_below(self, other: Vector | float) -> Vector:
        """Return whether floats are not less than other: true for NaN."""
        return self._new(self.builder.fcmp_unordered(">=", self.value, self._other(other)))

    def _apply_comparison(self, sign: str, other: Vector | float) -> Vector:
        compare = self.builder.fcmp_ordered if self._is_float() else self.builder.icmp_signed
        return self._new(compare(sign, self.value, self._other(other)))

    def sqrt(self) -> Vector:
        """Return the square root, correctly rounded."""
        b = self.builder
        kind = ir.FunctionType(_FLOATS, [_FLOATS])
        root = b.module.declare_intrinsic(f"llvm.sqrt.v{WIDTH}f32", fnty=kind)
        return self._new(b.call(root, [self.value]))

    def reciprocal(self) -> Vector:
        """Return one divided by this."""
        return self._new(self.builder.fdiv(self._other(1.0), self.value))

    def where(self, a: Vector, b: Vector) -> Vector:
        """Return a where this, booleans, is true, and b elsewhere."""
        return self._new(self.builder.select(self.value, a.value, b.value))

    def blend(self, other: Vector, taken: Sequence[int]) -> Vector:
        """Return this with those lanes of the other for which taken has 1."""
        which = ir.Constant(ir.VectorType(ir.IntType(1), WIDTH), list(taken))
        return self._new(self.builder.select(which, other.value, self.value))

    def is_negative(self) -> Vector:
        """Return whether int32 are below zero."""
        return self._new(self.builder.icmp_signed("<", self.value, self._other(0)))

    def mask(self) -> Vector:
        """Return -1 where this, booleans, is true, and 0 elsewhere."""
        return self._new(self.builder.sext(self.value, _INTS))

    def bits(self) -> Vector:
        """Return the bits of floats as int32."""
        return self._new(self.builder.bitcast(self.value, _INTS))

    def floats(self) -> Vector:
        """Return int32 as the floats whose bits they are."""
        return self._new(self.builder.bitcast(self.value, _FLOATS))


class Lanes:
    """An array (n * stride,), from which vectors are loaded at [stride * row + lane]."""

    def __init__(self, builder: ir.IRBuilder, data: ir.Value, lane: ir.Value, stride: int) -> None:
        self.builder, self.stride = builder, stride
        self.base = builder.gep(data, [lane])
        self.kind = _FLOATS if data.type.pointee == ir.FloatType() else _INTS

    def _place(self, row: int) -> ir.Value:
        at = self.builder.gep(self.base, [ir.Constant(ir.IntType(64), row * self.stride)])
        return self.builder.bitcast(at, self.kind.as_pointer())

    def __getitem__(self, row: int) -> Vector:
        value = self.builder.load(self._place(row))
        value.align = 4
        return Vector(self.builder, value)

    def __setitem__(self, row: int, vector: Vector) -> None:
        self.builder.store(vector.value, self._place(row)).align = 4


def spread(builder: ir.IRBuilder, one: ir.Value) -> Vector:
    """Return a vector of one float or integer."""
    kind, i32 = ir.VectorType(one.type, WIDTH), ir.IntType(32)
    undefined = ir.Constant(kind, ir.Undefined)
    single = builder.insert_element(undefined, one, i32(0))
    order = ir.Constant(ir.VectorType(i32, WIDTH), [0] * WIDTH)
    return Vector(builder, builder.shuffle_vector(single, undefined, order))


class Tables:
    """An array (n, 8) or (8 * n,): rows that are taken as they are, or looked up by an index."""

    def __init__(self, builder: ir.IRBuilder, data: ir.Value) -> None:
        self.rows = Lanes(builder, data, ir.IntType(64)(0), WIDTH)
        self.loaded: dict[int, Vector] = {}

    def __getitem__(self, row: int) -> Vector:
        if row not in self.loaded:
            self.loaded[row] = self.rows[row]
        return self.loaded[row]

    def look_up(self, row: int, index: Vector) -> Vector:
        """Return element index & 7 of a row, for each lane of index."""
        return _permute(self[row], index) if HAS_PERMUTE else _choose(self[row], index)

    def look_up_level(self, bits: int, code: Vector) -> Vector:
        """Return the level of the lowest bits of code, from a table that `level_table` made."""
        if bits < 4:
            return self.look_up(0, code)
        return _is_set(code, 3).where(self.look_up(1, code), self.look_up(0, code))

    def search(self, bits: int, values: Vector, rule: str) -> Vector:
        """Return minus how many limits each value has passed; the table is a `search_table`.

        rule: what passes a limit: values ">=" it, ">" it, or "not <" it, which NaN is.
        """
        found = _passes(values, self[0], rule)
        for k in range(1, bits):
            found = found + found + _passes(values, self.look_up(k, found), rule)
        return found


def level_table(levels: np.ndarray) -> np.ndarray:
    """Return 2 to 16 levels, float32 (2 ** bits,), so that `Tables.look_up_level` finds them."""
    return np.resize(levels, max(WIDTH, len(levels)))


def search_table(limits: np.ndarray) -> np.ndarray:
    """Return ascending limits (2 ** bits - 1,) in the order of a search by halves, (bits, 8).

    Row k has the limits that are compared with in step k, at minus what has been found so far.
    """
    bits = len(limits).bit_length()
    table = np.empty((bits, WIDTH), np.float32)
    for k in range(bits):
        found = -np.arange(WIDTH) % (1 << k)
        table[k] = limits[(2 * found + 1) * (1 << (bits - 1 - k)) - 1]
    return table


def _passes(values: Vector, limits: Vector, rule: str) -> Vector:
    if rule == "not <":
        return values.not_below(limits).mask()
    return (values > limits if rule == ">" else values >= limits).mask()


# One instruction of AVX2 looks up eight floats; LLVM has no name for it that all machines share.
_FEATURES = config.CPU_FEATURES  # what NUMBA_CPU_FEATURES or NUMBA_CPU_NAME asked for
if _FEATURES is None:
    _FEATURES = binding.get_host_cpu_features().flatten()
HAS_PERMUTE = "+avx2" in _FEATURES.split(",")


def _permute(table: Vector, index: Vector) -> Vector:
    b = table.builder
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _INTS])
    function = b.module.declare_intrinsic("llvm.x86.avx2.permps", fnty=kind)
    return Vector(b, b.call(function, [table.value, index.value]))


def _choose(table: Vector, index: Vector) -> Vector:
    """Do what `_permute` does by choosing between halves."""
    b, i32 = table.builder, ir.IntType(32)
    undefined = ir.Constant(table.value.type, ir.Undefined)
    kind = ir.VectorType(i32, WIDTH)
    left = [
        Vector(b, b.shuffle_vector(table.value, undefined, ir.Constant(kind, [k] * WIDTH)))
        for k in range(WIDTH)
    ]
    for bit in range(3):
        chosen = _is_set(index, bit)
        left = [chosen.where(left[k + 1], left[k]) for k in range(0, len(left), 2)]
    return left[0]


def _is_set(index: Vector, bit: int) -> Vector:
    return (index << (31 - bit)).is_negative()


def on_lanes(lanes: int, *tables: str, times: int = 1, **rows: int) -> Callable:
    """Turn a function into an intrinsic that does what it says for eight lanes after the other.

    The function gets `Lanes` for each of its parameters, or `Tables` for those named so. They are
    contiguous arrays of float32 or int32 that do not overlap, unless they are one.

    All that is repeated `times`, each time as many rows further as `rows` says for a parameter:
    long functions would not fit the cache of instructions.
    """

    def decorate(function):
        names = function.__code__.co_varnames[: function.__code__.co_argcount]

        def typing(context, *arrays):
            for array in arrays:
                if array.layout != "C" or array.dtype not in (types.float32, types.int32):
                    raise TypingError(f"a contiguous array of 32 bits is needed, not {array}")

            def generate(context, builder, signature, arguments):
                pairs = zip(signature.args, arguments)  # noqa: B905 (they are as many)
                data = [context.make_array(kind)(context, builder, a).data for kind, a in pairs]
                i64 = ir.IntType(64)
                with (
                    cgutils.for_range(builder, i64(times)) as repeat,
                    cgutils.for_range(builder, i64(lanes // WIDTH)) as loop,
                ):
                    lane = builder.mul(loop.index, i64(WIDTH))
                    given = []
                    for name, one in zip(names, data):  # noqa: B905
                        if name in tables:
                            given.append(Tables(builder, one))
                            continue
                        row = builder.mul(repeat.index, i64(rows.get(name, 0) * lanes))
                        given.append(Lanes(builder, one, builder.add(row, lane), lanes))
                    function(*given)
                return context.get_dummy_value()

            return types.void(*arrays), generate

        return _with_parameters(typing, names, function, (lanes, tables, times, rows))

    return decorate


def _with_parameters(typing: Callable, names: tuple[str, ...], function: Callable, told: tuple):
    """Return an intrinsic: Numba looks at the names of parameters, so they must be spelt out."""
    scope = {"typing": typing}
    listed = ", ".join(names)
    exec(f"def made(context, {listed}):\n    return typing(context, {listed})", scope)
    made = scope["made"]
    made.__doc__, made.__module__ = function.__doc__, function.__module__
    return _named(made, function, told)


def _named(made: Callable, function: Callable, told: tuple = ()):
    """Return an intrinsic whose name tells it from others that the same code makes.

    Kernels know it by that name: what the function closes over is in it, and what else was told.
    """
    tag = "_" + hashlib.sha256(repr(told).encode()).hexdigest()[:12] if told else ""
    made.__name__ = made.__qualname__ = function.__name__ + closure_tag(function) + tag
    return intrinsic(made)


def on_words(function: Callable):
    """Turn function(words, tables, factor) into an intrinsic that sets eight values of a row.

    The intrinsic takes words, a tuple of int32, each of which the function gets as a vector;
    tables, a tuple of contiguous arrays; a factor, float32; and y, contiguous float32, of which it
    sets the eight values from `at` on, as if it were flat.
    """

    def expand(context, words, tables, factor, y, at):
        signature = types.void(words, tables, factor, y, types.intp)

        def generate(context, builder, signature, arguments):
            words, tables, factor, y, at = arguments
            arrays = [
                context.make_array(kind)(context, builder, one).data
                for kind, one in zip(signature.args[1], cgutils.unpack_tuple(builder, tables))  # noqa: B905
            ]
            result = function(
                [spread(builder, word) for word in cgutils.unpack_tuple(builder, words)],
                [Tables(builder, data) for data in arrays],
                spread(builder, factor),
            )
            data = context.make_array(signature.args[3])(context, builder, y).data
            Lanes(builder, data, at, WIDTH)[0] = result
            return context.get_dummy_value()

        return signature, generate

    return _named(expand, function)
