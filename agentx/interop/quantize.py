"""Weights in eight bits, in the layout of compressed-tensors, which vLLM and SGLang read.

Every output channel of a linear layer has a scale: the largest of its weights is the largest number
of the type, and a weight is its number times the scale. Zero is zero. Activations stay as they are.

- int8: four inputs a word of 32 bits ("pack-quantized"), from the lowest byte on, each number plus
  128. Of the formats that hold int8, this is the one that vLLM reads where activations are not
  quantised. The tensor `weight` becomes `weight_packed`, with `weight_shape` and `weight_scale`.
- fp8: float8_e4m3fn ("naive-quantized"): `weight` in that type, and `weight_scale`.

Embeddings, norms, biases, lm_head and the routers of experts stay as they are. A router is small,
and which experts it chooses hangs on small differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from agentx.interop.tensors import Tensor
from agentx.model.config import ModelConfig

Quantization = Literal["int8", "fp8"]

_FORMATS = {"int8": ("pack-quantized", "int"), "fp8": ("naive-quantized", "float")}
# The largest number of each type. int8 leaves -128 out, so that it is as long both ways.
_LARGEST = {"int8": 127.0, "fp8": float(jnp.finfo(jnp.float8_e4m3fn).max)}
# int8: numbers in a word, and what is added to each.
_PACKED, _OFFSET = 4, 128


def check_quantization(
    quantize: Quantization, tensors: Iterable[Tensor], config: ModelConfig
) -> None:
    """Raises ValueError for a kind that is unknown, or that a server could not read back."""
    if quantize not in get_args(Quantization):
        raise ValueError(f"quantize is {quantize!r}; choose int8 or fp8")
    if config.moe is not None:
        if quantize == "fp8":
            raise ValueError(
                "vLLM reads experts in fp8 only where activations are in fp8 too; choose int8"
            )
        if any("moe.experts" in t.pieces[0].param and not is_linear(t) for t in tensors):
            raise ValueError(
                "the experts of this family lie in one tensor for all of them, which cannot be "
                "quantized; leave quantize out"
            )
    for tensor in tensors:
        if quantize == "int8" and is_linear(tensor) and tensor.shape[1] % _PACKED:
            raise ValueError(
                f"{tensor.name} has {tensor.shape[1]} inputs, and int8 needs a multiple of "
                f"{_PACKED}; choose fp8"
            )


def is_linear(tensor: Tensor) -> bool:
    """Whether a tensor is the weight of a linear layer that is quantized."""
    piece = tensor.pieces[0]
    return bool(piece.num_inputs) and not piece.param.endswith("moe.w_router")


def quantized(
    weight: np.ndarray, quantize: Quantization, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers, int8 or float8_e4m3fn [out, in], and their scales [out, 1] in dtype.

    weight: [out, in]. The numbers are the nearest to weight / scale with the scale that is stored,
    already rounded to dtype.
    """
    wide = weight.astype(np.float32)
    largest = _LARGEST[quantize]
    scale = (np.abs(wide).max(1, keepdims=True) / largest).astype(dtype)
    # A channel of zeros, or of numbers too small for dtype, would be divided by zero.
    scale = np.where(scale == 0, np.ones_like(scale), scale)
    # Beyond the largest by the rounding of the scale.
    number = np.clip(wide / scale.astype(np.float32), -largest, largest)
    if quantize == "fp8":
        return number.astype(jnp.float8_e4m3fn), scale
    return np.rint(number).astype(np.int8), scale


def dequantized(number: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The weight [out, in] that a server computes with, in the type of the scales."""
    return number.astype(scale.dtype) * scale


def pack(number: np.ndarray) -> np.ndarray:
    """int8 [out, in] as int32 [out, in / 4]."""
    plus = (number.astype(np.int16) + _OFFSET).astype(np.uint8)
    return np.ascontiguousarray(plus).view("<i4")


def stored(
    tensor: Tensor, arrays: Mapping[str, Any], dtype: np.dtype, quantize: Quantization | None
) -> dict[str, np.ndarray]:
    """The tensors that a file holds in a tensor's place, by name."""
    if quantize is None or not is_linear(tensor):
        return {tensor.name: tensor.joined(arrays, dtype)}
    number, scale = quantized(tensor.joined(arrays, np.dtype(np.float32)), quantize, dtype)
    if quantize == "fp8":
        return {tensor.name: number, tensor.name + "_scale": scale}
    return {
        tensor.name + "_packed": pack(number),
        tensor.name + "_scale": scale,
        tensor.name + "_shape": np.array(tensor.shape, np.int64),
    }


def stored_bytes(tensor: Tensor, dtype: np.dtype, quantize: Quantization | None) -> int:
    """The size of what `stored` returns."""
    size = math.prod(tensor.shape)
    if quantize is None or not is_linear(tensor):
        return size * dtype.itemsize
    shape = 2 * np.dtype(np.int64).itemsize if quantize == "int8" else 0
    return size + tensor.shape[0] * dtype.itemsize + shape


def quantization_config(tensors: Iterable[Tensor], quantize: Quantization) -> dict[str, Any]:
    """What config.json says of it, under quantization_config."""
    layout, kind = _FORMATS[quantize]
    weights = {
        "num_bits": 8,
        "type": kind,
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
    }
    routers = [t.name for t in tensors if t.pieces[0].num_inputs and not is_linear(t)]
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": layout,  # vLLM looks here for experts
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *(name.removesuffix(".weight") for name in routers)],
    }
