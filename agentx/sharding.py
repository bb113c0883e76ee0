"""The device mesh, and which of its axes each array's axes are split over.

Arrays name their axes by what they hold ("embed", "heads", "batch"); `RULES` maps the names to mesh
axes; everything else follows. Parameters carry their names (`nnx.Param(..., axes=...)`), and so do
optimizer moments, which are made from parameters; activations are named where they are constrained.

    data     rows of the batch; parameters are copied
    fsdp     rows of the batch; parameters are split and gathered a layer at a time
    tensor   heads, feed-forward and vocabulary
    context  tokens of a row; parameters are split as over fsdp
    expert   rows of the batch, and experts; other parameters are split as over fsdp
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "context", "expert")

# Parameters are split along `embed` over fsdp, context and expert: a device needs them a layer at a
# time, whether it has other rows than its neighbours or other tokens. Experts are split over the
# expert axis by their number, so their `embed` is `expert_embed`. Activations are split over fsdp
# and expert by their rows and over context by their tokens, so where they are constrained their
# embed axis has the name None. `routes` are the experts that a router chooses among: its parameters
# are small, and every device needs them for all experts. `rank` is an adapter's: thin, so whole.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "layers": (),
    "embed": ("fsdp", "context", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "latent": (),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "expert_embed": ("fsdp", "context"),
    "routes": (),
    "rank": (),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis has; one of them may be -1, which takes what is left.

    cpu_devices: how many devices a process makes of its CPU, where it has no accelerator.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    cpu_devices: int = 1

    def __post_init__(self) -> None:
        if self.cpu_devices < 1:
            raise ValueError(f"cpu_devices is {self.cpu_devices}; it must be 1 or more")
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if any(size < 1 and size != -1 for size in sizes.values()):
            raise ValueError(
                f"mesh axes must have 1 or more devices, or -1 for the rest, not {sizes}"
            )
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"only one mesh axis can be -1 (the rest), not several as in {sizes}")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all `devices` (those of the process by default), with the axes of `AXES`.

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    wanted = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise ValueError(
            f"a mesh of {wanted} does not divide {len(devices)} devices: the sizes must multiply "
            f"to {len(devices)}, and one of them may be -1 to take what is left"
        )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes]
    # An axis may be a part of one of the slice's: context=8 of 4x4x4, which jax.make_mesh refuses.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh_shape: Mapping[str, int]
) -> PartitionSpec:
    """How an array of `shape` whose axes are called `axes` is split over a mesh.

    spec(("embed", "mlp"), (64, 256), {"fsdp": 2, "tensor": 4}) == PartitionSpec("fsdp", "tensor")

    Mesh axes of size 1 are left out. Raises ValueError where a name is not known, one mesh axis
    would split two axes of the array, or an axis is not divisible by the devices that split it.
    """
    assert len(axes) == len(shape), (axes, shape)
    entries: list[Any] = []
    taken: dict[str, str] = {}
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in RULES:
            raise ValueError(f"axis {axis!r} has no rule; the known ones are {', '.join(RULES)}")
        over = [a for a in RULES[axis] if mesh_shape.get(a, 1) > 1] if axis is not None else []
        for mesh_axis in over:
            if mesh_axis in taken:
                raise ValueError(
                    f"mesh axis {mesh_axis!r} would split both {taken[mesh_axis]!r} and {axis!r} "
                    f"of an array with axes {tuple(axes)}: change the rule of one of them"
                )
            taken[mesh_axis] = str(axis)
        parts = math.prod(mesh_shape[a] for a in over)
        if size % parts:
            raise ValueError(
                f"axis {axis!r} has size {size}, which {parts} devices ({' x '.join(over)}) do not "
                f"divide: choose a mesh with fewer devices on {' x '.join(over)}, or another size"
            )
        entries.append(tuple(over) if len(over) > 1 else over[0] if over else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, told how to lie on the mesh that the computation is traced under; x itself under none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh.shape))


def gathered(x: jax.Array, *axes: str) -> jax.Array:
    """x, whole along `embed` if several mesh axes split that, gathered over one after the other.

    In some slices TPUs gather beside computation over one of these, not over all at once: left to
    XLA, a v5p-64 computed nothing while it gathered the weights of a layer's backward pass.
    """
    mesh = jax.sharding.get_abstract_mesh()
    over = [a for a in RULES["embed"] if mesh.shape.get(a, 1) > 1]
    if "embed" not in axes or len(over) < 2:
        return x
    place = list(spec(axes, x.shape, mesh.shape))
    for num_left in reversed(range(len(over))):
        place[axes.index("embed")] = tuple(over[:num_left])
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(*place))
    return x


def tree_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of every array of `tree`, in a tree of the same structure.

    An `nnx.Variable` goes by its axes: so parameters, gradients and optimizer moments lie alike.
    Anything else, such as a counter of steps, is copied to every device. Arrays and mesh may be
    abstract. Raises ValueError as `spec` does, naming the parameter.
    """
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)
    shardings = []
    for path, leaf in leaves:
        if not is_variable(leaf):
            shardings.append(NamedSharding(mesh, PartitionSpec()))
            continue
        if not jax.tree.leaves(leaf):  # what optax puts where a part of the optimizer has no state
            shardings.append(leaf)
            continue
        try:
            partition = spec(leaf.get_metadata("axes"), leaf.shape, mesh.shape)
        except ValueError as error:
            raise ValueError(f"{jax.tree_util.keystr(path)}: {error}") from None
        shardings.append(leaf.replace(NamedSharding(mesh, partition)))
    return jax.tree.unflatten(structure, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array [B, S] of a batch: rows over data, fsdp and expert, tokens over context."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["sequence"]))


def check_batch(shape: Sequence[int], mesh: Mesh, num_micro_batches: int = 1) -> None:
    """Raises ValueError where a batch of shape [B, S] does not split evenly over a mesh."""
    rows, tokens = shape
    over_rows = {axis: mesh.shape[axis] for axis in RULES["batch"]}
    context = mesh.shape["context"]
    if rows % (math.prod(over_rows.values()) * num_micro_batches) or tokens % context:
        sizes = " x ".join(f"{axis}={size}" for axis, size in over_rows.items())
        raise ValueError(
            f"a batch of {rows} rows of {tokens} tokens does not divide into {num_micro_batches} "
            f"micro-batches, their rows over {sizes} devices and their tokens over "
            f"context={context} devices"
        )
