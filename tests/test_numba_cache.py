"""The compiler's cache and the environment: whatever they are, the bytes are the same."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import HERE, SAMPLES

import gguf_io
import tbq
from tbq.kernels import compile as compiler

WARNING = "tbq: kernels are compiled anew, Numba's cache cannot be used"
# A kernel that is compiled in no time, in a module of its own.
KERNEL = """
from tbq.kernels.compile import jit

@jit
def kernel(x):
    total = x[0] * 0
    for value in x:
        total += value
    return total
"""
CHECK = "import numpy as np, kernel; print(kernel.kernel(np.arange(5)))"
EXPECTED = "10"


def python(code, folder, *flags, args=(), cache=None, **environment):
    """Run Python code in a process of its own; return what it prints, and on stderr."""
    path = os.pathsep.join([str(HERE.parent), str(folder)])
    environment = os.environ | {"PYTHONPATH": path} | environment
    if cache is not None:
        environment["NUMBA_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, *flags, "-c", code, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A folder with the module and, beside it, a cache that holds its kernel."""
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "kernel.py").write_text(KERNEL)
    assert python(CHECK, folder, cache=folder / "cache") == (EXPECTED, "")
    return folder


@pytest.fixture
def cache(module, tmp_path):
    """A copy of the cache which may be damaged."""
    return Path(shutil.copytree(module / "cache", tmp_path / "cache"))


def truncate(data):
    return b""


def cut(data):
    return data[: len(data) // 2]


def scramble(data):
    return bytes(byte ^ 0x55 for byte in data)


DAMAGES = [(truncate, "*.nbi"), (cut, "*.nbi"), (truncate, "*.nbc"), (cut, "*.nbc")]
DAMAGES += [(scramble, "*.nb?")]


@pytest.mark.parametrize(("damage", "files"), DAMAGES, ids=lambda x: getattr(x, "__name__", x))
def test_damaged(module, cache, damage, files):
    damaged = list(cache.rglob(files))
    assert damaged
    for path in damaged:
        path.write_bytes(damage(path.read_bytes()))
    found, err = python(CHECK, module, cache=cache)
    assert found == EXPECTED
    assert err.count(WARNING) == err.count("\n") == 1, err
    assert python(CHECK, module, cache=cache) == (EXPECTED, ""), "what was compiled anew is kept"


def test_full_disk(module, tmp_path):
    """A limit of the size of files, which writing the cache runs into."""
    script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
    found, err = python(script + CHECK, module, cache=tmp_path)
    assert found == EXPECTED
    assert err.count(WARNING) == err.count("\n") == 1, err


def test_no_place_for_a_cache(tmp_path):
    """Neither where it is told to be, nor beside the source, nor at home; root or not."""
    (tmp_path / "kernel.py").write_text(KERNEL)
    for name in ("file", "__pycache__"):
        (tmp_path / name).write_bytes(b"")
    home = str(tmp_path / "file" / "home")
    places = {"HOME": home, "XDG_CACHE_HOME": home, "NUMBA_CACHE_DIR": home}
    found, err = python(CHECK, tmp_path, **places)
    assert found == EXPECTED
    assert err.count(WARNING) == err.count("\n") == 1, err


def test_a_full_disk_of_the_cache_says_nothing_of_the_output(tmp_path):
    script = (
        "import errno, sys; from numba.core import caching; from tbq.kernels import compile\n"
        "def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "caching.IndexDataCacheFile.load = full\n"  # stands for the save of a new kernel
        "import kernel, numpy\n"
        "from gguf_io import convert\n"
        "plain = convert._converted\n"
        "convert._converted = lambda *a: (kernel.kernel(numpy.arange(5)), plain(*a))[1]\n"
        "from tools import tbq_quantize; sys.exit(tbq_quantize.main(sys.argv[1:]))"
    )
    (tmp_path / "kernel.py").write_text(KERNEL)
    out = tmp_path / "o.gguf"
    source = SAMPLES / "small.f32.gguf"
    done = subprocess.run(
        [sys.executable, "-c", script, "--pure", str(source), str(out), "q8_0"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(tmp_path)])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(WARNING) == 1
    assert out.stat().st_size > 1000


# Kernels of one name and signature, such as closures are, of sources of some age.
CLOSURES = """
from tbq.kernels import compile

def make(step, stamp):
    compile._sources_stamp = lambda: stamp

    @compile.jit
    def kernel(x):
        total = x[0] * 0
        for value in x:
            total += value * step
        return total

    return kernel
"""
USE = "import numpy as np, closures; print(closures.make({0}, {1!r})(np.arange(5)))"
# Another process runs between what this one writes first and what it writes then.
INTERRUPTED = """
import subprocess, sys
import numpy as np
import closures

def pausing(write):
    def paused(*args):
        written.append(args)
        if len(written) == 2:
            other = [sys.executable, "-c", sys.argv[1]]
            print(subprocess.run(other, capture_output=True, text=True).stdout.strip())
        return write(*args)
    return paused

written = []
kernel = closures.make(2, "new")
file = kernel._cache._cache_file
file._save_index, file._save_data = pausing(file._save_index), pausing(file._save_data)
print(kernel(np.arange(5)))
"""


@pytest.mark.parametrize("other", [1, 2])
def test_processes_at_the_same_time(tmp_path, other):
    """What one is about to write is never taken for what another left under its name."""
    (tmp_path / "closures.py").write_text(CLOSURES)
    cache = tmp_path / "cache"
    for step in (1, 2):  # older sources, of which data files remain
        assert python(USE.format(3 * step, "old"), tmp_path, cache=cache) == (f"{30 * step}", "")
    found, err = python(INTERRUPTED, tmp_path, args=[USE.format(other, "new")], cache=cache)
    assert (found.split(), err) == ([f"{10 * other}", "20"], "")
    for step in (1, 2):
        assert python(USE.format(step, "new"), tmp_path, cache=cache) == (f"{10 * step}", "")
    left = [path.name for path in cache.rglob("*.nbc")]
    assert len(left) <= 2, "of older sources nothing is kept"


# What the tests themselves have compiled is used here.
BYTES = """
import hashlib, sys
import numpy as np
import tbq
x = np.random.default_rng(5).standard_normal((3, 256)).astype(np.float32)
packed = tbq.quantize(x, "tbq3_0")
print(hashlib.sha256(packed.tobytes() + tbq.dequantize(packed, "tbq3_0").tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def expected():
    """What the specification says, which is not compiled."""
    fmt = tbq.get_format("tbq3_0")
    x = np.random.default_rng(5).standard_normal((3, 256)).astype(np.float32)
    rows = [fmt.codec.quantize_rows(x[i : i + 1], 0) for i in range(3)]
    values = [fmt.codec.dequantize_rows(row) for row in rows]
    parts = [np.concatenate(rows), np.concatenate(values)]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


ENVIRONMENTS = {
    "no compiler": ((), {"NUMBA_DISABLE_JIT": "1"}),
    "warnings are errors": (("-W", "error"), {}),
    "everything is ASCII": ((), {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}),
    "one thread": ((), {"NUMBA_NUM_THREADS": "1"}),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments(tmp_path, expected, name):
    flags, environment = ENVIRONMENTS[name]
    if name == "no compiler":  # nothing that was compiled before may help
        environment = environment | {"cache": tmp_path / "cache"}
    assert python(BYTES, tmp_path, *flags, **environment) == (expected, "")


@pytest.mark.parametrize("encoding", ["ascii:strict", "latin-1:strict", "utf-16"])
def test_output_encodings(tmp_path, encoding):
    """Names that cannot be printed are shown all the same, and files are named as they are."""
    path = tmp_path / "中.gguf"
    tensor = gguf_io.OutputTensor.from_array("é中.weight", np.ones((2, 32), np.float32))
    gguf_io.write_gguf(path, {}, [tensor])
    for program, args in (("tbq_inspect", [path]), ("tbq_quantize", [path, f"{path}.o", "q8_0"])):
        done = subprocess.run(
            [sys.executable, "-m", f"tools.{program}", *map(str, args)],
            cwd=HERE.parent,
            env=os.environ | {"PYTHONIOENCODING": encoding},
            capture_output=True,
            timeout=100,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert "weight" in done.stdout.decode(encoding.partition(":")[0])
    assert Path(f"{path}.o").exists()


@pytest.mark.parametrize("fmt", ["tbq3_0", "ktq2_1", "vtq2_2"])
def test_the_callers_error_state_has_no_effect(fmt):
    """Infinities, NaN and denormals come through, and nothing is raised or warned of."""
    x = np.random.default_rng(3).standard_normal((4, 256)).astype(np.float32)
    x[0] *= np.float32(1e-42)
    x[1] *= np.float32(1e38)
    x[2, :3] = np.inf, -np.inf, np.nan
    packed = tbq.quantize(x, fmt)
    y = tbq.dequantize(packed, fmt)
    for state in ("raise", "warn", "print"):
        with np.errstate(all=state):
            assert tbq.quantize(x, fmt).tobytes() == packed.tobytes()
            assert tbq.dequantize(packed, fmt).tobytes() == y.tobytes()


def test_the_programs_under_every_error_state(quantize, inspect, tmp_path):
    x = np.zeros((4, 256), np.float32)
    x[0], x[1, 0], x[2] = 1e30, np.nan, 1e-42
    path = tmp_path / "m.gguf"
    gguf_io.write_gguf(path, {}, [gguf_io.OutputTensor.from_array("x.weight", x)])
    with np.errstate(all="raise"):
        for name in ("tbq3_0", "q8_0", "q4_0", "f16", "bf16"):
            out = tmp_path / "o.gguf"
            code, _, err = quantize("--pure", "--allow-overflow", "--verify", path, out, name)
            assert code in (0, 1), err
            assert "Traceback" not in err
            assert inspect("--reference", path, out)[0] == 0
        assert inspect("--candidates", "tbq3_0,q8_0,f16", path)[0] == 0


# --- the cache itself ----------------------------------------------------------------------------


class Failing:
    def __init__(self, error):
        self.error, self.flushed = error, 0

    def load_overload(self, *args):
        raise self.error

    save_overload = load_overload

    def flush(self):
        self.flushed += 1
        raise self.error


@pytest.mark.parametrize("error", [EOFError(), OSError("disk"), KeyError("x"), MemoryError()])
def test_a_cache_that_fails_is_done_without(monkeypatch, caplog, error):
    monkeypatch.setattr(compiler, "_warned", [])
    inner = Failing(error)
    cache = compiler._ForgivingCache(inner)
    assert cache.load_overload("signature", "target") is None
    cache.save_overload("signature", "data")
    assert inner.flushed == 1
    assert len(caplog.records) == 1
    assert cache.error is error  # everything else is Numba's


def test_ctrl_c_is_not_a_failure_of_the_cache():
    with pytest.raises(KeyboardInterrupt):
        compiler._ForgivingCache(Failing(KeyboardInterrupt())).load_overload()


def test_disable_jit_is_as_before():
    from numba.core import config

    before = config.DISABLE_JIT
    compiler.jit(lambda x: x)
    assert before == config.DISABLE_JIT


def test_no_two_kernels_have_one_name():
    """Processes number kernels of one name each in their own way, and share what they compile."""
    import gc
    import importlib
    import pkgutil

    from numba.core.dispatcher import Dispatcher

    import tbq.kernels

    for module in pkgutil.iter_modules(tbq.kernels.__path__):
        importlib.import_module(f"tbq.kernels.{module.name}")
    named = {}
    for kernel in gc.get_objects():
        if not issubclass(type(kernel), Dispatcher):  # isinstance would look behind proxies
            continue
        function = kernel.py_func
        if function.__module__.startswith("tbq."):
            cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
            named.setdefault((function.__module__, function.__qualname__), set()).add(cells)
    assert len(named) > 200
    assert {name: cells for name, cells in named.items() if len(cells) > 1} == {}


def test_kernels_close_over_nothing_that_has_no_name():
    table = {}
    with pytest.raises(TypeError, match="close over numbers and kernels only"):

        @compiler.jit
        def kernel(x):
            return x if table else -x


# --- kernels that kernels call -------------------------------------------------------------------

NESTED = """
from tbq.kernels.compile import jit

def make(inner):
    @jit
    def kernel(x):
        return inner(x) * 2
    return kernel

@jit
def plus_one(x):
    return x[0] + 1

twice = make(plus_one)

@jit
def outer(x):
    return twice(x) + 10
"""
CALLED = """
import numpy as np, nested
x = np.arange(5)
print(nested.outer(x), *(len(k.overloads) for k in (nested.twice, nested.plus_one)))
print(sum(nested.twice.callee.stats.cache_hits.values()), nested.twice(x), nested.plus_one(x))
"""


def test_what_kernels_call_is_not_what_python_calls(tmp_path):
    """And what closes over a kernel is found by the next process, though it was not its caller."""
    (tmp_path / "nested.py").write_text(NESTED)
    cache = tmp_path / "cache"
    assert python(CALLED, tmp_path, cache=cache) == ("12 0 0\n0 2 1", "")
    for path in cache.rglob("nested.outer*"):
        path.unlink()
    assert python(CALLED, tmp_path, cache=cache) == ("12 0 0\n1 2 1", "")
