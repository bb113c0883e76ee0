"""A Hugging Face folder, or a GGUF file, as the folder of a run: what `agentx import` does.

    OUT/checkpoints/      the parameters, as step 0; no state of training
    OUT/tokenizer.model   their tokenizer, with our markers behind its vocabulary
    OUT/model.gin         the model, to be included in run files
    OUT/imported/         a folder's config, tokenizer and chat template, as they were

Parameters go block by block from their files into the checkpoint. All of it is made in OUT.partial,
and the rename comes last.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from agentx.checkpoint import CheckpointStore
from agentx.cli.resolved import format_config
from agentx.interop.blocks import (
    Part,
    chunk_shape,
    param_blocks,
    parts_of_folder,
    parts_of_gguf,
)
from agentx.interop.gguf import open_gguf
from agentx.interop.huggingface import TOKENIZER_FILES, read_config, tensor_files
from agentx.interop.tensors import flatten_params, param_shapes
from agentx.metrics import Progress
from agentx.model.config import ModelConfig
from agentx.model.saved import config_to_json
from agentx.model.transformer import abstract_transformer
from agentx.parameters import checkpoint_dir, imported_dir
from agentx.streamed import STREAMED, StreamedArray
from agentx.tokenizer import Tokenizer

# An embedding that grows has a multiple of so many rows, so that devices can share it.
_ROWS = 128
# A save that takes longer hangs.
_TIMEOUT_S = 24 * 3600.0
_KEPT = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def import_run(
    source: Path, out: Path, dtype: str, tokenizer_path: Path | None = None
) -> list[str]:
    """Makes `out` a run's folder with the model in `source`; returns lines that say what it is.

    dtype: what the parameters are kept in. tokenizer_path: of a GGUF file's tokenizer.json or
    tokenizer.model, or the folder that has it; None for a folder's own. Raises ValueError where
    `source` cannot be read, `out` is not empty, or the disk is too small.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype}: choose float32 or bfloat16")
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; give another folder")
    is_gguf = source.suffix == ".gguf"
    if is_gguf:
        kind, theirs, parts, tokenizer = _open_gguf(source, tokenizer_path)
    else:
        if tokenizer_path is not None:
            raise ValueError(f"--tokenizer is for GGUF files; {source} has its own")
        family, theirs = read_config(source)
        kind, parts = family.architecture, parts_of_folder(tensor_files(source, family, theirs))
        tokenizer = load_tokenizer(source)
    said, rows = _vocabulary(tokenizer, theirs, source)
    config = dataclasses.replace(theirs, vocab_size=rows, param_dtype=dtype)
    num_bytes = sum(map(math.prod, param_shapes(config).values())) * jnp.dtype(dtype).itemsize
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        free = shutil.disk_usage(partial).free
        if free < num_bytes:
            raise ValueError(
                f"{out.parent} has {free / 1e9:.1f} GB free, and the parameters may take "
                f"{num_bytes / 1e9:.1f} GB: make room, or give another folder"
            )
        tokenizer.save(partial / "tokenizer.model")
        _write_model(config, source, partial / "model.gin")
        if not is_gguf:
            imported_dir(partial).mkdir()
            for name in _KEPT:
                if (source / name).is_file():
                    shutil.copyfile(source / name, imported_dir(partial) / name)
        _stream(parts, theirs, config, tokenizer, partial, num_bytes)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return [f"{kind}, {num_bytes / 1e6:,.0f} MB of {dtype}", said]


def _open_gguf(
    source: Path, tokenizer_path: Path | None
) -> tuple[str, ModelConfig, dict[str, list[Part]], Tokenizer]:
    if tokenizer_path is None:
        raise ValueError(
            f"{source} says too little of its tokenizer: give the tokenizer.json of the model's "
            "Hugging Face folder, or that folder, as --tokenizer"
        )
    if not tokenizer_path.exists():
        raise ValueError(f"--tokenizer {tokenizer_path}: there is no such file")
    is_folder = tokenizer_path.is_dir()
    tokenizer = (load_tokenizer if is_folder else Tokenizer.load)(tokenizer_path)
    file = open_gguf(source)
    return f"{file.architecture}, of GGUF", file.config, parts_of_gguf(file), tokenizer


def load_tokenizer(source: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. Raises ValueError where it has none that is read."""
    if not any((source / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        if (source / "tekken.json").exists():
            raise ValueError(
                f"{source} has its tokenizer as tekken.json alone, which is not read: put the "
                "tokenizer.json of a conversion to transformers beside it"
            )
        raise ValueError(f"{source} has no tokenizer.json and no tokenizer.model")
    return Tokenizer.load(source)


def _vocabulary(tokenizer: Tokenizer, config: ModelConfig, source: Path) -> tuple[str, int]:
    """What to say of our markers, and how many rows the embedding has to have."""
    size, rows, added = tokenizer.vocab_size, config.vocab_size, tokenizer.num_added
    texts = [i for i, p in enumerate(tokenizer.pieces) if p.kind in ("text", "byte")]
    if max(texts) >= rows:
        raise ValueError(
            f"{source}: the tokenizer has ids up to {max(texts):,} and the embedding {rows:,} "
            "rows: this is not the tokenizer of this model"
        )
    if size > rows:
        grown = -(-size // _ROWS) * _ROWS
        return (
            f"The embedding grows from {rows:,} to {grown:,} rows: it had none for "
            f"{size - rows} of {size:,} ids, our {added} markers among them; new rows lie at the "
            "mean of the others"
        ), grown
    if added:
        return (
            f"Our {added} markers have the ids {size - added:,} to {size - 1:,}, which no token "
            f"had: the embedding has {rows:,} rows"
        ), rows
    return f"The tokenizer has all our markers; the embedding has {rows:,} rows", rows


def _write_model(config: ModelConfig, source: Path, file: Path) -> None:
    settings = [line for line in format_config(config).splitlines() if line[:1] != "#"]
    about = f"# The model of {source.name}, as it was imported. Include it in a run file.\n"
    file.write_text(about + "\n".join(settings) + "\n", encoding="utf-8")


def _stream(
    parts: dict[str, list[Part]],
    theirs: ModelConfig,
    config: ModelConfig,
    tokenizer: Tokenizer,
    folder: Path,
    num_bytes: int,
) -> None:
    """Saves the parameters as the checkpoint of step 0."""
    # Orbax logs an error with a traceback and raises it all the same.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    stop = threading.Event()
    shapes, dtype = param_shapes(config), jnp.dtype(config.param_dtype)
    with Progress("import, MB", math.ceil(num_bytes / 1e6), interval=2.0) as progress:
        on_bytes = _counter(progress, stop)
        leaves: list[Any] = []
        abstract = nnx.state(abstract_transformer(config))
        for name in flatten_params(abstract):
            shape, own = shapes[name], parts[name]
            more = shape[0] - theirs.vocab_size if name in ("embed", "lm_head") else 0
            blocks = functools.partial(param_blocks, own, dtype, more, on_bytes)
            chunks = chunk_shape(own[0].piece, dtype)
            leaves.append(StreamedArray(shape, np.dtype(dtype), chunks, blocks))
        state = {"params": jax.tree.unflatten(jax.tree.structure(abstract), leaves)}
        extras = {
            "model": config_to_json(config),
            "tokenizer": tokenizer.fingerprint,
            "source": {},
            "seed": 0,
            "tokens": 0,
            "seconds": 0.0,
            "tool_format": False,
        }
        store = CheckpointStore(checkpoint_dir(folder), timeout_s=_TIMEOUT_S, types=STREAMED)
        with store:
            try:
                store.save(0, state, extras)
                store.wait()
            except BaseException:
                stop.set()  # or closing the store waits until everything is written
                raise


def _counter(progress: Progress, stop: threading.Event) -> Callable[[int], None]:
    """Shows the bytes it is told of; ends the thread that tells it once `stop` is set."""
    done = shown = 0

    def count(num_bytes: int) -> None:
        nonlocal done, shown
        if stop.is_set():
            raise InterruptedError("the import was stopped")
        done += num_bytes
        if math.ceil(done / 1e6) > shown:
            shown = math.ceil(done / 1e6)
            progress.update(shown)

    return count
