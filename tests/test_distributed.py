"""Conversions and inspections on dask workers: the same bytes and texts, whoever dies meanwhile."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import HERE, SAMPLES, STATES
from gguf_bytes import big_file
from hypothesis import given, settings
from hypothesis import strategies as st

import gguf_io
import tbq
from gguf_io import distributed, steps
from gguf_io.convert import plan_model, write_model
from gguf_io.type_policy import Options
from tbq import BackendError, FileFormatError
from tools import scale_bench

F32 = SAMPLES / "small.f32.gguf"
STATE = STATES / "pr21089.f16.seq0.bin"


# --- steps: without dask -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An open file with a tensor of each source that the cases below have."""
    path = tmp_path_factory.mktemp("steps") / "in.gguf"
    x = np.random.default_rng(3).standard_normal((24, 1536)).astype(np.float32)
    kind = tbq.get_format("buun:turbo3")
    x[5, 7], x[20] = np.inf, 1e6  # what is counted must be counted once
    tensors = [
        gguf_io.OutputTensor.from_array("f32", x),
        gguf_io.OutputTensor.from_packed("turbo3", tbq.quantize(x, kind), kind),
    ]
    gguf_io.write_gguf(path, {}, tensors)
    with gguf_io.open_gguf(path) as file:
        yield file


def done(step, tensor, out):
    found = steps.carry_out(step, tensor.read(step.start, step.n_bytes), 1)
    data = np.ascontiguousarray(found.data).reshape(-1).view(np.uint8)
    assert data.size == step.n_written
    out[step.at : step.at + data.size] = data
    return found.nonfinite, found.overflowed


# a position in the tensor, a scale before each row, floats, codes that are put into other blocks
CASES = [
    ("f32", "tbq3_0"),
    ("f32", "q8_0"),
    ("f32", "f16"),
    ("f32", "llama-tq-cuda:ktq4_1"),
    ("f32", "ik_llama:q8_KV"),
    ("turbo3", "f32"),
    ("turbo3", "thetom@2026-05:turbo3"),
]


@pytest.mark.parametrize(("source", "target"), CASES)
@given(st.data())
@settings(max_examples=15)
def test_any_partition_in_any_order_gives_the_same(model, source, target, data):
    """Twice as well: a worker may die when it has written already."""
    tensor, kind = model.tensors[source], gguf_io.resolve_type(target)
    size = kind.row_bytes(tensor.row_values) * tensor.n_rows
    expected, out = np.zeros(size, np.uint8), np.full(size, 0xA5, np.uint8)
    counts = [done(step, tensor, expected) for step in steps.tensor_steps(tensor, kind, True)]
    n = tensor.n_rows
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(1, n - 1), max_size=6))})
    whole = range(tensor.row_values)
    pieces = [steps.Piece(range(a, b), whole) for a, b in zip(cuts, cuts[1:], strict=False)]
    parts = [
        steps.conversion_step(tensor, kind, piece) for piece in data.draw(st.permutations(pieces))
    ]
    found = [done(step, tensor, out) for step in parts]
    assert out.tobytes() == expected.tobytes()
    assert np.sum(found, axis=0).tolist() == np.sum(counts, axis=0).tolist()
    again = data.draw(st.sampled_from(parts))
    done(again, tensor, out)
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("source", "target"), [*CASES, ("f32", None)])
def test_steps_of_any_size_cover_a_tensor(model, source, target, monkeypatch):
    """Parts of rows among them, where the rows are too wide to be held."""
    tensor = model.tensors[source]
    kind = tensor.format if target is None else gguf_io.resolve_type(target)
    outputs = []
    for chunk in (1 << 20, 100, 512, 1000, 3000, 1 << 14):
        monkeypatch.setattr(steps, "CHUNK_VALUES", chunk)
        monkeypatch.setattr(steps, "COPY_BYTES", max(chunk, 500))
        out = np.full(kind.row_bytes(tensor.row_values) * tensor.n_rows, 0xA5, np.uint8)
        read = written = 0
        for step in steps.tensor_steps(tensor, kind, target is not None):
            assert (step.start, step.at) == (read, written)
            read, written = read + step.n_bytes, written + step.n_written
            done(step, tensor, out)
        assert (read, written) == (tensor.n_bytes, out.size)
        outputs.append(out.tobytes())
    assert len(set(outputs)) == 1


def test_a_row_that_is_too_wide_is_cut(model, monkeypatch):
    """So that the memory of a step is bounded, whatever the tensor."""
    monkeypatch.setattr(steps, "CHUNK_VALUES", 512)
    tensor, kind = model.tensors["f32"], tbq.get_format("tbq3_0")
    found = list(steps.tensor_steps(tensor, kind, True))
    assert len(found) == 3 * tensor.n_rows
    assert {step.memory for step in found} == {512 * 4 * 3 + kind.row_bytes(512)}


def plan_bytes(file, target="tbq3_0"):
    return plan_model(file, Options(target=gguf_io.resolve_type(target), pure=True))


@pytest.fixture
def small_steps(monkeypatch):
    """Many tasks of a small file."""
    monkeypatch.setattr(steps, "CHUNK_VALUES", 1 << 13)
    monkeypatch.setattr(steps, "COPY_BYTES", 1 << 12)


@pytest.fixture
def tasks(tmp_path, small_steps):
    """The tasks of a file, the temporary that they are for, and what has to come out."""
    with gguf_io.open_gguf(F32) as file:
        outcomes = plan_bytes(file)
        wanted, at = [], 100
        for outcome in outcomes:
            wanted.append((outcome, at))
            at += outcome.n_bytes
        output = tmp_path / "temporary"
        output.write_bytes(bytes(at))
        expected = bytearray(at)
        for outcome, at in wanted:
            part = np.frombuffer(expected, np.uint8)[at : at + outcome.n_bytes]
            for step in outcome.steps():
                done(step, outcome.tensor, part)
        yield list(distributed.tasks(str(output), wanted)), output, bytes(expected)


@pytest.mark.parametrize("host", ["this", "another"])
def test_a_task_says_all_that_a_worker_needs(tasks, host):
    todo, output, expected = tasks
    assert len(todo) > 20
    for task in reversed(todo):
        task = task if host == "this" else task._replace(host="another")
        assert distributed.work(task).data is None
    assert output.read_bytes() == expected


def test_a_worker_without_the_output_sends_its_bytes(tasks):
    todo, output, expected = tasks
    output.unlink()
    found = bytearray(len(expected))
    for task in todo:
        data = distributed.work(task).data.reshape(-1).view(np.uint8)
        found[task.at : task.at + data.size] = data.tobytes()
    assert bytes(found) == expected
    assert not output.exists()


@pytest.mark.parametrize("field", ["path", "n_bytes", "modified", "digest"])
def test_a_worker_without_the_input_asks_for_it(tasks, field):
    """It is another file if anything that a file is known by differs."""
    todo, output, expected = tasks
    for task in todo:
        old = getattr(task.source, field)
        new = old + {str: ".not", int: 1, bytes: b"0"}[type(old)]
        other = task._replace(source=task.source._replace(**{field: new}))
        assert distributed.work(other) is None
        data = np.fromfile(F32, np.uint8, task.step.n_bytes, offset=task.start)
        assert distributed.work(other._replace(data=data)) is not None
    assert output.read_bytes() == expected


def test_without_dask_the_extra_is_named(quantize, inspect, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    for run in (
        lambda: quantize("--workers", 2, F32, tmp_path / "o.gguf", "q8_0"),
        lambda: inspect("--scheduler", "tcp://127.0.0.1:1", F32),
    ):
        code, _, err = run()
        assert code == 4
        assert "[dask]'" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workers", "0"], "--workers: got 0"),
        (["--workers", "2", "--scheduler", "tcp://a:1"], "one of --scheduler and --workers"),
        (["--workers", "2", "--threads", "2"], "a task has one thread"),
    ],
)
def test_flags_that_do_not_go_together(quantize, tmp_path, flags, said):
    code, _, err = quantize(*flags, F32, tmp_path / "o.gguf", "q8_0")
    assert (code, said in err) == (2, True), err


def test_a_dump_is_converted_here(quantize, tmp_path):
    code, _, err = quantize("--workers", 2, STATE, tmp_path / "o.bin", "q8_0")
    assert (code, "need a GGUF file" in err) == (2, True), err


# --- workers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client():
    """Two workers, started once: that takes longer than what they do here."""
    pytest.importorskip("distributed")
    with distributed.connected(workers=2) as client:
        client.wait_for_workers(2, timeout=60)
        yield client


@pytest.fixture
def address(client):
    client.wait_for_workers(2, timeout=60)  # one may have died in another test
    return client.scheduler.address


@pytest.fixture
def on_workers(client):
    """Set attributes in the workers, and set them back."""
    undo = []

    def arrange(where, name, value, workers=None):
        def exchange(value):
            place = __import__(where, fromlist=["_"])
            before = getattr(place, name)
            setattr(place, name, value)
            return before

        for worker, before in client.run(exchange, value, workers=workers).items():
            undo.append((exchange, before, worker))

    yield arrange
    for exchange, before, worker in undo:
        client.run(exchange, before, workers=[worker])


def converted(path, client=None, target="tbq3_0", **kwargs):
    with gguf_io.open_gguf(F32) as file:
        outcomes = plan_bytes(file, target)
        write_model(file, outcomes, [path], outcomes[0].type, client=client, **kwargs)
    return path.read_bytes()


def test_the_same_file(client, tmp_path, small_steps):
    names, sizes = [], []
    kwargs = {"done": lambda o: names.append(o.tensor.name), "advance": sizes.append}
    plain = converted(tmp_path / "a.gguf", **kwargs)
    told = names.copy(), sum(sizes)
    names.clear(), sizes.clear()
    assert converted(tmp_path / "b.gguf", client, **kwargs) == plain
    assert (names, sum(sizes)) == told


@pytest.mark.parametrize(
    ("hidden", "all_of_them"),
    [
        (["find_marked"], True),
        (["find_marked"], False),
        (["_write_at"], False),
        (["find_marked", "_write_at"], True),
    ],
)
def test_no_shared_file_system(
    client, address, on_workers, tmp_path, small_steps, hidden, all_of_them
):
    plain = converted(tmp_path / "a.gguf")
    workers = list(client.nthreads())[: 2 if all_of_them else 1]
    for name in hidden:
        nothing = _nothing if name == "find_marked" else _nowhere
        on_workers("gguf_io.distributed", name, nothing, workers)
    assert converted(tmp_path / "b.gguf", client) == plain


def _nothing(mark):
    return None


def _nowhere(task, data):
    return False


@pytest.fixture
def only_late(monkeypatch, request):
    """Have workers looked at by themselves only, as one that came later is."""
    if request.param:
        monkeypatch.setattr(distributed, "_check_workers", lambda client, needs: None)


each_time = pytest.mark.parametrize("only_late", [False, True], indirect=True)


@each_time
@pytest.mark.usefixtures("only_late")
def test_a_worker_of_another_version(address, quantize, on_workers, tmp_path):
    on_workers("tbq", "__version__", "0.0.1")
    code, _, err = quantize("--scheduler", address, "--pure", F32, tmp_path / "o.gguf", "q8_0")
    assert (code, err.count("\n")) == (4, 1), err
    assert f"has tbq 0.0.1, the client {tbq.__version__}" in err
    assert list(tmp_path.iterdir()) == []


@each_time
@pytest.mark.usefixtures("only_late")
def test_a_worker_with_too_little_memory(address, quantize, tmp_path, monkeypatch):
    """It is asked for more than any has: one that had too little would pause, and take no task."""
    monkeypatch.setattr(distributed, "BASE_BYTES", 8 << 40)
    code, _, err = quantize("--scheduler", address, "--pure", F32, tmp_path / "o.gguf", "q8_0")
    assert (code, err.count("\n")) == (4, 1), err
    assert re.search(r"worker tcp://\S+ has \d+ MiB of memory, a task needs 1048576\d MiB", err)
    assert list(tmp_path.iterdir()) == []


def test_shards(client, address, quantize, tmp_path):
    with gguf_io.open_gguf(F32) as file:
        tensors = [gguf_io.OutputTensor.from_tensor(t) for t in file.tensors.values()]
        gguf_io.write_gguf_shards(tmp_path / "m", file.metadata, [tensors[:2], tensors[2:]])
    source = tmp_path / "m-00001-of-00002.gguf"
    said = quantize("--keep-split", source, tmp_path / "a", "q8_0")
    more = quantize(
        "--keep-split", "--scheduler", address, "--verify", source, tmp_path / "b", "q8_0"
    )
    assert (said[0], more[0]) == (0, 0)
    lines = [line for line in said[1].splitlines() if "size" in line]
    assert lines == [line for line in more[1].splitlines() if "size" in line]
    for i in (1, 2):
        a, b = (tmp_path / f"{name}-0000{i}-of-00002.gguf" for name in "ab")
        assert a.read_bytes() == b.read_bytes()


def test_an_error_of_a_worker_is_the_error_of_the_program(address, quantize, on_workers, tmp_path):
    def full(task, data):
        import errno

        raise OSError(errno.ENOSPC, "No space left on device")

    on_workers("gguf_io.distributed", "_write_at", full)
    code, _, err = quantize("--scheduler", address, "--pure", F32, tmp_path / "o.gguf", "q8_0")
    assert (code, err.count("\n")) == (3, 1)
    assert "no space left on the device; nothing was written" in err
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_changes(client, address, tmp_path, small_steps):
    source = tmp_path / "in.gguf"
    source.write_bytes(F32.read_bytes())
    with gguf_io.open_gguf(source) as file:
        outcomes = plan_bytes(file)
        touch = {"advance": lambda n: os.utime(source, ns=(1, 1))}
        with pytest.raises(FileFormatError, match="was written to while it was read"):
            write_model(file, outcomes, [tmp_path / "o"], None, client=client, **touch)
    assert list(tmp_path.iterdir()) == [source]


def test_values_that_overflow_are_refused_with_their_number(client, address, tmp_path):
    source = tmp_path / "in.gguf"
    x = np.ones((64, 256), np.float32)
    x[3, 5] = x[60, 7] = 1e30
    gguf_io.write_gguf(source, {}, [gguf_io.OutputTensor.from_array("a.weight", x)])
    with gguf_io.open_gguf(source) as file:
        outcomes = plan_bytes(file, "f16")
        with pytest.raises(tbq.ValueOverflowError) as error:
            write_model(file, outcomes, [tmp_path / "o"], None, client=client)
    assert error.value.counts == {"a.weight": 2}
    assert list(tmp_path.iterdir()) == [source]


def test_few_tasks_are_under_way(client, address):
    most = distributed.TASKS_PER_THREAD * 2
    numbers, open_tasks, seen = iter(range(100)), set(), []

    def take():
        number = next(numbers, None)
        open_tasks.add(number)
        return number

    for item, result in distributed.results(client, math.sqrt, take, distributed.Needs.of()):
        seen.append(len(open_tasks - {None}))
        open_tasks.remove(item)
        assert result == math.sqrt(item)
    assert len(seen) == 100
    assert 2 <= max(seen) <= most


def test_a_task_that_kills_every_worker():
    from distributed.scheduler import KilledWorker

    def gather(futures):
        raise KilledWorker("task", SimpleNamespace(address="tcp://a:1"), 3)

    with pytest.raises(BackendError, match="4 workers died while they carried out one task"):
        distributed._gathered(SimpleNamespace(gather=gather), [])


def test_nobody_is_left(monkeypatch):
    monkeypatch.setattr(distributed, "PATIENCE", -1.0)
    room = distributed._Room(SimpleNamespace(nthreads=dict))
    with pytest.raises(BackendError, match="no worker is left"):
        room.tasks()


def test_nobody_answers(quantize, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(distributed, "PATIENCE", 1.0)
    code, _, err = quantize("--scheduler", "tcp://127.0.0.1:1", F32, tmp_path / "o.gguf", "q8_0")
    assert (code, err.count("\n")) == (4, 1), err
    assert "no workers at tcp://127.0.0.1:1" in err


def test_an_address_is_needed(quantize, tmp_path):
    pytest.importorskip("distributed")
    code, _, err = quantize("--scheduler", "", F32, tmp_path / "o.gguf", "q8_0")
    assert (code, err.count("\n")) == (2, 1), err
    assert "--scheduler: got '', need an address" in err


def test_the_benchmark_measures_and_records(client, address, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(distributed, "connected", lambda *args: nullcontext(client))
    monkeypatch.setattr(distributed, "TASKS_PER_THREAD", 3)  # which it changes
    out = tmp_path / "scale.jsonl"
    args = ["--values", "10000000", "--tasks", "20", "--folder", str(tmp_path), "--out", str(out)]
    assert scale_bench.main(args) == 0
    here, there, scheduler = map(json.loads, out.read_text().splitlines())
    assert here["values"] == there["values"] == 10000000 // 4096 * 4096
    assert (there["equal"], there["workers"], there["tasks"]) == (True, 2, 5)
    assert there["worker_peak_bytes"] > 1 << 20
    assert scheduler["tasks"] == 20
    assert list(tmp_path.iterdir()) == [out]


def test_many_files_are_inspected_alike(address, inspect, tmp_path):
    files = [STATE, F32, tmp_path / "not there", STATES / "llama-tq.f16.seq0.bin", F32]
    plain = inspect(*files)
    assert plain[0] == 3
    assert plain[1].splitlines().count(str(F32)) == 2
    assert inspect("--scheduler", address, *files) == plain
    assert inspect("--scheduler", address, "--json", F32) == inspect("--json", F32)


def test_a_file_that_workers_do_not_see(address, inspect, on_workers):
    on_workers("tools.inspect_many", "find_marked", _nothing)
    code, out, err = inspect("--scheduler", address, F32)
    assert (code, out) == (4, "")
    assert f"does not see {F32}" in err


def test_a_worker_dies(client, tmp_path, small_steps):
    """The last of those that share the workers: a new one takes seconds to start."""
    plain = converted(tmp_path / "a.gguf")
    client.wait_for_workers(2, timeout=60)
    pids = client.run(os.getpid)
    killed = []

    def advance(n):
        if not killed:
            killed.append(next(iter(pids.values())))
            os.kill(killed[0], signal.SIGKILL)

    assert converted(tmp_path / "b.gguf", client, advance=advance) == plain
    assert killed
    assert killed[0] not in client.run(os.getpid).values()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_one_page_is_of_one_file(inspect, tmp_path):
    code, _, err = inspect("--html", tmp_path / "o.html", F32, STATE)
    assert (code, "--html: got 2 FILES, need one FILE" in err) == (2, True), err


def children(pid):
    """Return the processes that a process started, in whichever thread."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(number) for text in lists for number in text.split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="asks /proc for processes")
def test_ctrl_c_leaves_nothing(tmp_path):
    """As in a terminal, where the workers get it too."""
    source = big_file(tmp_path / "in.gguf", 1 << 30)
    command = [sys.executable, "-m", "tools.tbq_quantize", "--pure", "--workers", "2", source]
    process = subprocess.Popen(
        [*map(str, command), str(tmp_path / "o.gguf"), "tbq3_0"],
        cwd=HERE.parent,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2:  # the temporary
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while len(workers := children(process.pid)) < 3:  # and what counts their semaphores
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "tbq-quantize: error: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == [source]
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
