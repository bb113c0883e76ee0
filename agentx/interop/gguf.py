"""GGUF files, which llama.cpp runs, read as parameters of ours. Needs the `gguf` package.

Weights of every type are taken to f32, tensor by tensor. What a file of llama.cpp's converter has
otherwise than Hugging Face's folders is undone: q and k of llama, whose pairs of the rotation are
neighbours there, and gemma's norms, to which 1 is added.

A file says less than a config.json. llama.cpp knows the rest by the name of the architecture, and
so does this: for gemma3 the period of the layers with a window and their rotation, and how the dot
products are scaled.

The tokenizer within a file (tokenizer.ggml) is not read: it says too little of how text is cut.
Take tokenizer.json of the model's Hugging Face folder.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agentx.interop.families import Family, Row
from agentx.interop.tensors import Tensor, family_tensors, param_shapes
from agentx.model.config import ModelConfig
from agentx.model.rope import (
    LinearRope,
    Llama3Rope,
    LongRope,
    RopeScaling,
    YarnRope,
    unscaled,
)

PathLike = str | os.PathLike[str]

_BLOCK = "blk.{layer}."
_ENDS = (
    Row("embed", "token_embd.weight"),
    Row("final_norm.scale", "output_norm.weight"),
    Row("lm_head", "output.weight"),
)
_LAYERS = (
    Row("layers.attention_norm.scale", _BLOCK + "attn_norm.weight"),
    Row("layers.attention.w_q", _BLOCK + "attn_q.weight", 1),
    Row("layers.attention.w_k", _BLOCK + "attn_k.weight", 1),
    Row("layers.attention.w_v", _BLOCK + "attn_v.weight", 1),
    Row("layers.attention.w_o", _BLOCK + "attn_output.weight", 2),
    Row("layers.mlp_norm.scale", _BLOCK + "ffn_norm.weight"),
    Row("layers.mlp.w_gate", _BLOCK + "ffn_gate.weight", 1),
    Row("layers.mlp.w_up", _BLOCK + "ffn_up.weight", 1),
    Row("layers.mlp.w_down", _BLOCK + "ffn_down.weight", 1),
)
_QKV_BIASES = (
    Row("layers.attention.b_q", _BLOCK + "attn_q.bias", 0),
    Row("layers.attention.b_k", _BLOCK + "attn_k.bias", 0),
    Row("layers.attention.b_v", _BLOCK + "attn_v.bias", 0),
)
_OUTPUT_BIAS = Row("layers.attention.b_o", _BLOCK + "attn_output.bias", 0)
_MLP_BIASES = (
    Row("layers.mlp.b_gate", _BLOCK + "ffn_gate.bias", 0),
    Row("layers.mlp.b_up", _BLOCK + "ffn_up.bias", 0),
    Row("layers.mlp.b_down", _BLOCK + "ffn_down.bias", 0),
)
_QK_NORMS = (
    Row("layers.attention.q_norm.scale", _BLOCK + "attn_q_norm.weight", 0),
    Row("layers.attention.k_norm.scale", _BLOCK + "attn_k_norm.weight", 0),
)
_POST_NORMS = (
    Row("layers.attention_post_norm.scale", _BLOCK + "post_attention_norm.weight"),
    Row("layers.mlp_post_norm.scale", _BLOCK + "post_ffw_norm.weight"),
)
_FAMILIES = {
    "llama": (*_ENDS, *_LAYERS, *_QKV_BIASES, _OUTPUT_BIAS, *_MLP_BIASES),
    "qwen2": (*_ENDS, *_LAYERS, *_QKV_BIASES),
    "qwen3": (*_ENDS, *_LAYERS, *_QK_NORMS),
    "gemma3": (*_ENDS, *_LAYERS, *_QK_NORMS, *_POST_NORMS),
}
# The divisors of the rotation's frequencies that Llama 3.1 and later have for a tensor.
_ROPE_FREQS = "rope_freqs.weight"
# What llama.cpp knows of gemma3 by its name: every sixth layer has no window, and which of its
# models divides the dot products by another size than the head's, by its number of layers.
_GEMMA_PERIOD, _GEMMA_27B_LAYERS = 6, 62
# The length that Llama 3 had before it was made longer.
_LLAMA_3_LENGTH = 8192

# Settings that change what a model computes, and that ours has not.
_NOT_OURS = (
    "attention.clamp_kqv",
    "attention.scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "logit_scale",
    "nextn_predict_layers",
    "residual_scale",
    "use_parallel_residual",
)
# What is known below rope.scaling.
_SCALING = {
    "type",
    "factor",
    "original_context_length",
    "finetuned",
    "yarn_beta_fast",
    "yarn_beta_slow",
}


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A file that is open: `config`, and `read` for its tensors.

    about: the metadata of the architecture, without its name in front. stored: the tensors by name,
    as the gguf package has them: their data lies in the file until it is read.
    """

    path: Path
    architecture: str
    about: Mapping[str, Any]
    stored: Mapping[str, Any]

    @functools.cached_property
    def config(self) -> ModelConfig:
        """Raises ValueError for a setting that is missing or that the model has not."""
        return _config(self)

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name, before any is read.

        Raises ValueError where one is missing, left over or of a wrong shape.
        """
        rows = _FAMILIES[self.architecture]
        family = Family(self.architecture, self.architecture, (), rows)
        tensors = family_tensors(family, self.config)
        for name, tensor in tensors.items():
            if name not in self.stored:
                raise ValueError(f"{self.path} has no tensor {name}")
            if self.shape(name) != tensor.shape:
                raise ValueError(
                    f"{self.path}: {name} has shape {self.shape(name)}, and its metadata means "
                    f"{tensor.shape}"
                )
        surplus = self.stored.keys() - tensors.keys()
        if self.architecture == "llama":
            surplus -= {_ROPE_FREQS}
        if surplus:
            raise ValueError(f"{self.path} has a tensor that the model has not: {min(surplus)}")
        return tensors

    def as_huggingface(self, name: str) -> np.ndarray:
        """A tensor in f32, as a Hugging Face folder has it: of its pieces `of_theirs` takes ours.

        Raises ValueError for a type that is unknown.
        """
        return _as_huggingface(self, name)

    def read(self) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Every tensor and its array, one at a time, as `huggingface.read_tensors`."""
        for name, tensor in self.tensors().items():
            yield tensor, self.as_huggingface(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """In the order of numpy, which is the reverse of the file's."""
        return tuple(int(size) for size in reversed(self.stored[name].shape))

    def array(self, name: str) -> np.ndarray:
        """As it is in the file, dequantized, in f32."""
        from gguf.quants import dequantize

        tensor = self.stored[name]
        try:
            return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: {name} is of type {tensor.tensor_type.name}, which the gguf package "
                "cannot dequantize; give a file of another type"
            ) from None

    def required(self, key: str) -> Any:
        """A setting. Raises ValueError where it is missing."""
        if key not in self.about:
            raise ValueError(f"{self.path} lacks {self.architecture}.{key}")
        return self.about[key]


def read_gguf(path: PathLike) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """The model config of a GGUF file, and its parameters by our paths, stacked, in f32.

    All of it is held in memory; `open_gguf` gives it tensor by tensor. Raises ValueError as
    `open_gguf` and `GGUFFile` do.
    """
    file = open_gguf(path)
    shapes = param_shapes(file.config)
    arrays: dict[str, np.ndarray] = {}
    for tensor, array in file.read():
        for piece in tensor.pieces:
            if piece.param not in arrays:
                arrays[piece.param] = np.empty(shapes[piece.param], np.float32)
            arrays[piece.param][piece.at] = piece.of_theirs(array)
    return file.config, arrays


def open_gguf(path: PathLike) -> GGUFFile:
    """Reads what a file says of itself; the tensors are mapped, not read.

    Raises ValueError for what is no GGUF file, a damaged one or a part of one, for an architecture
    that is unknown, and without the gguf package.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(
            f"{path} is read by the gguf package, which is missing; install agentx[gguf]"
        ) from None
    path = Path(path)
    with path.open("rb") as opened:
        magic = opened.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it begins with {magic!r}")
    try:
        reader = GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.")  # long lists, which nothing here reads
        }
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # What the reader raises for bytes that are missing or mean nothing.
        raise ValueError(f"{path} is cut short or damaged ({error}); fetch it again") from None
    architecture = fields.get("general.architecture")
    if architecture not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise ValueError(f"{path} is of a {architecture!r} model; only {known} can be read")
    num_parts = fields.get("split.count", 1)
    if num_parts > 1:
        raise ValueError(
            f"{path} is one of {num_parts} parts; join them with llama-gguf-split --merge"
        )
    prefix = f"{architecture}."
    about = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
    return GGUFFile(path, architecture, about, {tensor.name: tensor for tensor in reader.tensors})


def _config(file: GGUFFile) -> ModelConfig:
    about, kind = file.about, file.architecture
    for name in _NOT_OURS:
        if about.get(name):
            raise ValueError(f"{file.path} has {kind}.{name}, which cannot be read")
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in file.stored:
            raise ValueError(f"{file.path} has no tensor {name}")
    num_heads = file.required("attention.head_count")
    num_kv_heads = about.get("attention.head_count_kv", num_heads)
    sizes = {
        "d_model": file.required("embedding_length"),
        "num_layers": file.required("block_count"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "d_ff": file.required("feed_forward_length"),
        "max_length": file.required("context_length"),
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                f"{file.path}: {name} is {size}; only one number for all layers, 1 or more, can be "
                "read"
            )
    head_dim = about.get("attention.key_length", sizes["d_model"] // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if about.get(name, head_dim) != head_dim:
            raise ValueError(f"{file.path}: {name} is {about[name]}, and a head has {head_dim}")
    settings: dict[str, Any] = {
        **sizes,
        "vocab_size": file.shape("token_embd.weight")[0],
        "head_dim": head_dim,
        "tie_embeddings": "output.weight" not in file.stored,
        "qk_norm": "head" if kind in ("qwen3", "gemma3") else "none",
        "qkv_bias": kind in ("llama", "qwen2") and "blk.0.attn_q.bias" in file.stored,
        "output_bias": kind == "llama" and "blk.0.attn_output.bias" in file.stored,
        "mlp_bias": kind == "llama" and "blk.0.ffn_gate.bias" in file.stored,
        "norm_eps": _short(file.required("attention.layer_norm_rms_epsilon")),
        "rope_theta": _theta(file),
        "rope_scaling": _rope_scaling(file, head_dim),
    }
    if kind == "llama":  # Mistral is one too
        settings["window_pattern"] = (about.get("attention.sliding_window"),)
    if kind == "gemma3":
        settings |= _gemma3(file, num_heads)
    return ModelConfig(**settings)


def _gemma3(file: GGUFFile, num_heads: int) -> dict[str, Any]:
    about = file.about
    window = file.required("attention.sliding_window")
    period = about.get("attention.sliding_window_pattern", _GEMMA_PERIOD)
    is_local = period if isinstance(period, list) else [True] * (period - 1) + [False]
    settings: dict[str, Any] = {
        "window_pattern": tuple(window if local else None for local in is_local),
        "rope_pattern": tuple("local" if local else "global" for local in is_local),
        "local_rope_theta": _short(about.get("rope.freq_base_swa", 1e4)),
        "logit_softcap": about.get("final_logit_softcapping") or None,
        "norms": "both",
        "norm_plus_one": True,
        "scale_embeddings": True,
        "activation": "gelu_tanh",
    }
    if about["block_count"] == _GEMMA_27B_LAYERS:
        settings["attention_scale"] = (about["embedding_length"] / num_heads) ** -0.5
    return settings


def _theta(file: GGUFFile) -> float:
    return _short(file.about.get("rope.freq_base", 1e6 if file.architecture == "gemma3" else 1e4))


def _rope_scaling(file: GGUFFile, head_dim: int) -> RopeScaling | None:
    given = {
        key.removeprefix("rope.scaling."): value
        for key, value in file.about.items()
        if key.startswith("rope.scaling.")
    }
    surplus = sorted(given.keys() - _SCALING)
    if surplus:
        raise ValueError(f"{file.path} has rope.scaling.{surplus[0]}, which cannot be read")
    kind = given.get("type", "none")
    if file.architecture == "llama" and _ROPE_FREQS in file.stored:
        if kind != "none":
            raise ValueError(f"{file.path} has {_ROPE_FREQS} and rope.scaling.type {kind!r} too")
        return _divided(file, head_dim)
    if kind == "none":
        return None
    if kind == "linear":
        return LinearRope(_short(file.required("rope.scaling.factor")))
    if kind == "yarn":
        return YarnRope(
            _short(file.required("rope.scaling.factor")),
            given.get("original_context_length", file.required("context_length")),
            _short(given.get("yarn_beta_fast", 32.0)),
            _short(given.get("yarn_beta_slow", 1.0)),
        )
    raise ValueError(f"{file.path}: rope.scaling.type is {kind!r}, which cannot be read")


def _divided(file: GGUFFile, head_dim: int) -> RopeScaling:
    """The scaling whose frequencies a file holds as divisors, without the numbers they are from.

    That of Llama 3.1 and after where it gives the same, and the divisors themselves otherwise.
    """
    divisors = file.array(_ROPE_FREQS)
    if divisors.shape != (head_dim // 2,):
        raise ValueError(
            f"{file.path}: {_ROPE_FREQS} has shape {divisors.shape}, and a head has "
            f"{head_dim // 2} pairs"
        )
    theta, length = _theta(file), file.required("context_length")
    llama = Llama3Rope(max(1.0, _short(divisors.max())), _LLAMA_3_LENGTH)
    meant = unscaled(theta, head_dim) / llama.frequencies(theta, head_dim, length)[0]
    if np.allclose(meant, divisors, rtol=1e-5):
        return llama
    own = tuple(_short(divisor) for divisor in divisors)
    return LongRope(own, own, length, attention_factor=1.0)


def _as_huggingface(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor's array as transformers would have it."""
    array, part = file.array(name), name.split(".")[-2]
    if file.architecture == "gemma3" and part.endswith("norm"):
        return array - 1
    if file.architecture == "llama" and part in ("attn_q", "attn_k"):
        # Of every head, [pair, 2] to [2, pair].
        pairs = file.config.head_dim // 2
        return array.reshape(-1, pairs, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array


def _short(number: Any) -> float:
    """The shortest decimal of an f32: 1e-6 for what the file has as 9.99999997e-07."""
    return float(str(np.float32(number)))
