"""Backward passes of sigmoid and SiLU, to the float32, for whoever adds them to a backend.

Both take the input x of the forward pass and the gradient dy of its output. exp is that of the
exact value, rounded once to float32; every other operation is float32 and rounded, in this order:

    s = 1 / (1 + exp(-x))
    sigmoid_back: dx = dy * (s * (-s * 1 + 1))
    silu_back:    dx = (dy * s) * (1 + x * (1 - s))

Source: sigmoid LL4nc33/llama-tq @ 017716061, ggml.c (ggml_compute_backward), built of scale,
scale with bias and two products; upstream has none. SiLU ggml-org/llama.cpp @ 0c1e57098,
ggml-cpu/vec.h (ggml_silu_backward_f32). Their expf may be a unit in the last place off.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Context, Decimal

import numpy as np

ONE = np.float32(1)
# Digits with which exp is rounded to float32 as if it were exact.
_EXACT = Context(prec=60, Emin=-9999, Emax=9999)


def exp(x: np.ndarray) -> np.ndarray:
    """Return e to the power of finite float32 values, correctly rounded to float32."""
    powers = [float(Decimal(float(value)).exp(_EXACT)) for value in x.ravel()]
    with np.errstate(over="ignore", under="ignore"):
        return np.array(powers, np.float64).astype(np.float32).reshape(x.shape)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)) of finite float32 values."""
    return ONE / (ONE + exp(-x))


def sigmoid_back(x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return the gradient of x, float32 of its shape, from that of sigmoid(x)."""
    s = sigmoid(x)
    return dy * (s * (-s * ONE + ONE))


def silu_back(x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return the gradient of x, float32 of its shape, from that of x * sigmoid(x)."""
    s = sigmoid(x)
    return (dy * s) * (ONE + x * (ONE - s))


BACKWARD: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "sigmoid_back": sigmoid_back,
    "silu_back": silu_back,
}
