"""What a model is said to take, beside what arrays on a mesh of CPU devices really take."""

import re

import jax
import numpy as np
import pytest

from agentx.cli.main import main
from agentx.cli.models import load_model, model_table
from agentx.model import sizes
from agentx.model.config import ModelConfig
from agentx.model.moe_config import MoEConfig
from agentx.model.transformer import abstract_transformer
from agentx.optim import OptimizerConfig, make_optimizer
from agentx.sharding import MeshConfig, make_mesh
from agentx.step import abstract_state

DENSE = {
    "vocab_size": 96,
    "d_model": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 48,
    "max_length": 64,
    "window_pattern": (8, None),
}
MIXTURE = DENSE | {"num_dense_layers": 1, "moe": MoEConfig(4, 2, 24, "sigmoid")}
GIB = 2**30


def figures(table: str, row: str) -> list[str]:
    (line,) = re.findall(rf"^{re.escape(row)}  +(.+)$", table, re.MULTILINE)
    return re.split("  +", line)


def in_bytes(text: str) -> float:
    amount, unit = text.split()
    return float(amount.replace(",", "")) * {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB}[unit]


@pytest.mark.parametrize("settings", [DENSE, MIXTURE])
@pytest.mark.parametrize(
    "mesh", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "expert": 2}, {"data": 4, "context": 2}]
)
def test_a_device_holds_what_is_said(settings, mesh):
    config = ModelConfig(**settings, param_dtype="float32")
    optimizer = make_optimizer(OptimizerConfig(), num_steps=1)
    made = make_mesh(MeshConfig(**{"data": 1, **mesh}))
    state = abstract_state(abstract_transformer(config), optimizer, made)

    def held(tree) -> int:
        arrays = [jax.device_put(np.zeros(x.shape, x.dtype), x.sharding) for x in tree]
        return sum(x.addressable_shards[0].data.nbytes for x in arrays)

    table = model_table(config, mesh=",".join(f"{axis}={size}" for axis, size in mesh.items()))
    for row, tree in (("weights", state.params), ("Adam's moments", state.opt_state)):
        said = in_bytes(figures(table, row)[0])
        assert said == pytest.approx(held(jax.tree.leaves(tree)), abs=52)  # of 0.1 KiB one half


def test_llama_takes_what_can_be_worked_out_by_hand():
    config = load_model("llama3.1-8b")
    table = model_table(config, 8192, "fsdp=8,tensor=2")
    assert figures(table, "KV cache") == ["128.0 KiB a token"]  # 32 layers, 2 x 8 heads of 128
    # Weights of products: all but the norms and the embedding. 6 for each, and causal attention:
    # of 32 layers and 32 heads 2 x 128 numbers of (8192 + 1) / 2 tokens.
    products = 8_030_261_248 - 65 * 4096 - 128256 * 4096
    attention = 32 * 32 * 2 * 128 * 8193 / 2
    flops = 6 * (products + attention) / 1e9
    assert f"{flops:,.3f} GFLOP to train a token of a row of 8,192" in table
    # Norms are split over fsdp alone.
    norms = 65 * 4096
    params = (8_030_261_248 - norms) / 16 + norms / 8
    memory = figures(table, "all to train, but activations")
    assert memory == [f"{16 * params / GIB:.1f} GiB", f"{8 * params / GIB:.1f} GiB"]
    assert figures(table, "KV cache of a row of 8,192") == ["1.0 GiB", "512.0 MiB"]


@pytest.mark.parametrize(("length", "window"), [(7, None), (7, 3), (7, 7), (7, 9), (1, 1)])
def test_the_tokens_that_one_sees_are_counted(length, window):
    sees = np.tril(np.ones((length, length)))
    if window is not None:
        sees -= np.tril(sees, -window)
    assert sizes.mean_keys_seen(length, window) == sees.sum() / length


def test_latent_attention_caches_one_vector_whatever_the_tensor_axis():
    config = load_model("deepseek-v3-671b")
    assert sizes.cache_bytes_per_token(config) == 61 * (512 + 64) * 2
    for mesh in ("", "tensor=8"):
        assert figures(model_table(config, 1024, mesh), "KV cache of a row of 1,024")[1] == (
            f"{61 * 576 * 2 * 1024 / 2**20:.1f} MiB"
        )


def test_a_model_is_found_by_its_name_alone_and_shown(capsys):
    assert main(["model", "info", "qwen3-30b-a3b", "--length", "4096", "--mesh", "expert=8"]) == 0
    printed = capsys.readouterr().out
    assert figures(printed, "active") == ["3,353,032,704 for each token, all embeddings counted"]
    assert "memory of each of 8 devices" in printed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--mesh", "fsdp=3"], r"\['embed'\]: axis 'embed' has size 4096, which 3 devices"),
        (["--mesh", "tensor=16"], r".*axis 'kv_heads' has size 8, which 16 devices \(tensor\)"),
        (["--mesh", "tensr=2"], "--mesh tensr=2: there is no axis 'tensr'; did you mean 'tensor'"),
        (["--mesh", "fsdp=-1"], "--mesh fsdp=-1: fsdp wants a number of devices, as in fsdp=8"),
        (["--mesh", "fsdp"], "--mesh fsdp: fsdp wants a number of devices"),
        (["--length", "40961"], "--length 40961: the model has rows of 1 to 40960 tokens"),
        (["--length", "0"], "--length 0: the model has rows of 1 to 40960 tokens"),
    ],
)
def test_what_does_not_fit_is_named_in_one_sentence(options, sentence, capsys):
    assert main(["model", "info", "qwen3-8b", *options]) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(rf"error: {sentence}[^\n]*\n", printed), printed
