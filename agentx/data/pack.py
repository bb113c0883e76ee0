"""Examples and groups of rollouts to batches of fixed shape. Numpy, on the host.

Enters: examples with a weight a token, or groups of trajectories with an advantage each. Leaves: a
`Batch`. A sequence of n ids takes n - 1 places: each but the last is an input whose target is the
next one, so the last id is a target only. No target crosses from one document to another.

A group that shares its prompt is one prefix tree: the prompt but for its last token once, then for
every trajectory a copy of that last token, which predicts its first sampled one, and what follows.

Legend: B rows, S places a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from agentx.batch import Batch
from agentx.data.objectives import Example
from agentx.trajectory import Origin, Trajectory
from agentx_kernels.layout import ROOT, packed, prefix_tree


def best_fit(sizes: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of item numbers: largest items first, each where it leaves the least room.

    Every item is in exactly one bin. Raises ValueError for an item larger than `capacity`.

    best_fit([2, 3, 5, 2], 5) is [[2], [1, 0], [3]]
    """
    sizes = np.asarray(sizes, np.int64)
    if len(sizes) and sizes.max() > capacity:
        item = int(sizes.argmax())
        raise ValueError(
            f"item {item} takes {sizes[item]} places, more than the {capacity} of a row"
        )
    bins: list[list[int]] = []
    # Bins by the room they have left, and the sorted list of the rooms that occur.
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            chosen, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        bins[chosen].append(item)
        left = room - size
        if left not in with_room:
            with_room[left] = []
            bisect.insort(rooms, left)
        with_room[left].append(chosen)
    return bins


def pack_rows(rows: Sequence[Sequence[Example]], length: int) -> Batch:
    """Rows whose examples are given, as a Batch of [len(rows), length].

    Two documents, `a b c` and `x y`, whose weights are 0 1 2 and 0 3, in a row of 4:

        tokens   a b x 0
        targets  b c y 0
        weights  1 2 3 0

    Raises ValueError where the examples of a row take more than `length` places.
    """
    tokens_BS, targets_BS = _zeros(2, len(rows), length, np.int32)
    (weights_BS,) = _zeros(1, len(rows), length, np.float32)
    lengths = [[max(len(e) - 1, 0) for e in row] for row in rows]
    layout = packed(lengths, length)
    for b, row in enumerate(rows):
        column = 0
        for example, places in zip(row, lengths[b], strict=True):
            own = slice(column, column + places)
            tokens_BS[b, own] = example.ids[:-1]
            targets_BS[b, own] = example.ids[1:]
            weights_BS[b, own] = example.weights[1:]
            column += places
    return Batch(tokens_BS, targets_BS * (weights_BS != 0), weights_BS, layout)


def _zeros(number: int, rows: int, length: int, dtype: Any) -> list[Any]:
    """That many arrays [rows, length]. Typed as Any: a Batch on the host holds numpy arrays."""
    return [np.zeros((rows, length), dtype) for _ in range(number)]


class _Branch(NamedTuple):
    """What follows a prompt, from its last token on; all but `tokens` and `experts` belong to the
    targets."""

    tokens: np.ndarray
    targets: np.ndarray
    sampled: np.ndarray
    weight: float
    advantage: float
    logprobs: np.ndarray
    experts: np.ndarray | None


class _Tree(NamedTuple):
    """A prompt without its last token, and the branches that grow from it."""

    trunk: np.ndarray
    experts: np.ndarray | None
    branches: list[_Branch]

    @property
    def places(self) -> int:
        return len(self.trunk) + sum(len(b.tokens) for b in self.branches)


def pack_groups(
    groups: Sequence[Sequence[Trajectory]],
    advantages: Sequence[Sequence[float] | np.ndarray],
    rows: int,
    length: int,
    *,
    tree: bool = True,
    normalise: Literal["token", "sequence"] = "token",
) -> Batch:
    """Groups of rollouts, with the advantage of each, as a Batch of [rows, length].

    A sampled token (the stop token too) has from_policy 1 and weight 1, or, with "sequence", 1 over
    the number of sampled tokens of its trajectory, so that every trajectory counts the same. Prompt
    and environment tokens have weight 0. What comes after the last sampled token teaches nothing
    and takes no place; so does a trajectory without one.

    With `tree`, each group is one prefix tree, or several where it exceeds a row. Without, each
    trajectory has its prompt for itself. Targets, weights, advantages and positions are the same.
    Experts that were recorded go along; where nothing was, they are -1.
    One prompt `p q`, rollouts `a b` with advantage 1 and `c` with -1, in a row of 5:

        tokens      p q a q 0
        targets     0 a b c 0
        weights     0 1 1 1 0
        advantages  0 1 1 -1 0
        position    0 1 2 1 0

    Raises ValueError where a group does not share its prompt, a trajectory exceeds `length`, or the
    groups need more rows than `rows` (`rows_needed` says how many).
    """
    if normalise not in ("token", "sequence"):
        raise ValueError(f"normalise is {normalise!r}; it must be 'token' or 'sequence'")
    if len(groups) != len(advantages):
        raise ValueError(f"{len(groups)} groups have {len(advantages)} rows of advantages")
    trees = _make_trees(groups, advantages, length, tree=tree, normalise=normalise)
    bins = best_fit([t.places for t in trees], length)
    if len(bins) > rows:
        raise ValueError(
            f"the groups need {len(bins)} rows of {length} places, but the batch has {rows}: "
            "give it more rows or longer ones"
        )
    runs: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    tokens_BS, targets_BS = _zeros(2, rows, length, np.int32)
    weights_BS, sampled_BS, advantages_BS, logprobs_BS = _zeros(4, rows, length, np.float32)
    recorded = [t.experts for t in trees if t.experts is not None]
    experts_BSLk: Any = None
    if recorded:
        experts_BSLk = np.full((rows, length, *recorded[0].shape[1:]), -1, np.int32)
    for b, items in enumerate(bins):
        column = 0
        for trunk, experts, branches in (trees[i] for i in items):
            parent = ROOT
            if len(trunk):
                parent = len(runs[b])
                runs[b].append((len(trunk), ROOT))
            tokens_BS[b, column : column + len(trunk)] = trunk
            if experts is not None:
                experts_BSLk[b, column : column + len(trunk)] = experts
            column += len(trunk)
            for branch in branches:
                runs[b].append((len(branch.tokens), parent))
                own = slice(column, column + len(branch.tokens))
                tokens_BS[b, own] = branch.tokens
                targets_BS[b, own] = branch.targets * branch.sampled
                sampled_BS[b, own] = branch.sampled
                weights_BS[b, own] = branch.sampled * branch.weight
                advantages_BS[b, own] = branch.sampled * branch.advantage
                logprobs_BS[b, own] = branch.logprobs
                if branch.experts is not None:
                    experts_BSLk[b, own] = branch.experts
                column += len(branch.tokens)
    return Batch(
        tokens_BS,
        targets_BS,
        weights_BS,
        prefix_tree(runs, length),
        from_policy=sampled_BS,
        advantages=advantages_BS,
        sampler_logprobs=logprobs_BS,
        experts=experts_BSLk,
    )


def rows_needed(groups: Sequence[Sequence[Trajectory]], length: int, *, tree: bool = True) -> int:
    """How many rows of `length` places `pack_groups` needs for these groups."""
    advantages = [[0.0] * len(group) for group in groups]
    trees = _make_trees(groups, advantages, length, tree=tree, normalise="token")
    return len(best_fit([t.places for t in trees], length))


def _make_trees(
    groups: Sequence[Sequence[Trajectory]],
    advantages: Sequence[Sequence[float] | np.ndarray],
    length: int,
    *,
    tree: bool,
    normalise: Literal["token", "sequence"],
) -> list[_Tree]:
    """One tree a group, or as many as it takes to keep each within `length` places."""
    trees = []
    for number, (group, values) in enumerate(zip(groups, advantages, strict=True)):
        if len(group) != len(values):
            raise ValueError(
                f"group {number} has {len(group)} trajectories and {len(values)} advantages"
            )
        if not group:
            continue
        prompt = _prompt(group[0], number)
        trunk, first = prompt[:-1], group[0].experts
        # What the prompt's tokens took is the same for all: they were read once.
        of_trunk = None if first is None else first[: len(trunk)]
        branches = []
        for trajectory, advantage in zip(group, values, strict=True):
            own = _prompt(trajectory, number)
            if not np.array_equal(own, prompt):
                raise ValueError(
                    f"group {number} ({trajectory.task_id!r}) has trajectories with different "
                    f"prompts, of {len(prompt)} and {len(own)} ids: group them by prompt"
                )
            branch = _make_branch(trajectory, len(prompt), float(advantage), normalise)
            if len(trunk) + len(branch.tokens) > length:
                raise ValueError(
                    f"a trajectory of group {number} ({trajectory.task_id!r}) takes "
                    f"{len(trunk) + len(branch.tokens)} places, more than the {length} of a row"
                )
            if len(branch.tokens):
                branches.append(branch)
        if tree:
            bins = best_fit([len(b.tokens) for b in branches], length - len(trunk))
        else:
            bins = [[i] for i in range(len(branches))]
        trees += [_Tree(trunk, of_trunk, [branches[i] for i in sorted(items)]) for items in bins]
    return trees


def _prompt(trajectory: Trajectory, group: int) -> np.ndarray:
    spans = trajectory.spans[: trajectory.num_prompt_spans]
    if not sum(len(s.ids) for s in spans):
        raise ValueError(
            f"a trajectory of group {group} ({trajectory.task_id!r}) has no prompt: "
            "set num_prompt_spans to the number of spans before its first sampled token"
        )
    return np.concatenate([s.ids for s in spans])


def _make_branch(
    trajectory: Trajectory, prompt_length: int, advantage: float, normalise: str
) -> _Branch:
    ids, logprobs = trajectory.ids, trajectory.sampler_logprobs
    sampled = trajectory.per_token("origin") == Origin.SAMPLED
    assert not sampled[:prompt_length].any(), "a prompt is not sampled"
    num_sampled = int(sampled.sum())
    stop = int(np.flatnonzero(sampled)[-1]) + 1 if num_sampled else prompt_length
    inputs = slice(prompt_length - 1, stop - 1)
    targets = slice(prompt_length, stop)
    weight = 1.0 / num_sampled if normalise == "sequence" and num_sampled else 1.0
    experts = None if trajectory.experts is None else trajectory.experts[inputs]
    return _Branch(
        ids[inputs], ids[targets], sampled[targets], weight, advantage, logprobs[targets], experts
    )
