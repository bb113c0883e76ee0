"""What several commands do with the folder of a run."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from agentx.cli.config import save_config
from agentx.cli.resolved import format_config
from agentx.model.config import ModelConfig
from agentx.model.saved import config_from_json
from agentx.model.transformer import abstract_transformer
from agentx.parameters import (
    LoadedAdapters,
    imported_dir,
    load_adapters,
    load_params,
    newest_saved,
)
from agentx.sharding import MeshConfig, make_mesh
from agentx.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Policy:
    """A trained model with its tokenizer. `params` lie on all devices, as `mesh` says.

    imported: the files of the model of others that it began as, None where it began as nothing.
    uses_tool_format: whether it was trained in our tool format; else those files say all of how to
    talk to it.
    """

    config: ModelConfig
    params: nnx.State
    tokenizer: Tokenizer
    mesh: Mesh
    imported: Path | None = None
    uses_tool_format: bool = True


def load_run(folder: Path) -> Policy:
    """The newest complete checkpoint of a run. Raises ValueError where there is none."""
    saved = newest_saved(folder)
    config = config_from_json(saved.extras["model"])
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    mesh = make_mesh(MeshConfig())
    params = load_params(saved, abstract_transformer(config), mesh, tokenizer)
    imported = imported_dir(folder)
    return Policy(
        config,
        params,
        tokenizer,
        mesh,
        imported if imported.is_dir() else None,
        saved.extras.get("tool_format", True),
    )


def load_run_adapters(folder: Path) -> tuple[LoadedAdapters, ModelConfig, str]:
    """The adapters of a run, its model, and the folder of the run whose parameters they adapt.

    Raises ValueError where the run has none.
    """
    saved = newest_saved(folder)
    config = config_from_json(saved.extras["model"])
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    model, mesh = abstract_transformer(config), make_mesh(MeshConfig())
    loaded = load_adapters(saved, model, mesh, tokenizer)
    return loaded, config, saved.extras["lora"]["base"]["run"]


def prepare_run(config: Any, folder: Path) -> str:
    """Saves the resolved config as `folder`/config.gin and returns its text.

    Raises ValueError where the folder holds the run of another config, naming the first difference.
    """
    text, file = format_config(config), folder / "config.gin"
    if not file.exists() and imported_dir(folder).is_dir():
        raise ValueError(
            f"{folder} is an imported model, which has no state of training: give another folder, "
            f"and begin there with TrainConfig.init_from = {str(folder)!r}"
        )
    if file.exists():
        before = file.read_text(encoding="utf-8").splitlines()
        changes = [c for c in difflib.ndiff(before, text.splitlines()) if c[:2] in ("- ", "+ ")]
        if changes:
            raise ValueError(
                f"{file} is of another config, which has {changes[0][2:]!r}: "
                "give another folder, or delete this one to start over"
            )
    save_config(config, file)
    return text
