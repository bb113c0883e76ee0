"""A run that is killed goes on as if nothing had happened: to the last bit of its parameters.

The runs that die are processes of their own and die of SIGKILL; what they left behind is picked up
in this process. Run as a script, this file is such a process.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import make_config, params_of, write_inputs

from agentx import checkpoint
from agentx.cli.config import save_config
from agentx.cli.main import main
from agentx.metrics import read_metrics
from agentx.train import checkpoint_dir, train

TESTS = Path(__file__).parent.parent
VARIABLES = {
    **os.environ,
    "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
}
KINDS = ("pretrain", "sft", "rl")
# What is measured with a clock, and so differs from run to run.
CLOCKS = ("time", "seconds", "rollout_s")


def die(*unused: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main_of_the_doomed(kind: str, folder: str, run: str, when: str, step: str) -> None:
    """Trains until the step, and dies: after it, or in the middle of saving it."""

    def on_batch(number: int, made: object) -> None:
        if number != int(step):
            return
        while list(Path(run).glob("checkpoints/*.partial")):
            time.sleep(0.01)  # the save before this one
        if when == "after":
            die()
        # So it dies when the arrays are written, and their checksums and the rename are to come.
        checkpoint._checksums = die

    train(make_config(kind, Path(folder)), Path(run), on_batch)


if __name__ == "__main__":
    main_of_the_doomed(*sys.argv[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and three runs that nobody stopped: pretraining, SFT after it, RL after that."""
    folder = tmp_path_factory.mktemp("runs")
    write_inputs(folder)
    for kind in KINDS:
        train(make_config(kind, folder), folder / kind)
    return folder


def records(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if k not in CLOCKS} for r in read_metrics(run)]


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """Equal parameters, bit for bit, and equal metrics, each step once."""
    found, wanted = params_of(run), params_of(undisturbed)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].tobytes() == wanted[name].tobytes(), name
    assert records(run) == records(undisturbed)
    steps = [r["step"] for r in records(run)]
    assert steps == sorted(set(steps))


def checkpoints(run: Path) -> list[str]:
    return sorted(p.name for p in checkpoint_dir(run).iterdir())


def test_the_runs_to_compare_with_did_learn(folder):
    for kind in KINDS:
        before = params_of(folder / {"sft": "pretrain", "rl": "sft"}.get(kind, "sft"))
        after = params_of(folder / kind)
        assert any(np.any(before[name] != after[name]) for name in before)
    assert sum(r["groups_useful"] for r in records(folder / "rl")) > 3


@pytest.mark.parametrize(
    ("kind", "when", "step", "left"),
    [
        ("pretrain", "after", 13, ["step_00000008"]),
        ("pretrain", "saving", 16, ["step_00000008", "step_00000016.partial"]),
        ("sft", "after", 3, []),
        ("rl", "after", 3, ["step_00000002"]),
        ("rl", "saving", 4, ["step_00000002", "step_00000004.partial"]),
    ],
)
def test_a_killed_run_goes_on_to_the_same_parameters(
    folder, tmp_path, caplog, kind, when, step, left
):
    run = tmp_path / "killed"
    arguments = [kind, folder, run, when, step]
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], env=VARIABLES)
    assert done.returncode == -signal.SIGKILL
    assert checkpoints(run) == left
    train(make_config(kind, folder), run)
    assert ("is half-written" in caplog.text) == (when == "saving")
    assert_same_run(run, folder / kind)


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < steps:
        assert process.poll() is None, "it ended before it was stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_may_be_killed_at_any_moment_again_and_again(folder, tmp_path):
    run, rng = tmp_path / "killed", random.Random(0)
    command = [sys.executable, __file__, "pretrain", str(folder), str(run), "after", "0"]
    for _ in range(3):
        process = subprocess.Popen(command, env=VARIABLES)
        time.sleep(rng.uniform(2, 5))
        process.kill()
        process.wait()
    train(make_config("pretrain", folder), run)
    assert_same_run(run, folder / "pretrain")


def test_sigterm_saves_and_exits_with_0_and_the_same_command_goes_on(folder, tmp_path, capsys):
    config = make_config("pretrain", folder, num_steps=200, checkpoint_every=100)
    run, file = tmp_path / "stopped", tmp_path / "run.gin"
    save_config(config, file)
    command = ["train", str(file), "--run", str(run)]
    code = "import sys; from agentx.cli.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], env=VARIABLES, stdout=subprocess.PIPE, text=True
    )
    wait_for_steps(run, 5, process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    (name,) = checkpoints(run)
    stopped_at = int(name.removeprefix("step_"))
    assert 20 <= stopped_at < 200
    assert f"Stopped at step {stopped_at}, saved in {run}" in printed
    assert main(command) == 0
    assert "Step 200 in " in capsys.readouterr().out
    train(config, tmp_path / "undisturbed")
    # The step at which it stopped is logged, as is every step that is saved.
    usual = [r for r in records(run) if r["step"] % config.log_every == 0]
    assert usual == records(tmp_path / "undisturbed")
    found, wanted = params_of(run), params_of(tmp_path / "undisturbed")
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(folder, tmp_path, caplog):
    run = tmp_path / "damaged"
    config = make_config("pretrain", folder)

    class Stopped(Exception):
        pass

    def stop(step: int, made: object) -> None:
        if step == 20:
            raise Stopped

    with pytest.raises(Stopped):
        train(config, run, stop)
    assert checkpoints(run) == ["step_00000008", "step_00000016"]
    file = max((checkpoint_dir(run) / "step_00000016").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    first: list[int] = []
    train(config, run, lambda step, made: first.append(step))
    assert f"{checkpoint_dir(run)}/step_00000016 is damaged (" in caplog.text
    assert first[0] == 9
    assert_same_run(run, folder / "pretrain")


def test_a_finished_run_stays_as_it_is(folder):
    before = (folder / "sft" / "metrics.jsonl").read_bytes()
    summary = train(make_config("sft", folder), folder / "sft")
    assert (summary.step, summary.interrupted) == (24, False)
    assert summary.tokens == sum_of_tokens(folder)
    assert (folder / "sft" / "metrics.jsonl").read_bytes() == before


def sum_of_tokens(folder: Path) -> int:
    """What the newest checkpoint of the SFT run has counted, which is the same for every step."""
    about = checkpoint_dir(folder / "sft") / "step_00000024" / "about.json"
    tokens = json.loads(about.read_text())["extras"]["tokens"]
    assert tokens == 24 * 8 * 46
    return tokens
