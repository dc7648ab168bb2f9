"""The work of the programs on other processes and machines, through dask.distributed.

A task is one step of a conversion (see `gguf_io.steps`) or the text of one file. A worker that sees
the input reads its own range, and one that sees the temporary output, whose name is random, writes
there; to and from others the bytes are sent. Whatever a task does it can do again: a worker may die
at any time. A bounded number of tasks is under way, so nobody holds more for a larger file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import socket
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

import numpy as np

import tbq
from gguf_io.mapped import Mark, find_marked
from gguf_io.steps import Step, carry_out
from gguf_io.writer import Fill, Slot, as_bytes
from tbq import BackendError, InputError
from tbq.extras import install_command

if TYPE_CHECKING:
    from distributed import Client, Future, LocalCluster, Worker

    from gguf_io.convert import Advance, Done, Outcome
    from gguf_io.reader import GgufTensor

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = 60.0  # seconds without a scheduler, or without any worker
CLOSING = 0.3  # seconds for a scheduler of our own whose workers are gone
TASKS_PER_THREAD = 3  # under way: one that runs, and what the next ones come from
MOST_TASKS = 4096  # under way, however many workers there are
MOST_SENT = 32  # whose bytes are sent, or fetched, at a time
# What a worker takes before a task does: Python, NumPy, Numba, compiled kernels. Measured, see
# docs/scale.md.
BASE_BYTES = 300 << 20
# Without what dask sets for malloc: to give memory back at once costs half as much time again.
ENVIRONMENT = {"distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": 1}}
PAUSES_AT = 0.8  # of its memory limit, where a worker takes no more tasks


# --- who works -----------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(workers: int | None = None, scheduler: str | None = None) -> Iterator[Client]:
    """Yield a client of the scheduler at an address, or of `workers` processes started for it.

    Raises:
        BackendError: dask.distributed is not installed, nothing answers, or there is no worker.
        InputError: neither is given.
    """
    try:
        from distributed import Client
    except ImportError:
        need = f"--workers and --scheduler need it: {install_command('dask')}"
        raise BackendError("dask.distributed", need) from None
    with contextlib.ExitStack() as stack:
        address: str | LocalCluster
        if scheduler:
            address = scheduler
        elif workers is not None:
            address = stack.enter_context(_local_cluster(workers))
        else:
            raise InputError("scheduler", repr(scheduler), "an address, or a number of workers")
        try:
            client = Client(address, timeout=PATIENCE / 4, set_as_default=False)
            stack.enter_context(client)
            client.wait_for_workers(1, timeout=PATIENCE)
        except (OSError, ValueError, asyncio.TimeoutError) as error:
            where = scheduler or "a scheduler of our own"
            raise BackendError("dask", f"no workers at {where}: {error}") from None
        yield client


@contextlib.contextmanager
def _local_cluster(workers: int) -> Iterator[LocalCluster]:
    """Start processes of one thread each, and end them whatever happens."""
    import dask
    from distributed import LocalCluster

    before = set(multiprocessing.active_children())
    with _children_outlive_the_terminal():
        cluster = LocalCluster(
            n_workers=0,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )
    try:
        with dask.config.set(ENVIRONMENT):
            cluster.scale(workers)  # and does not wait: they may have to be ended already
            yield cluster
    finally:
        _end(cluster, before)


def _end(cluster: LocalCluster, before: set[BaseProcess]) -> None:
    """End the workers at once: closing would wait for what they do, or for their start."""
    for nanny in cluster.workers.values():
        nanny.auto_restart = False
    for process in set(multiprocessing.active_children()) - before:
        process.kill()
    with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
        cluster.close(timeout=CLOSING)


@contextlib.contextmanager
def _children_outlive_the_terminal() -> Iterator[None]:
    """Keep Ctrl-C from processes that are started here: it is for this one, which ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which takes the mask away where it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Needs(NamedTuple):
    """What a worker has to be: of the client's version, and with room for a task."""

    version: str
    memory: int

    @classmethod
    def of(cls, task_bytes: int = 0) -> Needs:
        """Return what tasks of this version need that take so many bytes."""
        return cls(tbq.__version__, int((BASE_BYTES + task_bytes) / PAUSES_AT))

    def check(self, worker: str, version: str | None, limit: int | None) -> None:
        """Raise BackendError if a worker is not what is needed."""
        if version != self.version:
            has = f"tbq {version}" if version else "no tbq"
            raise BackendError("dask", f"worker {worker} has {has}, the client {self.version}")
        if limit and limit < self.memory:
            has, need = (f"{n / (1 << 20):.0f} MiB" for n in (limit, self.memory))
            raise BackendError("dask", f"worker {worker} has {has} of memory, a task needs {need}")


def _check_workers(client: Client, needs: Needs) -> None:
    """Check all workers that are there; those that come later check themselves."""

    # sent as code: the worker may have no such module
    def about(dask_worker: Worker) -> tuple[str | None, int | None]:
        limit = dask_worker.memory_manager.memory_limit
        try:
            from tbq import __version__
        except ImportError:
            return None, limit
        return __version__, limit

    for worker, (version, limit) in client.run(about).items():
        needs.check(worker, version, limit)


def _check_myself(needs: Needs) -> None:
    from distributed import get_worker

    worker = get_worker()
    needs.check(worker.address, tbq.__version__, worker.memory_manager.memory_limit)


# --- tasks ---------------------------------------------------------------------------------------


def results(
    client: Client,
    function: Callable[[Item], Result],
    take: Callable[[], Item | None],
    needs: Needs,
) -> Generator[tuple[Item, Result], None, None]:
    """Yield (item, function(item)) in the order in which workers are done with them.

    `take` returns the next item, or None if there is none before a result has come. The function
    is carried out again where a worker dies.

    Raises:
        BackendError: workers are not what is needed, die of the same task again and again, or are
            all gone.
        Exception: what the function raised.
    """
    from distributed.comm.core import CommClosedError

    done: queue.SimpleQueue[Future[Result]] = queue.SimpleQueue()
    running: dict[Future[Result], Item] = {}
    room, call = _Room(client), partial(_checked, function, needs)
    try:
        _check_workers(client, needs)
        while True:
            items: list[Item] = []
            while len(running) + len(items) < room.tasks() and (item := take()) is not None:
                items.append(item)
            for future, item in zip(_submitted(client, call, items), items, strict=True):
                running[future] = item
                future.add_done_callback(done.put)
            if not running:
                return
            found = _done(done, room)
            for future, result in zip(found, _gathered(client, found), strict=True):
                yield running.pop(future), result
    except CommClosedError as error:
        raise BackendError("dask", f"a scheduler or worker does not answer: {error}") from None
    finally:
        if running:
            with contextlib.suppress(OSError):  # the scheduler may be what is gone
                client.cancel(list(running))


def _submitted(
    client: Client, call: Callable[[Item], Result], items: list[Item]
) -> list[Future[Result]]:
    """Submit tasks together, which takes half as long as one by one."""
    with warnings.catch_warnings():  # bytes that are sent are sent on purpose, and are not many
        warnings.filterwarnings("ignore", "Sending large graph")
        return client.map(call, items, pure=False) if items else []


def _checked(function: Callable[[Item], Result], needs: Needs, item: Item) -> Result:
    _check_myself(needs)
    return function(item)


class _Room:
    """How many tasks may be under way; asked for again every second, as workers come and go."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._asked = self._seen = time.monotonic()
        self._threads = 0

    def tasks(self) -> int:
        """Return how many; at least one, which waits for a worker."""
        now = time.monotonic()
        if not self._threads or now - self._asked > 1:
            self._threads = sum(self._client.nthreads().values())
            self._asked = now
            self._seen = now if self._threads else self._seen
            if now - self._seen > PATIENCE:
                raise BackendError("dask", f"no worker is left, and none came for {PATIENCE:.0f} s")
        return min(max(1, TASKS_PER_THREAD * self._threads), MOST_TASKS)


def _done(done: queue.SimpleQueue[Future[Result]], room: _Room) -> list[Future[Result]]:
    """Wait for a task to be done, and return those that are, so many as may be fetched at once."""
    found: list[Future[Result]] = []
    while not found:
        with contextlib.suppress(queue.Empty):
            found.append(done.get(timeout=1))
            while len(found) < MOST_SENT:
                found.append(done.get_nowait())
        room.tasks()
    return found


def _gathered(client: Client, found: list[Future[Result]]) -> list[Result]:
    """Return the results of tasks, fetched together: that takes as long as for one."""
    from distributed.scheduler import KilledWorker

    try:
        return client.gather(found)
    except KilledWorker as error:
        n = error.args[2] + 1 if len(error.args) > 2 else "all"
        raise BackendError("dask", f"{n} workers died while they carried out one task") from None
    except (CancelledError, asyncio.CancelledError) as error:
        raise BackendError("dask", f"the scheduler let go of the tasks: {error}") from None


def in_order(
    client: Client, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """Yield function(item) for each item in order; see `results`."""
    numbered = enumerate(items)
    waiting: dict[int, Result] = {}
    due = 0
    call = partial(_of_numbered, function)
    found = results(client, call, lambda: next(numbered, None), Needs.of())
    with contextlib.closing(found):
        for (number, _), result in found:
            waiting[number] = result
            while due in waiting:
                yield waiting.pop(due)
                due += 1


def _of_numbered(function: Callable[[Item], Result], numbered: tuple[int, Item]) -> Result:
    return function(numbered[1])


# --- conversions ---------------------------------------------------------------------------------


class Task(NamedTuple):
    """A step with where its bytes are, and where they go.

    Attributes:
        tensor: the name of whose it is.
        step: what is done.
        source, start: a file, and where in it the bytes to be read start.
        output, at: the temporary file, and where in it the result goes.
        host: the machine that flushes that file to disk at the end.
        data: the bytes to be read, for a worker that does not see the source.
    """

    tensor: str
    step: Step
    source: Mark
    start: int
    output: str
    at: int
    host: str
    data: np.ndarray | None = None


class Answer(NamedTuple):
    """What a worker says of a task; `data` is the result that it could not write itself."""

    nonfinite: int
    overflowed: int
    data: np.ndarray | None


def work(task: Task) -> Answer | None:
    """Carry out a task; None if its bytes have to be sent, because the source is not seen here."""
    data = task.data
    if data is None:
        source = find_marked(task.source)
        if source is None:
            return None
        data = source.read_at(task.start, task.step.n_bytes)
    found = carry_out(task.step, data, threads=1)
    written = _write_at(task, found.data)
    return Answer(found.nonfinite, found.overflowed, None if written else found.data)


def _write_at(task: Task, data: np.ndarray) -> bool:
    """Write where a task says, into a file that is there; False if it is not.

    From another machine than the client's the bytes are on disk when this returns. O_DSYNC also
    keeps NFS from writing whole pages, and with them what another machine has written beside.
    """
    flags = os.O_WRONLY | getattr(os, "O_BINARY", 0)
    if socket.gethostname() != task.host:
        flags |= getattr(os, "O_DSYNC", 0)
    try:
        descriptor = os.open(task.output, flags)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.seek(task.at)
        file.write(as_bytes(data))
    return True


def filler(
    client: Client,
    outcomes: Sequence[Outcome[GgufTensor]],
    done: Done,
    advance: Advance,
) -> Fill:
    """Return what has the workers write the data of a file, for `gguf_io.writer.write_gguf`."""
    by_name = {outcome.tensor.name: outcome for outcome in outcomes}
    # the first step is as large as any of its tensor's
    largest = max((next(o.steps()).memory for o in outcomes if o.n_bytes), default=0)

    def fill(output: BinaryIO, slots: Sequence[Slot]) -> None:
        wanted = [(by_name[slot.tensor.name], slot.at) for slot in slots]
        filling = _Filling(output, wanted, done, advance)
        with contextlib.closing(results(client, work, filling.take, Needs.of(largest))) as found:
            for task, answer in found:
                filling.receive(task, answer)
        filling.announce()

    return fill


def tasks(output: str, wanted: Iterable[tuple[Outcome[GgufTensor], int]]) -> Iterator[Task]:
    """Yield the tasks that write a file's tensors, each from its place on."""
    host = socket.gethostname()
    for outcome, at in wanted:
        tensor, mark = outcome.tensor, outcome.tensor.mark()
        for step in outcome.steps():
            start = tensor.data_offset + step.start
            yield Task(tensor.name, step, mark, start, output, at + step.at, host)


class _Filling:
    """What is left to be done on one file."""

    def __init__(
        self,
        output: BinaryIO,
        wanted: list[tuple[Outcome[GgufTensor], int]],
        done: Done,
        advance: Advance,
    ) -> None:
        output.flush()  # workers write beside what is buffered
        self._output, self._done, self._advance = output, done, advance
        self._outcomes = {outcome.tensor.name: outcome for outcome, _ in wanted}
        self._left = {name: outcome.n_bytes for name, outcome in self._outcomes.items()}
        self._unannounced = deque(self._outcomes.values())
        self._tasks = tasks(os.path.abspath(output.name), wanted)
        self._unseen: deque[Task] = deque()  # whose workers did not see the source
        self._sent = 0

    def take(self) -> Task | None:
        """Return the next task, as `results` asks for it."""
        if not self._unseen:
            return next(self._tasks, None)
        if self._sent == MOST_SENT:
            return None
        self._sent += 1
        task = self._unseen.popleft()
        tensor = self._outcomes[task.tensor].tensor
        return task._replace(data=tensor.read(task.step.start, task.step.n_bytes))

    def receive(self, task: Task, answer: Answer | None) -> None:
        """Keep what a worker found, and write what it could not."""
        self._sent -= task.data is not None
        if answer is None:
            self._unseen.append(task)
            return
        if answer.data is not None:
            self._output.seek(task.at)
            self._output.write(as_bytes(answer.data))
        self._outcomes[task.tensor].count(answer.nonfinite, answer.overflowed)
        self._left[task.tensor] -= task.step.n_written
        self._advance(task.step.n_bytes)
        self.announce()

    def announce(self) -> None:
        """Say of tensors that they are done, in their order."""
        while self._unannounced and not self._left[self._unannounced[0].tensor.name]:
            self._done(self._unannounced.popleft())
