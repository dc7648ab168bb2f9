"""What is wrong with stored rows, whatever the values mean: scales, codes, signs, padding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gguf_io.types import FLOAT_TYPES, TensorType, Unknown
from tbq import Format
from tbq.api import index_step
from tbq.codec import Layout

# float16: the largest number, the smallest normal one
FP16_MAX = 65504.0
FP16_TINY = 2.0**-14
# A scale this close to the largest number may already have been rounded from beyond it.
NEAR_OVERFLOW = FP16_MAX / 2
# A code counts as dead if this many times the number of codes were seen and none was it.
ENOUGH_PER_CODE = 64


@dataclass
class BlockHealth:
    """Counts over the blocks of one tensor; add rows piece by piece.

    Attributes:
        blocks: blocks seen; 0 for types without blocks.
        zero_blocks: blocks whose scales are all zero.
        nonfinite_scales: blocks with a scale that is NaN or infinite.
        large_scales, subnormal_scales: blocks with a scale near float16 overflow, and below its
            normal range.
        nonfinite_values: for float types, values that are NaN or infinite.
        anomalies: blocks with what no encoder of the dialect writes, by description.
        histograms: how often each code occurs outside zero blocks, by kind of code.
    """

    blocks: int = 0
    zero_blocks: int = 0
    nonfinite_scales: int = 0
    large_scales: int = 0
    subnormal_scales: int = 0
    nonfinite_values: int = 0
    anomalies: dict[str, int] = field(default_factory=dict)
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    spare_codes: frozenset[int] = frozenset()

    def add(self, rows: np.ndarray, kind: TensorType, first_row: int) -> None:
        """Look at rows, uint8 (n, row_bytes), of which the first is row `first_row` of a tensor."""
        if isinstance(kind, Unknown) or not rows.size:
            return
        codec = kind.codec
        blocks = codec.blocks(rows)
        n, row_blocks = blocks.shape
        first = first_row * index_step(kind, row_blocks * kind.block_values)
        index = codec.indices(n, row_blocks // codec.group_blocks, first)
        self._add(blocks.reshape(-1), kind, index)

    def add_part(self, row: np.ndarray, kind: Format, number: int, start: int, stop: int) -> None:
        """Look at groups [start, stop) of one wide row, uint8 (row_bytes,), row `number`."""
        codec = kind.codec
        first = number * index_step(kind, kind.row_values(len(row)))
        before = start if codec.position in ("row", "tensor") else 0
        index = codec.indices(1, stop - start, first) + before
        self._add(codec.part(row, start, stop), kind, index)

    @np.errstate(all="ignore")
    def _add(self, blocks: np.ndarray, fmt: Format, index: np.ndarray) -> None:
        """Look at blocks (groups * group_blocks,), index (groups,)."""
        if fmt.name in FLOAT_TYPES:
            values = fmt.codec.dequantize(blocks)
            self.nonfinite_values += values.size - int(np.isfinite(values).sum())
        elif fmt.layout.scales or fmt.layout.codes:
            self._add_blocks(blocks, fmt, np.repeat(index, fmt.codec.group_blocks))

    def _add_blocks(self, blocks: np.ndarray, fmt: Format, index: np.ndarray) -> None:
        codec = fmt.codec
        small = self.subnormal_scales
        live = self._add_scales(blocks, fmt.layout)
        if codec.sub_scales:  # which such a scale is a small part of: it is often subnormal
            self.subnormal_scales = small
        for name, found in codec.anomalies(blocks, index).items():
            self.anomalies[name] = self.anomalies.get(name, 0) + int(found.sum())
        if not codec.signed_scales:
            negative = np.zeros(len(blocks), bool)
            for name in fmt.layout.scales:
                negative |= np.signbit(blocks[name])
            name = "scales with a sign"
            self.anomalies[name] = self.anomalies.get(name, 0) + int(negative.sum())
        self.spare_codes |= codec.spare_codes
        for name, (codes, count) in codec.codes(blocks[live]).items():
            if name not in codec.sub_scales:
                self._count(name, codes[:, : codec.coded_values], count)

    def _add_scales(self, blocks: np.ndarray, layout: Layout) -> np.ndarray:
        """Count what the scales tell; returns which blocks are not zero."""
        zero = np.full(len(blocks), bool(layout.scales or layout.small_scales))
        for name in layout.small_scales:
            zero &= ~blocks[name].reshape(len(blocks), -1).any(axis=1)
        bad, large, small = (np.zeros(len(blocks), bool) for _ in range(3))
        for name in layout.scales:
            scale = np.abs(blocks[name].astype(np.float32))
            zero &= scale == 0
            bad |= ~np.isfinite(scale)
            large |= np.isfinite(scale) & (scale > NEAR_OVERFLOW)
            small |= (scale > 0) & (scale < FP16_TINY)
        self.blocks += len(blocks)
        self.zero_blocks += int(zero.sum())
        self.nonfinite_scales += int(bad.sum())
        self.large_scales += int(large.sum())
        self.subnormal_scales += int(small.sum())
        return ~zero

    def _count(self, name: str, codes: np.ndarray, n_codes: int) -> None:
        counts = np.bincount(codes.ravel(), minlength=n_codes)
        before = self.histograms.get(name)
        self.histograms[name] = counts if before is None else before + counts

    @property
    def dead_codes(self) -> int:
        """Codes that never occur although enough were seen, and encoders write them."""
        return sum(
            int((np.delete(counts, [c for c in self.spare_codes if c < len(counts)]) == 0).sum())
            for counts in self.histograms.values()
            if counts.sum() >= ENOUGH_PER_CODE * len(counts) and len(counts) < 256
        )

    def problems(self) -> list[str]:
        """Return what deserves a warning, in words."""
        counts = {
            "blocks have a scale that is NaN or infinite": self.nonfinite_scales,
            "blocks have a scale near float16 overflow": self.large_scales,
            "blocks have a scale below float16's normal range": self.subnormal_scales,
            "values are NaN or infinite": self.nonfinite_values,
            "codes never occur": self.dead_codes,
        }
        counts |= {f"blocks have {name}": n for name, n in self.anomalies.items()}
        return [f"{n} {text}" for text, n in counts.items() if n]

    def report(self) -> dict[str, Any]:
        """Return the counts for the JSON report."""
        return {
            "blocks": self.blocks,
            "zero_blocks": self.zero_blocks,
            "nonfinite_scales": self.nonfinite_scales,
            "large_scales": self.large_scales,
            "subnormal_scales": self.subnormal_scales,
            "nonfinite_values": self.nonfinite_values,
            "anomalies": self.anomalies,
            "dead_codes": self.dead_codes,
            "histograms": {name: counts.tolist() for name, counts in self.histograms.items()},
        }
