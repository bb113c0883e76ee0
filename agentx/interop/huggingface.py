"""Hugging Face folders, out and in, by one table per family.

A family's table has a row for each of our parameters: its path, the tensor it is called there, and
how many of its axes are inputs of the product. Ours are [in, ..., out, ...] and stacked over
layers, theirs are nn.Linear's [out, in] and one tensor a layer. `export_huggingface` reads the
tables from left to right, `import_huggingface` from right to left; no name is written twice.

Legend: L layers, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from agentx.interop.tokenizer_json import write_tokenizer
from agentx.model.config import ModelConfig
from agentx.model.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, RopeScaling, YarnRope
from agentx.model.transformer import abstract_transformer
from agentx.tokenizer import Tokenizer

PathLike = str | os.PathLike[str]


class Row(NamedTuple):
    """One parameter here and there.

    ours: the path in the parameters, joined by dots. theirs: the tensor's name; "{layer}" in it
    means that ours is stacked over layers on its first axis. num_inputs: how many axes of ours
    (the layers not counted) the product sums over; 0 for what is the same array on both sides.
    """

    ours: str
    theirs: str
    num_inputs: int = 0


class Family(NamedTuple):
    """A family: what config.json calls it, its table, and the settings that we cannot vary."""

    architecture: str
    model_type: str
    rows: tuple[Row, ...]
    constants: dict[str, Any]


_LAYER = "model.layers.{layer}."
_LLAMA_ROWS = (
    Row("embed", "model.embed_tokens.weight"),
    Row("layers.attention_norm.scale", _LAYER + "input_layernorm.weight"),
    Row("layers.attention.w_q", _LAYER + "self_attn.q_proj.weight", 1),
    Row("layers.attention.w_k", _LAYER + "self_attn.k_proj.weight", 1),
    Row("layers.attention.w_v", _LAYER + "self_attn.v_proj.weight", 1),
    Row("layers.attention.w_o", _LAYER + "self_attn.o_proj.weight", 2),
    Row("layers.mlp_norm.scale", _LAYER + "post_attention_layernorm.weight"),
    Row("layers.mlp.w_gate", _LAYER + "mlp.gate_proj.weight", 1),
    Row("layers.mlp.w_up", _LAYER + "mlp.up_proj.weight", 1),
    Row("layers.mlp.w_down", _LAYER + "mlp.down_proj.weight", 1),
    Row("final_norm.scale", "model.norm.weight"),
    Row("lm_head", "lm_head.weight"),
)
_QWEN3_ROWS = (
    *_LLAMA_ROWS,
    Row("layers.attention.q_norm.scale", _LAYER + "self_attn.q_norm.weight"),
    Row("layers.attention.k_norm.scale", _LAYER + "self_attn.k_norm.weight"),
)
_PLAIN = {"hidden_act": "silu", "attention_bias": False}
LLAMA = Family("LlamaForCausalLM", "llama", _LLAMA_ROWS, {**_PLAIN, "mlp_bias": False})
QWEN3 = Family("Qwen3ForCausalLM", "qwen3", _QWEN3_ROWS, {**_PLAIN, "use_sliding_window": False})

# A setting of `ModelConfig`, and what config.json calls it.
_SETTINGS = (
    ("vocab_size", "vocab_size"),
    ("d_model", "hidden_size"),
    ("num_layers", "num_hidden_layers"),
    ("num_heads", "num_attention_heads"),
    ("num_kv_heads", "num_key_value_heads"),
    ("head_dim", "head_dim"),
    ("d_ff", "intermediate_size"),
    ("tie_embeddings", "tie_word_embeddings"),
    ("rope_theta", "rope_theta"),
    ("norm_eps", "rms_norm_eps"),
    ("max_length", "max_position_embeddings"),
)

# What config.json calls each kind of RoPE's scaling; and its numbers, ours and theirs. A number
# that config.json leaves out has our default. Dynamic scaling has its original length in
# max_position_embeddings.
_ROPES: dict[str, tuple[type[RopeScaling], dict[str, str]]] = {
    "linear": (LinearRope, {"factor": "factor"}),
    "dynamic": (DynamicRope, {"factor": "factor"}),
    "yarn": (
        YarnRope,
        {
            "factor": "factor",
            "original_length": "original_max_position_embeddings",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "attention_factor": "attention_factor",
            "mscale": "mscale",
            "mscale_all_dim": "mscale_all_dim",
            "truncate": "truncate",
        },
    ),
    "llama3": (
        Llama3Rope,
        {
            "factor": "factor",
            "original_length": "original_max_position_embeddings",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
        },
    ),
    "longrope": (
        LongRope,
        {
            "short_factor": "short_factor",
            "long_factor": "long_factor",
            "original_length": "original_max_position_embeddings",
            "factor": "factor",
            "attention_factor": "attention_factor",
        },
    ),
}


def export_huggingface(
    params: Any,
    config: ModelConfig,
    tokenizer: Tokenizer,
    directory: PathLike,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 2**30,
) -> Path:
    """Writes a folder that transformers, vLLM and SGLang load, and returns its path.

    params: the model's `nnx.State`, or any tree or mapping with the same paths, of jax or numpy
    arrays; they are fetched from the devices a tensor at a time. dtype: what is stored, "float32",
    "bfloat16" or "float16". Tensors beyond `max_shard_bytes` go to further files, with an index.
    The layout is Llama's, or Qwen3's where `config.qk_norm` is set. The folder is written under
    another name and renamed when whole. Raises ValueError where it exists and is not empty, where
    the tokenizer has more ids than the model, where config has a softcap, or where params do not
    fit config.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; choose float32, bfloat16 or float16")
    if config.logit_softcap is not None:
        raise ValueError(
            f"logit_softcap is {config.logit_softcap}, which Llama and Qwen3 lack: nobody else can "
            f"run this model"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}: "
            "this is not the tokenizer it was trained with"
        )
    target = Path(directory).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty; give another directory")
    arrays = flatten_params(params)
    _check_params(arrays, config)
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    for leftover in partial.iterdir():
        leftover.unlink()
    _write_tensors(arrays, config, partial, jnp.dtype(dtype), max_shard_bytes)
    special = tokenizer.special
    ids = {
        "bos_token_id": special["<|bos|>"],
        "eos_token_id": special["<|end|>"],
        "pad_token_id": special["<|pad|>"],
    }
    _write_json(partial / "config.json", {**_config_json(config), **ids, "dtype": dtype})
    _write_json(partial / "generation_config.json", {**ids, "do_sample": False})
    write_tokenizer(tokenizer, partial, config.max_length)
    if target.exists():
        target.rmdir()
    partial.rename(target)
    return target


def import_huggingface(directory: PathLike) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """The model config of a Hugging Face folder, and its parameters by our paths, stacked.

    Arrays keep the dtype they are stored in. Raises ValueError for an architecture or a setting
    that the model has not, a missing or surplus tensor, and a wrong shape. Only safetensors are
    read.
    """
    folder = Path(directory)
    config = _model_config(folder)
    files = _tensor_files(folder)
    arrays: dict[str, np.ndarray] = {}
    shapes = _shapes(config)
    for row in _rows(config):
        tensors = []
        for name in _their_names(row, config):
            if name not in files:
                raise ValueError(f"{folder} has no tensor {name}")
            with safe_open(files.pop(name), framework="numpy") as file:
                tensors.append(file.get_tensor(name))
            shape = shapes[row.ours][1:] if "{layer}" in row.theirs else shapes[row.ours]
            if tensors[-1].shape != _their_shape(shape, row):
                raise ValueError(
                    f"{folder}: {name} has shape {tensors[-1].shape}, and config.json means "
                    f"{_their_shape(shape, row)}"
                )
            tensors[-1] = tensors[-1].T.reshape(shape) if row.num_inputs else tensors[-1]
        arrays[row.ours] = np.stack(tensors) if "{layer}" in row.theirs else tensors[0]
    if files:
        raise ValueError(f"{folder} has a tensor that the model has not: {min(files)}")
    return config, arrays


def flatten_params(params: Any) -> dict[str, Any]:
    """A tree of parameters as a flat dict: {"layers.attention.w_q": array, ...}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return {
        name.removesuffix(".value"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)
    }


def _family(config: ModelConfig) -> Family:
    return QWEN3 if config.qk_norm else LLAMA


def _rows(config: ModelConfig) -> list[Row]:
    rows = _family(config).rows
    return [row for row in rows if row.ours != "lm_head" or not config.tie_embeddings]


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our shape of every parameter, by its path."""
    params = flatten_params(nnx.state(abstract_transformer(config)))
    return {name: leaf.shape for name, leaf in params.items()}


def _check_params(arrays: Mapping[str, Any], config: ModelConfig) -> None:
    shapes = _shapes(config)
    different = sorted(shapes.keys() ^ arrays.keys())
    if different:
        how = "is missing" if different[0] in shapes else "is not the model's"
        raise ValueError(f"these parameters are not of this config: {different[0]} {how}")
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}, and the config means {shape}")


def _their_names(row: Row, config: ModelConfig) -> list[str]:
    if "{layer}" not in row.theirs:
        return [row.theirs]
    return [row.theirs.format(layer=i) for i in range(config.num_layers)]


def _their_shape(shape: tuple[int, ...], row: Row) -> tuple[int, ...]:
    """Of a tensor there, from the shape of one layer's here."""
    if not row.num_inputs:
        return shape
    return math.prod(shape[row.num_inputs :]), math.prod(shape[: row.num_inputs])


def _write_tensors(
    arrays: Mapping[str, Any],
    config: ModelConfig,
    folder: Path,
    dtype: np.dtype,
    max_shard_bytes: int,
) -> None:
    """One safetensors file, or several and their index; one file's tensors are held at a time."""
    shards: list[list[tuple[str, Row, int]]] = [[]]
    room = max_shard_bytes
    total = 0
    for row in _rows(config):
        names = _their_names(row, config)
        size = arrays[row.ours].size // len(names) * dtype.itemsize
        total += size * len(names)
        for layer, name in enumerate(names):
            if size > room and shards[-1]:
                shards.append([])
                room = max_shard_bytes
            shards[-1].append((name, row, layer))
            room -= size
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for name, row, layer in shard:
            ours = arrays[row.ours]
            array = np.asarray(ours[layer] if "{layer}" in row.theirs else ours)
            if row.num_inputs:
                array = array.reshape(math.prod(array.shape[: row.num_inputs]), -1).T
            # safetensors writes memory as it lies, whatever the strides say.
            tensors[name] = np.ascontiguousarray(array.astype(dtype))
            index[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        about = {"metadata": {"total_size": total}, "weight_map": index}
        _write_json(folder / "model.safetensors.index.json", about)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Every tensor of a folder, and the file it lies in."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = _read_json(index)["weight_map"]
        return {name: folder / file for name, file in names.items()}
    single = folder / "model.safetensors"
    if single.exists():
        with safe_open(single, framework="numpy") as file:
            return dict.fromkeys(file.keys(), single)
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    if pickles:
        raise ValueError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which may run any code when it "
            "is opened; convert it to safetensors"
        )
    raise ValueError(f"{folder} has no model.safetensors and no index of several")


def _config_json(config: ModelConfig) -> dict[str, Any]:
    family = _family(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{theirs: getattr(config, ours) for ours, theirs in _SETTINGS},
        **_rope_json(config),
        **family.constants,
    }


def _rope_json(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    ((kind, names),) = [
        (kind, names) for kind, (cls, names) in _ROPES.items() if cls is type(scaling)
    ]
    numbers = {theirs: getattr(scaling, ours) for ours, theirs in names.items()}
    given = {name: number for name, number in numbers.items() if number is not None}
    about: dict[str, Any] = {"rope_scaling": {"rope_type": kind, **given}}
    if isinstance(scaling, DynamicRope):
        about["max_position_embeddings"] = scaling.original_length
    return about


def _rope_scaling(about: Mapping[str, Any], folder: Path) -> RopeScaling | None:
    """Of a config.json, in the form of transformers 5 (`rope_parameters`) or of those before."""
    given = dict(about.get("rope_parameters") or about.get("rope_scaling") or {})
    kind = given.pop("rope_type", None) or given.pop("type", "default")
    given = {name: value for name, value in given.items() if value is not None}
    given.pop("type", None)
    given.pop("rope_theta", None)
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{folder}: heads of which a part is rotated cannot be read")
    if kind == "default":
        return None
    if kind not in _ROPES:
        raise ValueError(
            f"{folder}: rope_type is {kind!r}; only {', '.join(_ROPES)} and default can be read"
        )
    cls, names = _ROPES[kind]
    length = about["max_position_embeddings"]
    if "original_length" in names:
        original = about.get("original_max_position_embeddings", length)
        given.setdefault("original_max_position_embeddings", original)
    surplus = sorted(given.keys() - set(names.values()))
    if surplus:
        raise ValueError(f"{folder}: {surplus[0]} is no number of rope_type {kind!r}")
    numbers = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    numbers = {name: tuple(x) if isinstance(x, list) else x for name, x in numbers.items()}
    if cls is DynamicRope:
        numbers["original_length"] = length
    required = (x.name for x in dataclasses.fields(cls) if x.default is dataclasses.MISSING)
    for name in required:
        if name not in numbers:
            raise ValueError(f"{folder}: rope_type {kind!r} lacks {names[name]}")
    return cls(**numbers)


def _model_config(folder: Path) -> ModelConfig:
    about = _read_json(folder / "config.json")
    family = next((f for f in (LLAMA, QWEN3) if f.model_type == about.get("model_type")), None)
    if family is None:
        raise ValueError(
            f"{folder} holds a {about.get('model_type')!r} model; llama and qwen3 can be read"
        )
    for name, value in family.constants.items():
        if about.get(name, value) != value:
            raise ValueError(f"{folder}: {name} is {about[name]!r}; only {value!r} can be read")
    rope = about.get("rope_parameters") or about.get("rope_scaling") or {}
    about = {**about, **{k: v for k, v in rope.items() if k == "rope_theta"}}
    about.setdefault("head_dim", about["hidden_size"] // about["num_attention_heads"])
    missing = [theirs for _, theirs in _SETTINGS if theirs not in about]
    if missing:
        raise ValueError(f"{folder / 'config.json'} lacks {missing[0]}")
    settings = {ours: about[theirs] for ours, theirs in _SETTINGS}
    scaling = _rope_scaling(about, folder)
    return ModelConfig(**settings, rope_scaling=scaling, qk_norm=family is QWEN3)


def _write_json(path: Path, about: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(about, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path.parent} is no Hugging Face folder: it has no {path.name}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
