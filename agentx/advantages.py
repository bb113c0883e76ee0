"""Rewards of groups to advantages. Plain numpy. Legend: G groups, N rollouts of one prompt."""

from __future__ import annotations

from typing import Literal

import numpy as np

Kind = Literal["grpo", "dr_grpo", "rloo"]


def group_advantages(
    rewards_GN: np.ndarray, kind: Kind = "grpo", *, std_floor: float = 1e-4
) -> np.ndarray:
    """How much better each rollout was than the others of its group: f64[G, N].

    With m and s the mean and the (population) standard deviation of a group's rewards:

        grpo     (r - m) / max(s, std_floor)   DeepSeekMath, arXiv:2402.03300, section 4.1.2
        dr_grpo  r - m                         Dr. GRPO, arXiv:2503.20783, section 3.2: dividing by
                                               s favours tasks that are too easy or too hard
        rloo     r - mean of the others        REINFORCE leave-one-out, arXiv:2402.14740: equals
                                               (r - m) * N / (N - 1)

        group_advantages([[1, 0, 0, 1]])            is [[1, -1, -1, 1]]
        group_advantages([[1, 0, 0, 1]], "dr_grpo") is [[0.5, -0.5, -0.5, 0.5]]
        group_advantages([[1, 0, 0, 0]], "rloo")    is [[1, -1/3, -1/3, -1/3]]

    A group whose rewards are all equal has advantages of exactly 0 and teaches nothing. Groups of
    different sizes are given one at a time, as [1, N]. Raises ValueError for groups of fewer than
    2, for rewards that are not finite, for another kind, and for a floor that is not positive.
    """
    rewards_GN = np.asarray(rewards_GN, np.float64)
    if rewards_GN.ndim != 2 or rewards_GN.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {list(rewards_GN.shape)}; give [groups, rollouts] with at least 2 "
            "rollouts a group"
        )
    if not np.isfinite(rewards_GN).all():
        g, n = np.argwhere(~np.isfinite(rewards_GN))[0]
        raise ValueError(f"the reward of rollout {n} of group {g} is {rewards_GN[g, n]}")
    if kind not in ("grpo", "dr_grpo", "rloo"):
        raise ValueError(f"kind is {kind!r}; it must be 'grpo', 'dr_grpo' or 'rloo'")
    if not std_floor > 0:
        raise ValueError(f"std_floor is {std_floor}; it must be positive")
    centred_GN = rewards_GN - rewards_GN.mean(axis=1, keepdims=True)
    # The mean of equal numbers may differ from them in the last bit.
    centred_GN[rewards_GN.max(axis=1) == rewards_GN.min(axis=1)] = 0.0
    if kind == "grpo":
        return centred_GN / np.maximum(rewards_GN.std(axis=1, keepdims=True), std_floor)
    if kind == "rloo":
        num_rollouts = rewards_GN.shape[1]
        return centred_GN * (num_rollouts / (num_rollouts - 1))
    return centred_GN
