"""Comparison of the harness's results, sample by sample."""

import math

import pytest
from finedeep.eval import EvaluationError
from finedeep.eval.compare.comparison import compare, notes_of, sentence_of, table_of


def results_of(tasks, groups=None):
    """As the harness has them. `tasks`: name -> {metric: values of samples}; a pair's second is its size."""
    results, samples, higher = {}, {}, {}
    for name, metrics in tasks.items():
        results[name], higher[name] = {"alias": name}, {}
        for metric, values in metrics.items():
            if metric == "word_perplexity":
                score = math.exp(-sum(x for x, _ in values) / sum(w for _, w in values))
            elif metric == "f1":
                score = 0.123
            else:
                score = sum(values) / len(values)
            results[name] |= {f"{metric},none": score, f"{metric}_stderr,none": "N/A"}
            higher[name][metric] = metric != "word_perplexity"
        count = len(next(iter(metrics.values())))
        samples[name] = [
            {"filter": "none", "doc_id": i, "doc_hash": f"{name} {i}", **{m: v[i] for m, v in metrics.items()}}
            for i in range(count)
        ]
    for group, (children, weighted) in (groups or {}).items():
        sizes = [len(samples[child]) if weighted else 1 for child in children]
        means = [results[child]["acc,none"] for child in children]
        results[group] = {"acc,none": sum(m * s for m, s in zip(means, sizes, strict=True)) / sum(sizes)}
    return {
        "results": results,
        "samples": samples,
        "higher_is_better": higher,
        "group_subtasks": {group: children for group, (children, _) in (groups or {}).items()},
    }


def by_place(rows):
    return {(row.place.task, row.place.metric): row for row in rows}


def test_verdicts_say_who_is_better_whichever_way_the_metric_goes():
    many, some = [0] * 30 + [1] * 30, [1] * 60
    long, short = [(-50.0 - i, 10) for i in range(12)], [(-40.0 - i, 10) for i in range(12)]
    before = results_of({"up": {"acc": many}, "text": {"word_perplexity": short}, "down": {"acc": some}})
    after = results_of({"up": {"acc": some}, "text": {"word_perplexity": long}, "down": {"acc": many}})
    rows = by_place(compare(before, after))
    assert rows["up", "acc"].verdict == "better"
    assert rows["down", "acc"].verdict == "worse"
    assert rows["text", "word_perplexity"].verdict == "worse"
    assert rows["text", "word_perplexity"].difference.losses == 12
    assert rows["text", "word_perplexity"].difference.difference > 0


def test_a_metric_of_no_known_direction_is_not_judged():
    """What the harness says of a task's own function, and of a group whose tasks differ: None."""
    before, after = results_of({"t": {"my": [0] * 60}}), results_of({"t": {"my": [1] * 60}})
    for results in (before, after):
        results["higher_is_better"]["t"]["my"] = None
    (row,) = compare(before, after)
    assert (row.verdict, row.difference) == ("not compared", None)
    assert "the task does not say whether a higher my is better" in sentence_of(row)
    assert "not said" in table_of([row])


def test_holm_makes_a_lone_small_p_value_undecided():
    tasks = {f"t{i}": {"acc": [0, 1] * 20} for i in range(10)}
    better = dict(tasks, t0={"acc": [1, 1] * 6 + [0, 1] * 14})
    alone = compare(results_of({"t0": tasks["t0"]}), results_of({"t0": better["t0"]}))
    together = compare(results_of(tasks), results_of(better))
    assert (alone[0].difference.p, alone[0].p_holm, alone[0].verdict) == (2 / 64, 2 / 64, "better")
    assert together[0].p_holm == pytest.approx(10 * 2 / 64)
    assert together[0].verdict == "not distinguishable at this size"
    assert "40 samples" in sentence_of(together[0])


def test_a_task_is_judged_by_its_main_metric_only():
    both = {"acc": [0, 1, 1], "acc_norm": [1, 1, 0]}
    rows = by_place(compare(results_of({"t": both}), results_of({"t": both})))
    assert rows["t", "acc_norm"].main
    assert rows["t", "acc"].verdict is None
    assert rows["t", "acc_norm"].difference.p == 1


def test_a_metric_that_is_no_mean_of_samples_is_not_tested():
    values = {"f1": [0.2, 0.4]}
    (row,) = compare(results_of({"t": values}), results_of({"t": values}))
    assert row.difference is None
    assert row.verdict == "not compared"
    assert "no average" in sentence_of(row)


def test_a_group_with_a_task_of_one_sample_has_no_interval():
    groups = {"g": (["a", "b"], False)}
    both = results_of({"a": {"acc": [1]}, "b": {"acc": [0, 1, 1]}}, groups)
    assert by_place(compare(both, both))["g", "acc"].difference.low is None


@pytest.mark.parametrize("weighted", [False, True])
def test_groups_are_compared_the_way_the_harness_averages_them(weighted):
    groups = {"g": (["a", "b"], weighted)}
    before = results_of({"a": {"acc": [0, 1]}, "b": {"acc": [0, 0, 1, 1]}}, groups)
    after = results_of({"a": {"acc": [1, 1]}, "b": {"acc": [0, 1, 1, 0]}}, groups)
    row = by_place(compare(before, after))["g", "acc"]
    assert row.is_group
    assert row.difference.difference == pytest.approx(1 / 6 if weighted else 1 / 4)
    assert row.verdict is None


def test_other_samples_are_refused():
    one, two = results_of({"t": {"acc": [0, 1]}}), results_of({"t": {"acc": [0, 1]}})
    two["samples"]["t"][1]["doc_hash"] = "another"
    with pytest.raises(EvaluationError, match="t: the two models were scored on different samples"):
        compare(one, two)


def test_samples_in_another_order_are_paired_by_document():
    one, two = results_of({"t": {"acc": [0, 0, 1]}}), results_of({"t": {"acc": [0, 0, 1]}})
    two["samples"]["t"].reverse()
    (row,) = compare(one, two)
    assert row.difference.ties == 3


def test_the_table_has_a_row_for_each_metric():
    both = results_of({"t": {"acc": [0, 1, 1], "acc_norm": [1, 1, 0]}})
    lines = table_of(compare(both, both)).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("finite", [-40.0, -1e5], ids=["minus infinity in both", "a perplexity that overflows"])
def test_an_answer_without_a_chance_decides_nothing(finite):
    """Both models' perplexities are infinite: their difference is no number, and no verdict either."""
    impossible = -math.inf if finite == -40.0 else -1e6
    before = [(impossible, 10), *[(finite - i, 10) for i in range(11)]]
    after = [(impossible, 10), *[(finite - 2 * i, 10) for i in range(11)]]
    one, two = (results_of({"t": {"word_perplexity": [(-1.0, 1)] * 12}}) for _ in range(2))
    for results, values in ((one, before), (two, after)):
        results["results"]["t"]["word_perplexity,none"] = math.inf
        for sample, value in zip(results["samples"]["t"], values, strict=True):
            sample["word_perplexity"] = value
    (row,) = compare(one, two)
    assert (row.verdict, row.difference) == ("not compared", None)
    assert "word_perplexity of the baseline and the model is infinite" in sentence_of(row)


def test_equal_models_are_identical_and_not_undecided():
    both = results_of({"t": {"acc": [0, 1] * 20}})
    (row,) = compare(both, both)
    assert sentence_of(row) == "t: identical (acc 0.5000, identical on all 40 questions)"


def test_an_interval_that_the_verdict_does_not_go_by_says_so():
    """Ten tasks of no difference beside one whose own interval leaves out 0: Holm's p is 0.3."""
    tasks = {f"t{i}": {"acc": [0, 1] * 20} for i in range(10)}
    better = dict(tasks, t0={"acc": [1, 1] * 6 + [0, 1] * 14})
    row = compare(results_of(tasks), results_of(better))[0]
    assert row.difference.low > 0
    assert row.verdict == "not distinguishable at this size"
    assert "interval +0.0500 to +0.2750 (of this task by itself; the verdict goes by p)" in sentence_of(row)
    alone = compare(results_of({"t0": tasks["t0"]}), results_of({"t0": better["t0"]}))
    assert "by itself" not in sentence_of(alone[0])


def test_few_samples_are_named():
    few, many = {"acc": [0, 1, 1, 0, 1, 1]}, {"acc": [0, 1] * 20}
    notes = notes_of(compare(results_of({"few": few, "many": many}), results_of({"few": few, "many": many})))
    assert "Holm's correction over 2 tasks" in notes[0]
    assert notes[1].startswith("Fewer than 30 samples (few: 6): ")
