"""A model as compiled-anywhere programs: StableHLO of prefill and decode, and the parameters.

What is written needs no agentx to run: JAX loads the programs (`jax.export`), safetensors the
parameters, and `manifest.json` says the rest. docs/stablehlo.md has the format, and a loader.

Legend: B rows, T tokens of a prompt, S columns of the cache, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export
from safetensors.numpy import save_file

from agentx.interop.tensors import flatten_params
from agentx.model.cache import KVCache, init_cache, write
from agentx.model.config import ModelConfig
from agentx.model.transformer import Transformer, abstract_transformer
from agentx_kernels.logits import capped

Array = jax.Array
# {"k": arrays, "v": arrays}, as in `KVCache`: what JAX can write down of a tree is dicts and lists.
Cache = dict[str, list[Array]]

FORMAT, FORMAT_VERSION = "agentx-stablehlo", 1
PLATFORMS = "cpu", "tpu", "cuda"
_PARAMS_FILE = "params.safetensors"


class Programs:
    """What is exported of a model: `prefill` and `decode`, which hold no parameters.

    Parameters are a flat dict, by the names that `flatten_params` gives.
    """

    def __init__(self, config: ModelConfig):
        self._graphdef, abstract = nnx.split(abstract_transformer(config))
        self._structure = jax.tree.structure(abstract)
        self.params: dict[str, jax.ShapeDtypeStruct] = flatten_params(abstract)
        self._softcap = config.logit_softcap

    def prefill(
        self, params: Mapping[str, Array], tokens: Array, lengths: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        """Reads prompts, i32[B, T], of which row b has lengths[b] tokens, i32[B], 1 to T.

        They go to the first columns of the cache, whatever it holds. Returns (logits f32[B, V] of
        what follows each row's last token, the cache).
        """
        model = self._model(params)
        nothing = jnp.zeros_like(lengths)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, new, _ = model.decode(tokens, positions, cache["k"], cache["v"], nothing)
        written = write(KVCache(cache["k"], cache["v"], nothing), *new, lengths)
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        return self._logits(model, jnp.take_along_axis(hidden, last, 1)), _plain(written)

    def decode(
        self, params: Mapping[str, Array], token: Array, lengths: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        """Appends one token to every row, i32[B]. lengths: i32[B], the columns in use before it.

        Returns (logits f32[B, V] of what follows it, the cache). A row without a free column does
        not keep the token.
        """
        model = self._model(params)
        hidden, new, _ = model.decode(
            token[:, None], lengths[:, None], cache["k"], cache["v"], lengths
        )
        written = write(KVCache(cache["k"], cache["v"], lengths), *new, jnp.ones_like(lengths))
        return self._logits(model, hidden), _plain(written)

    def _model(self, params: Mapping[str, Array]) -> Transformer:
        leaves = [params[name] for name in self.params]
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._structure, leaves))

    def _logits(self, model: Transformer, hidden_B1D: Array) -> Array:
        raw_BV = jnp.dot(
            hidden_B1D[:, 0], model.unembedding().T, preferred_element_type=jnp.float32
        )
        return capped(raw_BV, self._softcap)


def export_stablehlo(
    params: Any,
    config: ModelConfig,
    directory: str | os.PathLike[str],
    *,
    rows: int,
    tokens: int,
    columns: int,
    dtype: str = "float32",
) -> Path:
    """Writes a folder with a model's `Programs` and parameters, and returns its path.

    params: the model's `nnx.State`, or any tree or mapping with the same paths; all of it is held
    in memory. rows, tokens, columns: B, T and S, which the programs have once and for all. dtype:
    what the parameters are stored in, "float32" or "bfloat16"; the cache and the arithmetic have
    the type of the activations. The folder is written under another name and renamed when whole.

    Raises ValueError where it exists and is not empty, where the sizes do not fit the model, or
    where params do not fit config.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; choose float32 or bfloat16")
    if rows < 1 or not 1 <= tokens <= columns <= config.max_length:
        raise ValueError(
            f"{rows} rows, prompts of {tokens} tokens and {columns} columns: rows must be 1 or "
            f"more, tokens from 1 to the columns, and those at most the model's {config.max_length}"
        )
    target = Path(directory).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty; give another directory")

    config = dataclasses.replace(config, param_dtype=dtype)
    programs = Programs(config)
    arrays = flatten_params(params)
    _check_params(arrays, programs.params)
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in programs.params.items()}
    cache = jax.eval_shape(lambda: _plain(init_cache(config, rows, columns)))
    integers = jax.ShapeDtypeStruct((rows,), jnp.int32)
    prompts = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    exported = {
        "prefill": _export(programs.prefill, abstract, prompts, integers, cache),
        "decode": _export(programs.decode, abstract, integers, integers, cache),
    }

    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    for leftover in partial.iterdir():
        leftover.unlink()
    stored = {
        name: np.ascontiguousarray(np.asarray(arrays[name]).astype(x.dtype))
        for name, x in abstract.items()
    }
    save_file(stored, partial / _PARAMS_FILE)
    for name, program in exported.items():
        (partial / f"{name}.stablehlo").write_bytes(program.serialize())
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "jax_version": jax.__version__,
        "calling_convention_version": exported["decode"].calling_convention_version,
        "platforms": list(PLATFORMS),
        "rows": rows,
        "tokens": tokens,
        "columns": columns,
        "params_file": _PARAMS_FILE,
        # In the order in which JAX flattens the dict: by name.
        "params": [{"name": name, **_described(abstract[name])} for name in sorted(abstract)],
        "cache": {name: [_described(x) for x in cache[name]] for name in cache},
        "programs": {
            name: {
                "file": f"{name}.stablehlo",
                "inputs": ["params", *inputs, "cache"],
                "outputs": ["logits", "cache"],
                **inputs,
                "logits": {"shape": [rows, config.vocab_size], "dtype": "float32"},
            }
            for name, inputs in {
                "prefill": {"tokens": _described(prompts), "lengths": _described(integers)},
                "decode": {"token": _described(integers), "lengths": _described(integers)},
            }.items()
        },
        "model": dataclasses.asdict(config),
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    if target.exists():
        target.rmdir()
    partial.rename(target)
    return target


def _export(function: Any, *arguments: Any) -> export.Exported:
    """One program for all platforms, its cache changed in place."""
    return export.export(jax.jit(function, donate_argnums=3), platforms=PLATFORMS)(*arguments)


def _plain(cache: KVCache) -> Cache:
    return {"k": list(cache.k), "v": list(cache.v)}


def _described(x: jax.ShapeDtypeStruct) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def _check_params(arrays: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in sorted(arrays.keys() | wanted.keys()):
        has, wants = (of[name].shape if name in of else None for of in (arrays, wanted))
        if has != wants:
            raise ValueError(
                f"these parameters are not of this config: {name} is {has} and should be {wants}"
            )
