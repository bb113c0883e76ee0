"""Scores of hand-made episodes against literal values."""

import dataclasses
import json
import math

import numpy as np
import pytest

from agentx.eval.scores import (
    EpisodeResult,
    Score,
    make_score,
    mean_of_runs,
    paired_difference,
    paired_runs_difference,
    score_episodes,
    unpaired_difference,
    wilson_interval,
)
from agentx.quickstart import Evaluation

A = ("search", '{"name": "walk"}', "timed out")
B = ("open", '{"path": "os.py"}', "no such line")
A_ANSWERED = ("search", '{"name": "walk"}', "os.py:345")


def episode(task, success, calls=(), num_valid=None, num_failed=0):
    valid = len(calls) if num_valid is None else num_valid
    return EpisodeResult(task, success, len(calls), valid, num_failed, tuple(calls))


def episodes(successes):
    return [episode(str(i), bool(s)) for i, s in enumerate(successes)]


def test_wilson_interval_has_the_published_values():
    low, high = wilson_interval(129, 256)
    assert (round(100 * low, 1), round(100 * high, 1)) == (44.3, 56.5)
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for count, total, expected in (
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ):
        assert wilson_interval(count, total) == pytest.approx(expected, abs=5e-5)


def test_wilson_interval_stays_within_0_and_1_and_of_nothing_knows_nothing():
    assert wilson_interval(5, 5)[1] == 1.0
    assert wilson_interval(0, 5)[0] == 0.0
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="6 successes of 5"):
        wilson_interval(6, 5)


def test_scores_count_what_they_say():
    scores = score_episodes(
        [
            episode("0", True, [A, A_ANSWERED], num_failed=1),
            episode("1", False, [A, B], num_failed=2),
            episode("2", True, [A_ANSWERED]),
            episode("3", False, [B, B, B], num_valid=1, num_failed=3),
        ]
    )
    assert {name: (s.count, s.total) for name, s in scores.items()} == {
        "success": (2, 4),
        "valid_call": (6, 8),
        "recovery": (1, 3),
        "loop": (1, 4),
    }
    assert scores["success"].value == 0.5
    assert scores["recovery"].low < 1 / 3 < scores["recovery"].high


@pytest.mark.parametrize(
    ("calls", "looped"),
    [
        ([A, A], False),
        ([A, A, A], True),
        ([A, A, A_ANSWERED], False),
        ([A, B, A], False),
        ([A, B, A, B], True),
        ([A, B, A, A_ANSWERED], False),
        ([A_ANSWERED, B, A, B, A], True),
        ([], False),
    ],
)
def test_loop_is_three_in_a_row_or_two_by_turns(calls, looped):
    assert episode("0", False, calls).looped is looped


def test_score_of_nothing_has_no_value_and_says_so_in_json():
    score = make_score("recovery", 0, 0)
    assert math.isnan(score.value)
    assert score.to_json() == {"value": None, "low": 0.0, "high": 1.0, "count": 0, "total": 0}


def test_episode_refuses_more_failed_calls_than_calls():
    with pytest.raises(ValueError, match=r"num_failed_calls 2.*num_calls 1"):
        episode("7", False, [A], num_failed=2)


def test_paired_difference_has_the_intervals_of_its_paired_changes():
    # 100 tasks: 10 lost, 30 gained. The normal interval of the mean change is
    # 0.2 +- 1.96 sqrt((0.4 - 0.04) / 100) = [0.082, 0.318]; the bootstrap must agree.
    before = episodes([1] * 30 + [0] * 70)
    after = episodes([0] * 10 + [1] * 20 + [1] * 30 + [0] * 40)
    d = paired_difference(before, after)
    assert d.value == pytest.approx(0.2)
    assert (d.low, d.high) == pytest.approx((0.082, 0.318), abs=0.011)
    assert paired_difference(before, after) == d
    assert paired_difference(before, list(reversed(after))) == d


def test_paired_difference_of_equal_stages_is_exactly_zero():
    same = episodes([1, 0, 1])
    d = paired_difference(same, same)
    assert (d.value, d.low, d.high) == (0, 0, 0)


def test_paired_difference_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        before, after = rng.random((2, 150)) < np.array([[0.5], [0.7]])
        d = paired_difference(episodes(before), episodes(after), seed=i, num_resamples=1000)
        covered += d.low <= 0.2 <= d.high
    assert 180 <= covered <= 198


def test_paired_difference_refuses_stages_of_other_tasks():
    with pytest.raises(ValueError, match="such as '2'"):
        paired_difference(episodes([1, 0]), episodes([1, 0, 1]))
    with pytest.raises(ValueError, match="2 episodes of 1 tasks"):
        paired_difference([episode("0", True)] * 2, episodes([1]))
    with pytest.raises(ValueError, match="no episodes"):
        paired_difference([], [])


def test_unpaired_difference_has_the_published_value():
    # Newcombe 1998b, table II, method 10: 56/70 - 48/80 is 0.2 [0.0524, 0.3339].
    d = unpaired_difference(make_score("a", 48, 80), make_score("a", 56, 70))
    assert (d.value, d.low, d.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_score_keeps_its_name_out_of_its_json():
    fields = make_score("success", 1, 2).to_json()
    assert Score("success", **fields) == make_score("success", 1, 2)
    assert Score.from_json("success", fields) == make_score("success", 1, 2)


RUNS = [make_score("call", count, 100) for count in (50, 52, 54, 56, 58)]


def test_a_mean_of_runs_has_the_uncertainty_of_seeds_and_of_questions():
    mean = mean_of_runs(RUNS)
    # Student's t, 2.776 * 0.03162 / sqrt(5) = 0.0393; Wilson's of 54 in 100, [0.4426, 0.6344].
    assert mean.value == pytest.approx(0.54)
    assert mean.low == pytest.approx(0.54 - math.hypot(0.0393, 0.54 - 0.4426), abs=1e-4)
    assert mean.high == pytest.approx(0.54 + math.hypot(0.0393, 0.6344 - 0.54), abs=1e-4)
    # Runs that agree tell nothing of other questions.
    assert mean_of_runs([make_score("call", 0, 100)] * 5).high == pytest.approx(0.037, abs=1e-3)


def test_a_mean_of_runs_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        ability = 0.6 + 0.05 * rng.standard_normal(5)
        hardness = rng.random(200)  # of the questions, the same for every run
        counts = (hardness < ability[:, None]).sum(axis=1)
        mean = mean_of_runs([make_score("call", int(count), 200) for count in counts])
        covered += mean.low <= 0.6 <= mean.high
    assert 370 <= covered <= 398


def test_a_difference_of_runs_is_taken_seed_by_seed():
    after = [make_score("call", count, 100) for count in (52, 55, 58, 61, 64)]
    # 2, 3, 4, 5, 6 points: 0.04, and 2.776 * 0.01581 / sqrt(5) = 0.0196.
    d = paired_runs_difference(RUNS, after)
    assert (d.value, d.low, d.high) == pytest.approx((0.04, 0.0204, 0.0596), abs=1e-4)


def test_a_single_run_tells_nothing_of_other_seeds():
    mean, difference = mean_of_runs(RUNS[:1]), paired_runs_difference(RUNS[:1], RUNS[1:2])
    assert (mean.value, mean.low, mean.high) == (0.5, 0.0, 1.0)
    assert (difference.value, difference.low, difference.high) == (pytest.approx(0.02), -1.0, 1.0)


def test_an_evaluation_is_read_back_from_older_files_too(tmp_path):
    made = Evaluation([episode("t", True, [A, B])], [], 1, 0, 2.5, [])
    fields = dataclasses.asdict(made)
    fields["held_out"][0] |= {"reward": 1.0, "kind": "parameter"}
    (tmp_path / "evaluation.json").write_text(json.dumps(fields))
    assert Evaluation.load(tmp_path / "evaluation.json") == made
