"""Log-probabilities, forward and backward, by the real compiler for TPUs that are not there."""

import pytest

# Each chip with another vocabulary, width and type: what is legal on one is on all, and what
# fits the VMEM of those with the least, v5p and tpu7x, fits the others.
SHAPES = [
    ("v5e", "v5e:2x2", {"size": 896, "vocab_size": 151_936, "dtype": "float32"}),
    ("v5p", "v5p:2x2x1", {"size": 5376, "vocab_size": 262_144}),
    ("v6e", "v6e:2x2", {"size": 2048, "vocab_size": 32_000}),
    ("tpu7x", "tpu7x:2x2x1", {"size": 4096, "vocab_size": 128_256}),
]


@pytest.mark.parametrize(("chip", "topology", "shape"), SHAPES)
def test_log_probabilities_of_8k_tokens_compile_and_fit(facts, chip, topology, shape):
    compiled = facts("logprobs", chip=chip, topology=topology, length=8192, **shape)
    assert compiled["needed_bytes"] <= compiled["hbm_bytes"]
    assert not compiled["collectives"]


@pytest.mark.parametrize("length", [2**17, 2**20])
def test_log_probabilities_of_long_rows_compile_and_fit_a_slice(facts, length):
    """Tokens over eight devices, the vocabulary over two, and D over the 32 of rows and tokens."""
    shape = {"size": 4096, "vocab_size": 128_256, "context": 8, "tensor": 2}
    compiled = facts("logprobs", chip="v5p", topology="v5p:4x4x4", length=length, **shape)
    assert compiled["needed_bytes"] <= compiled["hbm_bytes"]
    assert {"all-reduce", "all-gather"} <= {each["kind"] for each in compiled["collectives"]}
