"""What the train step of an 8B model needs of each TPU's memory, by length. No TPU needed.

    python -m benchmarks.memory [--topology v5p:2x4x4] [--context 8]

Compiles the project's own step ahead of time, for the shape of Llama 3.1 8B: parameters and
AdamW's moments in float32, activations in bfloat16, each layer computed again in the backward. The
tokens of a row are split over `context` devices, rows over the rest (fsdp), a row for each, and
parameters over all. A v5p-64 is 64 cores, which are 32 chips: 2x4x4, and JAX sees a device a chip.

Prints a row of Markdown for each length as soon as it is compiled, a minute or two each: GB a
device for the state and batch, for what is temporary, and together, as `memory_analysis` counts
them; whether that fits; and last the longest row that does, of the powers of two. Needs libtpu
(agentx_kernels.ahead).
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp

from agentx.batch import Batch
from agentx.losses import NextTokenLoss
from agentx.model.config import ModelConfig
from agentx.model.transformer import abstract_transformer
from agentx.optim import OptimizerConfig, make_optimizer
from agentx.sharding import MeshConfig, batch_sharding, make_mesh
from agentx.step import abstract_state, make_train_step
from agentx_kernels import ahead
from agentx_kernels.hardware import hardware
from agentx_kernels.layout import TreeLayout

LENGTHS = (2**13, 2**17, 2**20)


def llama_8b(length: int) -> ModelConfig:
    """Llama 3.1 8B, to be trained on rows of `length` tokens."""
    return ModelConfig(
        vocab_size=128256,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ff=14336,
        qk_norm="none",
        tie_embeddings=False,
        rope_theta=5e5,
        norm_eps=1e-5,
        max_length=length,
        dtype="bfloat16",
        remat="full",
    )


class Memory(NamedTuple):
    """Bytes of one device. kept: state and batch, updated in place. temporary: all else."""

    kept: int
    temporary: int

    @property
    def needed(self) -> int:
        return self.kept + self.temporary


def compile_step(topology: str, context: int, length: int) -> jax.stages.Compiled:
    """The 8B model's step for a slice, of rows of `length` tokens over `context` devices each."""
    devices = ahead.devices(topology)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1, context=context), devices)
    model = abstract_transformer(llama_8b(length), hardware=hardware(topology.partition(":")[0]))
    optimizer = make_optimizer(OptimizerConfig(), num_steps=1000)

    def tokens(dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        shape = mesh.shape["fsdp"], length
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    ids, weights = tokens(jnp.int32), tokens(jnp.float32)
    batch = Batch(ids, ids, weights, TreeLayout(ids, ids, ids))
    step = make_train_step(model, NextTokenLoss(), optimizer, mesh)
    return step.__wrapped__.lower(abstract_state(model, optimizer, mesh), batch).compile()


def measure(topology: str, context: int, length: int) -> Memory | None:
    """The memory of the 8B model's step; None where the compiler says it does not fit."""
    try:
        compiled = compile_step(topology, context, length)
    except jax.errors.JaxRuntimeError as error:
        if "Ran out of memory" not in str(error):
            raise
        return None
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Memory(kept, memory.temp_size_in_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", default="v5p:2x4x4")
    parser.add_argument("--context", type=int, default=8)
    given = parser.parse_args()
    ahead.prepare()
    chip = hardware(given.topology.partition(":")[0])
    print(f"{given.topology}, context={given.context}, {chip.hbm_bytes / 1e9:.0f} GB a device\n")
    print("| tokens a row | state and batch, GB | temporary, GB | together, GB | fits |")
    print("|---|---|---|---|---|", flush=True)

    def fits(length: int) -> bool:
        memory = measure(given.topology, given.context, length)
        is_in = memory is not None and memory.needed <= chip.hbm_bytes
        sizes = (memory.kept, memory.temporary, memory.needed) if memory else ()
        columns = [f"{size / 1e9:.1f}" for size in sizes] or ["refused by the compiler"] + [""] * 2
        print(f"| {length} | {' | '.join(columns)} | {'yes' if is_in else 'no'} |", flush=True)
        return is_in

    tried = {length: fits(length) for length in LENGTHS}
    while True:
        longest = max((length for length, is_in in tried.items() if is_in), default=0)
        above = [length for length, is_in in tried.items() if not is_in and length > longest]
        if not longest or (above and min(above) <= 2 * longest):
            break
        length = 2 * longest
        tried[length] = fits(length)
    print(f"\nThe longest row that fits has {longest} tokens, of the powers of two.")


if __name__ == "__main__":
    main()
