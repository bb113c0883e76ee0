"""Log-probabilities, forward and backward, by the real compiler for TPUs that are not there."""

import itertools

import pytest
from in_flight import beside, num_bytes

# Each chip with another vocabulary, width and type: what is legal on one is on all, and what
# fits the VMEM of those with the least, v5p and tpu7x, fits the others.
SHAPES = [
    ("v5e", "v5e:2x2", {"size": 896, "vocab_size": 151_936, "dtype": "float32"}),
    ("v5p", "v5p:2x2x1", {"size": 5376, "vocab_size": 262_144}),
    ("v6e", "v6e:2x2", {"size": 2048, "vocab_size": 32_000}),
    ("tpu7x", "tpu7x:2x2x1", {"size": 4096, "vocab_size": 128_256}),
]
# Sixteen devices of each chip.
SLICES = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x4", "v6e": "v6e:4x4", "tpu7x": "tpu7x:2x2x2"}


@pytest.mark.parametrize(("chip", "topology", "shape"), SHAPES)
def test_log_probabilities_of_8k_tokens_compile_and_fit(facts, chip, topology, shape):
    compiled = facts("logprobs", chip=chip, topology=topology, length=8192, **shape)
    assert compiled["needed_bytes"] <= compiled["hbm_bytes"]
    assert not compiled["collectives"]


@pytest.mark.parametrize(
    ("chip", "length"),
    # Of v5p those of 131,072 are in the step of test_aot_slice.py.
    [case for case in itertools.product(SLICES, (2**17, 2**20)) if case != ("v5p", 2**17)],
)
def test_log_probabilities_of_long_rows_fit_a_slice_and_move_data_while_they_compute(
    facts, chip, length
):
    """Tokens over eight devices, as D of the embedding, and the vocabulary over two.

    The embedding is gathered beside the product before it. The gradient of hidden is summed up
    beside a piece of that of the embedding, each piece of which is beside the next. Three things
    are waited for: the gradient of hidden, once it is summed up, to come from the devices of the
    vocabulary; the last piece; and on v5e every sum.
    """
    shape = {"size": 4096, "vocab_size": 128_256, "context": 8, "tensor": 2}
    compiled = facts("logprobs", chip=chip, topology=SLICES[chip], length=length, **shape)
    assert compiled["needed_bytes"] <= compiled["hbm_bytes"]
    collectives = compiled["collectives"]
    share = num_bytes(beside(collectives)) / num_bytes(collectives)
    print(f"{chip}, {length}: {100 * share:.0f} % of the bytes move while something is computed")
    sizes = {each["bytes"] for each in beside(collectives) if each["kind"] == "all-gather"}
    assert 2 * shape["size"] * shape["vocab_size"] // shape["tensor"] in sizes, collectives
    sums = [each for each in collectives if each["kind"] == "reduce-scatter"]
    assert sums, collectives
    if chip != "v5e":
        assert num_bytes(beside(sums)) > num_bytes(sums) / 2, sums
        assert share > 2 / 3, collectives
