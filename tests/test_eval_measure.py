"""Scores, attribution and the cheapest types."""

import itertools

import numpy as np
import pytest
import tiny_models
from tiny_models import Tiny, log_softmax

import gguf_io
from gguf_io import evaluation
from gguf_io.evaluation import attribution, measure
from gguf_io.evaluation.attribution import Option, cheapest
from gguf_io.evaluation.evaluate import Task, evaluate, total_steps
from tbq import InputError

CTX = 20


class Output:
    """An output matrix, as `measure.score` needs it."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.n_vocab = len(matrix)

    def output_rows(self, start, stop):
        return self.matrix[start:stop]


@pytest.fixture
def task(tmp_path, rng):
    path = tiny_models.make(Tiny("qwen3", n_layer=3), tmp_path / "m.gguf")
    with gguf_io.open_gguf(path) as file:
        windows = [rng.integers(0, tiny_models.VOCAB, CTX).astype(np.int32) for _ in range(2)]
        yield Task(evaluation.load(file), windows, threads=2)


@pytest.mark.parametrize("piece", [1, 60, 10**6])
@pytest.mark.parametrize("threads", [1, 3])
def test_scores_equal_a_softmax_in_float64(piece, threads, monkeypatch, rng):
    monkeypatch.setattr(measure, "PIECE_LOGITS", piece)
    matrix = rng.standard_normal((97, 8)).astype(np.float32)
    matrix[:, 0] += 6 * np.sin(np.arange(97))  # the largest logit so far changes often
    hidden = [[rng.standard_normal((n, 8)).astype(np.float32) for n in (6, 4)] for _ in range(3)]
    hidden.append(hidden[0])
    targets = [rng.integers(0, 97, n) for n in (5, 3)]  # the last position predicts nothing
    found = measure.score(Output(matrix), hidden, targets, threads=threads)
    logs = []
    for mine in hidden:
        used = np.concatenate([mine[0][:5], mine[1][:3]]).astype(np.float64)
        logs.append(log_softmax(used @ matrix.T.astype(np.float64)))
    joined = np.concatenate(targets)
    for scores, log in zip(found, logs, strict=True):
        kld = (np.exp(logs[0]) * (logs[0] - log)).sum(axis=1)
        assert np.allclose(scores.nll, -log[np.arange(8), joined], atol=1e-5)
        assert np.allclose(scores.kld, kld, atol=1e-5)
        assert np.array_equal(scores.same, log.argmax(axis=1) == logs[0].argmax(axis=1))
    assert found[1].kld.min() > 0.1
    assert not found[3].kld.any()
    assert found[3].same.all()


def test_summary():
    scores = measure.TokenScores(
        np.array([0.0, 2.0]), np.array([1.0, 3.0]), np.array([True, False])
    )
    got = scores.summary()
    assert got["ppl"] == pytest.approx(np.e)
    assert got["ppl_se"] == pytest.approx(np.e)  # the spread is 2 / sqrt(2), of two values
    assert got["kld"] == got["kld_median"] == 2
    assert got["kld_se"] == pytest.approx(1)
    assert got["kld_99"] == pytest.approx(2.98)
    assert (got["same_top"], got["n"]) == (0.5, 2)


def test_which_predictions_are_scored(task):
    run = evaluation.make_run(task.model, "f32", "f32")
    (scores,) = evaluate(task, [run], base=run)
    assert len(scores.nll) == 2 * (CTX - 1 - CTX // 2)
    tiny = Tiny("qwen3", n_layer=3)
    rewritten = task.model.weights.file.path.with_name("again.gguf")
    tiny_models.make(tiny, rewritten)
    want = []
    for window in task.windows:
        log = log_softmax(tiny_models.logits(tiny, window))
        want += [-log[t, window[t + 1]] for t in range(CTX // 2, CTX - 1)]
    assert np.allclose(scores.nll, want, atol=2e-4)


def test_turns_change_nothing(task):
    names = [("f16", "f16"), ("q4_0", "f16"), ("f16", "tbq3_0"), ("q8_0", "q8_0")]
    runs = [evaluation.make_run(task.model, *pair) for pair in names]
    steps = []
    together = evaluate(task, runs, progress=steps.append)
    assert task.at_once > len(runs)
    small = Task(task.model, task.windows, 1, memory=2 * task.run_bytes)
    assert small.at_once == 1
    for a, b in zip(together, evaluate(small, runs), strict=True):
        assert np.allclose(a.nll, b.nll, atol=1e-3)
        assert np.allclose(a.kld, b.kld, atol=1e-3)
    assert not together[0].kld.any()
    assert together[1].kld.mean() > together[3].kld.mean() > 0
    assert 0.5 * total_steps(task, 4) < sum(steps) <= total_steps(task, 4)
    assert task.peak_bytes(4) > task.peak_bytes(1) > 0


def test_windows_of_one_length_only(task):
    uneven = Task(task.model, [task.windows[0], task.windows[1][:-1]])
    with pytest.raises(InputError, match="one length"):
        evaluate(uneven, [])


def test_attribution_adds_up(task):
    base = evaluation.make_run(task.model, "f16", "f16")
    run = evaluation.make_run(task.model, "q4_0", "q8_0")
    found = attribution.attribution(task, run, base)
    assert list(found.parts) == [(layer, side) for layer in range(3) for side in "KV"]
    whole = found.whole.kld.mean()
    assert found.sum == pytest.approx(sum(s.kld.mean() for s in found.parts.values()))
    assert found.sum + found.interaction == pytest.approx(whole)
    assert abs(found.interaction) < 0.6 * whole
    assert found.sides["K"].kld.mean() > 3 * found.sides["V"].kld.mean()
    report = found.report()
    assert [(p["layer"], p["side"]) for p in report["parts"]] == list(found.parts)


def test_attribution_of_one_part_is_the_whole(task):
    base = evaluation.make_run(task.model, "f16", "f16")
    run = evaluation.make_run(task.model, "tbq3_0", "tbq3_0").where(base, [1], "V")
    found = attribution.attribution(task, run, base)
    assert list(found.parts) == [(1, "V")]
    assert found.interaction == 0
    assert np.array_equal(found.parts[1, "V"].kld, found.whole.kld)
    assert not found.sides["K"].kld.any()


def test_cheapest_equals_trying_all(rng):
    for _ in range(20):
        slots = [
            [Option(None, int(b), k) for b, k in zip(rng.integers(1, 9, 4), rng.random(4))]  # noqa: B905
            for _ in range(4)
        ]
        for budget in (0.3, 0.9, 2.0):
            every = [
                c for c in itertools.product(*slots) if sum(option.kld for option in c) <= budget
            ]
            got = cheapest(slots, budget)
            if not every:
                assert got is None
                continue
            assert sum(o.kld for o in got) <= budget
            assert all(o in slot for o, slot in zip(got, slots, strict=True))
            least = min(sum(o.bytes for o in c) for c in every)
            assert sum(o.bytes for o in got) == least


def test_policy_stays_within_the_budget(task):
    base = evaluation.make_run(task.model, "f16", "f16")
    names = [("q8_0", "q8_0"), ("q4_0", "q4_0")]
    runs = [evaluation.make_run(task.model, *pair) for pair in names]
    costs = attribution.measured_costs(task, runs, base)
    assert len(costs) == 2 * 2 * 3
    worst = evaluate(task, runs, base=base)[1].kld.mean()
    bits = []
    for budget in (worst / 30, worst / 3, 3 * worst):
        found = attribution.policy(task, runs, base, costs, float(budget))
        assert found.scores.kld.mean() <= budget
        bits.append(found.run.bits(task.model))
    assert bits[0] > bits[1] > bits[2] == 4.5
    nothing = attribution.policy(task, runs, base, costs, 1e-12)
    assert nothing.run.bits(task.model) == 16
