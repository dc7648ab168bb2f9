"""How every kernel is compiled."""

from __future__ import annotations

import glob
import hashlib
import logging
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import FunctionType

import numba
import numpy as np
from numba.core import config, event, types
from numba.core.registry import CPUDispatcher

from tbq.codec import Codec

_log = logging.getLogger("tbq")
_progress = logging.getLogger("tbq.compile")  # what is compiled, for whoever waits for it

OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": False, "no_cfunc_wrapper": True}
NOT_BY_PYTHON = {"no_cpython_wrapper": True}


@cache
def _sources_stamp() -> tuple:
    """Return times and sizes of the files of tbq that kernels are compiled from."""
    package = Path(__file__).parents[1]
    files = [*package.glob("families/*.py"), *package.glob("kernels/*.py")]
    files += [package / f"{name}.py" for name in ("bitpack", "cells", "nearest", "numerics")]
    states = ((str(p.relative_to(package)), p.stat()) for p in sorted(files))
    return tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)


def jit(function):
    """Compile with Numba: no fastmath, IEEE division, GIL released, machine code cached on disk.

    Numba never contracts a*b+c to a fused multiply-add by itself, so with fastmath off each float
    operation rounds once, in source order. Where no cache directory can be written, or what is in
    it is damaged, the kernel is compiled anew in every process.

    Numba's cache notices a change of the file a function stands in, but kernels inline functions
    and constants of other files. The cache is therefore stamped with all of them.

    NUMBA_DISABLE_JIT has no effect: interpreted, NumPy's scalars would overflow where machine
    words wrap around, and bytes would differ. What a kernel does in Python is in `tbq.families`.

    Where other kernels call it, a twin is compiled that Python cannot call: what unpacks Python's
    arguments takes a quarter of the time that compiling does.
    """
    tag, own_name = closure_tag(function), function.__qualname__
    with _compiler_enabled():
        kernel = _dispatcher(function, tag, OPTIONS)
        if type(kernel) is CPUDispatcher:  # as in the Numbas that we know
            twin = _twin(function, f"{own_name}_called")
            kernel.callee = _dispatcher(twin, tag, OPTIONS | NOT_BY_PYTHON)
            kernel.__class__ = _Kernel
    return kernel


class _Kernel(CPUDispatcher):
    """A kernel that Python calls; kernels that name it call its twin."""

    @property
    def _numba_type_(self):
        return types.Dispatcher(self.callee)


def _twin(function, name: str) -> FunctionType:
    """Return a copy of a function with a name of its own, by which its machine code is known."""
    twin = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__module__, twin.__kwdefaults__ = function.__module__, function.__kwdefaults__
    twin.__qualname__ = name
    return twin


def _dispatcher(function, tag: str, options: dict):
    """Return Numba's dispatcher of a function, which has the tag in its name from then on."""
    kernel = numba.njit(**options)(function)
    try:
        kernel.enable_caching()  # its files have the name that the function has now
        file = kernel._cache._cache_file
        file._source_stamp = (file._source_stamp, _sources_stamp())
        file.save = partial(_save, file)
        kernel._cache._index_key = partial(_index_key, function.__code__.co_code, tag)
        kernel._cache = _ForgivingCache(kernel._cache)
    except (RuntimeError, OSError, AttributeError) as error:  # or another Numba's internals
        _warn_once(error)
        kernel = numba.njit(**options)(function)
    if tag:
        function.__name__ += tag
        function.__qualname__ += tag
    kernel.compile = _compiler_enabled()(kernel.compile)  # at the first call, long after
    return kernel


def _index_key(code: bytes, tag: str, signature, codegen) -> tuple:
    """Return what a kernel is found by in its cache: as Numba does, but for what it closes over.

    Numba pickles that, and pickled kernels are never the same in two processes.
    """
    return signature, codegen.magic_tuple(), hashlib.sha256(code).hexdigest(), tag


@contextmanager
def _compiler_enabled():
    """Compile whatever NUMBA_DISABLE_JIT says: Numba's own functions are compiled when needed."""
    disabled, config.DISABLE_JIT = config.DISABLE_JIT, 0
    try:
        yield
    finally:
        config.DISABLE_JIT = disabled


def closure_tag(function) -> str:
    """Return what tells a function that a factory made from the factory's others; "" for others.

    Numba tells functions of one name apart by a number, which counts what a process has defined.
    Cached machine code of two processes can have one number for two of a factory's functions, and
    a process that loads both links one of them in place of the other. So each needs a name.
    """
    cells = getattr(function, "__closure__", None)
    if not cells:
        return ""
    names = function.__code__.co_freevars
    text = repr([(n, _stable(c.cell_contents)) for n, c in zip(names, cells, strict=True)])
    return f"_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _stable(value) -> str:
    """Return what is the same in every process for the same value, and differs for others."""
    function = getattr(value, "py_func", None) or getattr(value, "_defn", None)
    if function is not None:  # another kernel, or an intrinsic
        return f"{function.__module__}.{function.__qualname__}"
    if isinstance(value, int | float | str | np.generic):
        return f"{type(value).__name__} {value!r}"
    raise TypeError(f"kernels close over numbers and kernels only, not over {type(value)}")


def _save(file, key, data) -> None:
    """Save a compiled kernel, so that no other process can ever load another one for it.

    Numba's own `save` names data files by number, uses the numbers of an outdated index again, and
    writes the index first: a process that reads in between loads what another kernel of that name,
    or its older source, was compiled to, inlines it, and saves that. Here what is compiled of one
    stamp and key has a file of its own, which is there before the index tells of it.
    """
    base = file._index_name.removesuffix(".nbi")
    name = f"{base}.{hashlib.sha256(file._dump((file._source_stamp, key))).hexdigest()[:32]}.nbc"
    file._save_data(name, data)
    known = file._load_index()
    if not known:  # the index is another stamp's, or damaged: so are the files it knew
        for path in Path(file._cache_path).glob(f"{glob.escape(base)}.*.nbc"):
            if path.name != name:
                path.unlink(missing_ok=True)
    file._save_index(known | {key: name})


class _ForgivingCache:
    """Numba's cache of a kernel, which goes without where files cannot be read or written."""

    def __init__(self, cache) -> None:
        self._cache = cache

    def __getattr__(self, name: str):
        return getattr(self._cache, name)

    def load_overload(self, *args):
        try:
            return self._cache.load_overload(*args)
        except Exception as error:  # unpickling damaged bytes can raise anything
            _warn_once(error)
            self._forget()
            return None

    def save_overload(self, *args) -> None:
        try:
            self._cache.save_overload(*args)
        except Exception as error:
            _warn_once(error)

    def _forget(self) -> None:
        """Start the damaged index anew, so that the next process finds what this one compiles."""
        try:
            self._cache.flush()
        except Exception as error:
            _warn_once(error)


def _warn_once(error: Exception) -> None:
    """Log once what is wrong with the cache: no fault of the caller, so no warning of Python."""
    if not _warned:
        _warned.append(error)
        reason = f"{type(error).__name__}: {error}"
        _log.warning("tbq: kernels are compiled anew, Numba's cache cannot be used: %s", reason)


_warned: list[Exception] = []


class _Announcer(event.Listener):
    """Logs, at the level INFO, for which format something is being compiled, not loaded."""

    def on_start(self, event) -> None:
        if event.data["dispatcher"].py_func.__module__.startswith("tbq."):
            _progress.info("compiling kernels for %s, once", Codec.asked or "rotations")

    def on_end(self, event) -> None:
        pass


event.register("numba:compile", _Announcer())
