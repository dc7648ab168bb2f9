"""Every wrong call gets one of our errors, with what was given and what was needed."""

import pickle

import numpy as np
import pytest
from conftest import FORMATS

import tbq
from gguf_io import resolve_type
from gguf_io.types import GgmlType, dequantize_rows, quantize_rows
from tbq import errors

X = np.zeros((2, 256), np.float32)
P = np.zeros((2, 98), np.uint8)

CALLS = {
    "row length": (lambda: tbq.quantize(X[:, :200], "tbq3_0"), "200 values.*multiple of 256"),
    "empty row": (lambda: tbq.quantize(X[:, :0], "tbq3_0"), "0 values"),
    "integers": (lambda: tbq.quantize(X.astype(int), "tbq3_0"), "dtype int64.*floating"),
    "complex": (lambda: tbq.quantize(X * 1j, "tbq3_0"), "dtype complex.*floating"),
    "scalar": (lambda: tbq.quantize(np.float32(1), "tbq3_0"), "scalar"),
    "float64 overflow": (
        lambda: tbq.quantize(X + np.float64(1e300), "tbq3_0"),
        "1e\\+300.*float32's range",
    ),
    "first block": (lambda: tbq.quantize(X, "tbq3_0", first_block=1), "first_block"),
    "negative first block": (lambda: tbq.quantize(X, "tbq3_0", first_block=-1), "first_block"),
    "out shape": (lambda: tbq.quantize(X, "tbq3_0", out=P[:1]), r"out: .*\(2, 98\)"),
    "out dtype": (lambda: tbq.quantize(X, "tbq3_0", out=P.astype("i1")), "out: .*uint8"),
    "out strides": (
        lambda: tbq.quantize(X, "tbq3_0", out=np.zeros((98, 2), np.uint8).T),
        "contiguous",
    ),
    "out type": (lambda: tbq.quantize(X, "tbq3_0", out=[1]), "out: got list"),
    "threads": (lambda: tbq.quantize(X, "tbq3_0", threads=0), "threads: got 0"),
    "packed length": (lambda: tbq.dequantize(P[:, :97], "tbq3_0"), "97 bytes.*multiple of 98"),
    "packed dtype": (lambda: tbq.dequantize(P.astype("i2"), "tbq3_0"), "int16.*uint8"),
    "packed scalar": (lambda: tbq.dequantize(np.uint8(1), "tbq3_0"), "uint8 array"),
    "decode out": (lambda: tbq.dequantize(P, "tbq3_0", out=X[:1]), "out: "),
    "decode threads": (lambda: tbq.dequantize(P, "tbq3_0", threads=-1), "threads: got -1"),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_input(name):
    call, words = CALLS[name]
    with pytest.raises(tbq.InputError, match=words) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert caught.value.argument
    assert caught.value.need
    assert "\n" not in str(caught.value)


def test_read_only_out():
    out = P.copy()
    out.setflags(write=False)
    with pytest.raises(tbq.InputError, match="writeable=False"):
        tbq.quantize(X, "tbq3_0", out=out)


def test_infinite_float64_is_no_overflow():
    x = np.full((1, 256), np.inf)
    assert np.array_equal(tbq.quantize(x, "tbq3_0"), tbq.quantize(x.astype("f4"), "tbq3_0"))


def test_types_of_gguf_py():
    assert resolve_type("Q8_0").name == "q8_0"
    assert resolve_type("q6_k").name == "q6_K"
    assert resolve_type("tbq3_0", "pr21089").key == "pr21089:tbq3_0"
    with pytest.raises(tbq.UnknownFormatError, match="did you mean.*q8_0"):
        resolve_type("q8_00")
    with pytest.raises(tbq.BackendError, match="cannot quantise to iq3_s"):
        quantize_rows(X, resolve_type("iq3_s"))
    with pytest.raises(tbq.BackendError, match="cannot dequantise i32"):
        dequantize_rows(P[:, :96], resolve_type("i32"))
    assert isinstance(resolve_type("f32"), GgmlType)


def test_every_error_class_is_exported_and_caught_as_its_builtin():
    builtins = {
        tbq.UnknownFormatError: LookupError,
        tbq.AmbiguousTypeError: LookupError,
        tbq.InputError: ValueError,
        tbq.CorruptBlockError: ValueError,
        tbq.FileFormatError: ValueError,
        tbq.ValueOverflowError: OverflowError,
        tbq.BackendError: RuntimeError,
        tbq.ClosedFileError: ValueError,
    }
    defined = {
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, tbq.TbqError)
    }
    assert defined == {tbq.TbqError, *builtins}
    for error, builtin in builtins.items():
        assert issubclass(error, tbq.TbqError)
        assert issubclass(error, builtin)


def test_errors_survive_being_sent_to_another_process():
    given = [
        errors.UnknownFormatError("x", ["y"]),
        errors.AmbiguousTypeError("x", ["a", "b"], "say which"),
        errors.InputError("x", "1", "2"),
        errors.CorruptBlockError("f", 3, "why"),
        errors.ValueOverflowError({"a": 3}),
        errors.FileFormatError("path", 7, "why"),
        errors.ClosedFileError("path"),
        errors.BackendError("numba", "why"),
        errors.ClosedFileError("path"),
    ]
    assert {type(error) for error in given} == set(errors.TbqError.__subclasses__())
    for error in given:
        found = pickle.loads(pickle.dumps(error))
        assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def test_a_format_is_the_same_where_it_is_sent():
    """They are compared by identity."""
    for fmt in FORMATS:
        assert pickle.loads(pickle.dumps(fmt)) is fmt
