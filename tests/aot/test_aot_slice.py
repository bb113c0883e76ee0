"""The trainer's mesh of a slice that is not there, and the train step of an 8B model, compiled for
one by the real compiler."""

import pytest
from in_flight import beside, num_bytes


@pytest.mark.parametrize(
    ("topology", "sizes"),
    [
        ("v5p:2x4x4", {"fsdp": 4, "context": 8}),
        ("v5p:4x4x4", {"fsdp": 8, "context": 8}),  # two sides of 4, and halves of them
        ("v6e:8x8", {"fsdp": 4, "context": 16}),
        ("v6e:16x16", {"fsdp": 32, "context": 8}),
    ],
)
def test_a_mesh_may_have_axes_that_are_parts_of_a_slice_s(facts, topology, sizes):
    made = facts("mesh_of_a_slice", topology=topology, **sizes)
    assert made["shape"] == sizes
    assert len(set(map(tuple, made["coordinates"]))) == sizes["fsdp"] * sizes["context"]


def test_the_step_of_an_8b_model_moves_data_while_it_computes_on_a_v5p_64(facts):
    """32 chips, 2x4x4: weights lie over all of them, tokens over 2x4.

    Two thirds of each kind have company: what is gathered and permuted are weights, what is
    scattered the gradient of one, what is exchanged heads.
    """
    compiled = facts("whole_step", topology="v5p:2x4x4", context=8, length=2**17)
    assert compiled["needed_bytes"] <= compiled["hbm_bytes"]
    collectives = compiled["collectives"]
    for kind in ("all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
        of_kind = [each for each in collectives if each["kind"] == kind]
        share = num_bytes(beside(of_kind)) / num_bytes(of_kind)
        print(f"{kind}: {100 * share:.0f} % of the bytes move while something is computed")
        assert share > 2 / 3, of_kind
    # A sum of all that all get moves twice what a scattered one does, and here none has company.
    sums = [each for each in collectives if each["kind"] == "all-reduce"]
    assert num_bytes(sums) < num_bytes(collectives) / 1000, sums
