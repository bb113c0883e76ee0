"""A run's policy as a Hugging Face folder, and whether transformers runs the same model from it."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from agentx.cli.runs import Policy
from agentx.interop.huggingface import export_huggingface
from agentx.interop.quantize import Quantization
from agentx.model.transformer import Transformer, abstract_transformer
from agentx_kernels.layout import causal
from agentx_kernels.logits import capped

# How far two implementations in float32 may be apart, for logits of a few tens.
TOLERANCE = 1e-3
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_PROMPT = "def walk(top):\n    "
_NUM_RANDOM, _NUM_GREEDY = 48, 24


def parse_size(text: str) -> int:
    """Bytes, of "5GB" for instance. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", text.strip().upper())
    size = int(float(match[1]) * _UNITS["" if match[2] == "B" else match[2]]) if match else 0
    if size < 1:
        raise ValueError(f"--shard-size {text}: give a size such as 5GB or 500MB")
    return size


def export_policy(
    policy: Policy, out: Path, *, dtype: str, quantize: Quantization | None, shard_bytes: int
) -> Path:
    """Writes a run's policy to `out`, with the tokenizer that it was trained with."""
    ours = policy.tokenizer if policy.uses_tool_format or policy.imported is None else None
    return export_huggingface(
        policy.params,
        policy.config,
        ours,
        out,
        dtype=dtype,
        max_shard_bytes=shard_bytes,
        like=policy.imported,
        quantize=quantize,
    )


def check_transformers(quantize: str | None) -> None:
    """Raises ValueError where there is nothing to compare with, or nothing that should agree."""
    if quantize is not None:
        raise ValueError(
            f"--check asks for the same logits, which {quantize} changes: leave it out, for "
            "--quantize prints by how much"
        )
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--check loads the folder with transformers, and {name} is not installed: "
                "pip install 'agentx[interop]', or leave --check out"
            )


def compare(policy: Policy, folder: Path, dtype: str) -> tuple[list[str], bool]:
    """Logits of random ids and the greedy text of a prompt, here and in transformers.

    Both sides compute in float32, and ours on the parameters rounded to `dtype` as they were
    written. So one tolerance holds for every dtype, and the model is in memory twice. Returns lines
    that say how far they are apart, and whether that is within the tolerance.
    """
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", attn_implementation="eager"
    ).eval()
    model = _as_written(policy, jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    length = min(_NUM_RANDOM, policy.config.max_length)
    tokens = rng.integers(0, policy.tokenizer.vocab_size, (1, length))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)).logits.numpy()
    found = np.asarray(_logits(model, jnp.asarray(tokens)))
    difference = float(np.abs(found - wanted).max())

    prompt = policy.tokenizer.encode(_PROMPT)[: max(1, length - _NUM_GREEDY)]
    inputs = torch.tensor([prompt])
    # The folder's own settings may sample, or punish repetition, which no greedy choice does.
    theirs.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    greedy = theirs.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=length - len(prompt)
    )[0].tolist()
    row = np.zeros((1, length), np.int32)
    row[0, : len(greedy)] = greedy
    scores = np.asarray(_logits(model, jnp.asarray(row)))[0, len(prompt) - 1 : len(greedy) - 1]
    chosen = scores[np.arange(len(scores)), greedy[len(prompt) :]]
    # Where two ids are as good as equal, either is greedy.
    is_same_text = bool((chosen >= scores.max(-1) - TOLERANCE).all())
    pieces = policy.tokenizer.pieces
    text = policy.tokenizer.decode([i for i in greedy if i < len(pieces)])
    agrees = difference <= TOLERANCE and is_same_text
    return [
        f"logits       at most {difference:.2g} from transformers' in float32, of up to "
        f"{np.abs(wanted).max():.3g} (tolerance {TOLERANCE:g})",
        f"greedy text  {'the same' if is_same_text else 'ANOTHER'}: {text!r}",
    ], agrees


def _as_written(policy: Policy, dtype: Any) -> Transformer:
    """The model in float32, with parameters that were rounded to a type on the way."""
    config = dataclasses.replace(policy.config, dtype="float32", param_dtype="float32")
    params = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), policy.params)
    return nnx.merge(nnx.graphdef(abstract_transformer(config)), params)


@nnx.jit
def _logits(model: Transformer, tokens: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("float32"):
        hidden = model(tokens, causal(*tokens.shape)).hidden
        return capped(hidden @ model.unembedding().T, model.config.logit_softcap)
