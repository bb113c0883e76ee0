"""The whole train step of an 8B model, by the real compiler for a slice that is not there."""

from in_flight import beside, num_bytes


def test_the_step_of_an_8b_model_moves_data_while_it_computes_on_a_v5p_64(facts):
    """32 chips, whose axes alone are none of the mesh's: weights lie over 2x4x4 of them, tokens over
    2x4. Of all that moves two thirds have company, and of each kind: what is gathered are weights,
    what is scattered their gradients, what is exchanged heads."""
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
