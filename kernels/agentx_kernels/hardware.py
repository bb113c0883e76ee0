"""What the kernels need to know of a chip. It is passed in: nothing here asks the runtime.

So everything compiles ahead of time for a chip that is not there. Figures are the makers'
published peaks, dense, per device as JAX counts devices (a v5p chip is one; a tpu7x chip is two).
"""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device.

    peak_bf16_flops: floating-point operations a second, dense bf16 with f32 accumulation.
    hbm_bytes, hbm_bandwidth: main memory, in bytes and bytes a second.
    vmem_bytes: what one core's kernel can address on chip: a TPU core's VMEM, the shared memory of
      a GPU's multiprocessor, 0 for a CPU, whose caches nobody addresses.
    tensor_cores: of a TPU, the cores that compute, which share the heads that a kernel is given.
    sparse_cores: of a TPU, cores beside those, which can move data between devices.
    """

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    peak_bf16_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    vmem_bytes: int
    tensor_cores: int = 1
    sparse_cores: int = 0


_KIB = 1024
_MIB = 1024**2
_GIB = 1024**3

_TABLE = {
    spec.name: spec
    for spec in (
        Hardware("v5e", "tpu", 197e12, 16 * _GIB, 819e9, 128 * _MIB),
        Hardware("v5p", "tpu", 459e12, 95 * _GIB, 2765e9, 64 * _MIB, 2, 4),
        Hardware("v6e", "tpu", 918e12, 32 * _GIB, 1640e9, 128 * _MIB, 1, 2),
        Hardware("tpu7x", "tpu", 1153.5e12, 96 * _GIB, 3690e9, 64 * _MIB, 1, 2),
        Hardware("h100", "gpu", 989e12, 80 * _GIB, 3350e9, 227 * _KIB),
        Hardware("h200", "gpu", 989e12, 141 * _GIB, 4800e9, 227 * _KIB),
        # One server core or two: the order of magnitude is all that the CPU path asks for.
        Hardware("cpu", "cpu", 1e11, 16 * _GIB, 20e9, 0),
    )
}


def hardware(name: str) -> Hardware:
    """The device called `name`: v5e, v5p, v6e, tpu7x, h100, h200 or cpu; else ValueError."""
    if name not in _TABLE:
        raise ValueError(f"hardware {name!r} is not known; choose one of {', '.join(_TABLE)}")
    return _TABLE[name]


def check_hardware(given: object) -> None:
    """Raises ValueError for what is no Hardware, such as its name."""
    if not isinstance(given, Hardware):
        raise ValueError(
            f"hardware is {given!r}; give a Hardware, such as agentx_kernels.hardware's "
            f"hardware('cpu')"
        )


# Without these XLA for TPU moves data first and computes after. Names are libtpu's own.
_BESIDE_COMPUTATION = {
    "xla_enable_async_all_gather": True,
    # Of small arrays it would make sums, in which all but one device have zeros.
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
}
# What gathers is moved along by the fusions that run meanwhile.
_BY_FUSIONS = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
# Sparse cores gather and sum up. The last three are how they must run for that; switched on
# without them they cost throughput, by public recipes for MaxText.
_BY_SPARSE_CORES = {
    "xla_tpu_enable_async_all_to_all": True,  # on v5e the compiler has none
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_disable_megacore_partitioning": True,
    "xla_sc_enable_instruction_fusion": False,
}
# On tpu7x less than half of what moves has computation beside it unless sparse cores exchange heads
# as well; on v5p and v6e more has where they do not (docs/log.md).
_EXCHANGE = "xla_tpu_enable_sparse_core_collective_offload_dense_all_to_all"


def compiler_options(hardware: Hardware) -> dict[str, bool]:
    """What `jax.jit(f, compiler_options=...)` needs for collectives to run beside computation."""
    if hardware.platform != "tpu":
        return {}
    if not hardware.sparse_cores:
        return _BESIDE_COMPUTATION | _BY_FUSIONS
    exchange = {_EXCHANGE: True} if hardware.name == "tpu7x" else {}
    return _BESIDE_COMPUTATION | _BY_SPARSE_CORES | exchange
