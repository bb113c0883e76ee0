"""Hugging Face folders, out and in, by the tables of families.py.

A folder holds config.json, the weights as safetensors files (one, or several and their index), and
the tokenizer. What is read has to be whole: a tensor that is missing, left over or of another shape
is an error, and so is a setting that we lack. Pickles are never opened.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from agentx.interop.families import FAMILIES, Family, family_of
from agentx.interop.quantize import (
    Quantization,
    check_quantization,
    quantization_config,
    stored,
    stored_bytes,
)
from agentx.interop.tensors import Tensor, family_tensors, flatten_params, param_shapes
from agentx.interop.tokenizer_json import write_tokenizer
from agentx.model.config import ModelConfig
from agentx.tokenizer import Tokenizer

PathLike = str | os.PathLike[str]

# Beside the weights: how to turn a conversation into ids and back.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

# What some checkpoints hold besides the model: a table that follows from config.json, and the
# unembedding again where it is the embedding (Qwen3-0.6B).
_COMPUTED = "rotary_emb.inv_freq"
_TIED, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROWS_AT_ONCE = 4096
_FLOATS = ("F32", "BF16", "F16")


def export_huggingface(
    params: Any,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    directory: PathLike,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 2**30,
    like: PathLike | None = None,
    quantize: Quantization | None = None,
) -> Path:
    """Writes a folder that transformers, vLLM and SGLang load, and returns its path.

    params: the model's `nnx.State`, or any tree or mapping with the same paths, of jax or numpy
    arrays; they are fetched from the devices a tensor at a time. tokenizer: written with our chat
    template; with None the files of `like` are copied as they are. dtype: what is stored,
    "float32", "bfloat16" or "float16". Tensors beyond `max_shard_bytes` go to further files, with
    an index. like: a folder that the model was once read from: its family is kept, and what its
    config.json and generation_config.json say beside what we know. quantize: "int8" or "fp8" for
    the weights of linear layers (see quantize.py); dtype is then what the rest and the scales are
    in. The folder is written under another name and renamed when whole.

    Raises ValueError where it exists and is not empty, where the tokenizer has more ids than the
    model, where no family has models like config, or where params do not fit config.
    """
    assert tokenizer is not None or like is not None, "nothing says what the ids stand for"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; choose float32, bfloat16 or float16")
    family, about = family_of(config), {}
    if like is not None:
        about = _read_json(Path(like) / "config.json")
        named = _family_named(about, Path(like) / "config.json")
        family = family if named.differences(config) else named
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}: "
            "this is not the tokenizer it was trained with"
        )
    target = Path(directory).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty; give another directory")
    arrays = flatten_params(params)
    _check_params(arrays, config)
    tensors = list(family_tensors(family, config).values())
    about = family.write(config, about)
    if quantize is not None:
        check_quantization(quantize, tensors, config)
        about["quantization_config"] = quantization_config(tensors, quantize)
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    for leftover in partial.iterdir():
        leftover.unlink()
    _write_tensors(arrays, tensors, partial, jnp.dtype(dtype), max_shard_bytes, quantize)
    generation: dict[str, Any] = {"do_sample": False}
    if like is not None and (Path(like) / "generation_config.json").exists():
        generation = _read_json(Path(like) / "generation_config.json")
    if tokenizer is not None:
        special = tokenizer.special
        ids = {
            "bos_token_id": special["<|bos|>"],
            "eos_token_id": special["<|end|>"],
            "pad_token_id": special["<|pad|>"],
        }
        about, generation = {**about, **ids}, {**generation, **ids}
        write_tokenizer(tokenizer, partial, config.max_length)
    elif like is not None:
        said = {name: about[name] for name in _IDS if name in about and name not in generation}
        generation = {**generation, **said}
        for name in TOKENIZER_FILES:
            if (Path(like) / name).is_file():
                shutil.copyfile(Path(like) / name, partial / name)
    about.pop("torch_dtype", None)  # what transformers 4 called dtype
    _write_json(partial / "config.json", {**about, "dtype": dtype})
    _write_json(partial / "generation_config.json", generation)
    if target.exists():
        target.rmdir()
    partial.rename(target)
    return target


def import_huggingface(directory: PathLike) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """The model config of a Hugging Face folder, and its parameters by our paths, stacked.

    All of it is held in memory. Arrays keep the dtype they are stored in. Raises ValueError for an
    architecture or a setting that the model has not, a missing or surplus tensor, a wrong shape, or
    tensors of one parameter in several types. Only safetensors are read.
    """
    family, config = read_config(directory)
    shapes = param_shapes(config)
    arrays: dict[str, np.ndarray] = {}
    for tensor, array in read_tensors(directory, family, config):
        for piece in tensor.pieces:
            param = arrays.get(piece.param)
            if param is None:
                param = arrays[piece.param] = np.empty(shapes[piece.param], array.dtype)
            if param.dtype != array.dtype:
                raise ValueError(
                    f"{directory}: {tensor.name} is {array.dtype} and other layers {param.dtype}"
                )
            param[piece.at] = piece.of_theirs(array)
    return config, arrays


def read_config(directory: PathLike) -> tuple[Family, ModelConfig]:
    """The family and the config that a folder's config.json describes.

    Raises ValueError for an architecture or a setting that the model has not.
    """
    path = Path(directory) / "config.json"
    about = _read_json(path)
    if about.get("quantization_config"):
        raise ValueError(
            f"{path} is of a model with quantized weights, which cannot be read; give the one that "
            "it was made from"
        )
    family = _family_named(about, path)
    try:
        return family, family.read(about, path)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a value of another kind than {family.model_type}'s") from (
            error
        )


def read_tensors(
    directory: PathLike, family: Family, config: ModelConfig
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Every tensor of a folder and its array, one at a time.

    Raises ValueError as `tensor_files` does, before anything is read.
    """
    by_file: dict[Path, list[Tensor]] = {}
    for tensor, path in tensor_files(directory, family, config).values():
        by_file.setdefault(path, []).append(tensor)
    for path, within in by_file.items():
        with safe_open(path, framework="numpy") as file:
            for tensor in within:
                yield tensor, file.get_tensor(tensor.name)


def tensor_files(
    directory: PathLike, family: Family, config: ModelConfig
) -> dict[str, tuple[Tensor, Path]]:
    """Every tensor of a folder, by name, and the file that holds it; of files the headers are read.

    Raises ValueError where a tensor is missing, left over, of a wrong shape or of no float type.
    """
    folder = Path(directory)
    tensors, files = family_tensors(family, config), _tensor_files(folder)
    for name in tensors:
        if name not in files:
            raise ValueError(f"{folder} has no tensor {name}")
    surplus = [n for n in sorted(files.keys() - tensors.keys()) if not n.endswith(_COMPUTED)]
    if surplus == [_TIED] and config.tie_embeddings:
        _check_tied(files[_TIED], files[_EMBEDDING])
    elif surplus:
        raise ValueError(f"{folder} has a tensor that the model has not: {surplus[0]}")
    by_file: dict[Path, list[Tensor]] = {}
    for tensor in tensors.values():
        by_file.setdefault(files[tensor.name], []).append(tensor)
    for path, within in by_file.items():
        _check_shapes(path, within)
    return {name: (tensor, files[name]) for name, tensor in tensors.items()}


def _family_named(about: Mapping[str, Any], path: Path) -> Family:
    kind = about.get("model_type")
    for family in FAMILIES:
        if family.model_type == kind:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ValueError(f"{path} is of a {kind!r} model; only {known} can be read")


def _check_shapes(path: Path, tensors: list[Tensor]) -> None:
    with _opened(path) as file:
        inside = set(file.keys())
        for tensor in tensors:
            if tensor.name not in inside:
                raise ValueError(f"{path} has no tensor {tensor.name}, though the index says so")
            found = file.get_slice(tensor.name)
            if tuple(found.get_shape()) != tensor.shape:
                raise ValueError(
                    f"{path.parent}: {tensor.name} has shape {tuple(found.get_shape())}, and "
                    f"config.json means {tensor.shape}"
                )
            if found.get_dtype() not in _FLOATS:
                raise ValueError(
                    f"{path.parent}: {tensor.name} is {found.get_dtype()}; only "
                    f"{', '.join(_FLOATS)} are read: convert quantised weights to bfloat16 first"
                )


def _check_tied(one: Path, other: Path) -> None:
    """Raises ValueError where the unembedding is there, and is not the embedding."""
    with _opened(one) as first, _opened(other) as second:
        ours, theirs = first.get_slice(_TIED), second.get_slice(_EMBEDDING)
        size = ours.get_shape()[0]
        is_same = ours.get_shape() == theirs.get_shape()
        for first in range(0, size if is_same else 0, _ROWS_AT_ONCE):
            rows = slice(first, min(first + _ROWS_AT_ONCE, size))
            is_same = is_same and np.array_equal(ours[rows], theirs[rows])
    if not is_same:
        raise ValueError(
            f"{one.parent}: {_TIED} is not {_EMBEDDING}, and config.json says that they are tied"
        )


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, though the index names it") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None


def _check_params(arrays: Mapping[str, Any], config: ModelConfig) -> None:
    shapes = param_shapes(config)
    different = sorted(shapes.keys() ^ arrays.keys())
    if different:
        how = "is missing" if different[0] in shapes else "is not the model's"
        raise ValueError(f"these parameters are not of this config: {different[0]} {how}")
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}, and the config means {shape}")


def _write_tensors(
    arrays: Mapping[str, Any],
    tensors: list[Tensor],
    folder: Path,
    dtype: np.dtype,
    max_shard_bytes: int,
    quantize: Quantization | None,
) -> None:
    """One safetensors file, or several and their index; one file's tensors are held at a time."""
    shards: list[list[Tensor]] = [[]]
    room = max_shard_bytes
    total = 0
    for tensor in tensors:
        size = stored_bytes(tensor, dtype, quantize)
        total += size
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        joined: dict[str, np.ndarray] = {}
        for tensor in shard:
            joined |= stored(tensor, arrays, dtype, quantize)
        index |= dict.fromkeys(joined, file)
        save_file(joined, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        about = {"metadata": {"total_size": total}, "weight_map": index}
        _write_json(folder / "model.safetensors.index.json", about)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Every tensor of a folder, and the file it lies in."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{index} has no weight_map")
        return {name: folder / file for name, file in names.items()}
    single = folder / "model.safetensors"
    if single.exists():
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    if pickles:
        raise ValueError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which may run any code when it "
            "is opened; convert it to safetensors"
        )
    raise ValueError(f"{folder} has no model.safetensors and no index of several")


def _write_json(path: Path, about: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(about, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{path.parent} is no Hugging Face folder: it has no {path.name}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path} is no JSON object")
    return about
