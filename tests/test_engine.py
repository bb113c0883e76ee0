"""The engine against the trainer's forward pass, and against itself in other circumstances."""

import asyncio
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from agentx.model import ModelConfig, abstract_transformer, init_params
from agentx.sample import Engine, SamplingParams
from agentx.sample.slots import Slots
from agentx.sharding import MeshConfig, make_mesh, tree_shardings
from agentx_kernels.hardware import hardware
from agentx_kernels.layout import causal
from agentx_kernels.logprob import token_logprobs

CONFIG = ModelConfig(
    vocab_size=96,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=64,
    max_length=256,
    logit_softcap=4.0,
)
LENGTH = 96
STOPS = (5, 6, 7, 8)


@functools.cache
def params(seed: int = 0) -> nnx.State:
    """Twice the usual scale, so that the model has opinions."""
    fresh = init_params(abstract_transformer(CONFIG), jax.random.key(seed))
    return jax.tree.map(lambda x: 2 * x, fresh)


def make_engine(**changes) -> Engine:
    arguments = {"num_slots": 16, "max_length": LENGTH, "stop_ids": STOPS, "seed": 3} | changes
    engine = Engine(CONFIG, **arguments)
    engine.set_params(params(), version=7)
    return engine


@functools.cache
def shared_engine() -> Engine:
    return make_engine()


@functools.cache
def single_slot_engine() -> Engine:
    return make_engine(num_slots=1, stop_ids=(), idle_timeout_s=0.05)


def fresh() -> Engine:
    """An engine that others have used; new parameters close whatever they left open."""
    engine = shared_engine()
    engine.set_params(params(), version=7)
    return engine


@functools.partial(jax.jit, static_argnames="temperature")
def forward(params: nnx.State, tokens, temperature):
    """The trainer's log-probabilities of each next token, and the most probable ones."""
    model = nnx.merge(nnx.graphdef(abstract_transformer(CONFIG)), params)
    hidden = model(tokens, causal(*tokens.shape)).hidden
    table = model.unembedding()
    targets = jnp.roll(tokens, -1, 1)
    logprobs, _ = token_logprobs(
        hidden,
        table,
        targets,
        hardware=hardware("cpu"),
        temperature=temperature,
        softcap=CONFIG.logit_softcap,
    )
    return logprobs, jnp.argmax(hidden @ table.T, -1)


def trainer(ids, start: int, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of ids[start:], and the greedy choice at each of their places."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(ids)] = ids
    logprobs, best = forward(params(), padded, temperature)
    places = slice(start - 1, len(ids) - 1)
    return np.asarray(logprobs)[0, places], np.asarray(best)[0, places]


def prompt(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(10, 96, 1 + 7 * number % 40)


async def play(engine: Engine, num_groups: int, group_size: int, nap: float = 0.0) -> list:
    """Groups of episodes of 1 to 3 turns, each with an observation of its own."""

    async def episode(session, num_turns):
        rng, turns, new = np.random.default_rng(session.request_id), [], []
        for _ in range(num_turns):
            start = len(session.ids) + len(new)
            turn = await engine.generate(session, new, 8)
            turns.append((start, turn))
            new = rng.integers(10, 96, rng.integers(0, 13)).tolist()
            await asyncio.sleep(nap * rng.random())
        ids = session.ids
        engine.close(session)
        return ids, turns

    async def group(number):
        requests = range(number * group_size, (number + 1) * group_size)
        sessions = await engine.open_group(prompt(number), requests)
        turns = (1 + (number + i) % 3 for i in range(group_size))
        return await asyncio.gather(*map(episode, sessions, turns))

    groups = await asyncio.gather(*map(group, range(num_groups)))
    return [episode for group in groups for episode in group]


def test_the_samplers_logprobs_are_the_trainers_across_turns_groups_and_padding():
    episodes = asyncio.run(play(fresh(), num_groups=6, group_size=4))
    differences, reasons = [], set()
    for ids, turns in episodes:
        for start, turn in turns:
            assert ids[start : start + len(turn.ids)].tolist() == turn.ids.tolist()
            assert turn.weight_version == 7
            expected, _ = trainer(ids[: start + len(turn.ids)], start)
            differences.append(np.abs(expected - turn.logprobs).max())
            reasons.add(turn.stop_reason)
    assert len(episodes) == 24
    assert reasons == {"stop", "length"}
    assert 0 < max(differences) < 2e-5


def test_logprobs_are_of_the_whole_vocabulary_at_the_sampling_temperature():
    sampling = SamplingParams(0.6, 5, 0.9)
    [turn] = fresh().complete([prompt(3)], [20], sampling)
    ids = [*prompt(3), *turn.ids]
    expected, _ = trainer(ids, len(prompt(3)), temperature=0.6)
    np.testing.assert_allclose(turn.logprobs, expected, rtol=0, atol=1e-5)
    assert np.all(turn.processed_logprobs >= turn.logprobs)


def test_only_ids_of_the_tokenizer_are_drawn():
    """And their log-probabilities are the trainer's, of the model's whole vocabulary."""
    engine = make_engine(vocab_size=40, stop_ids=())
    ids = prompt(3) % 40
    samplings = [SamplingParams(1.0), SamplingParams(2.0, 30, 0.9), SamplingParams(0.0)]
    for sampling in samplings:
        turns = engine.complete([ids] * 8, [40] * 8, sampling)
        drawn = np.concatenate([turn.ids for turn in turns])
        assert 30 < drawn.max() < 40
        expected, best = trainer([*ids, *turns[0].ids], len(ids), sampling.temperature or 1.0)
        np.testing.assert_allclose(turns[0].logprobs, expected, rtol=0, atol=1e-5)
    assert np.any(best >= 40)


SAMPLINGS = (
    SamplingParams(0.6),
    SamplingParams(0.0),
    SamplingParams(1.7, 5, 0.9),
    SamplingParams(1.0, 0, 0.5),
)


@pytest.mark.parametrize(
    "sizes", [None, {"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_rows_with_different_temperatures_have_the_trainers_logprobs_each(sizes):
    """Under a soft cap, on one device and with the vocabulary over several. 0 counts as 1."""
    mesh = sizes and make_mesh(MeshConfig(**({"data": 1} | sizes)))
    engine = make_engine(mesh=mesh, num_slots=8, stop_ids=(), max_length=64)
    sessions = engine.open(prompt(3), range(8))
    for number, session in enumerate(sessions):
        engine.submit(session, [], 5 + 4 * number, SAMPLINGS[number % 4])
    turns = dict(run_until_done(engine, 8))
    for number, session in enumerate(sessions):
        temperature = SAMPLINGS[number % 4].temperature or 1.0
        expected, _ = trainer(session.ids, len(prompt(3)), temperature)
        np.testing.assert_allclose(turns[session].logprobs, expected, rtol=0, atol=1e-5)


def test_greedy_is_the_argmax_of_the_full_forward_pass():
    turns = fresh().complete([prompt(i) for i in range(5)], [20] * 5, SamplingParams(0.0))
    for number, turn in enumerate(turns):
        ids = [*prompt(number), *turn.ids]
        assert turn.ids.tolist() == trainer(ids, len(prompt(number)))[1].tolist()


def test_a_later_turn_is_what_a_fresh_session_with_all_its_tokens_would_sample():
    engine = fresh()
    [first] = engine.open(prompt(4), [11])
    engine.submit(first, [], 6)
    [(_, turn)] = run_until_done(engine, 1)
    engine.submit(first, [20, 21, 22], 6)
    [(_, continued)] = run_until_done(engine, 1)
    [again] = engine.open([*prompt(4), *turn.ids, 20, 21, 22], [11])
    engine.submit(again, [], 6)
    [(_, whole)] = run_until_done(engine, 1)
    assert continued.ids.tolist() == whole.ids.tolist()
    np.testing.assert_allclose(continued.logprobs, whole.logprobs, atol=1e-5)


def run_until_done(engine: Engine, num_turns: int) -> list:
    finished = []
    while len(finished) < num_turns:
        finished += engine.step()
    return finished


def test_what_is_sampled_depends_neither_on_the_slots_nor_on_the_order_of_events():
    reference = asyncio.run(play(fresh(), num_groups=6, group_size=4))
    few_slots = make_engine(num_slots=3, max_length=128)
    other = asyncio.run(play(few_slots, num_groups=6, group_size=4, nap=0.02))
    for (ids, _), (other_ids, _) in zip(reference, other, strict=True):
        assert ids.tolist() == other_ids.tolist()


def test_the_same_run_twice_is_the_same_bit_for_bit():
    first, second = (asyncio.run(play(fresh(), 4, 4)) for _ in range(2))
    for (_, turns), (_, others) in zip(first, second, strict=True):
        for (_, turn), (_, other) in zip(turns, others, strict=True):
            assert turn.logprobs.tobytes() == other.logprobs.tobytes()


def test_members_of_a_group_share_their_prompt_and_not_their_draws():
    episodes = asyncio.run(play(fresh(), num_groups=2, group_size=8))
    for group in (episodes[:8], episodes[8:]):
        assert len({tuple(turns[0][1].ids) for _, turns in group}) > 4


@pytest.mark.parametrize(
    ("max_length", "sizes"),
    [
        (96, (64, 96)),
        (640, (160, 320, 480, 640)),
        (8191, (2048, 4096, 6144, 8191)),
        (8192, (512, 2048, 4096, 6144, 8192)),
        (131072, (512, 2048, 8192, 32768, 65536, 98304, 131072)),
    ],
)
def test_short_sessions_of_a_model_of_long_rows_have_a_short_cache(max_length, sizes):
    config = dataclasses.replace(CONFIG, max_length=max_length)
    slots = Slots(
        config, make_mesh(MeshConfig(data=-1)), 8, max_length, config.vocab_size, (), 0, None
    )
    assert slots.column_sizes == sizes


@pytest.mark.parametrize("max_length", [4, 13])
def test_an_engine_of_very_short_sessions_samples_what_a_long_one_does(max_length):
    """Also where a row has fewer columns left than are fed at once, in a later turn."""
    played = []
    for length in (max_length, LENGTH):
        engine = make_engine(max_length=length, num_slots=4, stop_ids=())
        [session] = engine.open(prompt(3)[: max_length // 3], [0])
        engine.submit(session, [], 1)
        [(_, first)] = run_until_done(engine, 1)
        engine.submit(session, [11] * (max_length // 2 - 1), 1)
        [(_, second)] = run_until_done(engine, 1)
        played.append((session.ids, [*first.logprobs, *second.logprobs]))
    (ids, logprobs), (long_ids, long_logprobs) = played
    assert ids.tolist() == long_ids.tolist()
    np.testing.assert_allclose(logprobs, long_logprobs, rtol=0, atol=1e-5)


def test_nothing_is_compiled_after_the_warm_up():
    engine, others = fresh(), params(1)
    engine.warm_up()
    # Programs are compiled ahead and called by shape: a call cannot compile what is not counted.
    before = engine.num_compilations
    asyncio.run(play(engine, num_groups=6, group_size=4))
    engine.set_params(others, version=8)
    sampling = [SamplingParams(), SamplingParams(0.0), SamplingParams(0.5, 7, 0.9)]
    for number, chosen in enumerate(sampling):
        engine.complete(
            [prompt(i) for i in range(20)], [3 * i + 1 for i in range(20)], chosen, number
        )
    assert engine.num_compilations == before


def test_a_turn_ends_at_a_stop_id_which_it_includes():
    turns = fresh().complete([prompt(i) for i in range(16)], [40] * 16)
    stopped = [turn for turn in turns if turn.stop_reason == "stop"]
    assert len(stopped) > 4
    for turn in stopped:
        assert turn.ids[-1] in STOPS
        assert not set(turn.ids[:-1].tolist()) & set(STOPS)
        assert len(turn.ids) == len(turn.logprobs)


def test_budgets_and_the_context_limit_end_turns_and_say_so():
    engine = single_slot_engine()
    turns = engine.complete([prompt(1)] * 3, [1, 17, 88])
    assert [len(turn.ids) for turn in turns] == [1, 17, 88]
    assert {turn.stop_reason for turn in turns} == {"length"}
    [session] = engine.open(np.arange(90), [0])
    engine.submit(session, [], 50)
    [(_, turn)] = run_until_done(engine, 1)
    assert (turn.stop_reason, len(turn.ids), len(session.ids)) == ("context", 6, LENGTH)
    with pytest.raises(ValueError, match=r"96 tokens and 1 new ones.*max_length of 96"):
        engine.submit(session, [1], 1)
    engine.close(session)


def test_sessions_begun_under_older_parameters_are_closed():
    engine = fresh()
    [session] = engine.open(prompt(3), [0])
    engine.submit(session, [], 4)
    run_until_done(engine, 1)
    engine.set_params(params(1), version=8)
    with pytest.raises(ValueError, match=r"replaced by version 8.*open a new session"):
        engine.submit(session, [], 4)
    [turn] = engine.complete([prompt(3)], [4])
    assert turn.weight_version == 8

    async def replaced_while_awaited():
        [session] = await engine.open_group(prompt(3), [1])
        pending = asyncio.ensure_future(engine.generate(session, [], 60))
        await asyncio.sleep(0)
        engine.set_params(params(), version=9)
        await pending

    with pytest.raises(ValueError, match="replaced by version 9"):
        asyncio.run(replaced_while_awaited())


def test_who_waits_in_vain_for_a_slot_is_told():
    engine = single_slot_engine()

    async def two_sessions_for_one_slot():
        first, second = await engine.open_group(prompt(1), [0, 1])
        await engine.generate(first, [], 2)
        await engine.generate(second, [], 2)

    with pytest.raises(TimeoutError, match=r"waited 0\.05 s for a free slot: all 1 are held"):
        asyncio.run(two_sessions_for_one_slot())
    assert len(engine.complete([prompt(1)], [2])[0].ids) > 0


def test_wrong_input_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="max_length is 300; the model allows 2 to 256"):
        make_engine(max_length=300)
    with pytest.raises(ValueError, match="call set_params first"):
        Engine(CONFIG, num_slots=1, max_length=8).open([1], [0])
    with pytest.raises(ValueError, match="vocab_size is 97; the model allows 1 to 96"):
        make_engine(vocab_size=97)
    engine = fresh()
    with pytest.raises(ValueError, match=r"10 tokens, which with 90 new ones makes 100.* of 96"):
        engine.complete([np.arange(10)], [90])
    with pytest.raises(ValueError, match="prompt has 96 tokens"):
        engine.open([1] * 96, [0])
    with pytest.raises(ValueError, match=r"numbers in \[0, 96\).*up to 96"):
        engine.open([96], [0])
    [session] = engine.open([1], [0])
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        engine.submit(session, [], 0)
    with pytest.raises(ValueError, match="temperature must be 0 or more"):
        engine.submit(session, [], 1, SamplingParams(-1.0))
    engine.submit(session, [], 1)
    with pytest.raises(ValueError, match="not finished yet"):
        engine.submit(session, [], 1)
    engine.close(session)
    engine.close(session)
    with pytest.raises(ValueError, match=r"closed \(by its owner\)"):
        engine.submit(session, [], 1)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 4, "context": 2}]
)
def test_eight_devices_sample_what_one_does(sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    engine = Engine(CONFIG, mesh=mesh, num_slots=8, max_length=LENGTH, stop_ids=STOPS, seed=3)
    shardings = tree_shardings(abstract_transformer_state(), mesh)
    engine.set_params(jax.device_put(params(), shardings), version=7)
    sharded = asyncio.run(play(engine, num_groups=2, group_size=4))
    alone = asyncio.run(play(fresh(), num_groups=2, group_size=4))
    for (ids, turns), (other_ids, others) in zip(sharded, alone, strict=True):
        assert ids.tolist() == other_ids.tolist()
        for (_, turn), (_, other) in zip(turns, others, strict=True):
            np.testing.assert_allclose(turn.logprobs, other.logprobs, atol=1e-4)


def abstract_transformer_state() -> nnx.State:
    return nnx.state(abstract_transformer(CONFIG))
