"""Shared fixtures: formats, test data, and a way to run the programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

import tbq
from tools import tbq_inspect, tbq_quantize, tbq_vectors

HERE = Path(__file__).parent
SAMPLES = HERE / "samples"
VECTORS = HERE / "vectors"
STATES = SAMPLES / "state"
MODELS = SAMPLES / "models"
MANIFEST = json.loads((HERE / "manifest.json").read_text())

# Kernels compile in their first call, and the machines are slow and shared.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("tests")


def vectors_path(fmt: tbq.Format) -> Path:
    """Return where the vectors of a format are."""
    return VECTORS / fmt.dialect / f"{fmt.name}.npz"


@pytest.fixture(params=tbq.formats(), ids=lambda fmt: fmt.key)
def fmt(request) -> tbq.Format:
    """Every registered format."""
    return request.param


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
