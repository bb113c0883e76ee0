"""The train step of families that differ from Llama's, by the real compiler for a TPU that is not
there.

Published shapes with fewer layers, heads and experts, narrower ones, and a small vocabulary. What
is of the family is as published: sizes of a head and of latent attention, windows, sinks, biases,
norms, how a router chooses. Of so few tokens a window leaves none out, but the kernels have it; and
their blocks are small, which compile in a third of the time: test_aot_attention.py and
test_aot_schedule.py have large ones of the same sizes of heads.
"""

import pytest

SMALL = {"vocab_size": 1024, "d_model": 256, "d_ff": 256, "length": 512}
SHAPES = {
    "gemma3-1b": {
        "num_layers": 2,
        "window_pattern": [512, None],
        "rope_pattern": ["local", "global"],
    },
    # Like the published 2,880, its widths are no multiple of the 128 lanes.
    "gpt-oss-20b": {
        "num_layers": 1,
        "num_heads": 8,
        "num_kv_heads": 1,
        "d_model": 320,
        "moe": {"num_experts": 8, "d_ff": 320},
    },
    "deepseek-v3-671b": {
        "num_layers": 1,
        "num_dense_layers": 0,
        "num_heads": 2,
        "num_kv_heads": 2,
        "moe": {"num_experts": 32, "d_ff": 256, "shared_d_ff": 256},
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_train_step_compiles_with_all_kernels_and_fits(facts, shape):
    changes = SMALL | SHAPES[shape]
    compiled = facts("train_step", chip="v5p", shape=shape, **changes)
    assert compiled["needed_bytes"] <= compiled["hbm_bytes"]
    kernels = compiled["kernels"]
    # The layers run again in the backward pass.
    assert kernels["attention_forward"] == 2 * changes["num_layers"]
    assert kernels["attention_backward"] == changes["num_layers"]
    assert {"logprob_statistics", "logprob_of_hidden", "logprob_of_embedding"} <= set(kernels)
    # Of an expert three products: forward, again, and their gradients by rows; biases take none.
    num_products = 9 if "moe" in changes else 0
    assert kernels.get("ragged-dot-none", 0) == num_products * changes["num_layers"]
