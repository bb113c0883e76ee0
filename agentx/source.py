"""Where batches come from: a dataset, rollouts by the current policy, or both in one batch.

A config (`DatasetSource`, `RolloutSource`, `MixtureSource`: what gin binds) is opened into a
`BatchSource`, which the driver asks for the batch of each step. A batch is a pure function of the
run's seed, the step and, for rollouts, the parameters: so a run goes on exactly where it was
killed. `batch_shapes` of a config says [rows, length] of its batches before any is made.

One RL step, in four points:
1. `num_groups` tasks are drawn, and each is played `group_size` times by the current policy.
2. Rewards become advantages within each group; groups without a difference are left out.
3. A group becomes one prefix tree, its prompt computed once, with the sampler's logprobs.
4. The batch goes to the same `train_step` as every other.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from agentx.advantages import Kind, group_advantages
from agentx.batch import Batch
from agentx.data.objectives import Objective
from agentx.data.pack import pack_groups, rows_needed
from agentx.data.pipeline import MixturePipeline, Source, Stage, prefetch
from agentx.data.store import TokenStore
from agentx.env.base import TaskSet
from agentx.model.config import ModelConfig
from agentx.model.lora import LoraConfig
from agentx.render import ToolRenderer
from agentx.rollout import Episode, RolloutLimits, run_groups, trainable
from agentx.sample.engine import Engine
from agentx.tokenizer import Tokenizer
from agentx_kernels.layout import TreeLayout


@dataclasses.dataclass(frozen=True)
class SourceContext:
    """What a source needs to know of the run. Steps from first_step up to num_steps are to come.

    lora: the adapters of the model, if any; the parameters of `BatchSource.batch` then have them.
    """

    tokenizer: Tokenizer
    model: ModelConfig
    mesh: Mesh
    seed: int
    first_step: int
    num_steps: int
    lora: LoraConfig | None = None


@dataclasses.dataclass(frozen=True)
class SourceBatch:
    """A batch (numpy), what making it measured, and the groups that were played for it, if any.

    `advantages` has one array for each group, one number for each of its episodes.
    """

    batch: Batch
    metrics: dict[str, float]
    groups: list[list[Episode]] = dataclasses.field(default_factory=list)
    advantages: list[np.ndarray] = dataclasses.field(default_factory=list)


class BatchSource(Protocol):
    """Batches by step. `identity` is what they depend on, by name: with it a batch changes.

    about: what there is to say of the data before the first step, a line each. uses_tool_format:
    whether any of it is in our tool format, and not all in the chat formats of others.
    """

    identity: dict[str, str]
    about: tuple[str, ...]
    uses_tool_format: bool

    def batch(self, step: int, params: nnx.State) -> SourceBatch: ...

    def close(self) -> None: ...


# --------------------------------------------------------------------------------------------------
# Datasets
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A token store, what to make of it, and its share of the tokens relative to the others'.

    reasoning: whether it holds reasoning traces, for `DatasetSource.reasoning_share`.
    """

    store: str
    objective: Objective
    share: float = 1.0
    reasoning: bool = False


@dataclasses.dataclass(frozen=True)
class DatasetSource:
    """Batches of [rows, length] from one or more datasets, mixed by share.

    reasoning_share: of all tokens, those that come from the datasets of reasoning traces, which
    divide it by their shares, as the others divide the rest; None leaves it to the shares. 0.5
    gives traces the volume of text. stages: shares, in the order of the datasets, each up to a
    share of the training; none keeps those of the datasets all along.
    """

    datasets: tuple[Dataset, ...]
    rows: int
    length: int
    reasoning_share: float | None = None
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        share = self.reasoning_share
        if share is None:
            return
        if not 0 < share < 1:
            raise ValueError(f"reasoning_share is {share}; it must be between 0 and 1")
        if len({dataset.reasoning for dataset in self.datasets}) < 2:
            raise ValueError(
                f"reasoning_share is {share}, which needs datasets with reasoning=True and others"
            )

    def shares(self) -> tuple[Stage, ...]:
        """The shares of each stage, one where none is given, with `reasoning_share` in them."""
        stages = self.stages or (Stage(1.0, tuple(d.share for d in self.datasets)),)
        if self.reasoning_share is None:
            return stages
        is_trace = [dataset.reasoning for dataset in self.datasets]
        made = []
        for stage in stages:
            totals = {
                kind: sum(s for s, k in zip(stage.shares, is_trace, strict=True) if k is kind)
                for kind in (True, False)
            }
            if not all(totals.values()):
                raise ValueError(
                    f"the stage until {stage.until:g} has no share of traces, or no other: "
                    "reasoning_share needs both"
                )
            parts = {True: self.reasoning_share, False: 1 - self.reasoning_share}
            made.append(
                Stage(
                    stage.until,
                    tuple(
                        parts[kind] * share / totals[kind]
                        for share, kind in zip(stage.shares, is_trace, strict=True)
                    ),
                )
            )
        return tuple(made)

    @property
    def temperature(self) -> float:
        """What logits are divided by in the loss: data is modelled as it is."""
        return 1.0

    @property
    def batch_shapes(self) -> tuple[tuple[int, int], ...]:
        return ((self.rows, self.length),)

    def pipeline(self, tokenizer: Tokenizer, seed: int, num_steps: int) -> MixturePipeline:
        """What makes the batches of a run with that seed and that many steps."""
        fingerprint = tokenizer.fingerprint
        sources = [
            Source(
                d.store,
                TokenStore.open(d.store, tokenizer_fingerprint=fingerprint),
                d.objective,
                d.share,
            )
            for d in self.datasets
        ]
        return MixturePipeline(
            sources, self.rows, self.length, seed, num_steps=num_steps, stages=self.shares()
        )

    def open(self, context: SourceContext) -> BatchSource:
        _check_length(self.length, context.model)
        return _DatasetBatches(self, context)


class _DatasetBatches:
    def __init__(self, config: DatasetSource, context: SourceContext):
        pipeline = config.pipeline(context.tokenizer, context.seed, context.num_steps)
        self.identity = pipeline.identity
        made_from = [source.store.manifest.get("made_from", {}) for source in pipeline.sources]
        self.uses_tool_format = any(m.get("renderer", "tool") == "tool" for m in made_from)
        self.about = tuple(
            f"{dataset.store}: {plan}"
            for dataset, plan in zip(config.datasets, pipeline.plans, strict=True)
        )
        self._steps = prefetch(pipeline.batch, context.first_step, context.num_steps)

    def batch(self, step: int, params: nnx.State) -> SourceBatch:
        made, batch = next(self._steps)
        assert made == step, f"asked for batch {step}, the next one is {made}"
        return SourceBatch(batch, {})

    def close(self) -> None:
        self._steps.close()


# --------------------------------------------------------------------------------------------------
# Rollouts
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RolloutSource:
    """Groups of episodes by the current policy, with their advantages.

    tasks: what to play. num_groups x group_size episodes a step, at `temperature`. rows, length:
    the batch; a step is padded up to a quarter, half or all of `rows`, or, where its groups need
    more, to a multiple of it, so that few shapes are compiled. advantages: see `group_advantages`.
    normalise: whether a token or a sequence counts the same. tree: a group as one prefix tree, or
    as rows of its own. replay_experts: of a model with experts, whether a token takes those in
    training that it took when it was sampled (routing replay, Ma et al., 2025, arXiv:2510.11370).
    """

    tasks: TaskSet
    num_groups: int
    group_size: int
    rows: int
    length: int
    temperature: float = 1.0
    advantages: Kind = "grpo"
    normalise: Literal["token", "sequence"] = "token"
    tree: bool = True
    replay_experts: bool = True
    limits: RolloutLimits = dataclasses.field(default_factory=RolloutLimits)

    def __post_init__(self) -> None:
        if self.num_groups < 1 or self.group_size < 2:
            raise ValueError(
                f"num_groups must be at least 1 and group_size at least 2, got {self.num_groups} "
                f"and {self.group_size}"
            )
        if self.rows < 4 or self.rows % 4:
            raise ValueError(f"rows must be a multiple of 4, got {self.rows}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    @property
    def batch_shapes(self) -> tuple[tuple[int, int], ...]:
        return tuple((rows, self.length) for rows in (self.rows // 4, self.rows // 2, self.rows))

    def open(self, context: SourceContext) -> BatchSource:
        _check_length(self.length, context.model)
        return _RolloutBatches(self, context)


class _RolloutBatches:
    def __init__(self, config: RolloutSource, context: SourceContext):
        self._config, self._seed = config, context.seed
        self._renderer = ToolRenderer(context.tokenizer)
        self._engine = Engine(
            context.model,
            mesh=context.mesh,
            num_slots=config.num_groups * config.group_size,
            max_length=config.length,
            vocab_size=context.tokenizer.vocab_size,
            stop_ids=self._renderer.stop_ids,
            temperature=config.temperature,
            seed=context.seed,
            lora=context.lora,
        )
        self.about: tuple[str, ...] = ()
        self.uses_tool_format = True
        self.identity = {
            "rollouts": repr(config),
            "seed": str(context.seed),
            "tokenizer": context.tokenizer.fingerprint,
        }

    def _tasks(self, step: int) -> list[Any]:
        """The step's tasks: the set in a fresh order every epoch, each in a world of its own."""
        tasks, config = self._config.tasks, self._config
        chosen = []
        for number in range(step * config.num_groups, (step + 1) * config.num_groups):
            epoch, place = divmod(number, len(tasks))
            order = np.random.Generator(np.random.Philox(key=[self._seed, 2 * epoch]))
            index = int(order.permutation(len(tasks))[place])
            world = np.random.Generator(np.random.Philox(key=[self._seed, 2 * number + 1]))
            chosen.append(tasks.task(index, seed=int(world.integers(2**62))))
        return chosen

    def batch(self, step: int, params: nnx.State) -> SourceBatch:
        config, start = self._config, time.perf_counter()
        self._engine.set_params(params, version=step)
        groups = run_groups(
            self._engine,
            config.tasks.env,
            self._tasks(step),
            self._renderer,
            config.limits,
            group_size=config.group_size,
            first_request=step * config.num_groups * config.group_size,
        )
        rollout_s = time.perf_counter() - start
        groups, counts = trainable(groups)
        advantages = [
            group_advantages(np.array([[e.reward for e in group]]), config.advantages)[0]
            for group in groups
        ]
        useful = [i for i, a in enumerate(advantages) if np.any(a)]
        batch = self._pack([groups[i] for i in useful], [advantages[i] for i in useful])
        episodes = [e for group in groups for e in group]
        metrics = counts | {
            "reward": _mean([e.reward for e in episodes]),
            "groups_useful": float(len(useful)),
            "rows": float(len(batch.tokens)),
            "calls_per_episode": _mean([len(e.calls) for e in episodes]),
            "calls_valid": _mean([c.valid for e in episodes for c in e.calls]),
            "rollout_s": rollout_s,
        }
        return SourceBatch(batch, metrics, groups, advantages)

    def _pack(self, groups: list[list[Episode]], advantages: list[np.ndarray]) -> Batch:
        config = self._config
        trajectories = [[e.trajectory for e in group] for group in groups]
        needed = rows_needed(trajectories, config.length, tree=config.tree)
        larger = math.ceil(needed / config.rows) * config.rows
        rows = next((rows for rows, _ in config.batch_shapes if rows >= needed), larger)
        batch = pack_groups(
            trajectories,
            advantages,
            rows,
            config.length,
            tree=config.tree,
            normalise=config.normalise,
        )
        return batch if config.replay_experts else batch._replace(experts=None)

    def close(self) -> None:
        return None


# --------------------------------------------------------------------------------------------------
# Both
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MixtureSource:
    """Rows of data and rows of rollouts in one batch: pretraining and RL at the same time.

    The step divides by the weights of all of it, so `data_weight` scales a data token's loss weight
    against a sampled token's.
    """

    data: DatasetSource
    rollouts: RolloutSource
    data_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.data.length != self.rollouts.length:
            raise ValueError(
                f"data rows of {self.data.length} tokens and rollout rows of "
                f"{self.rollouts.length} cannot share a batch: give both the same length"
            )

    @property
    def temperature(self) -> float:
        return self.rollouts.temperature

    @property
    def batch_shapes(self) -> tuple[tuple[int, int], ...]:
        return tuple((self.data.rows + rows, length) for rows, length in self.rollouts.batch_shapes)

    def open(self, context: SourceContext) -> BatchSource:
        return _MixtureBatches(self, context)


class _MixtureBatches:
    def __init__(self, config: MixtureSource, context: SourceContext):
        self._data = config.data.open(context)
        self._rollouts = config.rollouts.open(context)
        self._data_weight = config.data_weight
        self.about = self._data.about
        self.uses_tool_format = True
        self.identity = {
            **self._data.identity,
            **self._rollouts.identity,
            "data weight": str(config.data_weight),
        }

    def batch(self, step: int, params: nnx.State) -> SourceBatch:
        data = self._data.batch(step, params).batch
        rollouts = self._rollouts.batch(step, params)
        zeros: Any = np.zeros_like(data.weights)
        experts: Any = rollouts.batch.experts
        if experts is not None:  # of data the router chooses
            experts = np.full((*data.weights.shape, *experts.shape[2:]), -1, np.int32)
        data = data._replace(
            experts=experts,
            weights=data.weights * np.float32(self._data_weight),
            from_policy=zeros,
            advantages=zeros,
            sampler_logprobs=zeros,
        )
        return dataclasses.replace(rollouts, batch=concatenate(data, rollouts.batch))

    def close(self) -> None:
        self._data.close()
        self._rollouts.close()


def concatenate(first: Batch, second: Batch) -> Batch:
    """The rows of both; fields that either leaves out must be left out by both."""
    fields: dict[str, Any] = {}
    for name in Batch._fields:
        a, b = getattr(first, name), getattr(second, name)
        if (a is None) != (b is None):
            raise ValueError(f"one of the batches has {name} and the other has not")
        if isinstance(a, TreeLayout):
            fields[name] = TreeLayout(*(np.concatenate(pair) for pair in zip(a, b, strict=True)))
        elif a is not None:
            fields[name] = np.concatenate([a, b])
    return Batch(**fields)


# --------------------------------------------------------------------------------------------------
# Small parts
# --------------------------------------------------------------------------------------------------


def _check_length(length: int, model: ModelConfig) -> None:
    if length > model.max_length:
        raise ValueError(
            f"rows of {length} tokens are longer than the model's max_length of {model.max_length}"
        )


def _mean(values: Sequence[float]) -> float:
    """0 of nothing."""
    return float(np.mean(values)) if values else 0.0
