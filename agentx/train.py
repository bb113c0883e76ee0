"""The one driver: pretraining, SFT, RL and mixtures of them are all this loop.

In: a `TrainConfig`, a folder for the run. Out, in that folder:

    config.gin        the resolved config (written by the command line)
    tokenizer.model   the tokenizer that the run used
    imported/         where the model began as one of others: their config, tokenizer and template
    checkpoints/      state, step and what they belong to
    metrics.jsonl     one record a logged step; seconds: of the run so far, as in RunSummary

Started again in the same folder, a run goes on from its newest complete checkpoint, and its
parameters are bit for bit those of a run that was never stopped. SIGTERM saves and ends in order.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from agentx.checkpoint import CheckpointStore
from agentx.losses import NextTokenLoss, PolicyGradientLoss
from agentx.metrics import MetricsWriter, Progress
from agentx.model.config import ModelConfig
from agentx.model.lora import LoraConfig, adapted
from agentx.model.saved import config_to_json
from agentx.model.transformer import abstract_transformer
from agentx.optim import OptimizerConfig, make_optimizer
from agentx.parameters import (
    base_of,
    checkpoint_dir,
    describe_adapters,
    imported_dir,
    load_frozen,
    load_params,
    newest_saved,
)
from agentx.sample.sampling import check_seed
from agentx.sharding import MeshConfig, check_batch, make_mesh
from agentx.source import DatasetSource, MixtureSource, RolloutSource, SourceBatch, SourceContext
from agentx.step import abstract_state, init_state, make_train_step
from agentx.tokenizer import Tokenizer

# What the progress line shows of the metrics.
_SHOWN = ("loss", "reward")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run.

    model, source, loss, optimizer, mesh: what is trained, on what, how, and on which devices.
    tokenizer: path of the tokenizer. num_steps: optimizer steps. init_from: a run whose parameters
    this one begins with; "" for fresh ones. lora: train adapters of these parameters, which stay
    as they are and may be kept in bfloat16 (`ModelConfig.param_dtype`); None to train them all.
    checkpoint_every, log_every: in steps; one whose batch comes with measurements of its own, as
    rollouts do, is always logged. seed: of all random numbers, in [0, 2^31).
    """

    model: ModelConfig
    source: DatasetSource | RolloutSource | MixtureSource
    loss: NextTokenLoss | PolicyGradientLoss
    optimizer: OptimizerConfig
    tokenizer: str
    num_steps: int
    seed: int = 0
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    num_micro_batches: int = 1
    init_from: str = ""
    lora: LoraConfig | None = None
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_micro_batches", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"TrainConfig.{name} is {getattr(self, name)}; it must be 1 or more"
                )
        check_seed("TrainConfig.seed", self.seed)
        if self.lora is not None and not self.init_from:
            raise ValueError(
                "TrainConfig.lora adapts parameters that are there: set TrainConfig.init_from to "
                "the run that has them"
            )


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """Where a run stands. `tokens`, `seconds`: of all its steps, whichever process made them.

    interrupted: whether SIGTERM ended it before its last step.
    """

    step: int
    tokens: int
    seconds: float
    interrupted: bool


def train(
    config: TrainConfig, run_dir: Path, on_batch: Callable[[int, SourceBatch], None] | None = None
) -> RunSummary:
    """Runs `config` in `run_dir` to its last step, or until SIGTERM.

    on_batch: called after each step with its number and what was trained on. Raises ValueError
    where the config does not fit its inputs, the devices or what `run_dir` was begun with, and
    FloatingPointError where the loss or a gradient is no number.
    """
    # ---------------------------------------------------------------- what is trained
    tokenizer = Tokenizer.load(config.tokenizer)
    # Others pad their embeddings to a round number of rows; a fresh model has no need of that.
    is_padded = config.init_from and tokenizer.vocab_size < config.model.vocab_size
    if tokenizer.vocab_size != config.model.vocab_size and not is_padded:
        raise ValueError(
            f"the tokenizer {config.tokenizer} has {tokenizer.vocab_size} pieces but the model's "
            f"vocab_size is {config.model.vocab_size}: set ModelConfig.vocab_size to the former"
        )
    mesh = make_mesh(config.mesh)
    for shape in config.source.batch_shapes:
        check_batch(shape, mesh, config.num_micro_batches)
    plain = model = abstract_transformer(config.model)
    if config.lora is not None:
        model = adapted(plain, config.lora)
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    train_step = make_train_step(
        model,
        config.loss,
        optimizer,
        mesh,
        num_micro_batches=config.num_micro_batches,
        temperature=config.source.temperature,
    )

    with (
        until_sigterm() as stop,
        CheckpointStore(checkpoint_dir(run_dir), keep=config.keep_checkpoints) as checkpoints,
    ):
        # ------------------------------------------------------------ where to begin
        restored = checkpoints.restore(abstract_state(model, optimizer, mesh))
        first_step = 0 if restored is None else restored.step
        source = config.source.open(
            SourceContext(
                tokenizer,
                config.model,
                mesh,
                config.seed,
                first_step,
                config.num_steps,
                config.lora,
            )
        )
        extras: dict[str, Any] = {
            "model": config_to_json(config.model),
            "tokenizer": tokenizer.fingerprint,
            "source": source.identity,
            "seed": config.seed,
            "tool_format": source.uses_tool_format,
        }
        if restored is not None:
            _check_same_run(restored.extras, extras, config.lora, run_dir)
            state, before = restored.state, restored.extras
            extras["tool_format"] |= before.get("tool_format", True)
        else:
            params = None
            if config.init_from:
                saved = newest_saved(Path(config.init_from))
                if config.lora is None:
                    params = load_params(saved, model, mesh, tokenizer)
                extras["tool_format"] |= saved.extras.get("tool_format", True)
                _carry_imported(Path(config.init_from), run_dir)
            state = init_state(model, optimizer, mesh, jax.random.key(config.seed))
            state = state if params is None else state._replace(params=params)
            before = {"tokens": 0, "seconds": 0.0}
        frozen: list[nnx.State] = []
        if config.lora is not None:
            if restored is None:
                base = newest_saved(Path(config.init_from))
            else:
                base = base_of(restored.extras, run_dir)
            frozen.append(load_frozen(base, plain, config.lora, mesh, tokenizer))
            extras["lora"] = describe_adapters(config.lora, base)
        if Path(config.tokenizer).resolve() != (run_dir / "tokenizer.model").resolve():
            tokenizer.save(run_dir / "tokenizer.model")

        # ------------------------------------------------------------ the loop
        for line in source.about:
            print(line, file=sys.stderr)
        step, tokens, seconds = first_step, before["tokens"], before["seconds"]
        started = time.perf_counter() - seconds
        shown: dict[str, float] = {}
        # Steps of which nobody has asked yet whether they were finite: asking waits for the device.
        unchecked: list[tuple[int, dict[str, Any]]] = []
        is_last = step >= config.num_steps or stop.is_set()
        with (
            closing(source),
            MetricsWriter(run_dir, resume_from=first_step) as writer,
            Progress(run_dir.name, config.num_steps, done=first_step) as progress,
        ):
            while not is_last:
                made = source.batch(step, nnx.merge_state(state.params, *frozen))
                state, measured = train_step(state, made.batch, *frozen)
                step += 1
                unchecked.append((step, measured))
                num_tokens = int(np.count_nonzero(made.batch.layout.subtree_end))
                tokens += num_tokens
                # Asked once a step: a signal that comes after this ends the next step.
                is_last = step >= config.num_steps or stop.is_set()
                is_saved = is_last or step % config.checkpoint_every == 0
                if step % config.log_every == 0 or is_saved or made.metrics:
                    for number, held in jax.device_get(unchecked):
                        values = {name: float(value) for name, value in held.items()}
                        _check_finite(values, number)
                    unchecked.clear()
                    values |= made.metrics
                    seconds = time.perf_counter() - started
                    writer.write(step, num_tokens=num_tokens, seconds=seconds, **values)
                    shown = {name: values[name] for name in _SHOWN if name in values}
                progress.update(step, num_tokens=num_tokens, **shown)
                if on_batch is not None:
                    on_batch(step, made)
                if is_saved:
                    totals = {"tokens": tokens, "seconds": seconds}
                    checkpoints.save(step, state, extras | totals)
        checkpoints.wait()
    return RunSummary(step, tokens, seconds, step < config.num_steps)


def _carry_imported(init_from: Path, run_dir: Path) -> None:
    source, target = imported_dir(init_from), imported_dir(run_dir)
    if source.is_dir() and source.resolve() != target.resolve():
        shutil.copytree(source, target, dirs_exist_ok=True)


def _check_same_run(
    before: dict[str, Any], now: dict[str, Any], lora: LoraConfig | None, run_dir: Path
) -> None:
    if before["tokenizer"] != now["tokenizer"]:
        raise ValueError(
            f"{run_dir} was begun with another tokenizer: go on with "
            f"{run_dir / 'tokenizer.model'}, or give another folder"
        )
    # Its other settings are in the shapes and names of the arrays, which are compared.
    if lora is not None and before["lora"]["alpha"] != lora.alpha:
        raise ValueError(
            f"{run_dir} was begun with other adapters: LoraConfig.alpha was "
            f"{before['lora']['alpha']:g}, is now {lora.alpha:g}; give another folder"
        )
    old, new = before["source"], now["source"]
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        name = changed[0]
        also = f" (and {len(changed) - 1} more)" if changed[1:] else ""
        raise ValueError(
            f"{run_dir} was begun with other data: {name} was {_short(old.get(name))}, is now "
            f"{_short(new.get(name))}{also}; give another folder, or the data and config "
            "that it was begun with"
        )


def _short(value: str | None) -> str:
    """A value of a source's identity: a fingerprint by its beginning, nothing as "none"."""
    if value is None:
        return "none"
    return value[:12] if re.fullmatch("[0-9a-f]{64}", value) else value


def _check_finite(values: dict[str, float], step: int) -> None:
    """A loss that is no number stops the run, and says which parameters went first."""
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        return
    groups = [n.removeprefix("nonfinite/") for n, v in values.items() if "nonfinite/" in n and v]
    raise FloatingPointError(
        f"the loss or a gradient is not finite at step {step} (loss {values['loss']}); gradients "
        f"that are not: {', '.join(groups) or 'none'}. Lower OptimizerConfig.learning_rate"
    )


@contextmanager
def until_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; the handler of before is put back at the end."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
