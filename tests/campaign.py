"""A campaign of mutated files: `python -m tests.campaign gguf|state|vectors --seed N --minutes M`.

Files are made, mutated and given to the library and the programs. What may come of it is success or
an error of our own (`tbq.TbqError`; exit codes 0 to 4, one line on stderr). Everything else is a
failure: other exceptions, NumPy's warnings, tracebacks, the death of the process, much time or
memory for a small file, an unchanged copy with other bytes. Failures that are raised in the same
line are one; the first input of each is kept in --keep. The figures are printed as JSON, and the
exit code is 1 if anything failed. A seed gives the same cases in the same order.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import random
import re
import resource
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import gguf_bytes as g  # noqa: E402
import state_bytes as sb  # noqa: E402

import gguf_io  # noqa: E402
import tbq  # noqa: E402
from gguf_io.state_origin import origin  # noqa: E402
from tbq.registry import get_dialect  # noqa: E402
from tools import tbq_inspect, tbq_quantize, tbq_vectors  # noqa: E402

ADDRESS_SPACE = 8 << 30
MAX_CPU = 1.0  # seconds that a file may take, once everything is compiled
MAX_EXCESS = 1 << 20  # bytes that reading may take beyond the size of the file
TRACED = 8  # in one of so many cases memory is measured, which is slow
RUN = 12  # in one of so many cases the programs are run
POOL = 40  # files that are mutated, renewed one by one

INTERESTING = [
    *(0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 64, 127, 128, 255, 256, 1023, 1024, 4096, 1 << 16),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 48, (1 << 63) - 1, 1 << 63),
    *((1 << 64) - 32, (1 << 64) - 1),
]
NAMES = (
    *("blk.0.attn_k.weight", "blk.0.attn_v.weight", "output.weight", "token_embd.weight"),
    *("blk.1.ffn_up.weight", "", "t", "weight", "a\nb", "\x1b[2J", "../../x", "x" * 64, "x" * 127),
    *("x" * 128, "中文.weight", "blk.٣.weight", "blk.99999999999999999999.weight"),
)
ARCHITECTURES = ("llama", "gemma3", "gemma4", "lfm2", "mamba", "qwen2vl", "falcon", "llama4")
KEYS = (
    *("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "attention.value_length", "attention.sliding_window"),
    *("attention.sliding_window_pattern", "attention.shared_kv_layers", "attention.key_length_swa"),
    *("attention.key_length_mla", "rope.dimension_sections", "full_attention_interval"),
    *("nextn_predict_layers", "expert_count"),
)


# --- what is mutated -----------------------------------------------------------------------------


class Mutator:
    """Changes bytes at random, with a liking for what stands at the start and for numbers."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def __call__(self, data: bytes, others: list[bytes]) -> bytes:
        """Return a mutant of `data`."""
        found = bytearray(data)
        for _ in range(self.rng.choice((1, 1, 1, 2, 3, 5))):
            self.rng.choice(self.WAYS)(self, found, others)
        return bytes(found)

    def _place(self, data: bytearray) -> int:
        last = len(data) if self.rng.random() < 0.4 else min(len(data), 400)
        return self.rng.randrange(last + 1)

    def flip(self, data: bytearray, others: list[bytes]) -> None:
        """Flip a bit."""
        if data:
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)

    def number(self, data: bytearray, others: list[bytes]) -> None:
        """Overwrite an integer."""
        size = self.rng.choice((1, 4, 4, 8))
        at = self._place(data) // size * size
        old = int.from_bytes(data[at : at + size], "little")
        new = self.rng.choice((*INTERESTING, old + 1, old - 1, old * 2, old // 2, old + 32))
        data[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")

    def float_(self, data: bytearray, others: list[bytes]) -> None:
        """Overwrite a float32 or float16 by a special one."""
        at = self._place(data) // 2 * 2
        special = (float("nan"), float("inf"), -0.0, 1e-45, 3e38, -1.0)
        data[at : at + 4] = struct.pack("<f", self.rng.choice(special))

    def cut(self, data: bytearray, others: list[bytes]) -> None:
        """Drop the end."""
        del data[self._place(data) :]

    def drop(self, data: bytearray, others: list[bytes]) -> None:
        """Drop some bytes."""
        at = self._place(data)
        del data[at : at + self.rng.choice((1, 4, 8, 33))]

    def repeat(self, data: bytearray, others: list[bytes]) -> None:
        """Repeat some bytes."""
        at, n = self._place(data), self.rng.choice((1, 4, 8, 64))
        data[at:at] = data[at : at + n] * self.rng.choice((1, 1, 2, 20))

    def splice(self, data: bytearray, others: list[bytes]) -> None:
        """Insert or overwrite with a piece of another file."""
        other = self.rng.choice(others)
        start, n = self.rng.randrange(len(other) + 1), self.rng.choice((4, 8, 40, 200))
        at = self._place(data)
        data[at : at + self.rng.choice((0, n))] = other[start : start + n]

    def noise(self, data: bytearray, others: list[bytes]) -> None:
        """Overwrite with noise."""
        at, n = self._place(data), self.rng.choice((1, 8, 100))
        data[at : at + n] = self.rng.randbytes(n)

    WAYS = (flip, number, number, number, float_, cut, drop, repeat, splice, noise)


# --- GGUF files ----------------------------------------------------------------------------------


def field_value(rng: random.Random) -> tuple[int, bytes]:
    """Return a GGUF value type and a value of it."""
    kind = rng.choice((g.U8, g.I32, g.U32, g.F32, g.BOOL, g.STRING, g.ARRAY, g.U64, g.F64))
    codes = {g.U8: "B", g.I32: "i", g.U32: "I", g.F32: "f", g.BOOL: "B", g.U64: "Q", g.F64: "d"}

    def scalar(kind: int) -> bytes:
        if codes[kind] in "fd":
            return struct.pack(f"<{codes[kind]}", rng.choice((0.0, 2.5, float("nan"), -np.inf)))
        size = 8 * struct.calcsize(codes[kind])
        n = rng.choice(INTERESTING) % (1 << size)
        n -= (1 << size) if codes[kind] == "i" and n >> (size - 1) else 0
        return struct.pack(f"<{codes[kind]}", n)

    if kind == g.STRING:
        return kind, g.string(rng.choice((*NAMES, *ARCHITECTURES, b"\xff\xfe", b"\xed\xa0\x80")))
    if kind == g.ARRAY:
        item, n = rng.choice((*codes, g.STRING)), rng.choice((0, 1, 2, 4, 8, 50))
        text = g.string(rng.choice(NAMES))
        body = b"".join(text if item == g.STRING else scalar(item) for _ in range(n))
        return kind, struct.pack("<IQ", item, n) + body
    return kind, scalar(kind)


def fields(rng: random.Random, alignment: int) -> list[bytes]:
    """Return the metadata of a model, some of it malformed."""
    architecture = rng.choice(ARCHITECTURES)
    sane = {"block_count": 3, "embedding_length": 256, "attention.head_count": 2}
    sane |= {"attention.head_count_kv": 2, "attention.key_length": 128}
    found = [g.kv("general.architecture", g.STRING, g.string(architecture))]
    for key in KEYS:
        if rng.random() < (0.8 if key in sane else 0.2):
            kind, value = g.U32, struct.pack("<I", sane.get(key, rng.randrange(5)))
            if rng.random() < 0.15:
                kind, value = field_value(rng)
            found.append(g.kv(f"{architecture}.{key}", kind, value))
    if rng.random() < 0.4:
        name = rng.choice((*tbq.dialects(), "nobody", ""))
        found.append(g.kv("tbq.dialect", g.STRING, g.string(name)))
    for key in ("split.no", "split.count", "tbq.release", "tbq.dialect.x", "general.file_type"):
        if rng.random() < 0.05:
            found.append(g.kv(key, *field_value(rng)))
    if alignment != 32 or rng.random() < 0.1:
        found.append(g.kv("general.alignment", g.U32, struct.pack("<I", alignment)))
    rng.shuffle(found)
    return found


def gguf_file(rng: random.Random) -> bytes:
    """Return a GGUF file that is mostly right."""
    alignment = rng.choice((32, 32, 32, 8, 64, 4096))
    dialect = get_dialect(rng.choice(tbq.dialects()))
    records, data = [], b""
    for name in rng.sample(NAMES, rng.choice((0, 1, 2, 3, 5))):
        fmt = rng.choice((*dialect.formats, *map(gguf_io.resolve_type, ("f32", "f16", "q8_0"))))
        try:
            number = tbq.registry.type_id(fmt, dialect.name, None)
        except tbq.TbqError:  # of another release than the newest
            number = 0
            fmt = gguf_io.resolve_type("f32")
        if rng.random() < 0.08:
            number = rng.choice((33, 41, 57, 100, (1 << 31) - 1, (1 << 32) - 1))
        shape = [
            fmt.group_values * rng.choice((1, 1, 2)),
            *rng.choices((1, 2, 3), k=rng.randrange(3)),
        ]
        n_bytes = fmt.row_bytes(shape[0]) * int(np.prod(shape[1:]))
        records.append(g.tensor(name, shape, number, len(data)))
        fill = rng.choice((b"\0", b"\x3c", b"\xff", rng.randbytes(61)))
        body = (fill * (n_bytes // len(fill) + 1))[:n_bytes]
        data += body + bytes(-n_bytes % alignment)
    kvs = fields(rng, alignment)
    return g.gguf_file(kvs, records, data, version=rng.choice((3, 3, 2)), alignment=alignment)


# --- state files ---------------------------------------------------------------------------------


def state_file(rng: random.Random) -> bytes:
    """Return a state file that is mostly right."""
    dialect = get_dialect(rng.choice(tbq.dialects()))
    types = [(0, 512), (1, 256), (8, 136)]
    for fmt in dialect.formats:
        with contextlib.suppress(tbq.TbqError):
            n = tbq.registry.type_id(fmt, dialect.name, None)
            types += [(n, fmt.row_bytes(-(-128 // fmt.group_values) * fmt.group_values))] * 2
    count, mrope = rng.choice((0, 1, 2, 3, 7)), rng.random() < 0.15

    def kv() -> bytes:
        k, v = rng.choice(types), rng.choice(types)
        layers = rng.choice((1, 2, 3))
        return sb.kv(
            count,
            layers=(k,) * layers,
            values=() if rng.random() < 0.1 else (v,) * layers,
            mrope=mrope,
            deferred=rng.randrange(4) if dialect.state.deferred else None,
            sequences=[tuple(range(rng.choice((1, 1, 2)))) for _ in range(count)],
            fill=rng.choice((b"\0", b"\x3c", rng.randbytes(37))),
        )

    if rng.random() < 0.4:
        return new_state_file(rng)
    memory = rng.choice(
        (kv, kv, kv, lambda: kv() + kv(), sb.rec, lambda: kv() + sb.rec(), lambda: b"")
    )()
    wrap = rng.choice((sb.sequence, sb.session, sb.session, lambda memory: memory))
    return wrap(memory)


def new_state_file(rng: random.Random) -> bytes:
    """Return a state file of later versions, of ik_llama.cpp or of buun, that is mostly right."""
    count = rng.choice((0, 1, 2, 5))
    types = [(0, 512), (1, 256), (8, 136)]
    record = rng.choice((0, 2, 3))

    def cache(values: bool = True, record: int = record) -> bytes:
        rows = (rng.choice(types),) * rng.choice((0, 1, 2))
        cells = sb.mrope_cells(count, lambda i: (i,) * record)
        rotation = (0, 64) if rng.random() < 0.1 else None
        if not count:
            return sb.u32(1) + cells
        return sb.kv_of(cells, count, rows, rows if values else (), rotation)

    def ple() -> bytes:
        rows = sb.rows(0, 64, 1) + struct.pack("<Q", 24) + bytes(24)
        return sb.cells(1) + sb.u32(0, 4) + rows + sb.rows(0, 128, 1)

    memory = rng.choice(
        (
            cache,
            lambda: cache(False) * 2,
            lambda: cache(False) * 3,
            lambda: cache() + ple(),
            lambda: cache() + sb.rec() + cache(False, 0),
            lambda: cache() + cache() + sb.rec(),
            lambda: sb.dsv4(count, mode=rng.randrange(2)),
            lambda: sb.ik(count, v_state=rng.randrange(3)),
            lambda: sb.ik(count, linear=((0, 64, 2), None, (0, 8, 1)), window=(8, 3, 5, 2)),
        )
    )()
    words = rng.choice(
        (
            (1, 2, 3),
            sb.packed_tokens((1, -1, 3), [(1, rng.randbytes(5))]),
            sb.envelope((5, 6), logits=(0.5, 1.5)),
        )
    )
    appendix = sb.checkpoints((b"a", b"", rng.randbytes(9))) if rng.random() < 0.2 else b""
    return rng.choice(
        (
            lambda: sb.sequence(memory, words, rng.choice((2, 3, 4, 9))) + appendix,
            lambda: sb.session(memory, rng.choice((b"llama", b"deepseek32")), words, 10),
            lambda: sb.buun(memory, words),
            lambda: sb.ik_session(sb.ik(count, sequences=(0,))),
            lambda: sb.u32(0xAF143CD8, 1) + memory,
            lambda: sb.u32(5) + b"llama" + memory,
            lambda: b"BUUNRSMO" + sb.u32(1, 64, 1, 0, 8, 0, 0, 0, 0, 9, 0, 0, 0, 0) + bytes(8),
        )
    )()


# --- what is done with a file --------------------------------------------------------------------


def maybe_dialect(rng: random.Random) -> str | None:
    """Return what a caller may say of a file, right or not: one time in three a dialect."""
    return rng.choice(tbq.dialects()) if rng.random() < 1 / 3 else None


def touch_gguf(path: Path, rng: random.Random) -> None:
    """Read what is in a GGUF file, as programs do, and copy it."""
    with gguf_io.open_gguf(path, maybe_dialect(rng)) as file:
        for key in file.metadata:
            list(itertools.islice(map(str, [file.metadata[key]]), 10))
        for t in list(file.tensors.values())[:8]:
            sum(len(piece) for piece in t.pieces())
            with contextlib.suppress(tbq.TbqError):
                t.dequantize()
        with contextlib.suppress(tbq.TbqError):
            gguf_io.model_shape(file)
        copy = path.with_name("copy")
        tensors = [gguf_io.OutputTensor.from_tensor(t) for t in file.tensors.values()]
        try:
            gguf_io.write_gguf(copy, file.metadata, tensors)
        except tbq.InputError:
            return
        names = list(file.tensors)
        with gguf_io.open_gguf(copy, file.dialect) as other:  # without a release: the stated one
            if list(other.tensors) != names:
                raise AssertionError("a copy has other tensors")
            for name in names:
                a, b = file.tensors[name], other.tensors[name]
                # types that nobody knows reach to the next tensor, what aligns that included
                known = not isinstance(a.format, gguf_io.Unknown)
                n = a.n_bytes if known else min(a.n_bytes, b.n_bytes)
                if a.read(0, n).tobytes() != b.read(0, n).tobytes():
                    raise AssertionError("a copy has other bytes")


def touch_state(path: Path, rng: random.Random) -> None:
    """Read what is in a state file, as programs do, and copy it."""
    with gguf_io.open_state(path, dialect=maybe_dialect(rng)) as state:
        for i, _ in enumerate(state.memories):
            for cells in state.cells(i):
                len(cells.positions), len(cells.sequences), cells.coordinates, cells.tokens
        origin(state)
        for t in list(state.tensors.values())[:8]:
            with contextlib.suppress(tbq.TbqError):
                t.values()
        copy = path.with_name("copy")
        gguf_io.write_state(copy, state)
        if copy.read_bytes() != path.read_bytes():
            raise AssertionError("a copy has other bytes")
        if rng.random() < 0.2:
            touch_versions(state, copy)


def touch_versions(state: gguf_io.StateFile, copy: Path) -> None:
    """Write a state file under each version, and read it back."""
    for version in (9, 10):
        with contextlib.suppress(tbq.InputError, tbq.AmbiguousTypeError):
            gguf_io.write_state(copy, gguf_io.plan_conversion(state, version=version))
            how = {"memory": state.layout.memory, "values": state.layout.values}
            with gguf_io.open_state(copy, **how) as other:
                if list(other.tensors) != list(state.tensors):
                    raise AssertionError("another version has other tensors")


MODELS = HERE / "samples" / "models"
STATES, STATES_V3 = HERE / "samples" / "state", HERE / "samples" / "state-v3"


def program_calls(path: Path, rng: random.Random, kind: str) -> Iterator[tuple[Callable, list]]:
    """Yield programs and arguments to run on a file."""
    out = path.with_name("out")
    target = rng.choice(("q8_0", "f16", "f32", "tbq3_0", "tbq4_0"))
    yield tbq_inspect.main, [path, *rng.choice(([], ["--json"], ["--layers", "0-3,7"]))]
    flags = rng.sample(["--verify", "--json", "--allow-requantize", "--allow-overflow"], 2)
    flags += rng.choice(([], ["--pure"])) if kind == "gguf" else []
    yield tbq_quantize.main, [*flags, path, out, target]
    if kind == "gguf":
        state = rng.choice(sorted(STATES.glob("pr21089.*session.bin")))
        yield tbq_inspect.main, ["--model", path, "--layers", "0", "--max-rows", "2", state]
    else:
        model = rng.choice(sorted((*MODELS.glob("*.gguf"), *STATES_V3.glob("*.gguf"))))
        yield tbq_inspect.main, ["--model", model, "--json", path]


def run_program(main: Callable, args: list) -> None:
    """Run a program in this process, and check how it ends."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
    told = err.getvalue()
    fault = re.search(r'File ".*?([^/"]+)", line (\d+)[^"]*\Z', told, re.DOTALL)
    if "Traceback" in told or code not in (0, 1, 2, 3, 4):
        where = f"{fault[1]}:{fault[2]}" if fault else ""
        raise AssertionError(f"{main.__module__} exits {code}: {told.splitlines()[-1:]} {where}")
    if code in (2, 3, 4) and told.rstrip("\n").rpartition("\n")[2].count(": error: ") == 0:
        raise AssertionError(f"{main.__module__} exits {code} without an error: {told[-200:]!r}")
    if "\x1b" in told + out.getvalue() or "Warning" in told:
        raise AssertionError(f"{main.__module__} prints an escape or a warning: {told[-200:]!r}")


# --- the campaign --------------------------------------------------------------------------------


@dataclass
class Ledger:
    """What was tried, and what failed."""

    kind: str
    seed: int
    keep: Path | None = None
    cases: int = 0
    opened: int = 0
    refused: int = 0
    programs: int = 0
    slowest_cpu_s: float = 0.0
    largest_excess_bytes: int = 0
    failures: dict[str, dict] = field(default_factory=dict)

    def fail(self, what: str, detail: str, data: bytes) -> None:
        """Note a failure; the first of its kind with its input."""
        entry = self.failures.setdefault(what, {"count": 0, "detail": detail[-2000:]})
        entry["count"] += 1
        if entry["count"] == 1 and self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            name = f"{self.kind}.{len(self.failures)}.{self.seed}"
            (self.keep / name).write_bytes(data)
            entry["input"] = name

    def error(self, error: BaseException, data: bytes) -> None:
        """Note an exception, by where it was raised."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if Path(f.filename).name != "campaign.py"] or frames
        ours = [f for f in own if re.search(r"/(gguf_io|tbq|tools)/", f.filename)] or own
        what = f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
        what += f": {error}"[:120] if isinstance(error, AssertionError) else ""
        self.fail(what, "".join(traceback.format_exception(error)), data)

    def report(self) -> dict:
        """Return the figures."""
        return {key: value for key, value in vars(self).items() if key != "keep"}


def warm_up() -> None:
    """Load every kernel, so that no case has to wait for the compiler."""
    for fmt in tbq.formats():
        for variant in fmt.variants():
            if not variant.sibling:
                x = np.ones((1, variant.group_values), np.float32)
                tbq.dequantize(tbq.quantize(x, variant), variant)


def measured(ledger: Ledger, data: bytes, traced: bool, work: Callable[[], None]) -> None:
    """Do something with a file, and note what it takes and how it fails."""
    if traced:
        tracemalloc.start()
    began = time.process_time()
    try:
        work()
        ledger.opened += 1
    except tbq.TbqError:
        ledger.refused += 1
    except (Exception, SystemExit) as error:
        ledger.error(error, data)
    spent = time.process_time() - began
    if traced:
        excess = tracemalloc.get_traced_memory()[1] - len(data)
        tracemalloc.stop()
        ledger.largest_excess_bytes = max(ledger.largest_excess_bytes, excess)
        if excess > MAX_EXCESS:
            ledger.fail("memory", f"{excess} bytes beyond {len(data)}", data)
        return
    if spent > MAX_CPU:  # again, now that everything it needs is loaded
        began = time.process_time()
        with contextlib.suppress(Exception):
            work()
        spent = time.process_time() - began
    ledger.slowest_cpu_s = max(ledger.slowest_cpu_s, round(spent, 3))
    if spent > MAX_CPU:
        ledger.fail("slow", f"{spent:.2f} s of CPU for {len(data)} bytes", data)


Stop = Callable[[int], bool]


def files(ledger: Ledger, scratch: Path, stop: Stop, note: Callable[[bytes], None]) -> None:
    """Mutate GGUF or state files until told to stop."""
    rng = random.Random(f"{ledger.kind} {ledger.seed}")
    make, touch = {
        "gguf": (gguf_file, touch_gguf),
        "state": (state_file, touch_state),
    }[ledger.kind]
    mutate = Mutator(rng)
    folders = (MODELS,) if ledger.kind == "gguf" else (STATES, STATES_V3)
    paths = [p for folder in folders for p in sorted(folder.iterdir())]
    samples = [p.read_bytes() for p in paths if p.stat().st_size < 1 << 17 and p.suffix != ".npz"]
    pool = [make(rng) for _ in range(POOL)]
    path = scratch / "file"
    while not stop(ledger.cases):
        ledger.cases += 1
        if ledger.cases % 100 == 0:
            pool[rng.randrange(POOL)] = make(rng)
        source = rng.choice(samples if rng.random() < 0.15 else pool)
        data = source if rng.random() < 0.05 else mutate(source, pool)
        path.write_bytes(data)
        note(data)
        traced = ledger.cases % TRACED == 0
        chooser = random.Random(rng.random())
        measured(ledger, data, traced, lambda c=chooser: touch(path, c))
        if ledger.cases % RUN == 0:
            for main, args in program_calls(path, chooser, ledger.kind):
                ledger.programs += 1
                try:
                    run_program(main, args)
                except (Exception, SystemExit) as error:
                    ledger.error(error, data)


def sets(ledger: Ledger, scratch: Path, stop: Stop, note: Callable[[bytes], None]) -> None:
    """Mutate manifests and outputs of vectors until told to stop."""
    rng = random.Random(f"vectors {ledger.seed}")
    folder, actual = scratch / "set", scratch / "actual"
    made = io.StringIO()
    with contextlib.redirect_stdout(made):
        for out in (folder, actual):
            formats = "tbq3_0,vtq2_2,xktq2_1"
            tbq_vectors.main(["generate", "--out", str(out), "--formats", formats])
    original = json.loads((folder / "manifest.json").read_text())
    texts = [(folder / "manifest.json").read_bytes()]
    mutate = Mutator(rng)
    while not stop(ledger.cases):
        ledger.cases += 1
        manifest = json.loads(json.dumps(original))
        manifest["cases"] = rng.sample(manifest["cases"], rng.choice((1, 1, 2)))
        for _ in range(rng.choice((1, 1, 2, 3))):
            cases = manifest.get("cases")
            some = cases if isinstance(cases, list) and rng.random() < 0.6 else manifest
            mutate_json(rng, some)
        data = json.dumps(manifest).encode("utf-8", errors="surrogatepass")
        if rng.random() < 0.1:
            data = mutate(data, texts)
        (folder / "manifest.json").write_bytes(data)
        note(data)
        target = actual / rng.choice(list(original["files"]))
        before = target.read_bytes()
        if rng.random() < 0.5:
            target.write_bytes(mutate(before, texts))
        junit = scratch / "junit.xml"
        args = rng.choice(
            (["check", "--json"], ["check", "--verbose"], ["check", "--junit", junit])
        )
        args = ["list", folder] if rng.random() < 0.2 else [*args, folder, actual]
        ledger.programs += 1
        measured(ledger, data, False, lambda args=args: run_program(tbq_vectors.main, args))
        target.write_bytes(before)


def mutate_json(rng: random.Random, value: object) -> None:
    """Change something in a JSON value."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        break
    odd = (None, True, 0, -1, 1.5, 1 << 62, 10**400, float("nan"), "", "x", "\x1b[2J", "\ud800")
    odd += ("../x", "/etc/passwd", "a\0b", [], [1, 2], ["x"], {}, {"x": 1}, [[-1]], [1 << 40])
    if isinstance(value, dict) and rng.random() < 0.2:
        del value[key]
    elif isinstance(value[key], int) and rng.random() < 0.5:
        value[key] += rng.choice((-1, 1, 7, 64))
    else:
        value[key] = rng.choice((*odd, *(value[k] for k in keys)))


CAMPAIGNS = {"gguf": files, "state": files, "vectors": sets}


def campaign(
    kind: str,
    seed: int,
    stop: Stop,
    keep: Path | None = None,
    note: Callable[[bytes], None] = lambda data: None,
) -> Ledger:
    """Run a campaign in this process."""
    ledger = Ledger(kind, seed, keep)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("error")
        CAMPAIGNS[kind](ledger, Path(scratch), stop, note)
    return ledger


def _child(kind: str, seed: int, seconds: float, keep: Path | None, last: Path, result: Path):
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warm_up()
    until = time.monotonic() + seconds
    ledger = campaign(kind, seed, lambda cases: time.monotonic() > until, keep, last.write_bytes)
    result.write_text(json.dumps(ledger.report()))


def main(argv: list[str] | None = None) -> int:
    """Run a campaign in a child, whose death is a failure too; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=CAMPAIGNS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for the first input of each failure")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        last, result = Path(folder) / "last", Path(folder) / "result"
        seconds = 60 * args.minutes
        call = (args.kind, args.seed, seconds, args.keep, last, result)
        child = multiprocessing.get_context("spawn").Process(target=_child, args=call)
        child.start()
        child.join(seconds + 900)  # it has to load everything first
        if child.is_alive():
            child.kill()
            child.join()
        if result.exists():
            report = json.loads(result.read_text())
        else:
            ledger = Ledger(args.kind, args.seed, args.keep)
            data = last.read_bytes() if last.exists() else b""
            ledger.fail("the process died or hung", f"exit code {child.exitcode}", data)
            report = ledger.report()
    print(json.dumps(report, indent=1))
    return int(bool(report["failures"]))


if __name__ == "__main__":
    sys.exit(main())
