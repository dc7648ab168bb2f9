"""Shared fixtures: formats, test data, and a way to run the programs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

import tbq
from tbq import registry
from tbq.dialect import Dialect, Release
from tools import tbq_inspect, tbq_quantize, tbq_vectors

HERE = Path(__file__).parent
SAMPLES = HERE / "samples"
VECTORS = HERE / "vectors"
STATES = SAMPLES / "state"
MODELS = SAMPLES / "models"
# Dumps of session version 10 and sequence version 3, and of 9 and 2 with names that start with v9.
STATES_V3 = SAMPLES / "state-v3"
MANIFEST = json.loads((HERE / "manifest.json").read_text())

# Kernels compile in their first call, and the machines are slow and shared.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("tests")


def vectors_path(fmt: tbq.Format) -> Path:
    """Return where the vectors of a format are."""
    release = f"@{fmt.release}" if fmt.release else ""
    choice = f".{fmt.choice.replace('=', '')}" if fmt.choice else ""
    return VECTORS / fmt.dialect / f"{fmt.name}{release}{choice}.npz"


FORMATS = tuple(variant for fmt in tbq.formats() for variant in fmt.variants())
# Those that some release has a type id for: no file can hold the others.
NUMBERED = tuple(fmt for fmt in FORMATS if registry.get_dialect(fmt.dialect).numbers(fmt))
# Those of which there is something that the fork's own code wrote.
PROVEN = tuple(fmt for fmt in FORMATS if fmt.evidence == "vectors")
# One format of each algorithm and kind of block, for what takes long; all of them if TBQ_FULL=1.
FULL = os.environ.get("TBQ_FULL") == "1"
REPRESENTATIVES = tuple(
    {
        (type(f.codec), f.block.names, f.codec.group_blocks, f.codec.takes, f.codec.gives): f
        for f in reversed(FORMATS)
    }.values()
)
# Whose forks' code is wrong, and of which nearly nothing comes back.
WRONG = {*(f"dusterbloom-cpu:tbq{bits}" for bits in (2, 3, 4)), "excidos-cpu:tbq3_0"}


@pytest.fixture(params=FORMATS, ids=lambda fmt: fmt.label)
def fmt(request) -> tbq.Format:
    """Every registered format, with every choice that it has."""
    return request.param


@pytest.fixture
def registered_twin():
    """Register, for one test, a dialect with tbq3_0 of pr21089 under a name of its own."""
    names = []

    def register(name: str, codec=None, older=None) -> tbq.Format:
        source = tbq.get_format("pr21089:tbq3_0")
        twin = dataclasses.replace(source, dialect=name, codec=codec or source.codec)
        releases = [Release("new", types={42: twin})]
        if older:
            releases.append(Release("old", types=dict.fromkeys(older, twin)))
        rotation = registry.get_dialect("pr21089").rotation
        registry.register(Dialect(name, name, tuple(releases), rotation=rotation))
        names.append(name)
        return twin

    yield register
    for name in names:
        registry.unregister(name)


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator."""
    return np.random.default_rng(7)


def run_program(*args: object, **kwargs) -> subprocess.CompletedProcess:
    """Run tbq-quantize in a process of its own."""
    command = [sys.executable, "-m", "tools.tbq_quantize", *map(str, args)]
    kwargs = {"capture_output": True, "text": True, "timeout": 300} | kwargs
    return subprocess.run(command, cwd=HERE.parent, **kwargs)


def program(main):
    """Return a fixture that runs a program in this process: (exit code, stdout, stderr)."""

    @pytest.fixture
    def fixture(capsys):
        def run(*args: object) -> tuple[int, str, str]:
            capsys.readouterr()
            try:
                code = main([str(arg) for arg in args])
            except SystemExit as stop:  # argparse
                code = stop.code
            captured = capsys.readouterr()
            return code, captured.out, captured.err

        return run

    return fixture


quantize = program(tbq_quantize.main)
inspect = program(tbq_inspect.main)
vectors = program(tbq_vectors.main)
