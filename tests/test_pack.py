import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentx.data.objectives import Example
from agentx.data.pack import (
    best_fit,
    pack_groups,
    pack_rows,
    rows_needed,
)
from agentx.trajectory import Origin, Role, Span, Trajectory
from agentx_kernels.layout import allow


def example(ids, weights=None):
    weights = [0.0] + [1.0] * (len(ids) - 1) if weights is None else weights
    fields = np.zeros((3, len(ids)), np.uint8)
    return Example(np.array(ids, np.int32), np.array(weights, np.float32), *fields)


def prompt_span(ids):
    return Span(Role.USER, np.array(ids, np.int32))


def sampled(ids, logprobs=None):
    values = np.array([-float(i) for i in ids] if logprobs is None else logprobs, np.float32)
    return Span(Role.ANSWER, np.array(ids, np.int32), Origin.SAMPLED, logprobs=values)


def observed(ids):
    return Span(Role.OBSERVATION, np.array(ids, np.int32), Origin.ENVIRONMENT)


def rollout(prompt, *spans):
    return Trajectory([prompt_span(prompt), *spans], task_id="t", num_prompt_spans=1)


# --------------------------------------------------------------------------------------------------
# Examples
# --------------------------------------------------------------------------------------------------


def test_a_row_of_two_documents_is_what_the_docstring_shows():
    a, b, c, x, y = 11, 12, 13, 21, 22
    batch = pack_rows([[example([a, b, c], [0, 1, 2]), example([x, y], [0, 3])]], 4)
    assert batch.tokens.tolist() == [[a, b, x, 0]]
    assert batch.targets.tolist() == [[b, c, y, 0]]
    assert batch.weights.tolist() == [[1, 2, 3, 0]]
    assert batch.layout.subtree_end.tolist() == [[2, 2, 3, 0]]
    assert batch.layout.position.tolist() == [[0, 1, 0, 0]]
    assert batch.from_policy is None
    assert (batch.tokens.dtype, batch.weights.dtype) == (np.int32, np.float32)


def test_no_target_crosses_from_one_document_to_the_next():
    batch = pack_rows([[example([1, 2, 3]), example([4, 5, 6]), example([7, 8])]], 6)
    successor = {1: 2, 2: 3, 4: 5, 5: 6, 7: 8}
    for token, target, weight in zip(*(x[0] for x in batch[:3]), strict=True):
        assert weight == float(token in successor)
        assert target == successor.get(token, 0)


def test_a_target_without_weight_is_zero():
    batch = pack_rows([[example([5, 6, 7], [0, 0, 1])]], 3)
    assert batch.targets.tolist() == [[0, 7, 0]]


def test_a_row_that_is_too_full_is_refused():
    with pytest.raises(ValueError, match="row 0 holds 5 tokens, more than its length of 4"):
        pack_rows([[example([1, 2, 3, 4]), example([1, 2, 3])]], 4)


def test_best_fit_puts_each_item_where_it_leaves_the_least_room():
    assert best_fit([2, 3, 5, 2], 5) == [[2], [1, 0], [3]]
    assert best_fit([], 5) == []
    with pytest.raises(ValueError, match="item 1 takes 6 places, more than the 5 of a row"):
        best_fit([1, 6], 5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=60), st.integers(20, 40))
def test_best_fit_loses_nothing_and_overfills_nothing(sizes, capacity):
    bins = best_fit(sizes, capacity)
    assert sorted(i for items in bins for i in items) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in items) <= capacity for items in bins)
    # Two bins that are not more than half full could have been one.
    assert sum(2 * sum(sizes[i] for i in items) <= capacity for items in bins) <= 1


def test_missing_examples_leave_empty_rows():
    batch = pack_rows([[example([1, 2])], [], []], 4)
    assert batch.weights.sum(axis=1).tolist() == [1, 0, 0]
    assert batch.layout.subtree_end[1:].sum() == 0


# --------------------------------------------------------------------------------------------------
# Groups
# --------------------------------------------------------------------------------------------------


def test_a_group_is_the_tree_that_the_docstring_shows():
    p, q, a, b, c = 1, 2, 11, 12, 13
    group = [
        rollout([p, q], sampled([a, b], [-0.5, -0.25])),
        rollout([p, q], sampled([c], [-1.5])),
    ]
    batch = pack_groups([group], [[1.0, -1.0]], rows=1, length=5)
    assert batch.tokens.tolist() == [[p, q, a, q, 0]]
    assert batch.targets.tolist() == [[0, a, b, c, 0]]
    assert batch.weights.tolist() == [[0, 1, 1, 1, 0]]
    assert batch.from_policy.tolist() == [[0, 1, 1, 1, 0]]
    assert batch.advantages.tolist() == [[0, 1, 1, -1, 0]]
    assert batch.sampler_logprobs.tolist() == [[0, -0.5, -0.25, -1.5, 0]]
    assert batch.layout.position.tolist() == [[0, 1, 2, 1, 0]]
    sees = allow(batch.layout)[0]
    assert sees[2].tolist() == [True, True, True, False, False]
    assert sees[3].tolist() == [True, False, False, True, False]
    assert batch.old_logprobs is None
    assert batch.reference_logprobs is None


def test_without_a_tree_each_rollout_has_its_own_prompt():
    group = [rollout([1, 2], sampled([11, 12])), rollout([1, 2], sampled([13]))]
    batch = pack_groups([group], [[1.0, -1.0]], rows=1, length=6, tree=False)
    assert batch.tokens.tolist() == [[1, 2, 11, 1, 2, 0]]
    assert batch.targets.tolist() == [[0, 11, 12, 0, 13, 0]]
    assert batch.layout.position.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.layout.subtree_end.tolist() == [[3, 3, 3, 5, 5, 0]]


def test_environment_tokens_carry_no_loss_and_the_stop_token_does():
    stop = 8
    trajectory = rollout([1], sampled([11, stop]), observed([21, 22]), sampled([12, stop]))
    batch = pack_groups([[trajectory]], [[2.0]], rows=1, length=6)
    assert batch.tokens.tolist() == [[1, 11, stop, 21, 22, 12]]
    assert batch.targets.tolist() == [[11, stop, 0, 0, 12, stop]]
    assert batch.weights.tolist() == [[1, 1, 0, 0, 1, 1]]
    assert batch.advantages.tolist() == [[2, 2, 0, 0, 2, 2]]


def test_what_follows_the_last_sampled_token_takes_no_place():
    trajectory = rollout([1], sampled([11]), observed([21, 22, 23]))
    batch = pack_groups([[trajectory]], [[1.0]], rows=1, length=2)
    assert batch.tokens.tolist() == [[1, 0]]
    assert batch.targets.tolist() == [[11, 0]]


def test_normalising_by_sequence_gives_every_rollout_the_same_weight():
    group = [rollout([1], sampled([11, 12, 13, 14])), rollout([1], sampled([15, 16]))]
    batch = pack_groups([group], [[1.0, -1.0]], rows=1, length=6, normalise="sequence")
    assert batch.weights.tolist() == [[0.25, 0.25, 0.25, 0.25, 0.5, 0.5]]
    assert batch.from_policy.tolist() == [[1, 1, 1, 1, 1, 1]]


def targets_of(batch):
    """What is trained, wherever it stands."""
    trained = batch.weights > 0
    fields = (
        batch.targets,
        batch.weights,
        batch.advantages,
        batch.layout.position,
        batch.sampler_logprobs,
    )
    return sorted(zip(*(field[trained].tolist() for field in fields), strict=True))


def random_groups(seed, num_groups=5):
    rng = np.random.default_rng(seed)
    groups, advantages = [], []
    for _ in range(num_groups):
        prompt = rng.integers(1, 100, rng.integers(1, 12))
        group = []
        for _ in range(rng.integers(1, 6)):
            spans = []
            for _ in range(rng.integers(1, 4)):
                ids = rng.integers(1, 100, rng.integers(1, 6))
                spans += [sampled(ids, rng.normal(size=len(ids)))]
                spans += [observed(rng.integers(1, 100, rng.integers(0, 5)))]
            group.append(rollout(prompt, *spans))
        groups.append(group)
        advantages.append(rng.normal(size=len(group)))
    return groups, advantages


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_trees_and_separate_rows_train_the_same_targets(seed, normalise):
    groups, advantages = random_groups(seed)
    # The longest trajectory takes 43 places, so that some groups do not fit one row.
    settings = {"length": 48, "normalise": normalise}
    tree = pack_groups(groups, advantages, rows_needed(groups, 48), **settings)
    num_rows = rows_needed(groups, 48, tree=False)
    flat = pack_groups(groups, advantages, num_rows, tree=False, **settings)
    assert targets_of(tree) == targets_of(flat)
    assert len(tree.tokens) <= len(flat.tokens)
    assert (tree.layout.subtree_end > 0).sum() < (flat.layout.subtree_end > 0).sum()


@pytest.mark.parametrize("tree", [True, False])
def test_each_target_sees_exactly_its_own_past(tree):
    groups, advantages = random_groups(3)
    batch = pack_groups(groups, advantages, 20, 48, tree=tree)
    sees = allow(batch.layout)
    pasts = sorted(
        trajectory.ids[:i].tolist()
        for group in groups
        for trajectory in group
        for i in np.flatnonzero(trajectory.per_token("origin") == Origin.SAMPLED)
    )
    found = sorted(
        batch.tokens[b][sees[b, s]].tolist()
        for b, s in zip(*np.nonzero(batch.weights), strict=True)
    )
    assert found == pasts


def test_a_group_larger_than_a_row_becomes_several_trees():
    group = [rollout([1, 2, 3], sampled([10 + i, 20 + i])) for i in range(4)]
    # A trunk of 2 and branches of 2: two of them fit a row of 6.
    assert rows_needed([group], 6) == 2
    batch = pack_groups([group], [[1.0] * 4], rows=2, length=6)
    assert batch.tokens.tolist() == [[1, 2, 3, 10, 3, 11], [1, 2, 3, 12, 3, 13]]


def test_groups_that_need_more_rows_are_refused_with_both_numbers():
    group = [rollout([1, 2, 3], sampled([10 + i, 20 + i])) for i in range(4)]
    with pytest.raises(ValueError, match="need 2 rows of 6 places, but the batch has 1"):
        pack_groups([group], [[1.0] * 4], rows=1, length=6)


def test_no_groups_make_an_empty_batch_of_the_same_shape():
    batch = pack_groups([], [], rows=2, length=4)
    assert batch.weights.shape == (2, 4)
    assert batch.weights.sum() == 0
    assert rows_needed([], 4) == 0


@pytest.mark.parametrize(
    ("groups", "advantages", "sentence"),
    [
        (
            [[rollout([1, 2], sampled([3])), rollout([1], sampled([3]))]],
            [[0, 0]],
            "group 0 ('t') has trajectories with different prompts, of 2 and 1 ids",
        ),
        ([[rollout([1], sampled([3]))]], [[0, 0]], "group 0 has 1 trajectories and 2 advantages"),
        ([[rollout([1], sampled([3]))]], [], "1 groups have 0 rows of advantages"),
        (
            [[rollout([1], sampled([3] * 9))]],
            [[0]],
            "a trajectory of group 0 ('t') takes 9 places, more than the 8 of a row",
        ),
        ([[Trajectory([sampled([3])])]], [[0]], "group 0 ('') has no prompt"),
    ],
)
def test_groups_that_cannot_be_packed_are_named(groups, advantages, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        pack_groups(groups, advantages, rows=4, length=8)
