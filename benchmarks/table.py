"""Print a record of compare_checkouts.py as a table: `python benchmarks/table.py RECORD.jsonl`."""

from __future__ import annotations

import json
import sys

SINGLE = 1  # row: what a token writes


def cell(record: dict) -> str:
    """Return the speeds of both, and the newer one's share of a copy."""
    old, new = record["old_mvalues_per_s"], record["new_mvalues_per_s"]
    if new < 10:  # a search: time of a block of 128 says more
        values = record["rows"] * record["row_values"]
        old, new = (record[key] * 128 / values / 1000 for key in ("old_us", "new_us"))
        return f"{old:.2f} → {new:.2f} ms a block"
    return f"{old:.0f} → {new:.0f} ({record['new_to_copy']:.2f})"


def main(path: str) -> None:
    """Print the table of large arrays."""
    with open(path, encoding="utf-8") as file:
        records = [record for record in map(json.loads, file) if record["rows"] != SINGLE]
    print("| format | encode, Mvalues/s (share of a copy) | decode |")
    print("|---|---|---|")
    for name in dict.fromkeys(record["format"] for record in records):
        own = {r["operation"]: cell(r) for r in records if r["format"] == name}
        print(f"| `{name}` | {own['quantize']} | {own['dequantize']} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
