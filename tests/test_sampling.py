"""Draws against their distributions, and the kept tokens of top-k and top-p against a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentx.sample.sampling import SamplingParams, check_sampling, row_uniforms, sample

draw = jax.jit(sample)
uniforms = jax.jit(row_uniforms)


def random_logits(batch: int, vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (batch, vocab)).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kept_by_sorting(logprobs: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens of one row may be drawn, by the textbook: sort, cut at k, cut at p."""
    order = np.argsort(-logprobs)
    if top_k:
        order = order[:top_k]
    p = np.exp(logprobs[order])
    before = np.cumsum(p) - p
    kept = np.zeros(len(logprobs), bool)
    kept[order[before < top_p * p.sum()] if top_p < 1 else order] = True
    return kept


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """The statistic in units of its standard deviation from its mean, over cells of 5 and more."""
    expected = p * counts.sum()
    big = expected >= 5
    counts = np.append(counts[big], counts[~big].sum())
    expected = np.append(expected[big], expected[~big].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 20, 1.0), (1.3, 50, 0.8)],
)
def test_draws_follow_the_distribution_and_nothing_dropped_is_drawn(temperature, top_k, top_p):
    rows, vocab = 20_000, 200
    logits = random_logits(1, vocab)
    uniform = uniforms(1, jnp.arange(rows), jnp.zeros(rows, jnp.int32))
    params = SamplingParams(temperature, top_k, top_p)
    token = np.asarray(draw(np.repeat(logits, rows, 0), uniform, params).token)
    logprobs = log_softmax(logits / temperature)[0]
    kept = kept_by_sorting(logprobs, top_k, top_p)
    p = np.where(kept, np.exp(logprobs), 0)
    counts = np.bincount(token, minlength=vocab)
    assert counts[~kept].sum() == 0
    assert abs(chi_square(counts, p / p.sum())) < 4


def test_every_uniform_number_hits_the_token_whose_share_of_the_line_it_is_in():
    p = np.array([[0.125, 0.0, 0.5, 0.25, 0.125]], np.float32)
    uniform = np.array([0.0, 0.124, 0.126, 0.624, 0.626, 0.874, 0.876, 1 - 2**-23], np.float32)
    with np.errstate(divide="ignore"):
        logits = np.log(np.repeat(p, len(uniform), 0))
    assert draw(logits, uniform, SamplingParams()).token.tolist() == [0, 0, 2, 2, 3, 3, 4, 4]


def test_the_logprob_of_a_draw_is_over_what_top_k_and_top_p_keep():
    logits = random_logits(64, 300)
    uniform = uniforms(0, jnp.arange(64), jnp.zeros(64, jnp.int32))
    params = SamplingParams(0.7, 10, 0.9)
    drawn = draw(logits, uniform, params)
    logprobs = log_softmax(logits / 0.7)
    for row, token in enumerate(np.asarray(drawn.token)):
        kept = kept_by_sorting(logprobs[row], 10, 0.9)
        whole = logprobs[row, token]
        renormalised = whole - np.log(np.exp(logprobs[row][kept]).sum())
        assert abs(drawn.processed_logprob[row] - renormalised) < 1e-5


def test_temperature_zero_takes_the_first_of_the_most_probable_tokens():
    logits = random_logits(16, 300)
    logits[3, [40, 200]] = 50.0
    drawn = draw(logits, np.full(16, 0.5, np.float32), SamplingParams(0.0))
    assert drawn.token.tolist() == logits.argmax(-1).tolist()
    assert drawn.token[3] == 40
    assert drawn.processed_logprob.tolist() == [0.0] * 16


def test_rows_with_different_parameters_do_not_disturb_one_another():
    logits = random_logits(4, 300)
    uniform = np.array([0.1, 0.4, 0.6, 0.9], np.float32)
    rows = [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.7, 5, 1.0), (1.0, 0, 0.5)]
    mixed = draw(logits, uniform, SamplingParams(*map(np.array, zip(*rows, strict=True))))
    for b, row in enumerate(rows):
        alone = draw(logits[b : b + 1], uniform[b : b + 1], SamplingParams(*row))
        assert alone.token[0] == mixed.token[b]
        assert alone.processed_logprob[0] == mixed.processed_logprob[b]


@pytest.mark.parametrize("vocab", [5, 64, 65, 1000])
def test_top_k_of_1_is_greedy_for_every_size_of_vocabulary(vocab):
    logits = random_logits(8, vocab, seed=vocab)
    drawn = draw(logits, np.full(8, 0.999, np.float32), SamplingParams(1.0, 1, 1.0))
    assert drawn.token.tolist() == logits.argmax(-1).tolist()


def test_random_numbers_depend_on_seed_request_and_position_and_not_on_the_row():
    request, position = jnp.array([7, 8, 7]), jnp.array([3, 3, 4])
    a, b, c = uniforms(0, request, position).tolist()
    assert len({a, b, c, *uniforms(1, request, position).tolist()}) == 6
    assert uniforms(0, request[::-1], position[::-1]).tolist() == [c, b, a]
    assert uniforms(0, request[1:2], position[1:2]).tolist() == [b]


@pytest.mark.parametrize(
    "wrong", [(-1.0, 0, 1.0), (float("nan"), 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 0.0), (1.0, 0, 1.5)]
)
def test_numbers_that_make_no_distribution_are_refused(wrong):
    with pytest.raises(ValueError, match="top_p in"):
        check_sampling(SamplingParams(*wrong))
