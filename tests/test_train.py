"""The driver: what it refuses, what it logs, how it ends, and RL through the real train step."""

import dataclasses
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import BYTES, MODEL, make_config, params_of, write_inputs

from agentx import checkpoint
from agentx import train as driver
from agentx.batch import Batch
from agentx.cli.runs import load_run
from agentx.interop.tensors import flatten_params
from agentx.losses import PolicyGradientLoss
from agentx.metrics import read_metrics
from agentx.model import abstract_transformer
from agentx.optim import Optimizer
from agentx.sharding import MeshConfig, make_mesh
from agentx.source import SourceBatch, SourceContext
from agentx.step import TrainState, make_train_step
from agentx.tokenizer import Tokenizer
from agentx.train import TrainConfig, checkpoint_dir, load_params, newest_saved, train
from agentx.trajectory import Origin


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Inputs, and a run of SFT: a policy that calls and answers, with digits that are luck."""
    folder = tmp_path_factory.mktemp("runs")
    write_inputs(folder)
    train(make_config("sft", folder, init_from=""), folder / "sft")
    return folder


class Stopped(Exception):
    pass


def stop_after(wanted: int):
    def on_batch(step: int, made: SourceBatch) -> None:
        if step == wanted:
            raise Stopped

    return on_batch


# ------------------------------------------------------------------------------- what it refuses


def refused(config: TrainConfig, run: Path, monkeypatch) -> str:
    """The sentence, which has to come before anything is initialised."""
    monkeypatch.setattr(driver, "init_state", lambda *args: pytest.fail("it initialised a state"))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        train(config, run)
    return str(error.value)


def test_wrong_inputs_are_refused_before_anything_is_initialised(folder, tmp_path, monkeypatch):
    config = make_config("pretrain", folder)
    source = config.source
    missing = (dataclasses.replace(source.datasets[0], store=f"{tmp_path}/no"),)
    for changes, sentence in (
        ({"tokenizer": f"{tmp_path}/no"}, f"there is no tokenizer at {tmp_path}/no"),
        (
            {"model": dataclasses.replace(MODEL, vocab_size=300)},
            f"the tokenizer {config.tokenizer} has 271 pieces but the model's vocab_size is 300",
        ),
        (
            {"source": dataclasses.replace(source, datasets=missing)},
            f"{tmp_path}/no holds no token store",
        ),
        (
            {"source": dataclasses.replace(source, length=256)},
            "rows of 256 tokens are longer than the model's max_length of 128",
        ),
        (
            {"source": dataclasses.replace(source, rows=12)},
            "a batch of 12 rows of 64 tokens does not divide into 1 micro-batches",
        ),
        ({"num_micro_batches": 3}, "a batch of 8 rows of 64 tokens does not divide into 3"),
        ({"mesh": MeshConfig(data=3)}, "a mesh of data=3, fsdp=1"),
        ({"init_from": f"{tmp_path}/no"}, f"{tmp_path}/no is no run"),
    ):
        made = refused(dataclasses.replace(config, **changes), tmp_path / "run", monkeypatch)
        assert made.startswith(sentence)


def test_every_shape_that_rollouts_may_have_is_checked_at_once(folder, tmp_path, monkeypatch):
    config = make_config("rl", folder)
    config = dataclasses.replace(config, source=dataclasses.replace(config.source, rows=16))
    assert refused(config, tmp_path, monkeypatch).startswith("a batch of 4 rows of 64 tokens")


@pytest.mark.parametrize("field", ["num_steps", "num_micro_batches", "checkpoint_every"])
def test_a_count_of_nothing_is_refused(folder, field):
    with pytest.raises(ValueError, match=f"TrainConfig.{field} is 0; it must be 1 or more"):
        make_config("pretrain", folder, **{field: 0})


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_that_some_part_would_not_take_is_refused(folder, seed):
    with pytest.raises(
        ValueError, match=rf"TrainConfig.seed is {seed}; it must be in \[0, 2\^31\)"
    ):
        make_config("pretrain", folder, seed=seed)


def test_a_folder_of_another_run_is_refused(folder, monkeypatch):
    monkeypatch.setattr(driver, "init_state", lambda *args: pytest.fail("it began anew"))
    run, config = folder / "sft", make_config("sft", folder)
    for changes, sentence in (
        ({"seed": 1}, "was begun with other data: seed was 0, is now 1; give another"),
        ({"source": make_config("pretrain", folder).source}, "was begun with other data"),
        ({"model": dataclasses.replace(MODEL, d_ff=64)}, "is of another model"),
    ):
        with pytest.raises(ValueError, match=sentence):
            train(dataclasses.replace(config, **changes), run)


def test_a_run_to_begin_with_must_have_the_same_model_and_tokenizer(folder, tmp_path):
    wide = dataclasses.replace(MODEL, d_ff=64)
    with pytest.raises(ValueError, match="is of another model"):
        train(make_config("sft", folder, model=wide, init_from=str(folder / "sft")), tmp_path)
    other = Tokenizer.train(["to be or not to be " * 40], 290)
    mesh = make_mesh(MeshConfig())
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        load_params(newest_saved(folder / "sft"), abstract_transformer(MODEL), mesh, other)


def test_a_policy_is_loaded_from_one_checkpoint_that_is_read_through_once(folder, monkeypatch):
    checked, checksums = [], checkpoint._checksums
    monkeypatch.setattr(checkpoint, "_checksums", lambda f: checked.append(f.name) or checksums(f))
    load_run(folder / "sft")
    assert checked == ["step_00000024"]


# ----------------------------------------------------------------------------- what it leaves


def test_a_run_leaves_its_tokenizer_metrics_and_checkpoints(folder):
    run = folder / "sft"
    assert Tokenizer.load(run / "tokenizer.model").fingerprint == BYTES.fingerprint
    names = sorted(p.name for p in checkpoint_dir(run).iterdir())
    assert names == ["step_00000016", "step_00000024"]
    records = read_metrics(run)
    assert [r["step"] for r in records] == [4, 8, 12, 16, 20, 24]
    assert records[-1]["loss"] < records[0]["loss"] / 2
    assert records[-1].keys() >= {"loss", "grad_norm", "learning_rate", "tokens", "num_tokens"}


def test_a_run_begins_with_the_parameters_of_another_and_its_own_optimizer(
    folder, tmp_path, monkeypatch
):
    states: list[TrainState] = []

    def train_step(state: TrainState, batch: Batch) -> None:
        states.append(state)
        raise Stopped

    monkeypatch.setattr(driver, "make_train_step", lambda *args, **kwargs: train_step)
    with pytest.raises(Stopped):
        train(make_config("sft", folder, init_from=str(folder / "sft")), tmp_path)
    (state,) = states
    assert int(state.step) == 0
    wanted = params_of(folder / "sft")
    for name, array in flatten_params(state.params).items():
        np.testing.assert_array_equal(array, wanted[name])
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))


def test_tokens_and_seconds_are_of_the_whole_run_whichever_process_made_them(folder, tmp_path):
    config = make_config("sft", folder, init_from="")
    with pytest.raises(Stopped):
        train(config, tmp_path, stop_after(17))
    summary = train(config, tmp_path)
    again = train(config, tmp_path)
    finished = train(config, folder / "sft")
    assert (summary.step, summary.tokens) == (24, finished.tokens)
    assert summary.seconds > 0
    assert again == summary
    seconds = [record["seconds"] for record in read_metrics(tmp_path)]
    assert 0 < seconds[0] < seconds[1] < seconds[-1] <= summary.seconds
    assert seconds == sorted(seconds)


def test_sigterm_ends_a_run_after_its_step_and_is_then_what_it_was(folder, tmp_path):
    config = make_config("sft", folder, init_from="")
    handler = signal.getsignal(signal.SIGTERM)

    def interrupt(step: int, made: SourceBatch) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    summary = train(config, tmp_path, interrupt)
    # The signal came after step 5 had been judged not to be the last: so step 6 is.
    assert (summary.step, summary.interrupted) == (6, True)
    assert [p.name for p in checkpoint_dir(tmp_path).iterdir()] == ["step_00000006"]
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not train(config, tmp_path).interrupted
    found, wanted = params_of(tmp_path), params_of(folder / "sft")
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(folder, tmp_path, monkeypatch):
    init_state = driver.init_state

    def poisoned(*args: object) -> TrainState:
        state = init_state(*args)
        return state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params))

    monkeypatch.setattr(driver, "init_state", poisoned)
    config = make_config("sft", folder, init_from="", log_every=100, checkpoint_every=3)
    with pytest.raises(FloatingPointError, match="is not finite at step 1 ") as error:
        train(config, tmp_path)
    assert "gradients that are not: embed, final_norm, layers. Lower Opt" in str(error.value)
    assert list(checkpoint_dir(tmp_path).iterdir()) == []


def test_the_parameters_are_named_that_went_first_however_late_it_is_seen(
    folder, tmp_path, monkeypatch
):
    make = driver.make_train_step

    def make_spoiled(*args: object, **options: object):
        train_step = make(*args, **options)

        def spoiled(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
            state, measured = train_step(state, batch)
            if state.step >= 2:
                gone = [n for n in measured if "nonfinite/" in n and (state.step > 2 or "emb" in n)]
                measured |= {"grad_norm": np.nan} | dict.fromkeys(gone, 1.0)
            return state, measured

        return spoiled

    monkeypatch.setattr(driver, "make_train_step", make_spoiled)
    config = make_config("sft", folder, init_from="", log_every=100, checkpoint_every=100)
    with pytest.raises(FloatingPointError, match="is not finite at step 2 ") as error:
        train(dataclasses.replace(config, num_steps=4), tmp_path)
    assert "gradients that are not: embed. Lower" in str(error.value)


# ------------------------------------------------------------------------------------------- RL


@pytest.fixture(scope="module")
def rl(folder) -> Path:
    run = folder / "rl"
    train(make_config("rl", folder), run)
    return run


def test_every_rl_step_is_logged_with_how_far_the_sampler_was_from_the_trainer(rl):
    records = read_metrics(rl)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    counts = ("episodes", "episodes_crashed", "episodes_truncated", "groups_dropped", "reward")
    for record in records:
        assert record.keys() >= {"sampler_difference", "sampler_difference_max", *counts}
        assert record["episodes"] == 16
    used = [r for r in records if r["tokens"] > 0]
    assert len(used) >= 3
    for record in used:
        assert 0 < record["sampler_difference"] <= record["sampler_difference_max"] < 1e-4
    assert any(
        np.any(a != b) for a, b in zip(*map(all_params, (rl, rl.parent / "sft")), strict=True)
    )


def all_params(run: Path) -> list[np.ndarray]:
    return list(params_of(run).values())


def make_rollouts(folder: Path, *, tree: bool) -> SourceBatch:
    """The rollouts of a step by the SFT policy, packed one way or the other."""
    config = make_config("rl", folder)
    mesh = make_mesh(config.mesh)
    source = dataclasses.replace(config.source, tree=tree)
    opened = source.open(SourceContext(BYTES, MODEL, mesh, seed=3, first_step=0, num_steps=9))
    return opened.batch(
        0, load_params(newest_saved(folder / "sft"), abstract_transformer(MODEL), mesh, BYTES)
    )


def step_and_gradients(folder: Path, batch: Batch) -> tuple[dict, dict]:
    """Metrics of one train step, and the gradients: what plain descent at rate 1 takes away."""
    model, mesh = abstract_transformer(MODEL), make_mesh(MeshConfig())
    plain = Optimizer(optax.sgd(1.0), lambda step: jnp.float32(1))
    train_step = make_train_step(model, PolicyGradientLoss(importance_cap=2.0), plain, mesh)
    before = params_of(folder / "sft")
    params = load_params(newest_saved(folder / "sft"), model, mesh, BYTES)
    state, metrics = train_step(
        TrainState(jnp.int32(0), params, plain.transform.init(params)), batch
    )
    after = {name: np.asarray(x) for name, x in flatten_params(state.params).items()}
    return jax.device_get(metrics), {name: before[name] - after[name] for name in before}


def test_a_tree_and_its_rollouts_as_rows_have_the_same_loss_and_gradients(folder):
    tree, rows = (make_rollouts(folder, tree=is_tree) for is_tree in (True, False))
    ids = [[e.trajectory.ids.tolist() for g in made.groups for e in g] for made in (tree, rows)]
    assert ids[0] == ids[1]
    # Most episodes have several turns: what was sampled comes in several runs.
    sampled = [e.trajectory.per_token("origin") == Origin.SAMPLED for g in tree.groups for e in g]
    turns = [np.count_nonzero(np.diff(s.astype(int)) == 1) for s in sampled]
    assert np.median(turns) >= 2
    assert tree.metrics["groups_useful"] == 2
    lengths = [np.count_nonzero(made.batch.layout.subtree_end) for made in (tree, rows)]
    assert lengths[0] < 0.7 * lengths[1]

    (metrics, grads), (row_metrics, row_grads) = (
        step_and_gradients(folder, made.batch) for made in (tree, rows)
    )
    assert metrics["tokens"] == row_metrics["tokens"] > 100
    assert metrics["loss"] == pytest.approx(row_metrics["loss"], abs=1e-5)
    assert metrics["grad_norm"] > 0.01
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, row_grads[name], atol=1e-5, err_msg=name)
    for found in (metrics, row_metrics):
        assert found["sampler_difference_max"] < 1e-4


def test_one_run_trains_on_data_and_on_rollouts_at_once(folder, tmp_path):
    config = make_config("both", folder, num_steps=2)
    made: list[SourceBatch] = []
    train(config, tmp_path, lambda step, batch: made.append(batch))
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == [1, 2]
    for record, batch in zip(records, made, strict=True):
        from_policy = batch.batch.from_policy > 0
        counted = batch.batch.weights > 0
        assert np.count_nonzero(counted & ~from_policy) > 0
        assert record["tokens"] == np.count_nonzero(counted)
        assert record["episodes"] == 16
        assert record["sampler_difference_max"] < 1e-4
    assert any(np.any(b.batch.from_policy) for b in made)
