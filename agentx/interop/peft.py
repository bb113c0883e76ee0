"""A run's adapters as a folder that peft loads, and vLLM and SGLang beside a base model.

It holds adapter_config.json and adapter_model.safetensors. Which module of theirs an adapter of
ours belongs to, the tables of families.py say; nn.Linear's order is [out, in], so A is [R, in] and
B [out, R].

Of a model with experts peft (0.21, over transformers 5) is told the targets in two ways. The names
of an expert's modules in target_modules are to it those of all experts, which transformers joins
into two parameters a layer when it loads a checkpoint, and peft their adapters likewise. So modules
of other feed-forwards, which have the same names, are targeted by their weights' longer names in
target_parameters; so are routers, which are no nn.Linear. The file has the checkpoint's names
throughout, but for experts that are joined in the checkpoint itself.
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from agentx.interop.families import family_of
from agentx.interop.huggingface import PathLike
from agentx.interop.tensors import Piece, family_tensors, flatten_params, param_shapes
from agentx.model.config import ModelConfig
from agentx.model.lora import LoraConfig


def export_peft(
    adapters: Any, config: ModelConfig, lora: LoraConfig, directory: PathLike, *, base: str
) -> Path:
    """Writes a PEFT adapter and returns its folder's path.

    adapters: the state that `lora.split_trained` has of them, or any tree with the same paths.
    base: what adapter_config.json says the base model is, a name or a path; who loads the adapter
    by hand may give another.

    Where some weights of experts have adapters, those that have none are given zeros: peft fails on
    gate or up alone, and passes over both, with a warning at most, where down has none.

    Raises ValueError where the folder exists and is not empty, where no family has models like
    config, or for an adapter that peft cannot load: of a router with a correction bias, or of a
    single expert in a parameter of all experts.
    """
    target = Path(directory).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty; give another directory")
    arrays = {name: np.asarray(array) for name, array in flatten_params(adapters).items()}
    _fill_experts(arrays, config, lora.rank)
    modules: set[str] = set()
    parameters: set[str] = set()
    ranks: dict[str, int] = {}
    tensors: dict[str, np.ndarray] = {}
    theirs = family_tensors(family_of(config), config)
    for tensor in theirs.values():
        piece = tensor.pieces[0]
        if f"{piece.param}.a" not in arrays:
            continue
        module = tensor.name.removesuffix(".weight")
        reason = _unloadable(module, piece, theirs)
        if reason:
            raise ValueError(f"{reason}; export the whole model, with the adapters merged")
        pairs = [
            (arrays[f"{p.param}.a"][p.at], arrays[f"{p.param}.b"][p.at]) for p in tensor.pieces
        ]
        if piece.num_inputs is None:
            a, b = _joined(pairs)
            module, _, parameter = module.rpartition(".")
            parameters.add(f"experts.{parameter}")
            if len(pairs) > 1:
                # Each parameter wraps the module once more, the last one outermost.
                module = f"{module}.base_layer"
                ranks[parameter] = len(pairs) * lora.rank
        else:
            ((a, b),) = pairs
            a, b = a.reshape(-1, lora.rank).T, b.reshape(lora.rank, -1).T
            path = tensor.name.split(".")
            if config.moe is None or any(s in piece.param for s in (".attention.", ".experts.")):
                modules.add(path[-2])
            else:
                # What a router lies in has another name in transformers' Mixtral than in the file.
                parameters.add(".".join(path[-2 if piece.param.endswith("w_router") else -3 :]))
        # safetensors writes memory as it lies, whatever the strides say.
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    if parameters:
        about["target_parameters"] = sorted(parameters)
    if ranks:
        about["rank_pattern"] = ranks
        about["alpha_pattern"] = {x: rank * lora.alpha / lora.rank for x, rank in ranks.items()}
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    for leftover in partial.iterdir():
        leftover.unlink()
    save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    (partial / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")
    if target.exists():
        target.rmdir()
    partial.rename(target)
    return target


def _unloadable(module: str, piece: Piece, theirs: Container[str]) -> str | None:
    """Why peft cannot load an adapter of a module, None where it can. theirs: names of tensors."""
    if f"{module}.e_score_correction_bias" in theirs:
        return (
            f"peft cannot load an adapter of {module}, whose e_score_correction_bias its wrapper "
            "hides from the model"
        )
    if piece.num_inputs is None and piece.shape[0] == 1:
        return f"peft takes {module}, a parameter of one expert alone, for its transpose"
    return None


def _fill_experts(arrays: dict[str, np.ndarray], config: ModelConfig, rank: int) -> None:
    """Puts adapters of zeros beside those of experts that have not all of w_gate, w_up, w_down.

    With both a and b 0 no gradient reaches them either: who trains on trains the others alone.
    """
    for name, shape in param_shapes(config).items():
        experts, inner, _ = name.partition(".experts.w_")
        if inner and any(array.startswith(f"{experts}{inner}") for array in arrays):
            *stacked, inputs, outputs = shape
            arrays.setdefault(f"{name}.a", np.zeros((*stacked, inputs, rank), np.float32))
            arrays.setdefault(f"{name}.b", np.zeros((*stacked, rank, outputs), np.float32))


def _joined(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(A [E * n * R, in], B [n * out, n * R * E]) of n pairs (a [E, in, R], b [E, R, out]).

    For a parameter of all experts that n of ours make up, each every nth number of its last axis.
    In A peft has the experts outside of the ranks, in B inside.
    """
    n, (num_experts, rank, outputs) = len(pairs), pairs[0][1].shape
    a = np.concatenate([a.swapaxes(1, 2) for a, _ in pairs], axis=1)
    b = np.zeros((n * outputs, n * rank, num_experts), np.float32)
    for at, (_, piece) in enumerate(pairs):
        b[at::n, at * rank : (at + 1) * rank] = piece.transpose(2, 1, 0)
    return a.reshape(-1, a.shape[-1]), b.reshape(n * outputs, -1)
