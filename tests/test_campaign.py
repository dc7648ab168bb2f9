"""The campaign of mutated files in small: so many cases of each kind, and none fails."""

import random

import pytest

from gguf_io import reader
from tools import vector_check

try:
    from tests import campaign
except ImportError:  # run from another folder
    import campaign

CASES = {"gguf": 400, "state": 400, "vectors": 60}


def run(kind, cases, seed=7):
    return campaign.campaign(kind, seed, lambda done: done >= cases)


@pytest.mark.parametrize("kind", CASES)
def test_no_case_fails(kind, monkeypatch):
    monkeypatch.setattr(campaign, "MAX_CPU", float("inf"))  # other programs run beside this
    ledger = run(kind, CASES[kind])
    assert ledger.failures == {}
    assert ledger.cases == CASES[kind]
    assert ledger.opened > ledger.cases // 20
    assert ledger.refused > ledger.cases // 4 or kind == "vectors"
    assert ledger.programs > 50


def test_a_seed_gives_the_same_cases():
    found = []
    for seed in (1, 1, 2):
        seen = []
        campaign.campaign("gguf", seed, lambda done: done >= 30, note=seen.append)
        found.append(seen)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("kind", ["gguf", "vectors"])
def test_faults_are_found(monkeypatch, tmp_path, kind):
    """Of the library and of the programs, each once with its input."""

    def fault(*args):
        raise ZeroDivisionError("as planned")

    if kind == "gguf":
        monkeypatch.setattr(reader, "identify", fault)
    else:
        monkeypatch.setattr(vector_check, "check", fault)
    ledger = campaign.campaign(kind, 1, lambda done: done >= 25, tmp_path / "kept")
    assert ledger.failures
    assert "as planned" in str(ledger.failures)
    assert len(list((tmp_path / "kept").iterdir())) == len(ledger.failures)


def test_much_memory_is_found(monkeypatch):
    monkeypatch.setattr(campaign, "MAX_EXCESS", 100)
    assert "memory" in run("state", 40).failures


def test_mutants_differ():
    mutate = campaign.Mutator(random.Random(1))
    data = bytes(range(256)) * 3
    assert sum(mutate(data, [data]) != data for _ in range(100)) > 90
    assert mutate(b"", [b""]) is not None
