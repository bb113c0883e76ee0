"""Metrics survive a kill, a resume doubles no point, and progress needs no terminal."""

import io
import math

import numpy as np
import pytest
import rich.console

from agentx.metrics import MetricsWriter, Progress, format_count, format_seconds, read_metrics


def steps(path):
    return [record["step"] for record in read_metrics(path)]


def test_records_come_back_as_they_were_written(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, loss=np.float32(0.5), num_dropped=3)
        writer.write(np.int64(2), loss=np.float64(0.25))
    first, second = read_metrics(tmp_path / "run")
    assert (first["step"], first["loss"], first["num_dropped"]) == (1, 0.5, 3)
    assert (second["step"], second["loss"]) == (2, 0.25)
    assert second["time"] >= first["time"] > 1.7e9


def test_a_record_is_on_disk_before_the_writer_is_closed(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, loss=0.5)
    assert steps(tmp_path) == [1]
    writer.close()


def test_a_value_that_is_not_finite_is_strict_json_and_reads_as_nan(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, loss=math.nan, norm=math.inf)
    assert '"loss": null, "norm": null' in (tmp_path / "metrics.jsonl").read_text()
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"])
    assert math.isnan(record["norm"])


def test_a_torn_last_line_is_ignored_and_gone_after_a_resume(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.write(step, loss=0.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert steps(tmp_path) == [1, 2]
    with MetricsWriter(tmp_path, resume_from=2) as writer:
        writer.write(3, loss=0.5)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_resume_drops_the_records_it_is_about_to_write_again(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 8):
            writer.write(step, loss=1.0)
    with MetricsWriter(tmp_path, resume_from=4) as writer:
        for step in range(5, 9):
            writer.write(step, loss=2.0)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [r["loss"] for r in read_metrics(tmp_path)] == [1.0] * 4 + [2.0] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_the_file_anew(tmp_path):
    for _ in range(2):
        with MetricsWriter(tmp_path) as writer:
            writer.write(1, loss=1.0)
    assert steps(tmp_path) == [1]


def test_a_damaged_line_before_the_last_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a JSON record"):
        read_metrics(path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match='line 1: a record has no "step"'):
        read_metrics(path)


def run_progress(terminal, total=40, done=0):
    """A stage whose first step takes 20 s, to compile, and every other one second."""
    now = [0.0]
    console = rich.console.Console(
        file=io.StringIO(), force_terminal=terminal, width=120, color_system=None
    )
    with Progress("grpo", total, done=done, console=console, clock=lambda: now[0]) as progress:
        for step in range(done + 1, total + 1):
            now[0] += 20 if step == done + 1 else 1
            progress.update(step, num_tokens=2000, loss=1 / step, reward=np.float32(0.5))
    return console.file.getvalue()


def test_progress_without_a_terminal_prints_a_plain_line_now_and_then_and_the_last_one():
    # Times 20 (the first step), 30, 40, 50 and 59, the end: nothing in between. At time 30 eleven
    # steps took 30 s, so 29 more take 79.
    assert run_progress(terminal=False).splitlines() == [
        "grpo 1/40  100 tokens/s  13:00 left  loss 1  reward 0.5",
        "grpo 11/40  733 tokens/s  1:19 left  loss 0.09091  reward 0.5",
        "grpo 21/40  1.1k tokens/s  0:36 left  loss 0.04762  reward 0.5",
        "grpo 31/40  1.2k tokens/s  0:15 left  loss 0.03226  reward 0.5",
        "grpo 40/40  1.4k tokens/s  loss 0.025  reward 0.5",
    ]


def test_progress_forgets_the_compilation_before_the_first_step():
    assert "grpo 200/200  2.0k tokens/s" in run_progress(terminal=False, total=200)


def test_progress_after_a_resume_counts_only_its_own_steps():
    first = run_progress(terminal=False, total=40, done=30).splitlines()[0]
    assert first.startswith("grpo 31/40  100 tokens/s  3:00 left")


def test_the_first_of_many_steps_says_nothing_of_the_time_that_is_left():
    first, second = run_progress(terminal=False, total=1000).splitlines()[:2]
    assert first.startswith("grpo 1/1000  100 tokens/s  loss")
    assert second.startswith("grpo 11/1000  733 tokens/s  44:57 left")


def test_progress_on_a_terminal_is_a_live_line():
    shown = run_progress(terminal=True)
    assert "40/40" in shown
    assert "1.4k tokens/s  loss 0.025  reward 0.5" in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (16_240, "16.2k"),
        (999_960, "1.0M"),
        (3.4e6, "3.4M"),
        (1.25e9, "1.2G"),
    ],
)
def test_counts_are_written_for_people(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4, "0:00"), (42, "0:42"), (59.7, "1:00"), (725, "12:05"), (11_229, "3:07:09")],
)
def test_durations_are_written_for_people(value, text):
    assert format_seconds(value) == text
