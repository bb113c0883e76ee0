"""A run's adapters as a folder that peft loads, and vLLM and SGLang beside a base model.

It holds adapter_config.json and adapter_model.safetensors. Which module of theirs an adapter of
ours belongs to, the tables of families.py say; nn.Linear's order is [out, in], so A is [R, in] and
B [out, R].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from agentx.interop.families import family_of
from agentx.interop.huggingface import PathLike
from agentx.interop.tensors import family_tensors, flatten_params
from agentx.model.config import ModelConfig
from agentx.model.lora import LoraConfig


def export_peft(
    adapters: Any, config: ModelConfig, lora: LoraConfig, directory: PathLike, *, base: str
) -> Path:
    """Writes a PEFT adapter and returns its folder's path.

    adapters: the state that `lora.split_trained` has of them, or any tree with the same paths.
    base: what adapter_config.json says the base model is, a name or a path; who loads the adapter
    by hand may give another.

    Raises ValueError where the folder exists and is not empty, where no family has models like
    config, or for adapters of feed-forwards in a model with experts.
    """
    target = Path(directory).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty; give another directory")
    arrays = flatten_params(adapters)
    targets, tensors = set(), {}
    for tensor in family_tensors(family_of(config), config).values():
        (piece, *_), module = tensor.pieces, tensor.name.removesuffix(".weight")
        if f"{piece.param}.a" not in arrays:
            continue
        if config.moe is not None and ".attention." not in piece.param:
            raise ValueError(
                f"peft takes an adapter of {module} for one of experts, whose modules have the "
                "same name; export the whole model, with the adapters merged"
            )
        targets.add(module.rpartition(".")[2])
        a, b = (np.asarray(arrays[f"{piece.param}.{part}"][piece.at]) for part in "ab")
        prefix = f"base_model.model.{module}"
        # safetensors writes memory as it lies, whatever the strides say.
        tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, lora.rank).T)
        tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b.reshape(lora.rank, -1).T)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
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
