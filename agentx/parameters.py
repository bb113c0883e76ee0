"""The parameters that runs leave: found, checked, and whole again where a run trained adapters.

A run of adapters (`TrainConfig.lora`) saves these alone. Its extras say under "lora" what they are
and whose parameters they were trained on: the run, the step, and a fingerprint of that checkpoint.
Whoever reads such a run without asking for adapters gets a plain model's parameters, the adapters
added to the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from agentx.checkpoint import Saved, checkpoint_at, fingerprint, newest_checkpoint, restore_params
from agentx.model.lora import LoraConfig, adapted, merged_params, split_trained
from agentx.model.saved import config_from_json
from agentx.model.transformer import Transformer, abstract_transformer
from agentx.sharding import tree_shardings
from agentx.tokenizer import Tokenizer


def checkpoint_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def newest_saved(run_dir: Path) -> Saved:
    """A run's newest complete checkpoint; its extras have "model" and "tokenizer".

    Raises ValueError where there is none.
    """
    if not checkpoint_dir(run_dir).is_dir():
        raise ValueError(f"{run_dir} is no run: it has no checkpoints folder")
    return newest_checkpoint(checkpoint_dir(run_dir))


def imported_dir(run_dir: Path) -> Path:
    """Where a run has the files of the model of others that it began as, if it did."""
    return run_dir / "imported"


def load_params(saved: Saved, model: Transformer, mesh: Mesh, tokenizer: Tokenizer) -> nnx.State:
    """The parameters of a run's checkpoint, sharded for `mesh`; adapters are merged into them.

    Raises ValueError where it was trained with another tokenizer, is of another model, or is of
    adapters whose base has changed or gone.
    """
    if saved.extras["tokenizer"] != tokenizer.fingerprint:
        run_dir = saved.folder.parent.parent
        raise ValueError(
            f"{run_dir} was trained with another tokenizer: use {run_dir / 'tokenizer.model'}"
        )
    if "lora" not in saved.extras:
        return restore_params(saved, _abstract(nnx.state(model), mesh))
    parts = load_adapters(saved, model, mesh, tokenizer)
    graphdef = split_trained(adapted(model, parts.lora))[0]
    merge = jax.jit(
        lambda adapters, frozen: merged_params(nnx.merge(graphdef, adapters, frozen)),
        out_shardings=tree_shardings(nnx.state(model), mesh),
        donate_argnums=1,  # most of it goes out as it came
    )
    return merge(parts.adapters, parts.frozen)


class LoadedAdapters(NamedTuple):
    """What a run of adapters trained, and what on: states as `lora.split_trained` has them."""

    lora: LoraConfig
    adapters: nnx.State
    frozen: nnx.State


def load_adapters(
    saved: Saved, model: Transformer, mesh: Mesh, tokenizer: Tokenizer
) -> LoadedAdapters:
    """The adapters of a run's checkpoint and the parameters they belong to, sharded for `mesh`.

    model: without adapters. Raises ValueError as `load_params`, and where the run has no adapters.
    """
    run_dir = saved.folder.parent.parent
    if "lora" not in saved.extras:
        raise ValueError(f"{run_dir} trained all parameters, so it has no adapters")
    about = saved.extras["lora"]
    lora = LoraConfig(about["rank"], about["alpha"], tuple(about["targets"]))
    frozen = load_frozen(base_of(saved.extras, run_dir), model, lora, mesh, tokenizer)
    abstract = _abstract(split_trained(adapted(model, lora))[1], mesh)
    return LoadedAdapters(lora, restore_params(saved, abstract), frozen)


def load_frozen(
    base: Saved, model: Transformer, lora: LoraConfig, mesh: Mesh, tokenizer: Tokenizer
) -> nnx.State:
    """The parameters of a checkpoint as what stays of `adapted(model, lora)`.

    They are rounded to the model's `param_dtype`, if the checkpoint has another.
    """
    saved_type = config_from_json(base.extras["model"]).param_dtype
    config = dataclasses.replace(model.config, param_dtype=saved_type)
    params = load_params(base, abstract_transformer(config), mesh, tokenizer)
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, nnx.state(model))
    return split_trained(adapted(nnx.merge(nnx.graphdef(model), params), lora))[2]


def describe_adapters(lora: LoraConfig, base: Saved) -> dict[str, Any]:
    """What a run's extras hold under "lora"."""
    run_dir = str(base.folder.parent.parent)
    whose = {"run": run_dir, "step": base.step, "fingerprint": fingerprint(base)}
    return {**dataclasses.asdict(lora), "base": whose}


def base_of(extras: Mapping[str, Any], run_dir: Path) -> Saved:
    """The checkpoint whose parameters a run's adapters were trained on.

    Raises ValueError where it is gone, damaged, or not the one that it was.
    """
    about = extras["lora"]["base"]
    try:
        base = checkpoint_at(checkpoint_dir(Path(about["run"])), about["step"])
    except ValueError as error:
        raise ValueError(f"{run_dir} has adapters for step {about['step']}, but {error}") from None
    if fingerprint(base) != about["fingerprint"]:
        raise ValueError(
            f"{run_dir} has adapters for other parameters than {base.folder} now holds: "
            "put back that run as it was, or train again"
        )
    return base


def _abstract(params: nnx.State, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        params,
        tree_shardings(params, mesh),
    )
