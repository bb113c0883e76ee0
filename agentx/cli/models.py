"""What a model takes, for the screen: parameters, arithmetic, and the memory of each device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from agentx.cli.config import configs_folder, find_config, load_config
from agentx.cli.registry import nearest
from agentx.model import sizes
from agentx.model.cache import init_cache
from agentx.model.config import ModelConfig
from agentx.model.transformer import abstract_transformer
from agentx.optim import OptimizerConfig, make_optimizer
from agentx.sharding import AXES, spec, tree_shardings

_DTYPES = "float32", "bfloat16"


def load_model(name: str, overrides: Sequence[str] = ()) -> ModelConfig:
    """The model of a run file or a model file; a name may also be one below configs/models.

    Raises ConfigError as `load_config` does.
    """
    below = configs_folder() / "models" / f"{name}.gin"
    file = below if below.is_file() and not Path(name).is_file() else find_config(name)
    loaded = load_config(file, overrides, root=("TrainConfig", "ModelConfig"))
    return loaded if isinstance(loaded, ModelConfig) else loaded.model


def parse_mesh(text: str) -> AbstractMesh:
    """The mesh of "fsdp=8,tensor=2": axes that are left out have one device.

    Raises ValueError for what is no axis of `sharding.AXES` or no number of devices.
    """
    devices = dict.fromkeys(AXES, 1)
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        axis = axis.strip()
        if axis not in devices:
            raise ValueError(f"--mesh {text}: there is no axis {axis!r}{nearest(axis, AXES)}")
        if not size.strip().isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh {text}: {axis} wants a number of devices, as in {axis}=8")
        devices[axis] = int(size)
    return AbstractMesh(tuple(devices.values()), AXES)


def model_table(config: ModelConfig, length: int | None = None, mesh: str = "") -> str:
    """What a model takes, as lines to print.

    length: of the rows that are trained on and of those in the cache, in tokens; the longest that
    the model has by default. mesh: see `parse_mesh`; one device by default.

    Raises ValueError where the model has no rows of that length or a mesh does not divide it.
    """
    length = config.max_length if length is None else length
    if not 1 <= length <= config.max_length:
        raise ValueError(
            f"--length {length}: the model has rows of 1 to {config.max_length} tokens; for longer "
            "ones add --gin.ModelConfig.max_length=N"
        )
    devices = parse_mesh(mesh)
    total, active = sizes.num_params(config), sizes.num_active_params(config)
    flops = sizes.train_flops_per_token(config, length)
    met = f"{active:,} for each token, all embeddings counted"
    numbers = [
        ("parameters", f"{total:,}"),
        *([("active", met)] if active != total else []),
        ("KV cache", f"{_amount(sizes.cache_bytes_per_token(config))} a token"),
        ("arithmetic", f"{flops / 1e9:,.3f} GFLOP to train a token of a row of {length:,}"),
    ]
    by_dtype = [_memory(config, dtype, length, devices) for dtype in _DTYPES]
    memory = [(name, *(_amount(of[name]) for of in by_dtype)) for name in by_dtype[0]]
    size = f"each of {devices.size:,} devices" if devices.size > 1 else "one device"
    lines = [*_aligned(_settings(config)), "", *_aligned(numbers), ""]
    lines += _aligned([(f"memory of {size}", *_DTYPES), *memory], right=True)
    return "\n".join(lines)


def _settings(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """What a config says that is not so by default, those within it by their paths."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield prefix + field.name, type(value).__name__
            yield from _settings(value, f"{prefix}{field.name}.")
        elif value != field.default:
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            yield prefix + field.name, f"{value:,}" if is_whole else str(value)


def _memory(config: ModelConfig, dtype: str, length: int, mesh: AbstractMesh) -> Mapping[str, int]:
    """Bytes of each device, by what they hold, were everything kept in `dtype`."""
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    params = nnx.state(abstract_transformer(config))
    optimizer = make_optimizer(OptimizerConfig(), num_steps=1).transform
    of_params = _bytes_per_device(params, mesh)
    moments = _bytes_per_device(jax.eval_shape(optimizer.init, params), mesh)
    return {
        "weights": of_params,
        "gradients": of_params,
        "Adam's moments": moments,
        "all to train, but activations": 2 * of_params + moments,
        f"KV cache of a row of {length:,}": _cache_bytes(config, length, mesh),
    }


def _bytes_per_device(tree: Any, mesh: AbstractMesh) -> int:
    """What a device holds of abstract arrays, laid out as a trainer does."""
    shardings = jax.tree.leaves(tree_shardings(tree, mesh))
    return sum(
        math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x, sharding in zip(jax.tree.leaves(tree), shardings, strict=True)
    )


def _cache_bytes(config: ModelConfig, length: int, mesh: AbstractMesh) -> int:
    """Of one row, on a device that has it: rows are whole, and heads are split where there are
    several (see `sample.programs`)."""
    over = {axis: size for axis, size in mesh.shape.items() if axis == "tensor"}
    cache = jax.eval_shape(lambda: init_cache(config, 1, length))
    num_bytes = 0
    for x in (*cache.k, *cache.v):
        heads = "kv_heads" if x.shape[2] > 1 else None
        split = spec(("layers", "batch", heads, None, "head_dim"), x.shape, over)
        parts = math.prod(over[axis] for axis in split if axis is not None)
        num_bytes += x.size * x.dtype.itemsize // parts
    return num_bytes


def _aligned(rows: Any, *, right: bool = False) -> list[str]:
    """Rows of text in columns; all but the first to the right, or as they are."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right and at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _amount(num_bytes: float) -> str:
    """1,536 as "1.5 KiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log2(num_bytes)) // 10, len(units) - 1) if num_bytes >= 1 else 0
    return f"{num_bytes / 2 ** (10 * power):,.{1 if power else 0}f} {units[power]}"
