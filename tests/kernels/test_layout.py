import jax
import numpy as np
import pytest
from hypothesis import given, settings
from random_layouts import rows_of_forests

from agentx_kernels.hardware import hardware
from agentx_kernels.layout import ROOT, allow, causal, packed, prefix_tree


def test_a_causal_row_is_one_document_of_the_whole_length():
    for layout in (causal(2, 3), jax.jit(lambda: causal(2, 3))(), packed([[3], [3]], 3)):
        np.testing.assert_array_equal(layout.index, [[0, 1, 2]] * 2)
        np.testing.assert_array_equal(layout.subtree_end, [[3, 3, 3]] * 2)
        np.testing.assert_array_equal(layout.position, [[0, 1, 2]] * 2)
        assert {x.dtype for x in layout} == {np.dtype("int32")}


def test_packed_documents_start_again_at_position_zero_and_padding_is_seen_by_nobody():
    layout = packed([[2, 1], []], 4)
    np.testing.assert_array_equal(layout.index, [[0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(layout.subtree_end, [[2, 2, 3, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(layout.position, [[0, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(
        allow(layout)[0], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    )
    assert not allow(layout)[1].any()


def test_branches_of_a_tree_see_their_trunk_and_not_each_other():
    layout = prefix_tree([[(2, ROOT), (2, 0), (1, 0)]], 6)
    np.testing.assert_array_equal(layout.subtree_end, [[5, 5, 4, 4, 5, 0]])
    np.testing.assert_array_equal(layout.position, [[0, 1, 2, 3, 2, 0]])
    np.testing.assert_array_equal(
        allow(layout)[0],
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 0],
        ],
    )


def test_branches_of_an_empty_trunk_are_documents():
    tree = prefix_tree([[(0, ROOT), (2, 0), (1, 0)]], 3)
    documents = packed([[2, 1]], 3)
    for name in tree._fields:
        np.testing.assert_array_equal(getattr(tree, name), getattr(documents, name))


@settings(max_examples=100, deadline=None)
@given(rows_of_forests(2, 20, max_run=4))
def test_a_token_sees_exactly_itself_and_its_ancestors(rows):
    layout = prefix_tree(rows, 20)
    for row, runs in enumerate(rows):
        expected = np.zeros((20, 20), bool)
        ancestors_of_run: list[list[int]] = []
        column = 0
        for tokens, parent in runs:
            seen = [] if parent == ROOT else list(ancestors_of_run[parent])
            for _ in range(tokens):
                seen.append(column)
                expected[column, seen] = True
                assert layout.position[row, column] == len(seen) - 1
                column += 1
            ancestors_of_run.append(seen)
        np.testing.assert_array_equal(allow(layout)[row], expected)


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ([(2, ROOT), (3, 0)], "row 0 holds 5 tokens, more than its length of 4"),
        ([(1, ROOT), (-1, 0)], "run 1 of row 0 has -1 tokens"),
        ([(1, ROOT), (1, ROOT), (1, 0)], "run 2 of row 0 continues run 0.*depth-first"),
        ([(1, ROOT), (1, 1)], "run 1 of row 0 continues run 1"),
        ([(1, 3)], "run 0 of row 0 continues run 3"),
    ],
)
def test_runs_that_are_no_forest_are_refused_by_name(runs, sentence):
    with pytest.raises(ValueError, match=sentence):
        prefix_tree([runs], 4)


def test_hardware_is_looked_up_by_name_and_an_unknown_name_lists_the_known_ones():
    assert hardware("v5p").platform == "tpu"
    assert hardware("h100").platform == "gpu"
    assert hardware("cpu").platform == "cpu"
    with pytest.raises(
        ValueError, match=r"'v9' is not known.* v5e, v5p, v6e, tpu7x, h100, h200, cpu"
    ):
        hardware("v9")
