"""Programs as they are written for others: loaded and run where agentx cannot be imported."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import flatbuffers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from agentx.interop.stablehlo import export_stablehlo
from agentx.model.config import LatentConfig, ModelConfig
from agentx.model.moe_config import MoEConfig
from agentx.model.transformer import abstract_transformer
from agentx_kernels import ahead
from agentx_kernels.layout import causal
from agentx_kernels.logits import capped

DOCUMENT = Path(__file__).parent.parent / "docs" / "stablehlo.md"
SIZES = {
    "vocab_size": 61,
    "d_model": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 48,
    "max_length": 32,
}
MODELS = {
    "dense": ModelConfig(**SIZES),
    "bfloat16": ModelConfig(**SIZES, dtype="bfloat16"),
    "windows, caps and both norms": ModelConfig(
        **SIZES,
        logit_softcap=0.5,
        attention_softcap=2.0,
        window_pattern=(4, None),
        rope_pattern=("local", "global"),
        norms="both",
        norm_plus_one=True,
    ),
    "experts and sinks": ModelConfig(
        **SIZES, sinks=True, moe=MoEConfig(4, 2, 24, "softmax_of_chosen", expert_bias=True)
    ),
    "latent attention": ModelConfig(
        **{**SIZES, "num_kv_heads": 4},
        qk_norm="none",
        latent=LatentConfig(16, 12, 4, 4, 8),
        num_dense_layers=1,
        moe=MoEConfig(4, 2, 24, "sigmoid", num_groups=2, shared_d_ff=24),
    ),
}
SHAPES = {"rows": 2, "tokens": 7, "columns": 16}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 1, 4]]
STEPS = 6

# A process of its own, without site and so without the links that installed agentx; what comes from
# where it would be found is refused.
ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("agentx", "agentx_kernels"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.path += {paths}
{loader}
import numpy as np
prompts, steps = {prompts}, {steps}
for folder in {folders}:
    manifest, params, cache, programs = load(folder)
    padded = [p + [0] * (manifest["tokens"] - len(p)) for p in prompts]
    lengths = jnp.array([len(p) for p in prompts], jnp.int32)
    logits, cache = programs["prefill"](params, jnp.array(padded, jnp.int32), lengths, cache)
    seen, chosen = [logits], []
    for step in range(steps):
        chosen.append(seen[-1].argmax(-1).astype(jnp.int32))
        logits, cache = programs["decode"](params, chosen[-1], lengths + step, cache)
        seen.append(logits)
    np.savez(folder + "/seen.npz", chosen=np.stack(chosen, 1), logits=np.stack(seen, 1))
assert not [m for m in sys.modules if m.startswith("agentx")]
"""

FOR_TPU = """
from agentx_kernels import ahead
ahead.prepare()
import json
from pathlib import Path
import jax
from jax import export
folder = Path({folder!r})
manifest = json.loads((folder / "manifest.json").read_text())
device = ahead.devices(ahead.SMALLEST["v5e"])[0]
on_it = jax.sharding.SingleDeviceSharding(device)
def of(x):
    return jax.ShapeDtypeStruct(tuple(x["shape"]), x["dtype"], sharding=on_it)
params = {{x["name"]: of(x) for x in manifest["params"]}}
cache = {{name: [of(x) for x in arrays] for name, arrays in manifest["cache"].items()}}
in_place = []
for about in manifest["programs"].values():
    exported = export.deserialize(bytearray((folder / about["file"]).read_bytes()))
    inputs = [of(about[name]) for name in about["inputs"][1:3]]
    lowered = jax.jit(exported.call, donate_argnums=3).lower(params, *inputs, cache)
    in_place.append(lowered.compile().memory_analysis().alias_size_in_bytes)
print(json.dumps(in_place))
"""


@functools.cache
def params_of(config: ModelConfig) -> nnx.State:
    """Random, norms and biases too, so that each of them matters."""
    rng = np.random.default_rng(0)
    params = nnx.state(abstract_transformer(config))
    return jax.tree.map(lambda x: jnp.array(rng.normal(0, 0.3, x.shape), x.dtype), params)


def our_logits(config: ModelConfig, params: nnx.State, rows: list[list[int]]) -> list[np.ndarray]:
    """f32[S, V] of each row, by the forward pass that training takes."""
    graphdef = nnx.graphdef(abstract_transformer(config))

    @jax.jit
    def of_row(tokens_1S):
        model = nnx.merge(graphdef, params)
        hidden = model(tokens_1S, causal(*tokens_1S.shape)).hidden[0]
        return capped(hidden @ model.unembedding().T, config.logit_softcap)

    # Of one length: what follows a token has no part in its logits.
    length = max(map(len, rows))
    return [np.asarray(of_row(jnp.array([row + [0] * (length - len(row))]))) for row in rows]


def loader() -> str:
    """The one that the document has."""
    text = DOCUMENT.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def loaded_here() -> dict[str, Any]:
    scope: dict[str, Any] = {}
    exec(loader(), scope)
    return scope


@pytest.fixture(scope="module")
def seen_alone(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    """What a process without agentx saw of every model: chosen [B, steps], logits [B, ..., V]."""
    folders = {}
    for number, (name, config) in enumerate(MODELS.items()):
        out = tmp_path_factory.mktemp("stablehlo") / str(number)
        dtype = config.dtype  # of the parameters too
        folders[name] = export_stablehlo(params_of(config), config, out, **SHAPES, dtype=dtype)
    code = ALONE.format(
        loader=loader(),
        paths=sorted({str(Path(m.__file__).parents[1]) for m in (jax, np, flatbuffers)}),
        folders=list(map(str, folders.values())),
        prompts=PROMPTS,
        steps=STEPS,
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: dict(np.load(folder / "seen.npz")) for name, folder in folders.items()}


@pytest.mark.parametrize("name", MODELS)
def test_without_agentx_the_logits_are_those_of_the_forward_pass(name, seen_alone):
    config, seen = MODELS[name], seen_alone[name]
    rows = [p + chosen for p, chosen in zip(PROMPTS, seen["chosen"].tolist(), strict=True)]
    for prompt, logits, ours in zip(
        PROMPTS, seen["logits"], our_logits(config, params_of(config), rows), strict=True
    ):
        ours = ours[len(prompt) - 1 :][: STEPS + 1].astype(np.float32)
        # bfloat16 has 8 bits, and parameters that are stored in it are rounded once more.
        error = 2e-5 if config.dtype == "float32" else 0.05 * np.abs(ours).max()
        np.testing.assert_allclose(logits, ours, rtol=0, atol=error)


def test_the_loader_of_the_document_generates(tmp_path):
    config = MODELS["dense"]
    params = params_of(config)
    folder = export_stablehlo(params, config, tmp_path / "out", **SHAPES)
    chosen = loaded_here()["generate"](folder, PROMPTS, STEPS)
    rows = [prompt + new for prompt, new in zip(PROMPTS, chosen, strict=True)]
    for prompt, new, logits in zip(PROMPTS, chosen, our_logits(config, params, rows), strict=True):
        assert logits.argmax(-1)[len(prompt) - 1 :][:STEPS].tolist() == new


def test_the_manifest_says_what_the_programs_take(tmp_path):
    config = MODELS["windows, caps and both norms"]
    folder = export_stablehlo(params_of(config), config, tmp_path / "out", **SHAPES)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["jax_version"] == jax.__version__
    assert manifest["model"]["window_pattern"] == [4, None]
    params = {x["name"]: jax.ShapeDtypeStruct(x["shape"], x["dtype"]) for x in manifest["params"]}
    assert list(params) == sorted(params)
    cache = {
        name: [jax.ShapeDtypeStruct(x["shape"], x["dtype"]) for x in arrays]
        for name, arrays in manifest["cache"].items()
    }
    for name, third in (("prefill", "tokens"), ("decode", "token")):
        about = manifest["programs"][name]
        exported = export.deserialize(bytearray((folder / about["file"]).read_bytes()))
        assert exported.platforms == ("cpu", "tpu", "cuda") == tuple(manifest["platforms"])
        assert about["inputs"] == ["params", third, "lengths", "cache"]
        inputs = [
            jax.ShapeDtypeStruct(about[x]["shape"], about[x]["dtype"]) for x in (third, "lengths")
        ]
        logits, after = jax.eval_shape(exported.call, params, *inputs, cache)
        assert (list(logits.shape), str(logits.dtype)) == tuple(about["logits"].values())
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == (
            jax.tree.map(lambda x: (tuple(x.shape), x.dtype), cache)
        )


def test_a_row_that_is_full_does_not_keep_its_token(tmp_path):
    config = MODELS["dense"]
    shapes = {"rows": 1, "tokens": 4, "columns": 4}
    folder = export_stablehlo(params_of(config), config, tmp_path / "out", **shapes)
    _, params, cache, programs = loaded_here()["load"](folder)
    tokens, lengths = jnp.array([[1, 2, 3, 4]], jnp.int32), jnp.array([4], jnp.int32)
    _, cache = programs["prefill"](params, tokens, lengths, cache)
    before = jax.tree.map(np.array, cache)
    _, cache = programs["decode"](params, jnp.array([5], jnp.int32), lengths, cache)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, cache))


@pytest.mark.skipif(ahead.find_libtpu() is None, reason="there is no libtpu, the TPU compiler")
def test_the_compiler_for_tpus_takes_the_programs(tmp_path):
    config = MODELS["experts and sinks"]
    folder = export_stablehlo(params_of(config), config, tmp_path / "out", **SHAPES)
    code = FOR_TPU.format(folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The cache is changed in place, which may be padded.
    columns = SHAPES["rows"] * SHAPES["columns"]
    cache = 2 * config.num_layers * columns * config.num_kv_heads * config.head_dim * 4
    assert all(in_place >= cache for in_place in json.loads(done.stdout.splitlines()[-1]))


def test_what_does_not_fit_is_named(tmp_path):
    config = MODELS["dense"]
    params = params_of(config)
    for wrong in ({"rows": 0}, {"tokens": 17}, {"columns": 33, "tokens": 33}):
        with pytest.raises(ValueError, match="rows must be 1 or more, tokens from 1 to"):
            export_stablehlo(params, config, tmp_path / "out", **{**SHAPES, **wrong})
    with pytest.raises(ValueError, match="choose float32 or bfloat16"):
        export_stablehlo(params, config, tmp_path / "out", **SHAPES, dtype="int8")
    other = dataclasses.replace(config, d_ff=40)
    with pytest.raises(ValueError, match=r"config: layers\.0\.mlp\.w_down is \(3, 48, 32\)"):
        export_stablehlo(params, other, tmp_path / "out", **SHAPES)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        export_stablehlo(params, config, tmp_path / "full", **SHAPES)
    assert not (tmp_path / "out").exists()
