"""Statistics of paired scores, against plain loops, scipy and simulation."""

import itertools
import math

import numpy as np
import pytest
from finedeep.eval.compare import paired_statistics as paired
from finedeep.eval.compare.paired_statistics import difference_of, difference_of_means, holm
from scipy import stats


@pytest.fixture
def fewer(monkeypatch):
    monkeypatch.setattr(paired, "RESAMPLES", 999)


def exact_p(a, b, statistic):
    """Over all 2^n ways of swapping a sample's two scores; two-sided as twice the smaller tail."""
    observed, low, high, ways = statistic(a, b), 0, 0, 0
    for swaps in itertools.product([False, True], repeat=len(a)):
        x = [q if swap else p for p, q, swap in zip(a, b, swaps, strict=True)]
        y = [p if swap else q for p, q, swap in zip(a, b, swaps, strict=True)]
        found = statistic(x, y)
        low += found <= observed + 1e-12
        high += found >= observed - 1e-12
        ways += 1
    return min(1.0, 2 * min(low, high) / ways)


def test_permutation_is_exact_for_few_samples():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=7), draw.normal(size=7) + 0.5
    found = difference_of(a, b)
    assert found.test == "paired permutation"
    assert found.difference == pytest.approx(b.mean() - a.mean())
    assert found.p == pytest.approx(exact_p(list(a), list(b), lambda x, y: sum(y) / 7 - sum(x) / 7))


def test_permutation_of_a_perplexity_over_words():
    draw = np.random.default_rng(1)
    a, words = -draw.uniform(5, 50, 6), draw.integers(3, 20, 6)
    b = a * draw.uniform(0.8, 1.1, 6)

    def perplexity(x):
        return math.exp(-sum(x) / sum(words))

    found = difference_of(a, b, words, aggregate="weighted_perplexity", higher_is_better=True)
    assert found.difference == pytest.approx(perplexity(b) - perplexity(a))
    assert found.p == pytest.approx(exact_p(list(a), list(b), lambda x, y: perplexity(y) - perplexity(x)))
    assert (found.wins, found.losses) == (int((b > a).sum()), int((b < a).sum()))


def test_mcnemar_is_the_binomial_of_the_samples_that_differ():
    a = [1] * 10 + [0] * 9 + [1] * 30 + [0] * 11
    b = [0] * 10 + [1] * 9 + [1] * 30 + [0] * 11
    b[10:15], b[0:8] = [1] * 5, [1] * 8  # 2 losses, 9 wins
    found = difference_of(a, b)
    assert (found.wins, found.ties, found.losses, found.samples) == (9, 49, 2, 60)
    tail = sum(math.comb(11, i) for i in range(3)) / 2**11
    assert found.test == "exact McNemar"
    assert found.p == pytest.approx(2 * tail)
    assert found.difference == pytest.approx(7 / 60)


@pytest.mark.parametrize("scores", [[0, 1, 1, 0], [0.1, 0.5, -2.0]])
def test_identical_scores_differ_by_nothing(scores):
    found = difference_of(scores, scores)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert (found.wins, found.losses) == (0, 0)


def test_rounding_is_no_difference():
    draw = np.random.default_rng(2)
    a = -draw.uniform(100, 2000, 200)
    found = difference_of(a, a * (1 + 1e-7), np.full(200, 50), aggregate="weighted_perplexity")
    assert (found.difference, found.p, found.ties) == (0, 1, 200)


def test_one_sample_has_no_interval_and_says_nothing():
    found = difference_of([1.5], [2.5])
    assert (found.low, found.high, found.p) == (None, None, 1)


def test_the_interval_is_scipys_of_the_differences():
    draw = np.random.default_rng(3)
    a = draw.normal(size=40)
    b = a + draw.normal(0.2, 1, size=40)
    found = difference_of(a, b, seed=5)
    theirs = stats.bootstrap((b - a,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(5))
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.02)


def test_the_interval_covers_the_truth(fewer):
    """400 experiments of each kind: 95 % but for chance (3 standard errors are 3.3 %) and the bootstrap's own bias."""
    draw = np.random.default_rng(4)
    hits = {"means": 0, "shares": 0}
    for _ in range(400):
        a = draw.normal(size=60)
        found = difference_of(a, a + draw.normal(0.3, 1, 60))
        hits["means"] += found.low <= 0.3 <= found.high
        a = draw.random(150)
        found = difference_of((a < 0.5).astype(int), ((a + draw.normal(0, 0.3, 150)) < 0.5).astype(int))
        hits["shares"] += found.low <= 0 <= found.high
    assert hits["means"] / 400 == pytest.approx(0.95, abs=0.035)
    assert hits["shares"] / 400 == pytest.approx(0.95, abs=0.035)


def test_under_a_true_null_the_p_value_is_uniform(fewer):
    draw = np.random.default_rng(5)
    p = [difference_of(draw.normal(size=25), draw.normal(size=25)).p for _ in range(300)]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    # The exact test of shares is a discrete one: never too often below a level.
    p = np.array([difference_of(draw.random(200) < 0.5, draw.random(200) < 0.5).p for _ in range(1000)])
    for level in (0.01, 0.05, 0.2):
        assert (p <= level).mean() <= level + 3 * math.sqrt(level * (1 - level) / 1000)


def test_mean_of_means_weighs_tasks_and_not_samples():
    draw = np.random.default_rng(6)
    tasks = [(draw.random(4), draw.random(4)), (draw.random(5), draw.random(5))]
    weights = [0.5, 0.5]
    found = difference_of_means(tasks, weights)

    def statistic(x, y):
        return (sum(y[:4]) - sum(x[:4])) / 4 / 2 + (sum(y[4:]) - sum(x[4:])) / 5 / 2

    a, b = (np.concatenate([task[i] for task in tasks]).tolist() for i in (0, 1))
    assert found.difference == pytest.approx(statistic(a, b))
    assert found.p == pytest.approx(exact_p(a, b, statistic))
    assert found.low < found.difference < found.high


def test_the_interval_of_a_mean_of_means_covers_the_truth(fewer):
    draw = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        tasks = [(np.zeros(n), draw.normal(mean, 1, n)) for n, mean in ((30, 0.1), (90, 0.4))]
        found = difference_of_means(tasks, [0.5, 0.5])
        hits += found.low <= 0.25 <= found.high
    assert hits / 200 == pytest.approx(0.95, abs=0.05)


def test_holm_in_the_papers_steps():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
