"""What targets cost, by hand. One row; the columns of every table below are its tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentx.batch import Batch
from agentx.losses import Max, Mean, NextTokenLoss, PolicyGradientLoss
from agentx_kernels.layout import causal

ENTROPY = jnp.full((1, 4), 0.5)


def row(*values):
    return jnp.array([values], jnp.float32)


def make_batch(weights=(1, 1, 1, 1), **fields):
    length = len(weights)
    tokens = jnp.zeros((1, length), jnp.int32)
    fields = {name: row(*values) for name, values in fields.items()}
    return Batch(tokens, tokens, row(*weights), causal(1, length), **fields)


def results(metrics):
    return {name: float(metric.result()) for name, metric in metrics.items()}


def test_next_token_is_minus_the_log_probability():
    values, metrics = NextTokenLoss()(row(-1, -2, -3, -4), ENTROPY, make_batch())
    assert values.tolist() == [[1, 2, 3, 4]]
    assert results(metrics) == {"entropy": 0.5}


def test_at_ratio_one_without_kl_the_gradient_is_the_advantage_weighted_one():
    advantages, weights = (1.5, -2, 0, 3), (1, 0.5, 1, 0)
    batch = make_batch(weights, advantages=advantages)
    logprobs = row(-1, -2, -3, -0.5)

    def policy_gradient(logprobs):
        return jnp.sum(PolicyGradientLoss()(logprobs, ENTROPY, batch)[0] * batch.weights)

    def advantage_weighted(logprobs):
        return -jnp.sum(logprobs * batch.advantages * batch.weights)

    np.testing.assert_allclose(
        jax.grad(policy_gradient)(logprobs), jax.grad(advantage_weighted)(logprobs)
    )
    # With the log-probabilities of before the first update, which are the same ones, too.
    batch = batch._replace(old_logprobs=logprobs)
    np.testing.assert_allclose(
        jax.grad(policy_gradient)(logprobs), jax.grad(advantage_weighted)(logprobs)
    )


def test_the_ratio_is_clipped_on_the_side_that_the_advantage_pushes_to():
    #         ratio       2     2    0.5   0.5
    #         advantage   1    -1     1    -1
    #         clipped    yes    no    no   yes     (to 1.3 above, 0.8 below)
    loss = PolicyGradientLoss(clip_low=0.2, clip_high=0.3)
    logprobs = jnp.log(row(0.2, 0.2, 0.05, 0.05))
    batch = make_batch(advantages=(1, -1, 1, -1), old_logprobs=(np.log(0.1),) * 4)
    values, metrics = loss(logprobs, ENTROPY, batch)
    np.testing.assert_allclose(values, [[-1.3, 2, -0.5, 0.8]], rtol=1e-5)
    gradient = jax.grad(lambda x: loss(x, ENTROPY, batch)[0].sum())(logprobs)
    np.testing.assert_allclose(gradient, [[0, 2, -0.5, 0]], rtol=1e-5)
    assert results(metrics)["clip_fraction"] == 0.5
    assert results(metrics)["ratio"] == pytest.approx(1.25)


def test_kl_is_k3_against_the_reference():
    loss = PolicyGradientLoss(kl_coefficient=0.1)
    batch = make_batch(advantages=(0,) * 4, reference_logprobs=(-1, -2, -1, -3))
    values, metrics = loss(row(-1, -1, -2, -1), ENTROPY, batch)
    k3 = [0, np.exp(-1) + 1 - 1, np.exp(1) - 1 - 1, np.exp(-2) + 2 - 1]
    np.testing.assert_allclose(values[0], 0.1 * np.array(k3), rtol=1e-5, atol=1e-7)
    assert results(metrics)["kl"] == pytest.approx(np.mean(k3), rel=1e-5)


def test_importance_weights_are_truncated_and_carry_no_gradient():
    # p / p_sampler: 1, 4, 0.5, 1; the cap is 2.
    loss = PolicyGradientLoss(importance_cap=2.0)
    logprobs = jnp.log(row(0.4, 0.4, 0.4, 0.4))
    sampler = np.log([0.4, 0.1, 0.8, 0.4])
    batch = make_batch(advantages=(1,) * 4, sampler_logprobs=sampler)
    values, metrics = loss(logprobs, ENTROPY, batch)
    np.testing.assert_allclose(values, [[-1, -2, -0.5, -1]], rtol=1e-5)
    gradient = jax.grad(lambda x: loss(x, ENTROPY, batch)[0].sum())(logprobs)
    np.testing.assert_allclose(gradient, [[-1, -2, -0.5, -1]], rtol=1e-5)
    assert results(metrics)["importance"] == pytest.approx(1.125)
    assert results(metrics)["sampler_difference"] == pytest.approx(np.log(4 * 2) / 4, rel=1e-5)
    assert results(metrics)["sampler_difference_max"] == pytest.approx(np.log(4), rel=1e-5)


def test_negative_advantages_can_be_scaled_down():
    batch = make_batch(advantages=(1, -1, -2, 0))
    values, _ = PolicyGradientLoss(negative_scale=0.3)(row(-1, -1, -1, -1), ENTROPY, batch)
    np.testing.assert_allclose(values, [[-1, 0.3, 0.6, 0]], rtol=1e-6)


def test_a_batch_can_hold_data_and_rollouts():
    # Data's recorded log-probabilities mean nothing: they must not even make a NaN.
    fields = {
        "from_policy": (0, 1, 0, 1),
        "advantages": (9, 2, 9, -1),
        "old_logprobs": (0, -2, 0, -1),
        "sampler_logprobs": (0, -2, 0, -1),
        "reference_logprobs": (0, -2, 0, -1),
    }
    loss = PolicyGradientLoss(kl_coefficient=0.1, importance_cap=2.0)
    logprobs = row(-200, -2, -1, -1)
    values, metrics = loss(logprobs, ENTROPY, make_batch(**fields))
    np.testing.assert_allclose(values, [[200, -2, 1, 1]], rtol=1e-6)
    gradient = jax.grad(lambda x: loss(x, ENTROPY, make_batch(**fields))[0].sum())(logprobs)
    np.testing.assert_allclose(gradient, [[-1, -2, -1, 1]], rtol=1e-6)
    assert results(metrics)["sampler_difference_max"] == 0


def test_metrics_leave_out_what_has_no_weight():
    batch = make_batch((1, 0, 1, 0), advantages=(1,) * 4, sampler_logprobs=(-1, -9, -2, -9))
    _, metrics = PolicyGradientLoss()(row(-1, -1, -1, -1), row(1, 8, 3, 8), batch)
    measured = results(metrics)
    assert measured["entropy"] == 2
    assert measured["sampler_difference"] == 0.5
    assert measured["sampler_difference_max"] == 1


def test_metrics_of_micro_batches_add_up():
    assert Mean(jnp.array([1.0, 5.0]), jnp.array([1.0, 2.0])).result() == 2
    assert Mean(jnp.array([0.0]), jnp.array([0.0])).result() == 0
    assert Max(jnp.array([1.0, 3.0])).result() == 3


@pytest.mark.parametrize(
    ("settings", "fields", "words"),
    [
        ({}, {}, "needs batch.advantages"),
        ({"importance_cap": 2.0}, {"advantages": (1,) * 4}, "needs batch.sampler_logprobs"),
        ({"kl_coefficient": 0.1}, {"advantages": (1,) * 4}, "needs batch.reference_logprobs"),
    ],
)
def test_a_batch_that_lacks_what_the_loss_needs_is_refused(settings, fields, words):
    with pytest.raises(ValueError, match=words):
        PolicyGradientLoss(**settings)(row(-1, -1, -1, -1), ENTROPY, make_batch(**fields))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"clip_low": 1.5}, "clip_low must be in"),
        ({"negative_scale": -1.0}, "negative_scale must be 0 or more"),
        ({"importance_cap": 0.0}, "importance_cap is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        PolicyGradientLoss(**settings)
