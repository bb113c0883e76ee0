"""Sweeps: which runs there are, that each is trained once, and what is said of them at the end.

All but one start their runs in this process, where they take no time to import jax, and take steps
that learn nothing.
"""

import contextlib
import dataclasses
import io
import json
import os
import signal
import threading
import time
from pathlib import Path
from subprocess import Popen
from types import SimpleNamespace
from typing import ClassVar

import pytest
from runs import BYTES, MODEL, make_config, write_inputs

from agentx import sweep, train
from agentx.cli.config import load_config, save_config
from agentx.cli.main import main
from agentx.env.tasks.recordings import RecordingConfig
from agentx.eval.scores import make_score
from agentx.metrics import read_metrics
from agentx.render import ToolRenderer
from agentx.report.sweep import plot_sweep, sweep_markdown
from agentx.sweep import SweepConfig, plan
from agentx.train import newest_saved
from agentx.trajectory import Message, ToolCall, ToolSpec, Trajectory

SWEEP = """
SweepConfig.run = "{folder}/run.gin"
SweepConfig.arms = {{
    "short": (),
    "long": ("TrainConfig.num_steps=4",),
    "broken": ("MeshConfig.data=3",),
}}
SweepConfig.seeds = (0, 1)
"""


class InThisProcess:
    """Stands for a Popen: carries out `agentx train ...` before it says that it has started."""

    commands: ClassVar[list[list[str]]] = []
    run = staticmethod(main)

    def __init__(self, command, *, stdout, **_):
        self.commands.append(command[3:])
        with (
            open(stdout.name, "a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            self.returncode = self.run(command[3:])

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        return self.returncode


@pytest.fixture
def here(monkeypatch):
    """Runs are started in this process; gives their command lines."""
    monkeypatch.setattr(InThisProcess, "commands", [])
    monkeypatch.setattr(sweep.subprocess, "Popen", InThisProcess)
    return InThisProcess.commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of a tiny run, its run file, and a sweep over it whose third arm cannot run."""
    folder = tmp_path_factory.mktemp("sweep")
    write_inputs(folder)
    model = dataclasses.replace(MODEL, num_layers=1)
    config = make_config("pretrain", folder, model=model, num_steps=2, log_every=1)
    save_config(config, folder / "run.gin")
    (folder / "sweep.gin").write_text(SWEEP.format(folder=folder), encoding="utf-8")
    return folder


def make_idle_step(*_, **__):
    """Stands for `make_train_step`: a step that learns nothing, and so has nothing to compile."""

    def step(state, batch):
        loss = float(batch.tokens.mean())
        with_loss = int((batch.weights > 0).sum())
        return state, {"loss": loss, "grad_norm": 1.0, "tokens": with_loss}

    return step


class FakeSuite:
    """Asks nothing: half of two calls are right."""

    max_length = 64

    def __init__(self, config, renderer):
        pass

    def score(self, engine):
        return {"call": make_score("call", 1, 2)}


def results_of(out: Path) -> dict:
    return json.loads((out / "sweep.json").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------
# Which runs
# --------------------------------------------------------------------------------------------------


def test_every_arm_is_run_at_every_point_under_every_seed_seed_by_seed():
    config = SweepConfig(
        "run.gin",
        arms={"plain": ("A=@PlainText()",), "masked": ()},
        grid={"OptimizerConfig.learning_rate": (0.1, 0.2), "x/Dataset.share": (1,)},
        seeds=(3, 4),
    )
    runs = plan(config, Path("out"))
    assert [run.name for run in runs[:5]] == [
        "plain,learning_rate=0.1,share=1/seed_3",
        "plain,learning_rate=0.2,share=1/seed_3",
        "masked,learning_rate=0.1,share=1/seed_3",
        "masked,learning_rate=0.2,share=1/seed_3",
        "plain,learning_rate=0.1,share=1/seed_4",
    ]
    assert len(runs) == 8
    assert runs[1].overrides == (
        "A=@PlainText()",
        "OptimizerConfig.learning_rate=0.2",
        "x/Dataset.share=1",
        "TrainConfig.seed=3",
    )


def test_a_sweep_that_cannot_be_run_is_refused():
    with pytest.raises(ValueError, match="must have something to try"):
        SweepConfig("run.gin", seeds=())
    with pytest.raises(ValueError, match=r"seeds has one twice: \(1, 1\)"):
        SweepConfig("run.gin", seeds=(1, 1))
    with pytest.raises(ValueError, match="'a/b' cannot name a folder"):
        SweepConfig("run.gin", arms={"a/b": ()})
    with pytest.raises(ValueError, match="baseline is 'b'; choose from a"):
        SweepConfig("run.gin", arms={"a": ()}, baseline="b")


def test_a_dry_run_prints_the_command_of_every_run_and_starts_none(folder, here, capsys, tmp_path):
    out = tmp_path / "out"
    override = "--gin.run/TrainConfig.log_every=3"
    assert main(["sweep", f"{folder}/sweep.gin", "--out", str(out), "--dry-run", override]) == 0
    printed = capsys.readouterr().out
    assert (
        f"agentx train {folder}/run.gin --gin.TrainConfig.log_every=3 "
        f"--gin.TrainConfig.num_steps=4 --gin.TrainConfig.seed=1 --run {out}/long/seed_1\n"
    ) in printed
    assert "That would be 6 runs, 2 at a time" in printed
    assert here == []
    assert not out.exists()


def test_runs_elsewhere_are_refused(folder, capsys):
    assert main(["sweep", f"{folder}/sweep.gin", "--on", "slurm"]) == 2
    assert capsys.readouterr().err.startswith("error: --on slurm: runs can only go to this machine")


def test_what_is_wrong_with_any_arm_is_said_before_the_first_run(folder, here, capsys, tmp_path):
    file = tmp_path / "sweep.gin"
    file.write_text(
        SWEEP.format(folder=folder).replace("num_steps=4", "num_step=4"), encoding="utf-8"
    )
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "TrainConfig has no parameter 'num_step'" in capsys.readouterr().err
    assert here == []


# --------------------------------------------------------------------------------------------------
# From the first run to the table
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[list[str], Path, str]:
    """A sweep whose third arm failed: its command, its folder, and what it printed."""
    file, out, printed = folder / "evaluated.gin", folder / "out", io.StringIO()
    bound = "SweepConfig.evaluation = @LibraryCalls()\nLibraryCalls.num_slots = 8\n"
    file.write_text(SWEEP.format(folder=folder) + bound, encoding="utf-8")
    command = ["sweep", str(file), "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sweep, "CallSuite", FakeSuite)
        patch.setattr(train, "make_train_step", make_idle_step)
        patch.setattr(sweep.subprocess, "Popen", InThisProcess)
        assert main(command) == 1
    return command, out, printed.getvalue()


def test_a_sweep_trains_every_run_once_and_says_what_failed(finished, here):
    command, out, _ = finished
    results = results_of(out)
    short, long, broken = results["arms"]
    assert (short["name"], short["num_runs"], short["num_missing"], short["steps"]) == (
        *("short", 2, 0),
        2,
    )
    assert long["tokens"] > short["tokens"] > 0
    assert 0 < short["share_with_loss"] < 1
    assert short["scores"]["call"]["mean"] == {"value": 0.5, "low": pytest.approx(0.09, abs=0.01),
                                               "high": pytest.approx(0.91, abs=0.01)}  # fmt: skip
    assert long["scores"]["call"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert (broken["num_missing"], broken["loss"]) == (2, None)
    errors = [run["error"] for run in results["runs"] if run["error"]]
    assert len(errors) == 2
    assert "mesh" in errors[0]
    # Runs differ by their seed.
    first, second = (read_metrics(out / f"short/seed_{seed}")[-1]["loss"] for seed in (0, 1))
    assert first != second
    # Again: what is done is taken as it is, what failed is tried again.
    assert main(command) == 1
    assert [started[-1] for started in here] == [str(out / f"broken/seed_{s}") for s in (0, 1)]
    assert results_of(out)["arms"] == results["arms"]


def test_the_table_and_the_plot_are_written(finished):
    _, out, printed = finished
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table.splitlines()[:4] == printed.splitlines()[:4]
    assert table.splitlines()[0] == (
        "| arm | runs | steps | tokens | with loss | time | loss | call | call, against short |"
    )
    assert "| broken | 0 of 2 |  |  |  |  |  |  |  |" in table
    assert "Missing: 2 of 6 runs, which count nowhere.\n\n- broken, seed 0: " in table
    assert (out / "plot.png").read_bytes()[1:4] == b"PNG"


def test_without_an_evaluation_the_losses_are_compared(tmp_path):
    runs = [{"arm": "a", "seed": s, "error": "", "loss": 1.5, "scores": {}} for s in (0, 1)]
    arm = {"name": "a", "num_runs": 2, "num_missing": 0, "steps": 9.0, "tokens": 2e6, "loss": 1.5}
    results = {
        "seeds": [0, 1],
        "baseline": "a",
        "command": "agentx sweep x",
        "hardware": "2 CPU cores",
        "seconds": 62.0,
        "cpu_seconds": 120.0,
        "runs": runs,
        "arms": [arm | {"share_with_loss": 0.25, "seconds": 30.0, "scores": {}}],
    }
    assert "| a | 2 of 2 | 9 | 2.0M | 25 % | 0:30 | 1.500 |" in sweep_markdown(results)
    plot_sweep(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_a_folder_in_use_is_refused(folder, here, tmp_path, capsys):
    tmp_path.joinpath("out").mkdir()
    with sweep._locked(tmp_path / "out"):
        assert main(["sweep", f"{folder}/sweep.gin", "--out", str(tmp_path / "out")]) == 2
    assert "is in use by another sweep" in capsys.readouterr().err


def test_a_sweep_that_is_told_to_stop_saves_its_run_and_goes_on_from_there(
    folder, tmp_path, here, monkeypatch
):
    file, out = tmp_path / "sweep.gin", tmp_path / "out"
    file.write_text(
        f'SweepConfig.run = "{folder}/run.gin"\nSweepConfig.seeds = (5,)\n', encoding="utf-8"
    )
    command = ["sweep", str(file), "--out", str(out), "--gin.run/TrainConfig.num_steps=100000"]
    run = out / "run" / "seed_5"

    def stop_once_it_trains() -> None:
        while not (run / "metrics.jsonl").exists() or not read_metrics(run):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once_it_trains, daemon=True).start()
    with monkeypatch.context() as patch:
        patch.setattr(sweep.subprocess, "Popen", Popen)
        # One device compiles sooner than the eight that these tests have.
        patch.setenv("XLA_FLAGS", "")
        assert main(command) == 0
    [record] = results_of(out)["runs"]
    assert record["error"] == "not finished"
    step = newest_saved(run).step
    assert step == len(read_metrics(run)) > 0

    # The same command trains in the same folder, which is all that the driver needs to go on.
    monkeypatch.setattr(InThisProcess, "run", staticmethod(lambda arguments: 0))
    assert main(command) == 1
    assert here == [["train", str(run / "config.gin"), "--run", str(run)]]
    [record] = results_of(out)["runs"]
    assert record["error"] == f"was told to stop at step {step}"


def test_a_run_that_takes_too_long_is_ended_and_one_that_dies_is_named(tmp_path):
    class Late:
        started, is_late = 0.0, False

        def __init__(self, error=""):
            self.told, self.said, self.waited = False, error, False

        def ended(self):
            # One that is told to stop has ended before it is asked again.
            return self.told or bool(self.said)

        def error(self):
            assert self.waited
            return self.said

        def tell_to_stop(self):
            self.told = True

        def wait(self):
            assert self.ended()
            self.waited = True

    config = SweepConfig("run.gin", timeout_s=1.0)
    run = plan(config, tmp_path)[0]
    train_config = make_config("pretrain", tmp_path)
    runs = sweep._Sweep(config, {run: train_config}, tmp_path, 0, None)
    late, dead = Late(), Late("ended with code -9")
    assert runs._is_over(late)
    assert runs._is_over(dead)
    assert runs._record(run, late)["error"] == "took over 1 s"
    assert late.waited
    assert runs._record(run, dead)["error"] == "ended with code -9"


@pytest.mark.parametrize(
    ("code", "log", "error"),
    [
        (-9, "step 1\nKilled by the kernel\n\n", "ended with code -9: Killed by the kernel"),
        (
            1,
            "error: of an earlier line\nTraceback\n",
            "ended with code 1: error: of an earlier line",
        ),
        (2, "error: no such file\n", "no such file"),
        (-9, "", "ended with code -9"),
        (0, "error: none\n", ""),
    ],
)
def test_what_a_run_that_died_said_is_kept(tmp_path, monkeypatch, code, log, error):
    (tmp_path / "log.txt").write_text("error: of an earlier call\n", encoding="utf-8")

    def popen(command, *, stdout, **_):
        stdout.write(log.encode())
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    assert sweep._Process(tmp_path, {}, 0).error() == error


def test_a_sweep_goes_on_with_other_limits_but_not_with_other_runs(finished, here, capsys):
    command, out, _ = finished
    before = (out / "config.gin").read_text(encoding="utf-8")
    limits = ["--gin.SweepConfig.parallel=1", "--gin.SweepConfig.timeout_s=60.0"]
    assert main([*command, *limits]) == 1
    assert (out / "config.gin").read_text(encoding="utf-8") == before
    assert main([*command, "--gin.SweepConfig.baseline='long'"]) == 2
    assert "give another folder, or delete this one to start over" in capsys.readouterr().err


def test_a_folder_may_have_a_number_for_a_name():
    config = SweepConfig("runs/sweeps/objectives.gin", recording=RecordingConfig(), seeds=(0,))
    [run] = plan(config, Path("2024"))
    assert load_config(config.run, run.overrides).tokenizer == "2024/tokenizer.model"


# --------------------------------------------------------------------------------------------------
# The sweep that is shipped
# --------------------------------------------------------------------------------------------------


def test_the_arms_over_objectives_resolve_and_plan_the_same_rows(tmp_path):
    config = load_config("sweeps/objectives.gin", root="SweepConfig")
    BYTES.save(tmp_path / "tokenizer.model")
    runs = plan(config, tmp_path)
    assert len(runs) == 30
    configs = {run.arm: load_config(config.run, run.overrides) for run in runs}
    tool = ToolSpec("find", "finds")
    call = Message("assistant", tool_calls=(ToolCall("find", {}),))
    messages = [Message("user", "go"), call, Message("tool", "no"), Message("assistant", "2")]
    session = Trajectory(ToolRenderer(BYTES).render(messages, (tool,)))
    objectives = {arm: c.source.datasets[0].objective for arm, c in configs.items()}
    assert len({o.room(session) for o in objectives.values()}) == 1
    assert len({repr(o) for o in objectives.values()}) == 6
    for arm, c in configs.items():
        source = c.source
        plain = [dataclasses.replace(d, objective=None) for d in source.datasets]
        assert [d.objective for d in source.datasets[:2]] == [objectives[arm]] * 2
        assert plain == [
            dataclasses.replace(d, objective=None) for d in configs["masking"].source.datasets
        ]
