"""Attention, forward and backward, by the real compiler for TPUs that are not there.

That it compiles says that all shapes and layouts are legal, and that each kernel fits VMEM: the
compiler refuses what does not.
"""

import pytest
from in_flight import beside, num_bytes

# Each chip with another shape or feature, and one of a length that is no multiple of anything: what
# the kernels take is legal on any of them by the same rules. 8,192 tokens of 128 and 256 bf16 are
# compiled for all of them in test_aot_schedule.py.
SHAPES = [
    ("v5e", 131_001, {"head_size": 64, "value_size": 64}),
    ("v5p", 2**17, {"window": 4096, "softcap": 30.0, "sinks": True}),
    ("v6e", 2**17, {"head_size": 192}),
    ("tpu7x", 2**17, {"head_size": 256, "value_size": 256, "dtype": "float32"}),
]


@pytest.mark.parametrize(("chip", "length", "options"), SHAPES)
def test_attention_of_128k_tokens_compiles_and_fits_one_device(facts, chip, length, options):
    assert fits(facts("attention", chip=chip, length=length, **options))


# An 8B model's layers; those of 1,024 for the chip whose memory holds no more of a million tokens.
SMALL = {"size": 1024, "heads": 8, "kv_heads": 8}


@pytest.mark.parametrize(
    ("chip", "topology", "ulysses", "ring", "shape", "kinds"),
    [
        ("v5e", "v5e:4x4", 1, True, SMALL, {"collective-permute"}),
        ("v5p", "v5p:4x4x4", 1, False, {}, {"all-gather", "reduce-scatter"}),
        ("v6e", "v6e:4x8", 8, False, {}, {"all-to-all"}),
        ("tpu7x", "tpu7x:4x4x4", 8, False, {}, {"all-to-all"}),
    ],
)
def test_layers_of_a_million_tokens_fit_a_slice_and_move_data_while_they_compute(
    facts, chip, topology, ulysses, ring, shape, kinds
):
    """Each chip with another strategy for the tokens (v5p exchanges heads in test_aot_slice.py, at
    131,072); weights are gathered and their gradients
    summed up on all of them. Two thirds of all that moves have company, and of what is named."""
    split = {"ulysses": ulysses, "ring": ring}
    compiled = facts("layers", chip=chip, topology=topology, length=2**20, **split, **shape)
    assert fits(compiled)
    collectives = compiled["collectives"]
    share = num_bytes(beside(collectives)) / num_bytes(collectives)
    print(f"{chip}: {100 * share:.0f} % of the bytes move while something is computed")
    assert share > 2 / 3, collectives
    for kind in kinds:
        of_kind = [each for each in collectives if each["kind"] == kind]
        assert num_bytes(beside(of_kind)) > num_bytes(of_kind) * 2 / 3, of_kind
    if ring:  # what travels does so while attention is computed
        travels = [each for each in collectives if each["kind"] == "collective-permute"]
        attended = [each for each in travels if any("attention" in name for name in each["beside"])]
        assert num_bytes(attended) > num_bytes(travels) / 2, travels


def fits(compiled):
    return compiled["needed_bytes"] <= compiled["hbm_bytes"]
