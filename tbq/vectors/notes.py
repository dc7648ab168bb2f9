"""The flags of test vectors: which bug each catches, and what that looks like."""

from __future__ import annotations

NOTES = {
    "normal": {
        "bug": "anything that breaks every block: a wrong table, rotation, scale or layout",
        "effect": "most bytes or values differ",
    },
    "one_hot": {
        "bug": "a rotation that is transposed, left out, or indexed the wrong way",
        "effect": "the codes of a unit vector are another column of the matrix",
    },
    "ramp": {
        "bug": "bit order or nibble order reversed; an index that runs backwards",
        "effect": "values that should ascend jump, or come in swapped pairs",
    },
    "zero": {
        "bug": "division by a zero norm; bytes left over from the block before",
        "effect": "NaN, or a block that is not the dialect's zero block",
    },
    "tie": {
        "bug": "a tie between two codes decided the other way (< for <=, last for first)",
        "effect": "codes one off where the coordinate is exactly on the boundary, mostly at zero",
    },
    "fp16_overflow": {
        "bug": "a norm beyond 65504 clamped, or wrapped, where the C code stores infinity",
        "effect": "a finite scale; decoded, wrong magnitudes",
    },
    "subnormal": {
        "bug": "float16 or float32 subnormals flushed to zero, or rounded twice",
        "effect": "zero scales, or scales one unit off",
    },
    "nan": {
        "bug": "NaN and infinity that reach other codes than in the C code, or other blocks",
        "effect": "codes 0 where the last one belongs, or the reverse",
    },
    "outlier": {
        "bug": "outliers picked, ordered or restored wrongly; a sum that loses small terms",
        "effect": "one value dominates the error of its block",
    },
    "row_index": {
        "bug": "the block index counted from the start of the tensor, or of the row, wrongly",
        "effect": "signs of all rows but the first differ",
    },
    "streams": {
        "bug": "a leading axis (stream, sequence) ignored, or its stride",
        "effect": "all streams but the first hold rows of another",
    },
    "tail": {
        "bug": "the last blocks of a row left out where the row is no multiple of the tile",
        "effect": "zeros or stale bytes at the ends of rows",
    },
    "distinct_lanes": {
        "bug": "some lanes of a vector never written",
        "effect": "a pattern of wrong values that repeats every 4, 8, ... values",
    },
    "byte_ramp": {
        "bug": "bits taken from the wrong end of a byte, or from the wrong byte",
        "effect": "codes that belong to other positions",
    },
    "random_bits": {
        "bug": "signs recomputed instead of read; a field read past its end",
        "effect": "right for what the encoder writes, wrong for other bits",
    },
    "scales": {
        "bug": "a scale at the wrong end of the block, as bfloat16, or with its sign ignored",
        "effect": "values off by orders of magnitude, or zeros that should not be",
    },
    "graph_rotation": {
        "bug": "a Hadamard transform without 1/sqrt(n), of the wrong width, or without signs",
        "effect": "values scaled by a constant, or unrelated ones",
    },
    "attention": {
        "bug": "a query that is not rotated, or rotated the wrong way; lanes or keys left out",
        "effect": "scores unrelated to those of the decoded keys",
    },
    "backward": {
        "bug": "a derivative of another function, of the output for the input, or without dy",
        "effect": "gradients of the wrong sign, or too large by far where the sigmoid is 0 or 1",
    },
    "saturated": {
        "bug": "exp(-x) that overflows and leaves NaN instead of a sigmoid of 0",
        "effect": "NaN, or gradients that are not zero, far from zero",
    },
}
HEAD_DIMS = (64, 80, 96, 112, 192, 256, 576)
for _width in HEAD_DIMS:
    NOTES[f"head_dim_{_width}"] = {
        "bug": f"rows that hold whole heads of {_width} and are no power of two of blocks",
        "effect": "the end of the row missing, or read from the next row",
    }
