"""Lloyd-Max codebooks for N(0, 1), by bits per code, as the code bases wrote them down.

They differ in digits, and in what was taken for the distribution. A family names its own; the
others are what a wrong kernel may have used instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tbq.numerics import symmetric

# source: llama-tq, ggml-quants.c at 0f57a4ee6; decimals as written there
KEYS = {
    1: symmetric(0.797885),
    2: symmetric(0.451428, 1.489560),
    3: symmetric(0.242405, 0.745325, 1.314996, 2.071926),
    4: symmetric(0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
}
# source: the same file; only the 2-bit table differs from that of the keys
VALUES = KEYS | {2: symmetric(0.395, 1.81)}
# source: pull request 21089, ggml-turboq-tables.h at f112d6de7; decimals as written there
PR21089 = {
    3: symmetric(0.2451, 0.7560, 1.3440, 2.1520),
    4: symmetric(0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6180, 2.0690, 2.7326),
}
TABLES = {"keys": KEYS, "values": VALUES, "pr21089": PR21089}


def others(name: str, bits: int) -> Iterator[str]:
    """Yield the names of tables with other entries for so many bits."""
    own = TABLES[name][bits]
    for other, tables in TABLES.items():
        if bits in tables and not np.array_equal(tables[bits], own):
            yield other
