"""Programs that are compiled for TPUs which are not there, and what the tests read of them.

A process of its own, for it loads libtpu. A line of JSON comes in, {"program": name of a function
below, ...its arguments}; one goes out, {"facts": {...}} or {"error": what the compiler said}.

A new program is a function here that returns what `compiled` does, and a test that asks for it.

Legend: B rows, S tokens a row, N heads, K KV heads, H head size of q and k, Hv of v, D model,
F feed-forward, L layers, V vocabulary.
"""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from agentx_kernels import ahead
from agentx_kernels.attention import attention as attend
from agentx_kernels.context_parallel import Split, make_split_plan, split_attention
from agentx_kernels.hardware import compiler_options, hardware
from agentx_kernels.layout import TreeLayout
from agentx_kernels.logprob import VocabularySplit, token_logprobs

SPLIT = Split(rows=("data",), heads="tensor", tokens="context")


def attention(
    chip, length, head_size=128, value_size=128, heads=4, kv_heads=2, dtype="bfloat16", **options
):
    """Forward and backward on one device, the plan included; options: see below."""
    mesh = mesh_of(ahead.SMALLEST[chip], 1, 1, num_devices=1)
    has_sinks = options.pop("sinks", False)

    def loss(q, k, v, sinks, layout):
        given = options | ({"sinks": sinks} if has_sinks else {})
        o = attend(q, k, v, layout=layout, hardware=hardware(chip), **given)
        return o.astype(jnp.float32).sum()

    arrays = qkv(mesh, length, heads, kv_heads, head_size, value_size, dtype)
    sinks = on(mesh, (heads,), "float32", "tensor")
    gradient = jax.grad(loss, (0, 1, 2, 3))
    return compiled(gradient, chip, mesh, *arrays, sinks, layout_of(mesh, length))


def split_over_devices(chip, topology, length, tensor, ulysses, ring, heads=32, kv_heads=8):
    """Forward and backward of rows whose heads lie over `tensor` devices and tokens over 8."""
    mesh = mesh_of(topology, tensor, 8)
    split = dataclasses.replace(SPLIT, ulysses=ulysses, ring=ring)

    def loss(q, k, v, layout):
        plan = make_split_plan(layout, split, hardware=hardware(chip))
        o = split_attention(q, k, v, plan=plan, hardware=hardware(chip))
        return o.astype(jnp.float32).sum()

    arrays = qkv(mesh, length, heads, kv_heads, 128, 128, "bfloat16")
    return compiled(jax.grad(loss, (0, 1, 2)), chip, mesh, *arrays, layout_of(mesh, length))


def logprobs(chip, topology, length, size, vocab_size, context=1, tensor=1, dtype="bfloat16"):
    """Log-probabilities forward and backward, over a slice or over one device if all axes are 1."""
    is_split = context * tensor > 1
    mesh = mesh_of(topology, tensor, context, num_devices=None if is_split else 1)
    split = VocabularySplit(rows=("data",), tokens="context", vocab="tensor", embed=("data",))

    def loss(hidden, embedding, targets):
        logprob, _ = token_logprobs(
            hidden,
            embedding,
            targets,
            hardware=hardware(chip),
            softcap=30.0,
            split=split if is_split else None,
        )
        return logprob.sum()

    rows = mesh.shape["data"]
    hidden = on(mesh, (rows, length, size), dtype, "data", "context")
    embedding = on(mesh, (vocab_size, size), dtype, "tensor", "data")
    targets = on(mesh, (rows, length), "int32", "data", "context")
    return compiled(jax.grad(loss, (0, 1)), chip, mesh, hidden, embedding, targets)


def layers(chip, topology, length):
    """Two scanned layers, weights split over rows' devices and tokens over 8: there is something to
    compute while each array is gathered."""
    mesh = mesh_of(topology, 1, 8)
    D, F, N, K, H, L = 1024, 4096, 8, 2, 128, 2
    shapes = {
        "q": ((L, D, N, H), (None, "data")),
        "k": ((L, D, K, H), (None, "data")),
        "v": ((L, D, K, H), (None, "data")),
        "out": ((L, N, H, D), (None, None, None, "data")),
        "up": ((L, D, F), (None, "data")),
        "down": ((L, F, D), (None, None, "data")),
    }
    weights = {name: on(mesh, shape, "bfloat16", *axes) for name, (shape, axes) in shapes.items()}
    x_BSD = on(mesh, (mesh.shape["data"], length, D), "bfloat16", "data", "context")

    def run(weights, x_BSD, layout):
        plan = make_split_plan(layout, SPLIT, hardware=hardware(chip))

        def layer(x_BSD, w):
            q, k, v = (jnp.einsum("bsd,dnh->bsnh", x_BSD, w[name]) for name in "qkv")
            o_BSNH = split_attention(q, k, v, plan=plan, hardware=hardware(chip))
            x_BSD += jnp.einsum("bsnh,nhd->bsd", o_BSNH, w["out"])
            return x_BSD + jax.nn.silu(x_BSD @ w["up"]) @ w["down"], None

        return lax.scan(layer, x_BSD, weights)[0]

    return compiled(run, chip, mesh, weights, x_BSD, layout_of(mesh, length))


# --------------------------------------------------------------------------------------------------
# Arrays that are not there
# --------------------------------------------------------------------------------------------------


def mesh_of(topology, tensor, context, num_devices=None):
    """A mesh of a slice; what tensor and context leave is for rows."""
    devices = np.array(ahead.devices(topology)[:num_devices]).reshape(-1, tensor, context)
    return Mesh(devices, ("data", "tensor", "context"), axis_types=(AxisType.Auto,) * 3)


def on(mesh, shape, dtype, *axes):
    return jax.ShapeDtypeStruct(
        shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, PartitionSpec(*axes))
    )


def qkv(mesh, length, heads, kv_heads, head_size, value_size, dtype):
    rows = mesh.shape["data"]
    return [
        on(mesh, (rows, length, num, size), dtype, "data", "context", "tensor")
        for num, size in ((heads, head_size), (kv_heads, head_size), (kv_heads, value_size))
    ]


def layout_of(mesh, length):
    shape = mesh.shape["data"], length
    return TreeLayout(*[on(mesh, shape, "int32", "data", "context")] * 3)


# --------------------------------------------------------------------------------------------------
# Facts
# --------------------------------------------------------------------------------------------------


def compiled(f, chip, mesh, *arguments):
    """The bytes that one device needs and has; what the compiled text says of its collectives."""
    options = compiler_options(hardware(chip))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(f).lower(*arguments).compile(compiler_options=options)
    memory = program.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    facts = {"needed_bytes": needed, "hbm_bytes": hardware(chip).hbm_bytes}
    return facts | {"collectives": collectives(program.as_text())}


def collectives(text):
    """Of every collective that the program runs: its kind, the bytes it makes on a device, and
    whether it is in flight while something is computed.

    A scheduled module lists each computation in the order in which it runs. The TPU has collectives
    in flight in two forms: X-start ... X-done, and a fusion that is called async-collective-start
    ... -done, with fusions that compute and move it along between. Within a fusion the collective
    stands once more; only what the module's own computations run is looked at.
    """
    found, in_flight, in_fusion, kinds = [], {}, None, {}
    for line in text.splitlines():
        opened = re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", line)
        if opened:
            in_fusion = opened[1] if re.search("fus(ed|ion)", opened[1]) else None
        collective = re.search(rf" ({COLLECTIVE})(-start|-done)?\(", line)
        if in_fusion:
            if collective:
                kinds[in_fusion] = collective[1]
            continue
        name = re.match(r"\s*(?:ROOT )?%(\S+) = (.*?) [\w-]+\(", line)
        if not name:
            continue
        fused = re.match(r"async-collective-(start|done)([.\d]*)$", name[1])
        if "start" in (fused and fused[1], collective and (collective[2] or "")[1:]):
            called = re.search(r"calls=%([\w.-]+)", line)
            one = {
                "kind": kinds[called[1]] if fused else collective[1],
                "bytes": max(sizes(name[2])),
                "beside": [],
            }
            in_flight[fused[2] if fused else name[1]] = one
            found.append(one)
        elif fused:
            del in_flight[fused[2]]
        elif collective and collective[2] == "-done":
            del in_flight[re.search(r"-done\(%([\w.-]+)", line)[1]]
        elif collective:
            found.append({"kind": collective[1], "bytes": max(sizes(name[2])), "beside": []})
        elif re.search(r" (fusion|custom-call|convolution|dot|while)\(", line):
            for one in in_flight.values():
                one["beside"].append(name[1])
    assert not in_flight, f"{sorted(in_flight)} are started and not done"
    return found


COLLECTIVE = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def sizes(shapes):
    """The bytes of every array in the text of a type."""
    width = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return [
        width[dtype] * int(np.prod([int(n) for n in dims.split(",") if n]))
        for dtype, dims in arrays
        if dtype in width
    ]


def main():
    ahead.prepare()
    for line in sys.stdin:
        arguments = json.loads(line)
        program = globals()[arguments.pop("program")]
        try:
            answer = {"facts": program(**arguments)}
        except Exception as error:  # of the compiler, of any kind: the test's to judge
            answer = {"error": f"{type(error).__name__}: {error}"[:4000]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
