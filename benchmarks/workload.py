"""The workload that every benchmark runs: sizes, weights, data. All of it is made from seeds.

Weights and data come from NumPy's PCG64 in a stated order, so that any framework can make the same
ones: then losses and greedy tokens must agree, and the figures are of the same work. The model is
Qwen3's architecture in float32, without embeddings of its own for the output.

End-of-sequence ids are none, so that every request yields exactly its budget of tokens.

Legend: B rows, S tokens a row, R requests, T tokens of a prompt, D model, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from agentx.model.config import ModelConfig
from agentx.model.transformer import Transformer
from agentx.optim import Optimizer, OptimizerConfig
from agentx.sharding import MeshConfig, make_mesh, tree_shardings
from agentx.step import TrainState

_WEIGHT_SEED = 1234
_BATCH_SEED = 11
_PROMPT_SEED = 22
_BUDGET_SEED = 33
_GRPO_PROMPT_SEED = 44


@dataclasses.dataclass(frozen=True)
class Workload:
    """One size of everything. Times are taken over `*_steps` after one that compiles.

    train_*: SFT steps on [rows, length], 4 batches in turn. Targets are spans of 16 to 64 tokens.
    micro_batches: into how many parts a step, also of GRPO, cuts its rows; the result is the same.
    prompt_length: of all requests. uniform_*: requests of the same budget. ragged_*: requests with
    budgets between least and most. grpo_*: groups of rollouts, one update a step.
    """

    model: ModelConfig
    train_rows: int = 8
    train_length: int = 512
    train_steps: int = 8
    micro_batches: int = 2
    prompt_length: int = 64
    uniform_requests: int = 16
    uniform_tokens: int = 256
    ragged_requests: int = 32
    ragged_least: int = 16
    ragged_most: int = 256
    sample_repeats: int = 3
    grpo_prompts: int = 4
    grpo_group: int = 8
    grpo_tokens: int = 128
    grpo_steps: int = 4


SIZES = {
    # For tests: seconds, and no figure worth reading.
    "tiny": Workload(
        ModelConfig(64, 32, 2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64),
        train_rows=2,
        train_length=48,
        micro_batches=2,
        prompt_length=8,
        uniform_requests=2,
        uniform_tokens=16,
        ragged_requests=4,
        ragged_least=2,
        ragged_most=16,
        grpo_prompts=2,
        grpo_group=4,
        grpo_tokens=16,
    ),
    "small": Workload(
        ModelConfig(4096, 256, 8, num_heads=8, num_kv_heads=4, head_dim=32, d_ff=1024)
    ),
    "medium": Workload(
        ModelConfig(8192, 512, 12, num_heads=8, num_kv_heads=4, head_dim=64, d_ff=1536),
        train_steps=5,
        sample_repeats=2,
        grpo_steps=3,
    ),
}
_DISTINCT_BATCHES = 4
CPU_DEVICES = 2

TRAIN_OPTIMIZER = OptimizerConfig(
    learning_rate=3e-4,
    schedule="constant",
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.01,
    max_grad_norm=None,
)
GRPO_OPTIMIZER = dataclasses.replace(TRAIN_OPTIMIZER, learning_rate=1e-5)


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


def make_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """All parameters by their paths, float32.

    One generator draws standard normal matrices [out, in], as linear layers of other frameworks
    hold them: the embedding, at 0.02; then of every layer q, k, v, o, gate, up and down, at
    1 / sqrt(in). Norms are 1.
    """
    rng = _generator(_WEIGHT_SEED)
    d_model, head_dim, d_ff = config.d_model, config.head_dim, config.d_ff
    heads, kv_heads = (config.num_heads, head_dim), (config.num_kv_heads, head_dim)

    def matrix(ins: tuple[int, ...], outs: tuple[int, ...]) -> np.ndarray:
        num_in, num_out = int(np.prod(ins)), int(np.prod(outs))
        drawn = rng.standard_normal((num_out, num_in), dtype=np.float32)
        return (drawn * np.float32(num_in**-0.5)).T.reshape(*ins, *outs)

    embed = rng.standard_normal((config.vocab_size, d_model), dtype=np.float32)
    layers = [
        {
            "attention.w_q": matrix((d_model,), heads),
            "attention.w_k": matrix((d_model,), kv_heads),
            "attention.w_v": matrix((d_model,), kv_heads),
            "attention.w_o": matrix(heads, (d_model,)),
            "mlp.w_gate": matrix((d_model,), (d_ff,)),
            "mlp.w_up": matrix((d_model,), (d_ff,)),
            "mlp.w_down": matrix((d_ff,), (d_model,)),
        }
        for _ in range(config.num_layers)
    ]
    weights = {f"layers.0.{name}": np.stack([x[name] for x in layers]) for name in layers[0]}
    norms = {
        "attention_norm": d_model,
        "mlp_norm": d_model,
        "attention.q_norm": head_dim,
        "attention.k_norm": head_dim,
    }
    for name, size in norms.items():
        weights[f"layers.0.{name}.scale"] = np.ones((config.num_layers, size), np.float32)
    weights["final_norm.scale"] = np.ones(d_model, np.float32)
    weights["embed"] = embed * np.float32(0.02)
    return weights


def make_params(model: Transformer, mesh: Mesh) -> nnx.State:
    """`make_weights` as the parameters of an abstract model, on the mesh's devices."""
    weights = make_weights(model.config)
    abstract = nnx.state(model)
    shardings = tree_shardings(abstract, mesh)

    def place(path: Any, leaf: Any, sharding: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        array = weights.pop(name)
        assert array.shape == leaf.shape, (name, array.shape, leaf.shape)
        return jax.device_put(array, sharding)

    params = jax.tree_util.tree_map_with_path(place, abstract, shardings)
    assert not weights, f"the model has no {sorted(weights)}"
    return params


def make_state(model: Transformer, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """`make_params` and a fresh optimizer, as the train step leaves a state and takes it."""

    def init(params: nnx.State) -> TrainState:
        return TrainState(jnp.int32(0), params, optimizer.transform.init(params))

    params = make_params(model, mesh)
    return jax.jit(init, out_shardings=tree_shardings(jax.eval_shape(init, params), mesh))(params)


def num_params(params: nnx.State) -> int:
    """How many numbers the parameters hold."""
    return sum(x.size for x in jax.tree.leaves(params))


def make_machine() -> Mesh:
    """One accelerator; or, where there is none, two devices of the CPU, as the quickstart has."""
    devices = jax.devices()
    return make_mesh(MeshConfig(), devices[: CPU_DEVICES if devices[0].platform == "cpu" else 1])


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def num_micro_batches(work: Workload, rows: int, mesh: Mesh) -> int:
    """`work.micro_batches`, or as many as leave every device a row of each."""
    return max(1, min(work.micro_batches, rows // mesh.size))


def train_batches(work: Workload) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids i32[B, S] and masks i32[B, S], to be used in turn; mask 1 marks a target."""
    rng = _generator(_BATCH_SEED)
    shape = work.train_rows, work.train_length
    batches = []
    for _ in range(_DISTINCT_BATCHES):
        tokens_BS = rng.integers(0, work.model.vocab_size, shape, dtype=np.int32)
        mask_BS = np.zeros(shape, np.int32)
        for row_S in mask_BS:
            start, is_target = 0, 0
            while start < len(row_S):
                end = start + int(rng.integers(16, 65))
                row_S[start:end] = is_target
                start, is_target = end, 1 - is_target
        batches.append((tokens_BS, mask_BS))
    return batches


def prompts(work: Workload, num: int) -> np.ndarray:
    """Prompts of requests, i32[R, T]."""
    return _random_ids(work, num, _PROMPT_SEED)


def grpo_prompts(work: Workload, step: int) -> np.ndarray:
    """The prompts of one GRPO step, i32[R, T]."""
    return _random_ids(work, work.grpo_prompts, _GRPO_PROMPT_SEED + step)


def ragged_budgets(work: Workload) -> list[int]:
    """How many tokens each of the ragged requests wants."""
    rng = _generator(_BUDGET_SEED)
    most = work.ragged_most + 1
    return rng.integers(work.ragged_least, most, work.ragged_requests).tolist()


def reward(ids: list[int], vocab_size: int) -> float:
    """The share of ids in the first quarter of the vocabulary: 0.25 for an untrained model."""
    return sum(1 for i in ids if i < vocab_size // 4) / max(1, len(ids))


def _random_ids(work: Workload, num: int, seed: int) -> np.ndarray:
    shape = num, work.prompt_length
    return _generator(seed).integers(0, work.model.vocab_size, shape, dtype=np.int32)


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def matmul_gflops(size: int = 2048, repeats: int = 7) -> float:
    """What XLA's matrix product of float32 makes here, 10^9 operations a second, the best of a few.

    The ceiling of everything else, for it is most of the work.
    """
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def parse_arguments(description: str | None, steps_help: str) -> argparse.Namespace:
    """The command line of a benchmark: --size and --steps."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--steps", type=int, default=None, help=steps_help)
    return parser.parse_args()


def print_result(result: dict[str, Any]) -> None:
    """One line of JSON, with the versions that made it."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    versions["python"] = platform.python_version()
    print(json.dumps({**result, "versions": versions}), flush=True)


def rounded(values: Any, digits: int = 4) -> list[float]:
    """Numbers as they are printed."""
    return [round(float(x), digits) for x in values]
