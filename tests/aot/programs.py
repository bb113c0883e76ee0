"""Programs that are compiled for TPUs which are not there, and what the tests read of them.

A process of its own, for it loads libtpu. A line of JSON comes in, {"program": name of a function
below, ...its arguments}; one goes out, {"facts": {...}} or {"error": what the compiler said}.

A new program is a function here that returns what `facts_of` does, and a test that asks for it.

Legend: B rows, S tokens a row, N heads, K KV heads, H head size of q and k, Hv of v, D model,
L layers, V vocabulary.
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


def logprobs(chip, topology, length, size, vocab_size, context=1, tensor=1, dtype="bfloat16"):
    """Log-probabilities forward and backward, over a slice or over one device if all axes are 1.

    Over a slice of hidden states that a product comes before, as a layer would: what goes between
    devices has something to be beside.
    """
    is_split = context * tensor > 1
    mesh = mesh_of(topology, tensor, context, num_devices=None if is_split else 1)
    embed = "data", "context"
    split = VocabularySplit(rows=("data",), tokens="context", vocab="tensor", embed=embed)

    def loss(x, w, embedding, targets):
        logprob, _ = token_logprobs(
            x + jnp.einsum("bsd,de->bse", x, w) if is_split else x,
            embedding,
            targets,
            hardware=hardware(chip),
            softcap=30.0,
            split=split if is_split else None,
        )
        return logprob.sum()

    rows = mesh.shape["data"]
    arrays = (
        on(mesh, (rows, length, size), dtype, "data", "context"),
        on(mesh, (size, size), dtype, None, embed),
        on(mesh, (vocab_size, size), dtype, "tensor", embed),
        on(mesh, (rows, length), "int32", "data", "context"),
    )
    placed = tuple(x.sharding for x in arrays[:3])
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=placed)
    return compiled(gradient, chip, mesh, *arrays)


def layers(chip, topology, length, ulysses, ring, size=4096, heads=32, kv_heads=8):
    """Two scanned layers of attention forward and backward, weights split over all devices and
    tokens over 8: there is something to compute while each array is on its way. By default of the
    shape of an 8B model's."""
    mesh = mesh_of(topology, 1, 8)
    split = dataclasses.replace(SPLIT, ulysses=ulysses, ring=ring)
    D, N, K, H, L = size, heads, kv_heads, 128, 2
    embed = "data", "context"
    shapes = {
        "q": ((L, D, N, H), (None, embed)),
        "k": ((L, D, K, H), (None, embed)),
        "v": ((L, D, K, H), (None, embed)),
        "out": ((L, N, H, D), (None, None, None, embed)),
    }
    weights = {name: on(mesh, shape, "bfloat16", *axes) for name, (shape, axes) in shapes.items()}
    x_BSD = on(mesh, (mesh.shape["data"], length, D), "bfloat16", "data", "context")

    def loss(weights, x_BSD, layout):
        plan = make_split_plan(layout, split, hardware=hardware(chip))

        @jax.checkpoint  # as the trainer does for long rows
        def layer(x_BSD, w):
            q, k, v = (jnp.einsum("bsd,dnh->bsnh", x_BSD, w[name]) for name in "qkv")
            o_BSNH = split_attention(q, k, v, plan=plan, hardware=hardware(chip))
            return x_BSD + jnp.einsum("bsnh,nhd->bsd", o_BSNH, w["out"]), None

        return lax.scan(layer, x_BSD, weights)[0].astype(jnp.float32).sum()

    placed = {name: x.sharding for name, x in weights.items()}
    gradient = jax.jit(jax.grad(loss), out_shardings=placed)
    return compiled(gradient, chip, mesh, weights, x_BSD, layout_of(mesh, length))


def train_step(chip, **arguments):
    """The train step of a published shape, made smaller; arguments: see `steps.train_step`."""
    from steps import train_step  # with all of agentx, which takes seconds: not for the others

    return facts_of(sooner(train_step(chip, **arguments).compile), chip)


def mesh_of_a_slice(topology, **sizes):
    """The trainer's mesh of it: the coordinates of its devices, by the mesh's axes."""
    from agentx.sharding import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(data=1, **sizes), ahead.devices(topology))
    return {
        "shape": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "coordinates": [device.coords for device in mesh.devices.flat],
    }


def whole_step(topology, context, length):
    """The train step whose memory benchmarks/memory.py prints."""
    from benchmarks.memory import compile_step  # with all of agentx, as above

    return facts_of(compile_step(topology, context, length), topology.partition(":")[0])


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
    """The facts of a function of arrays that lie on a mesh."""
    options = compiler_options(hardware(chip))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(f).lower(*arguments)
    if mesh.size == 1:
        return facts_of(sooner(lowered.compile, compiler_options=options), chip)
    return facts_of(lowered.compile(compiler_options=options), chip)


def sooner(compile, **options):
    """compile(**options) by a compiler that takes no pains over speed: it is done in half the time,
    and what is legal and which kernels there are is the same."""
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    try:
        return compile(**options)
    finally:
        jax.config.update("jax_exec_time_optimization_effort", 0.0)


def facts_of(program, chip):
    """The bytes that one device needs and has; what the compiled text says of its kernels, how many
    there are of each, and of its collectives."""
    memory = program.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    facts = {"needed_bytes": needed, "hbm_bytes": hardware(chip).hbm_bytes}
    text = program.as_text()
    return facts | {"kernels": kernels(text), "collectives": collectives(text)}


def kernels(text):
    calls = re.findall(r'%([\w-]+)\S* = .*custom_call_target="tpu_custom_call"', text)
    return {name: calls.count(name) for name in sorted(set(calls))}


def collectives(text):
    """Of every collective that the program runs: its kind, the bytes that go in or come out on a
    device, whichever are more, and what is computed while it is in flight: kernels (but `delayed`,
    which does nothing), loops, and fusions with a product in them.

    A scheduled module lists each computation in the order in which it runs. The TPU has collectives
    in flight in three forms: X-start ... X-done; call-start ... call-done of a computation that the
    sparse cores run; and a fusion that is called async-collective-start ... -done, with fusions
    that compute and move it along between. Within what is called the collective stands once more;
    only what the module's own computations run is looked at.
    """
    called, products, run = _computations(text)
    found, in_flight, made = [], {}, {}
    for line in run:
        name = re.match(r"\s*(?:ROOT )?%(\S+) = (.*?) ([\w-]+)\(", line)
        if not name:
            continue
        name, shapes, operation = name.groups()
        made[name] = sum(sizes(shapes))
        callee = re.search(r"(?:calls|to_apply)=%([\w.-]+)", line)
        kind = re.match(COLLECTIVE, operation)
        fused = re.match(r"async-collective-(start|done)([.\d]*)$", name)
        if kind:
            kind = kind[0]
        elif fused or operation == "call-start" or name.startswith("all-reduce-scatter"):
            kind = called.get(callee[1])
        if operation.endswith("-done") and not fused:
            in_flight.pop(re.search(r"\(%([\w.-]+)", line)[1], None)  # a copy's is not here
        elif fused and fused[1] == "done":
            del in_flight[fused[2]]
        elif kind:
            is_started = bool(fused) or operation.endswith("-start")
            # One that is started lists what goes in beside what comes out.
            size = (max if is_started else sum)(sizes(shapes))
            if not is_started:
                taken = re.findall(r"%([\w.-]+)", line.partition(f" {operation}(")[2].split(")")[0])
                size = max(size, *(made.get(each, 0) for each in taken))
            one = {"kind": kind, "bytes": size, "beside": []}
            found.append(one)
            if is_started:
                in_flight[fused[2] if fused else name] = one
        elif (
            operation in ("while", "convolution", "dot")
            or ('custom_call_target="tpu_custom_call"' in line and not name.startswith("delayed"))
            or (operation == "fusion" and callee[1] in products)
        ):
            for one in in_flight.values():
                one["beside"].append(name)
    assert not in_flight, f"{sorted(in_flight)} are started and not done"
    return found


def _computations(text):
    """Of the computations that a fusion or the sparse cores run, by name: the collective of each,
    and which have a matrix product in them; and the lines of all other computations."""
    called, products, run, name, lines = {}, set(), [], None, []
    for line in text.splitlines():
        opened = re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", line)
        if opened:
            name, lines = opened[1], []
        elif not line.startswith("}"):
            lines.append(line)
        elif "execution_thread" in line or re.search("fus(ed|ion)", name):
            kinds = re.findall(rf" ({COLLECTIVE})(?:-start)?\(", "\n".join(lines))
            called |= dict.fromkeys([name] if kinds else [], *kinds[:1])
            callees = re.findall(r"calls=%([\w.-]+)", "\n".join(lines))
            if products & set(callees) or re.search(r" (convolution|dot)\(", "\n".join(lines)):
                products.add(name)
        else:
            run += lines
    return called, products, run


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
