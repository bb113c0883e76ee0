"""What a run file may name, and the words for a name that isn't there."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable

# Name in a .gin file -> the dataclass behind it. Its module is imported when it is first named.
REGISTRY = {
    "TrainConfig": "agentx.train.TrainConfig",
    "ModelConfig": "agentx.model.config.ModelConfig",
    "LatentConfig": "agentx.model.config.LatentConfig",
    "MoEConfig": "agentx.model.moe_config.MoEConfig",
    "LoraConfig": "agentx.model.lora.LoraConfig",
    "LinearRope": "agentx.model.rope.LinearRope",
    "DynamicRope": "agentx.model.rope.DynamicRope",
    "YarnRope": "agentx.model.rope.YarnRope",
    "Llama3Rope": "agentx.model.rope.Llama3Rope",
    "LongRope": "agentx.model.rope.LongRope",
    "OptimizerConfig": "agentx.optim.OptimizerConfig",
    "MeshConfig": "agentx.sharding.MeshConfig",
    "NextTokenLoss": "agentx.losses.NextTokenLoss",
    "PolicyGradientLoss": "agentx.losses.PolicyGradientLoss",
    "Dataset": "agentx.source.Dataset",
    "DatasetSource": "agentx.source.DatasetSource",
    "Stage": "agentx.data.pipeline.Stage",
    "RolloutSource": "agentx.source.RolloutSource",
    "MixtureSource": "agentx.source.MixtureSource",
    "RolloutLimits": "agentx.rollout.RolloutLimits",
    "NextToken": "agentx.data.objectives.weights.NextToken",
    "PlainText": "agentx.data.objectives.weights.PlainText",
    "FillInTheMiddle": "agentx.data.objectives.text.FillInTheMiddle",
    "InfillCall": "agentx.data.objectives.infill.InfillCall",
    "InfillPlan": "agentx.data.objectives.infill.InfillPlan",
    "Recover": "agentx.data.objectives.recover.Recover",
    "ToolRename": "agentx.data.objectives.tools.ToolRename",
    "ToolChoice": "agentx.data.objectives.choice.ToolChoice",
    "TraceAugment": "agentx.data.objectives.traces.TraceAugment",
    "Mixture": "agentx.data.objectives.mixture.Mixture",
    "BuildConfig": "agentx.data.prepare.BuildConfig",
    "Input": "agentx.data.prepare.Input",
    "BeamConfig": "agentx.data.prepare.BeamConfig",
    "Length": "agentx.data.curate.quality.Length",
    "Repetition": "agentx.data.curate.quality.Repetition",
    "Symbols": "agentx.data.curate.quality.Symbols",
    "Language": "agentx.data.curate.language.Language",
    "ValidCalls": "agentx.data.curate.runs.ValidCalls",
    "MinReward": "agentx.data.curate.runs.MinReward",
    "GoodSteps": "agentx.data.curate.steps.GoodSteps",
    "Deduplicate": "agentx.data.curate.duplicates.Deduplicate",
    "Decontaminate": "agentx.data.curate.contamination.Decontaminate",
    "Schedule": "agentx.data.objectives.schedule.Schedule",
    "LibraryTasks": "agentx.env.tasks.library.LibraryTasks",
    "RecordingConfig": "agentx.env.tasks.recordings.RecordingConfig",
    "QuickstartConfig": "agentx.quickstart.QuickstartConfig",
    "LibraryCalls": "agentx.eval.calls.LibraryCalls",
    "SweepConfig": "agentx.sweep.SweepConfig",
}


class ConfigError(ValueError):
    """What is wrong in a run file or an override, in one sentence that opens with its place."""


def find_class(name: str, place: object) -> type:
    """The dataclass of that name in `REGISTRY`. `place` opens the sentence of the ConfigError."""
    if name not in REGISTRY:
        raise ConfigError(f"{place}: there is no configurable {name!r}{nearest(name, REGISTRY)}")
    module, _, attribute = REGISTRY[name].rpartition(".")
    cls: type = getattr(importlib.import_module(module), attribute)
    assert dataclasses.is_dataclass(cls), f"{name} is registered but is no dataclass"
    return cls


def name_of(cls: type) -> str:
    """The name that run files use for a dataclass of `REGISTRY`."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    names = [name for name, registered in REGISTRY.items() if registered == path]
    assert names, f"{path} is part of a config, but no run file may name it"
    return names[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the closest known one, or all of them."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {by_lower[close[0]]!r}?"
    return f"; choose from {', '.join(by_lower.values())}" if by_lower else ""
