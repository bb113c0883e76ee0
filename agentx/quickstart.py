"""The whole pipeline on one machine: data, tokenizer, pretraining, SFT, GRPO, evaluation, export.

Every stage is a run file in configs/runs/quickstart, carried out by the same driver, step and
sampler that a pod runs; nothing here trains. After each stage the policy is evaluated, greedily, on
held-out tasks and on the same tasks with a tool that it has never seen. What comes out is in the
folder given:

    data/  stores/  tokenizer.model       recorded on this machine, see agentx.env.tasks.recordings
    pretrain/  sft/  grpo/                one run each, with its evaluation.json
    huggingface/                          the last policy, for transformers, vLLM and SGLang
    results.json  report.html             figures and pictures

Started again in the same folder, finished parts are taken as they are and a killed stage goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from agentx.cli.config import load_config
from agentx.cli.records import document_records, ending_records, rollout_records
from agentx.cli.runs import load_run, prepare_run
from agentx.data.curate import text_of
from agentx.data.formats import Conversation, read_documents
from agentx.data.prepare import trajectory_of
from agentx.data.store import TokenStore
from agentx.env.tasks.library import LibraryTasks
from agentx.env.tasks.recordings import RecordingConfig, record
from agentx.eval.scores import EpisodeResult, Score, make_score, paired_difference, score_episodes
from agentx.eval.suite import evaluate, result_of
from agentx.host import prepare_cpu
from agentx.interop.huggingface import export_huggingface
from agentx.metrics import Progress, read_metrics
from agentx.render import ToolRenderer, tool_list
from agentx.report import print_stage_table, write_report
from agentx.rollout import RolloutLimits
from agentx.sample.engine import Engine
from agentx.source import DatasetSource, SourceBatch
from agentx.tokenizer import Tokenizer
from agentx.train import TrainConfig, train
from agentx.trajectory import Trajectory

STAGES = ("pretrain", "sft", "grpo")
_FOLDER = "runs/quickstart"
# What the names of the stages that go without the tool objectives end in.
_ABLATED = "_ablated"


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """What is recorded and what is measured; how each stage trains is in its own run file.

    tasks: what is evaluated; tools in place and, for the new-tool score, with one of them new.
    num_episodes: of each evaluation. required_gain: by how much GRPO must raise held-out success
    over SFT for the command to exit with 0.
    """

    recording: RecordingConfig
    vocab_size: int
    tasks: LibraryTasks
    num_episodes: int
    limits: RolloutLimits
    num_slots: int
    max_length: int
    required_gain: float

    def __post_init__(self) -> None:
        if self.num_episodes < 1:
            raise ValueError(f"num_episodes is {self.num_episodes}; it must be 1 or more")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What came of one stage's episodes, with the tools in place and with one of them new.

    num_truncated, num_crashed: of both; such episodes are no successes. seconds: of playing them.
    shown: records of a few episodes, for the report.
    """

    held_out: list[EpisodeResult]
    new_tool: list[EpisodeResult]
    num_truncated: int
    num_crashed: int
    seconds: float
    shown: list[dict[str, Any]]

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        fields = json.loads(path.read_text(encoding="utf-8"))
        # Older files have more fields, which nothing reads.
        known = {field.name for field in dataclasses.fields(EpisodeResult)}
        for name in ("held_out", "new_tool"):
            for episode in fields[name]:
                episode["calls"] = tuple(map(tuple, episode["calls"]))
            fields[name] = [
                EpisodeResult(**{key: e[key] for key in e if key in known}) for e in fields[name]
            ]
        return cls(**fields)

    def scores(self) -> dict[str, Score]:
        solved = sum(episode.success for episode in self.new_tool)
        new_tool = make_score("new_tool", solved, len(self.new_tool))
        return score_episodes(self.held_out) | {"new_tool": new_tool}


class Interrupted(Exception):
    """A stage that SIGTERM ended before its last step; what it has done is saved."""


def run(out: Path, seed: int, ablate: str, overrides: Sequence[str]) -> int:
    """Runs everything into `out`; returns the exit code: 1 where GRPO missed the promised gain.

    overrides: "stage/Name.field=value" for a stage's run file, "Name.field=value" for this one's.
    """
    console = Console(stderr=True)
    config = load_config(
        f"{_FOLDER}/quickstart.gin",
        [f"SEED={seed}", *(o for o in overrides if not _stage_of(o))],
        root="QuickstartConfig",
    )
    names = [*STAGES, *(f"{stage}{_ABLATED}" for stage in STAGES if ablate)]
    pipeline = _Pipeline(config, names, out, seed, overrides, console)
    prepare_cpu(pipeline.configs[STAGES[0]].mesh.cpu_devices)
    prepare_run(config, out)
    try:
        # ------------------------------------------------------------ data and tokenizer
        data = record_data(config.recording, config.vocab_size, out, console)
        pipeline.tokenizer = Tokenizer.load(out / "tokenizer.model")

        # ------------------------------------------------------------ three stages
        done = [pipeline.stage(name) for name in names]
        stages, ablated = done[: len(STAGES)], done[len(STAGES) :]
    except Interrupted as interrupted:
        console.print(f"{interrupted}; the same command goes on from there", markup=False)
        return 0

    # ---------------------------------------------------------------- results
    promise = pipeline.promise()
    results = {
        "seed": seed,
        "split": config.tasks.split.replace("_", "-"),
        "command": shlex.join(["agentx", *sys.argv[1:]]),
        **describe_machine(),
        "seconds": data["seconds"]
        + sum(stage["seconds"] + stage["evaluation_s"] for stage in [*stages, *ablated]),
        "data": data,
        "stages": stages,
        "sampler_trainer_logprob_difference": pipeline.logprob_difference(),
        "promise": promise,
    }
    if ablate:
        results["ablation"] = {"name": "tool objectives", "stages": ablated}
    write_json(out / "results.json", results)
    write_json(out / "trajectories.json", pipeline.trajectories())
    pipeline.export()

    report = write_report(out)
    print_stage_table(results)
    console.print(
        f"GRPO over SFT on {config.num_episodes} {config.tasks.split} episodes: "
        f"{100 * promise['gain']:+.1f} points [{100 * promise['low']:.1f}, "
        f"{100 * promise['high']:.1f}], promised {100 * promise['required']:+.1f}",
        markup=False,
    )
    if ablated:
        last = ablated[-1]["scores"]["success"]
        console.print(
            f"Without the tool objectives: {100 * last['value']:.1f} % [{100 * last['low']:.1f}, "
            f"{100 * last['high']:.1f}] after {STAGES[-1]}; the report has the other scores",
            markup=False,
        )
    print(f"\nThe report is {report}")
    grpo = out / "grpo"
    print(f"Next: agentx sample --checkpoint {grpo} --suite library 'What does `walk` take first?'")
    print(
        f"      agentx train {grpo / 'config.gin'} --gin.TrainConfig.init_from={grpo} "
        f"--run {out / 'grpo_longer'}"
    )
    return 0 if promise["met"] else 1


def _stage_of(override: str) -> str:
    """The stage that an override is for: the first part of its scope, if that is a stage's name."""
    scope, slash, _ = override.removeprefix("--gin.").partition("=")[0].partition("/")
    return scope if slash and scope.removesuffix(_ABLATED) in STAGES else ""


def describe_machine() -> dict[str, Any]:
    """What results say of the machine and the software that they were made with."""
    versions = {name: version(name) for name in ("agentx", "jax", "flax", "optax")}
    return {
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": versions | {"python": platform.python_version()},
    }


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, so that a file that is there can be read."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def record_data(
    recording: RecordingConfig, vocab_size: int, out: Path, console: Console
) -> dict[str, Any]:
    """Records the data, trains the tokenizer and writes the token stores, once.

    They are in `out`: data/, tokenizer.model and stores/. Returns what data.json says of them:
    documents and tokens by name, and seconds.
    """
    data, stores = out / "data", out / "stores"
    done = out / "data.json"
    if not done.exists():
        started = time.perf_counter()
        shutil.rmtree(stores, ignore_errors=True)
        with Progress("record", recording.num_sessions) as progress:
            counts = record(recording, data, progress.update)
        with console.status("training the tokenizer"):
            tokenizer = Tokenizer.train(_tokenizer_texts(data), vocab_size)
            tokenizer.save(out / "tokenizer.model")
        with Progress("tokenize", sum(counts.values())) as progress:
            written, renderer = itertools.count(1), ToolRenderer(tokenizer)

            def documents(name: str) -> Iterator[Trajectory]:
                field = "text" if name == "text" else ""
                for document in read_documents(data / f"{name}.jsonl", field=field):
                    one = trajectory_of(document, renderer)
                    progress.update(next(written), num_tokens=len(one))
                    yield one

            tokens = {
                name: TokenStore.write(
                    stores / name, documents(name), tokenizer.fingerprint
                ).num_tokens
                for name in counts
            }
        seconds = time.perf_counter() - started
        write_json(done, {"documents": counts, "tokens": tokens, "seconds": seconds})
    about: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    for name, count in about["documents"].items():
        console.print(f"{name}: {count:,} documents, {about['tokens'][name]:,} tokens")
    return about


def _tokenizer_texts(data: Path) -> Iterator[str]:
    """Text, and the fields of the conversations each by itself, as they will be encoded."""
    for number, document in enumerate(read_documents(data / "text.jsonl", field="text")):
        if number % 4 == 0:
            yield text_of(document)
    for number, document in enumerate(read_documents(data / "sessions.jsonl")):
        if number % 8 == 0:
            assert isinstance(document, Conversation)
            yield tool_list(document.tools)
            for message in document.messages:
                yield message.content
                for call in message.tool_calls:
                    yield from (str(value) for value in call.arguments.values())


class _Pipeline:
    """The stages of one quickstart, and what they leave for the next."""

    def __init__(
        self,
        config: QuickstartConfig,
        names: Sequence[str],
        out: Path,
        seed: int,
        overrides: Sequence[str],
        console: Console,
    ):
        self.config, self.out, self.seed, self.console = config, out, seed, console
        # All of them now: what is wrong with the last stage's should not be found out at its turn.
        self.configs = {name: self._load(name, overrides) for name in names}
        self.evaluated: dict[str, Evaluation] = {}
        # Of `record_data`.
        self.tokenizer: Tokenizer
        self._engine: Engine | None = None

    # -------------------------------------------------------------------------- stages

    def stage(self, name: str) -> dict[str, Any]:
        """Trains one stage, evaluates what came out, and returns its entry of results.json."""
        config, folder = self.configs[name], self.out / name
        prepare_run(config, folder)
        summary = train(config, folder, on_batch=self._keep_last(folder))
        if summary.interrupted:
            raise Interrupted(f"{name} was stopped at step {summary.step}, which is saved")
        if not (folder / "evaluation.json").exists():
            evaluated = self._evaluate(folder)
            write_json(folder / "evaluation.json", dataclasses.asdict(evaluated))
        evaluated = self.evaluated[name] = Evaluation.load(folder / "evaluation.json")
        scores = evaluated.scores()
        success = scores["success"]
        self.console.print(
            f"{name}: {100 * success.value:.1f} % [{100 * success.low:.1f}, "
            f"{100 * success.high:.1f}] of {success.total} {self.config.tasks.split} episodes",
            markup=False,
        )
        return {
            "name": name.removesuffix(_ABLATED),
            "seconds": summary.seconds,
            "steps": summary.step,
            "tokens": summary.tokens,
            "tokens_per_s": summary.tokens / summary.seconds,
            "scores": {key: score.to_json() for key, score in scores.items()},
            "evaluation_s": evaluated.seconds,
            "episodes_truncated": evaluated.num_truncated,
            "episodes_crashed": evaluated.num_crashed,
        }

    def _load(self, name: str, overrides: Sequence[str]) -> TrainConfig:
        """A stage's run file. What is overridden for a stage is so in its ablation too."""
        mine = [
            o.replace(f"{stage}/", "", 1)
            for stage in dict.fromkeys((name.removesuffix(_ABLATED), name))
            for o in overrides
            if _stage_of(o) == stage
        ]
        config: TrainConfig = load_config(f"{_FOLDER}/{name}.gin", [*self._paths(name), *mine])
        return config

    def _paths(self, name: str) -> list[str]:
        """Where a stage finds what the stages before it left, and the seed."""
        stores, ending = self.out / "stores", _ABLATED if name.endswith(_ABLATED) else ""
        sources = {
            "pretrain": {
                "TEXT": stores / "text",
                "SESSIONS": stores / "sessions",
                "REPETITIONS": stores / "repetitions",
            },
            "sft": {
                "INIT_FROM": self.out / f"pretrain{ending}",
                "SESSIONS": stores / "sessions",
                "DEMONSTRATIONS": stores / "demonstrations",
            },
            "grpo": {"INIT_FROM": self.out / f"sft{ending}"},
        }[name.removesuffix(ending)]
        sources["TOKENIZER"] = self.out / "tokenizer.model"
        return [f"SEED={self.seed}", *(f"{macro}={path}" for macro, path in sources.items())]

    def _evaluate(self, folder: Path) -> Evaluation:
        """Plays the policy that a stage has left in `folder`."""
        started = time.perf_counter()
        policy = load_run(folder)
        renderer = ToolRenderer(self.tokenizer)
        if self._engine is None:
            self._engine = Engine(
                policy.config,
                mesh=policy.mesh,
                num_slots=self.config.num_slots,
                max_length=self.config.max_length,
                vocab_size=self.tokenizer.vocab_size,
                stop_ids=renderer.stop_ids,
                temperature=0.0,
            )
        self._engine.set_params(policy.params, version=len(self.evaluated))
        held_out, new_tool = (
            evaluate(
                self._engine,
                dataclasses.replace(self.config.tasks, new_tool=is_new),
                renderer,
                self.config.limits,
                num_episodes=self.config.num_episodes,
                seed=self.seed,
                title=f"evaluate {folder.name}{', new tool' if is_new else ''}",
            )
            for is_new in (False, True)
        )
        played = [*held_out, *new_tool]
        return Evaluation(
            [result_of(e) for e in held_out],
            [result_of(e) for e in new_tool],
            num_truncated=sum(e.truncated for e in played),
            num_crashed=sum(bool(e.failure) for e in played),
            seconds=time.perf_counter() - started,
            shown=ending_records(
                held_out, self.tokenizer, stage=folder.name, title=self.config.tasks.split
            ),
        )

    # -------------------------------------------------------------------------- results

    def promise(self) -> dict[str, Any]:
        """Whether GRPO raised held-out success as much as was promised."""
        before, after = self.evaluated["sft"], self.evaluated["grpo"]
        difference = paired_difference(before.held_out, after.held_out)
        return {
            "before": "sft",
            "after": "grpo",
            "gain": difference.value,
            "low": difference.low,
            "high": difference.high,
            "required": self.config.required_gain,
            "met": difference.value >= self.config.required_gain,
        }

    def logprob_difference(self) -> dict[str, float]:
        """How far the sampler's log-probabilities were from the trainer's, over all RL steps."""
        records = read_metrics(self.out / "grpo")
        num_tokens = sum(r["tokens"] for r in records)
        total = sum(r["sampler_difference"] * r["tokens"] for r in records)
        largest = max(r["sampler_difference_max"] for r in records)
        return {"mean": total / max(num_tokens, 1), "max": largest}

    def export(self) -> None:
        """Writes the last policy as a Hugging Face folder, unless it is there already."""
        folder = self.out / "huggingface"
        if not folder.exists():
            policy = load_run(self.out / "grpo")
            export_huggingface(policy.params, policy.config, policy.tokenizer, folder)
        self.console.print(f"exported to {folder}")

    # -------------------------------------------------------------------------- for people

    def trajectories(self) -> list[dict[str, Any]]:
        """What trajectories.json holds: what was trained on, then held-out episodes at the end."""
        records = []
        for stage in STAGES:
            source = load_config(self.out / stage / "config.gin").source
            if isinstance(source, DatasetSource):
                records += document_records(source, self.tokenizer, stage=stage, seed=self.seed)
            else:
                last_batch = self.out / stage / "last_batch.json"
                records += json.loads(last_batch.read_text(encoding="utf-8"))
        return records + self.evaluated[STAGES[-1]].shown

    def _keep_last(self, folder: Path) -> Callable[[int, SourceBatch], None]:
        """Keeps in last_batch.json a part of what the newest step of an RL run was trained on.

        Every step's, for any may be the last before a kill. A step without a difference within any
        group trained on nothing and is passed over.
        """

        def on_batch(step: int, made: SourceBatch) -> None:
            title = f"{folder.name}, step {step}: one of a group"
            records = rollout_records(made, self.tokenizer, stage=folder.name, title=title)
            if records or (made.groups and not (folder / "last_batch.json").exists()):
                write_json(folder / "last_batch.json", records)

        return on_batch
