import math
import re

import numpy as np
import pytest

from agentx.advantages import group_advantages


def test_grpo_divides_by_the_standard_deviation():
    assert group_advantages([[1, 0, 0, 1]]).tolist() == [[1, -1, -1, 1]]
    # mean 1/4, standard deviation sqrt(3)/4
    expected = [math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)]
    np.testing.assert_allclose(group_advantages([[1, 0, 0, 0]]), [expected], rtol=1e-12)


def test_dr_grpo_only_takes_the_mean_off():
    assert group_advantages([[1, 0, 0, 1]], "dr_grpo").tolist() == [[0.5, -0.5, -0.5, 0.5]]
    assert group_advantages([[4, 0], [1, 3]], "dr_grpo").tolist() == [[2, -2], [-1, 1]]


def test_rloo_compares_with_the_mean_of_the_others():
    found = group_advantages([[1, 0, 0, 0]], "rloo")
    np.testing.assert_allclose(found, [[1, -1 / 3, -1 / 3, -1 / 3]], rtol=1e-12)
    rewards = np.random.default_rng(0).normal(size=(5, 7))
    others = (rewards.sum(1, keepdims=True) - rewards) / 6
    np.testing.assert_allclose(group_advantages(rewards, "rloo"), rewards - others, atol=1e-12)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero(kind):
    # In floating point the mean of three times 0.1 is not 0.1.
    assert group_advantages([[0.1] * 3, [0.0] * 3], kind).tolist() == [[0] * 3, [0] * 3]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_the_advantages_of_a_group_add_up_to_zero(kind):
    rewards = np.random.default_rng(1).normal(size=(20, 6))
    np.testing.assert_allclose(group_advantages(rewards, kind).sum(1), 0, atol=1e-9)


def test_the_floor_bounds_the_division():
    found = group_advantages([[1e-6, 0.0]], std_floor=1e-2)
    np.testing.assert_allclose(found, [[5e-5, -5e-5]])


@pytest.mark.parametrize(
    ("rewards", "settings", "sentence"),
    [
        ([1.0, 0.0], {}, "rewards have shape [2]; give [groups, rollouts] with at least 2"),
        ([[1.0]], {}, "rewards have shape [1, 1]"),
        ([[0.0, 1.0], [0.0, math.nan]], {}, "the reward of rollout 1 of group 1 is nan"),
        ([[0.0, 1.0]], {"kind": "ppo"}, "kind is 'ppo'; it must be 'grpo', 'dr_grpo' or 'rloo'"),
        ([[0.0, 1.0]], {"std_floor": 0.0}, "std_floor is 0.0; it must be positive"),
    ],
)
def test_wrong_rewards_and_settings_are_named(rewards, settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        group_advantages(rewards, **settings)
