"""Episodes: what is sampled is what is trained on, and what goes wrong is counted.

A scripted engine shows what the loop does with each message; the real one, with a tiny random model
whose turns are mostly malformed, that ids, log-probabilities and draws are what they should be.
"""

import dataclasses
import functools
import math
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from fakes import EchoEnv, EchoTasks, ScriptedEngine, say
from flax import nnx

from agentx.cli import play as cli
from agentx.cli.rollouts import episode_conversations
from agentx.data.formats import (
    ReadCounts,
    conversation_trajectory,
    read_documents,
    write_conversations,
)
from agentx.env.base import Observation, Task
from agentx.eval.suite import evaluate, result_of
from agentx.model import ModelConfig, abstract_transformer, init_params
from agentx.render import ToolRenderer
from agentx.rollout import Episode, RolloutLimits, run_groups, trainable
from agentx.sample import Engine
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Message, Origin, Outcome, Role, Trajectory
from agentx_kernels.layout import causal

BYTES = Tokenizer.bytes()
RENDERER = ToolRenderer(BYTES)
END = BYTES.special["<|end|>"]
TASK = Task("echo/3", "Say 3.", "3", kind="echo")
LIMITS = RolloutLimits(max_new_tokens=60, step_timeout_s=20.0)
ANSWER = Message("assistant", "3")


def prompt_ids(task: Task = TASK) -> list[int]:
    spans = RENDERER.render([Message("user", task.prompt)], EchoEnv.tools)
    return [int(i) for span in spans for i in span.ids]


def play(script, make_env=EchoEnv, *, group_size=1, limits=LIMITS, max_length=1000):
    """The group that a script plays, and the engine that played it."""
    engine = ScriptedEngine(script, max_length)
    (group,) = run_groups(engine, make_env, [TASK], RENDERER, limits, group_size=group_size)
    assert engine.num_open == 0
    return group, engine


def makes(*envs: EchoEnv):
    """Environments in turn, one for each episode."""
    return functools.partial(next, iter(envs))


def text(spans) -> list[tuple[Role, Origin, Outcome, str]]:
    return [(s.role, s.origin, s.outcome, BYTES.decode(s.ids)) for s in spans]


# ------------------------------------------------------------------------------------ one episode


def test_an_episode_is_the_prompt_the_turns_and_what_was_observed():
    (episode,), engine = play([say("a"), ANSWER])
    trajectory = episode.trajectory
    sampled, environment, ok = Origin.SAMPLED, Origin.ENVIRONMENT, Outcome.OK
    assert text(trajectory.spans) == [
        (Role.SYSTEM, Origin.DATA, ok, "<|bos|><|system|>say(text): repeats a text"),
        (Role.USER, Origin.DATA, ok, "<|user|>Say 3."),
        (Role.CALL, sampled, ok, "<|call|>say"),
        (Role.ARGUMENTS, sampled, ok, "<|arguments|>a<|end|>"),
        (Role.OBSERVATION, environment, ok, "<|observation|>a<|end|>"),
        (Role.ANSWER, sampled, ok, "<|answer|>3<|end|>"),
    ]
    assert (episode.reward, trajectory.reward, episode.failure) == (1.0, 1.0, "")
    assert trajectory.task_id == "echo/3"
    assert trajectory.num_prompt_spans == 2
    assert trajectory.info == {"rewards": {"right": True}}
    assert [c.observation for c in episode.calls] == ["a"]
    assert engine.prompts == [prompt_ids()]
    assert engine.fed[0] == [[], trajectory.spans[4].ids.tolist()]


def test_the_prompt_of_a_group_is_opened_once():
    group, engine = play([say("a"), ANSWER], group_size=3)
    assert engine.prompts == [prompt_ids()]
    assert list(engine.fed) == [0, 1, 2]
    assert [len(e.calls) for e in group] == [1, 1, 1]


def test_sampled_spans_carry_the_logprobs_and_version_of_the_sampler():
    (episode,), _ = play([say("a"), ANSWER])
    trajectory = episode.trajectory
    call, answer = trajectory.spans[2:4], trajectory.spans[5]
    expected = -np.arange(1, 8, dtype=np.float32) / 8  # "<|call|>say<|arguments|>a<|end|>"
    assert np.concatenate([s.logprobs for s in call]).tolist() == expected.tolist()
    assert answer.logprobs.tolist() == expected[:3].tolist()
    assert {s.weight_version for s in (*call, answer)} == {7}
    others = [s for s in trajectory.spans if s.origin is not Origin.SAMPLED]
    assert all(s.logprobs is None and s.weight_version == -1 for s in others)


def test_a_turn_is_failed_where_its_call_failed_and_recovered_where_the_next_one_works():
    broken = [*BYTES.encode("what?"), END]
    script = [broken, broken, say("a"), say("b"), ANSWER]
    (episode,), _ = play(script, lambda: EchoEnv(num_turns=9))
    turns = [s for s in episode.trajectory.spans if s.origin is Origin.SAMPLED]
    assert [(s.role, s.outcome) for s in turns] == [
        (Role.ANSWER, Outcome.FAILED),
        (Role.ANSWER, Outcome.FAILED),
        (Role.CALL, Outcome.RECOVERED),
        (Role.ARGUMENTS, Outcome.RECOVERED),
        (Role.CALL, Outcome.OK),
        (Role.ARGUMENTS, Outcome.OK),
        (Role.ANSWER, Outcome.OK),
    ]
    observed = [s for s in episode.trajectory.spans if s.role is Role.OBSERVATION]
    assert [s.outcome for s in observed] == [Outcome.FAILED] * 2 + [Outcome.OK] * 2
    assert BYTES.decode(observed[0].ids) == (
        "<|observation|>it does not begin with a marker<|end|>"
    )


def test_giving_up_after_a_failed_call_is_no_recovery():
    (episode,), _ = play([[END], ANSWER])
    assert episode.trajectory.spans[-1].role is Role.ANSWER
    assert episode.trajectory.spans[-1].outcome is Outcome.OK


def test_a_turn_that_is_cut_by_its_budget_is_answered_as_malformed():
    unfinished = [BYTES.special["<|answer|>"], *BYTES.encode("33333")]
    (episode,), _ = play([unfinished, ANSWER])
    assert BYTES.decode(episode.trajectory.spans[3].ids) == "<|observation|>it does not end<|end|>"
    assert (episode.reward, episode.truncated) == (1.0, False)


# ------------------------------------------------------------------------------------ as data


def test_rollouts_are_written_and_read_back_as_the_same_messages_and_ids(tmp_path):
    group, _ = play([say("a"), say("\n"), ANSWER], group_size=2)
    broken, _ = play([[END], say("a"), ANSWER], makes(EchoEnv(), EchoEnv(crash_at=2)), group_size=2)
    path = tmp_path / "rollouts.jsonl"
    episodes = [*group, *broken]
    write_conversations(path, episode_conversations(episodes))
    found = list(read_documents(path))
    assert [c.messages for c in found] == [e.messages for e in episodes]
    assert [(c.tools, c.reward) for c in found] == [(EchoEnv.tools, 1.0)] * 3 + [
        (EchoEnv.tools, None)
    ]
    for conversation, episode in zip(found, group, strict=False):
        trajectory = conversation_trajectory(conversation, RENDERER)
        assert trajectory.ids.tolist() == episode.trajectory.ids.tolist()
        assert trajectory.per_token("outcome").tolist() == (
            episode.trajectory.per_token("outcome").tolist()
        )
    assert [m.outcome.name for m in found[2].messages] == (
        ["OK", "FAILED", "FAILED", "RECOVERED", "OK", "OK"]
    )
    assert found[2].messages[1].malformed == "it is empty"
    names = [c.name for c in episode_conversations(episodes)]
    assert names == [f"echo/3#{number}" for number in (1, 2, 3, 4)]


def test_an_episode_that_never_began_is_counted_as_empty(tmp_path):
    group, _ = play([ANSWER], makes(EchoEnv(crash_at=0), EchoEnv()), group_size=2)
    write_conversations(tmp_path / "rollouts.jsonl", episode_conversations(group))
    counts = ReadCounts()
    assert len(list(read_documents(tmp_path, counts=counts))) == 1
    assert (counts.read, dict(counts.skipped)) == (2, {"empty": 1})


def test_what_was_left_out_of_the_trajectory_is_no_message_either():
    (episode,), _ = play([say("a" * 10), ANSWER], max_length=len(prompt_ids()) + 28)
    assert [m.role for m in episode.messages] == ["user", "assistant"]


# ------------------------------------------------------------------------------------ truncation


def test_a_turn_that_meets_the_end_of_the_context_truncates_the_episode():
    (episode,), _ = play([say("a"), ANSWER], max_length=len(prompt_ids()) + 3)
    assert episode.truncated
    assert (episode.reward, episode.failure, episode.calls) == (0.0, "", ())
    assert len(episode.trajectory) == len(prompt_ids()) + 3
    assert episode.trajectory.spans[-1].outcome is Outcome.FAILED


def test_an_observation_that_does_not_fit_truncates_the_episode_and_is_left_out():
    # The call takes 16 tokens and its observation 12.
    (episode,), engine = play([say("a" * 10), ANSWER], max_length=len(prompt_ids()) + 28)
    assert episode.truncated
    assert episode.trajectory.spans[-1].role is Role.ARGUMENTS
    assert len(episode.calls) == 1
    assert len(engine.fed[0]) == 1


def test_truncated_episodes_keep_no_reward_of_a_turn_before_the_end():
    class Generous(EchoEnv):
        async def step(self, message):
            observation = await super().step(message)
            return dataclasses.replace(observation, reward=0.5)

    (whole,), _ = play([say("a")], Generous)
    assert whole.reward == 0.5
    (cut,), _ = play([say("a" * 10)], Generous, max_length=len(prompt_ids()) + 28)
    assert (cut.truncated, cut.reward) == (True, 0.0)


# ------------------------------------------------------------------------------------ broken worlds


def test_an_environment_that_crashes_ends_its_episode_and_no_other():
    group, _ = play([say("a"), ANSWER], makes(EchoEnv(), EchoEnv(crash_at=2)), group_size=2)
    assert [e.failure for e in group] == ["", "env.step raised RuntimeError: the world ended"]
    assert [e.reward for e in group] == [1.0, 0.0]
    assert group[1].trajectory.spans[-1].outcome is Outcome.FAILED


def test_an_environment_that_hangs_is_given_up_in_time():
    limits = RolloutLimits(step_timeout_s=0.1)
    envs = makes(EchoEnv(hang_at=1), EchoEnv(), EchoEnv(hang_at=0))
    start = time.perf_counter()
    group, _ = play([say("a"), ANSWER], envs, group_size=3, limits=limits)
    assert time.perf_counter() - start < 10
    assert [e.failure for e in group] == [
        "env.step took over 0.1 s",
        "",
        "env.reset took over 0.1 s",
    ]


def test_an_environment_that_cannot_be_reset_costs_its_own_episode():
    envs = makes(EchoEnv(crash_at=0), EchoEnv(), EchoEnv())
    group, engine = play([ANSWER], envs, group_size=3)
    assert [e.failure for e in group] == ["env.reset raised RuntimeError: the world ended", "", ""]
    assert len(group[0].trajectory) == 0
    assert [e.reward for e in group] == [0.0, 1.0, 1.0]
    assert list(engine.fed) == [1, 2]  # request ids stay with their place in the group
    group, engine = play([ANSWER], lambda: EchoEnv(crash_at=0), group_size=2)
    assert all(e.failure for e in group)
    assert engine.prompts == []


@pytest.mark.parametrize("reply", [Message("assistant", "I am you"), Message("tool", "\ud800")])
def test_an_observation_that_cannot_be_rendered_is_a_fault_of_the_environment(reply):
    class Odd(EchoEnv):
        async def step(self, message):
            return Observation((reply,))

    group, _ = play([say("a")], makes(Odd(), EchoEnv()), group_size=2)
    assert group[0].failure.startswith("env.step gave what cannot be rendered: ")
    assert group[1].failure == ""


def test_an_environment_may_raise_a_timeout_of_its_own():
    class Impatient(EchoEnv):
        async def step(self, message):
            raise TimeoutError("the shell said nothing")

    (episode,), _ = play([say("a")], Impatient)
    assert episode.failure == "env.step raised TimeoutError: the shell said nothing"


def test_an_environment_that_returns_nothing_has_failed():
    class Silent(EchoEnv):
        async def step(self, message):
            return None

    class Empty(EchoEnv):
        async def reset(self, task):
            return None

    group, _ = play([say("a")], makes(Silent(), Empty()), group_size=2)
    assert [e.failure for e in group] == [
        "env.step returned nothing",
        "env.reset returned nothing",
    ]


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_a_fault_of_the_environment(reward):
    class Dizzy(EchoEnv):
        async def step(self, message):
            return Observation((), reward, done=True)

    (episode,), _ = play([ANSWER], Dizzy)
    assert (episode.failure, episode.reward) == (f"env.step gave a reward of {reward}", 0.0)
    assert episode.trajectory.spans[-1].outcome is Outcome.FAILED


def test_a_prompt_that_cannot_be_rendered_costs_its_own_group():
    class Odd(EchoEnv):
        async def reset(self, task):
            return [Message("user", "\ud800")]

    group, engine = play([ANSWER], makes(Odd(), EchoEnv(crash_at=0), Odd()), group_size=3)
    assert [e.failure.partition(": ")[0] for e in group] == [
        "env.reset gave what cannot be rendered",
        "env.reset raised RuntimeError",
        "env.reset gave what cannot be rendered",
    ]
    assert engine.prompts == []


def test_a_prompt_that_fills_the_context_costs_its_own_group():
    length = len(prompt_ids())
    group, engine = play([ANSWER], group_size=2, max_length=length)
    fault = f"the prompt has {length} tokens, which fills the context of {length}"
    assert [(e.failure, len(e.trajectory)) for e in group] == [(fault, 0)] * 2
    assert engine.prompts == []
    assert trainable([group])[1]["episodes_crashed"] == 2


def test_episodes_of_a_task_must_begin_with_the_same_prompt():
    class Fickle(EchoEnv):
        async def reset(self, task):
            return [Message("user", str(id(self)))]

    with pytest.raises(ValueError, match="task echo/3: its episodes began with different prompts"):
        play([ANSWER], Fickle, group_size=2)


def episode(*, failure: str = "", truncated: bool = False) -> Episode:
    return Episode(TASK, Trajectory([]), (), 0.0, truncated, failure)


def test_a_group_trains_while_two_of_its_episodes_did_not_crash():
    good, cut, bad = episode(), episode(truncated=True), episode(failure="crash")
    kept, counts = trainable([[good, cut, bad], [good, bad, bad], [bad, bad], [good, good]])
    assert kept == [[good, cut], [good, good]]
    assert counts == {
        "episodes": 10.0,
        "episodes_crashed": 5.0,
        "episodes_truncated": 1.0,
        "groups_dropped": 2.0,
    }


def test_limits_that_allow_nothing_are_refused():
    with pytest.raises(ValueError, match=r"got 0 and 1\.0"):
        RolloutLimits(max_new_tokens=0, step_timeout_s=1.0)


# ------------------------------------------------------------------------------------ real engine


CONFIG = ModelConfig(
    vocab_size=BYTES.vocab_size,
    d_model=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    d_ff=32,
    max_length=160,
)


def fresh_params() -> nnx.State:
    return init_params(abstract_transformer(CONFIG), jax.random.key(1))


@functools.cache
def engine() -> Engine:
    """Eight slots for a model that knows nothing; some bytes end a turn too, to have short ones."""
    stop_ids = [*RENDERER.stop_ids, *range(200, 230)]
    made = Engine(CONFIG, num_slots=8, max_length=160, stop_ids=stop_ids)
    made.set_params(fresh_params(), version=3)
    return made


@functools.cache
def groups(first_request: int = 0) -> list[list[Episode]]:
    """Three groups of four: more episodes than slots."""
    tasks = [EchoTasks().task(i) for i in range(3)]
    limits = RolloutLimits(max_new_tokens=12)
    make_env = functools.partial(EchoEnv, num_turns=4)
    return run_groups(
        engine(), make_env, tasks, RENDERER, limits, group_size=4, first_request=first_request
    )


def all_ids(played: list[list[Episode]]) -> list[list[int]]:
    return [e.trajectory.ids.tolist() for group in played for e in group]


def test_groups_come_in_the_order_of_their_tasks_and_share_their_prompt():
    played = groups()
    assert [[e.trajectory.group for e in group] for group in played] == [[i] * 4 for i in range(3)]
    for number, group in enumerate(played):
        start = prompt_ids(EchoTasks().task(number))
        for e in group:
            assert e.task.id == e.trajectory.task_id == f"echo/{number}"
            assert e.trajectory.ids[: len(start)].tolist() == start
            assert e.trajectory.num_prompt_spans == 2
        assert len({tuple(ids) for ids in all_ids([group])}) > 1


def test_sampled_ids_stand_in_the_trajectory_as_they_were_sampled(monkeypatch):
    made, turns = engine(), {}
    generate = made.generate

    async def noted(session, new_ids, max_new_tokens):
        turn = await generate(session, new_ids, max_new_tokens)
        turns.setdefault(session.request_id, []).append((list(new_ids), turn))
        return turn

    monkeypatch.setattr(made, "generate", noted)
    played = [e for group in groups.__wrapped__(first_request=50) for e in group]
    assert max(len(t) for t in turns.values()) > 1
    for request, e in zip(sorted(turns), played, strict=True):
        spans = e.trajectory.spans
        sampled = [i for s in spans if s.origin is Origin.SAMPLED for i in s.ids.tolist()]
        logprobs = [x for s in spans if s.origin is Origin.SAMPLED for x in s.logprobs.tolist()]
        assert sampled == [i for _, turn in turns[request] for i in turn.ids.tolist()]
        assert logprobs == [x for _, turn in turns[request] for x in turn.logprobs.tolist()]
        ids = prompt_ids(e.task)
        for fed, turn in turns[request]:
            ids += [int(i) for i in fed] + turn.ids.tolist()
        assert e.trajectory.ids[: len(ids)].tolist() == ids
        # At most the last observation, which nobody read, comes after that.
        assert len(e.trajectory) == len(ids) or spans[-1].origin is Origin.ENVIRONMENT


def test_nothing_sampled_is_encoded_again(monkeypatch):
    encoded: list[str] = []
    tokenizer = Tokenizer.bytes()
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encoded.append(text) or encode(text))
    fake = ScriptedEngine([say("quoth"), Message("assistant", "nevermore")])
    renderer = ToolRenderer(tokenizer)
    run_groups(fake, EchoEnv, [TASK], renderer, LIMITS, group_size=1)
    assert "Say 3." in encoded
    assert encoded.count("quoth") == 1  # the observation that repeats it
    assert "nevermore" not in encoded
    assert "say" not in encoded


def test_turns_that_are_fed_piece_by_piece_have_the_logprobs_of_the_whole():
    model = abstract_transformer(CONFIG)
    assert all(max(len(e.calls) for e in group) > 1 for group in groups())
    longest = [max(group, key=lambda e: len(e.trajectory)).trajectory for group in groups()]
    tokens = np.zeros((len(longest), CONFIG.max_length), np.int32)
    for row, trajectory in enumerate(longest):
        tokens[row, : len(trajectory)] = trajectory.ids

    @jax.jit
    def log_softmax(params, tokens):
        whole = nnx.merge(nnx.graphdef(model), params)
        hidden = whole(tokens, causal(*tokens.shape)).hidden
        return jax.nn.log_softmax(hidden @ whole.unembedding().T)

    expected = np.asarray(log_softmax(fresh_params(), tokens))
    for row, trajectory in enumerate(longest):
        for s in range(1, len(trajectory)):
            if trajectory.per_token("origin")[s] == Origin.SAMPLED:
                token, logprob = trajectory.ids[s], trajectory.sampler_logprobs[s]
                assert logprob == pytest.approx(expected[row, s - 1, token], abs=1e-4)


def test_an_episode_is_the_same_in_every_run_and_another_one_under_other_request_ids():
    again = groups.__wrapped__()
    assert all_ids(again) == all_ids(groups())
    for one, other in zip(again, groups(), strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(
                a.trajectory.sampler_logprobs, b.trajectory.sampler_logprobs
            )
    assert all_ids(groups.__wrapped__(first_request=100)) != all_ids(groups())


# ------------------------------------------------------------------------------------ evaluation


def test_evaluation_plays_every_task_at_most_once_in_a_seeded_order():
    fake = ScriptedEngine([say("a"), ANSWER])

    def run(seed: int, num: int = 10):
        return evaluate(fake, EchoTasks(), RENDERER, LIMITS, num_episodes=num, seed=seed)

    order = [e.task.id for e in run(1)]
    assert sorted(order) == sorted(f"echo/{i}" for i in range(10))
    assert [e.task for e in run(1)] == [e.task for e in run(1)]
    assert order != [e.task.id for e in run(2)]
    assert [e.task.id for e in run(1, 4)] == order[:4]
    assert [e.reward for e in run(1)] == [float(name == "echo/3") for name in order]
    with pytest.raises(ValueError, match="11 episodes were asked for but the task set has 10"):
        run(1, 11)
    with pytest.raises(ValueError, match=r"seed is -1; it must be in \[0, 2\^31\)"):
        run(-1)


def test_the_command_says_how_many_episodes_were_cut_short(monkeypatch):
    def last_line(max_length: int) -> str:
        fake = ScriptedEngine([say("a" * 10), ANSWER], max_length)
        monkeypatch.setattr(cli, "_engine", lambda *_, **__: fake)
        return cli.evaluate_suite(Path(), "echo", num_episodes=10, seed=0).splitlines()[-1]

    monkeypatch.setattr(cli, "load_run", lambda _: SimpleNamespace(tokenizer=BYTES))
    monkeypatch.setitem(cli.SUITES, "echo", EchoTasks())
    length = len(prompt_ids())
    assert last_line(length + 28) == "Of 10 episodes 10 ran out of context: no success"
    assert last_line(length) == "Of 10 episodes 10 crashed: no success"
    assert last_line(1000).startswith("loop")


def test_a_result_counts_the_calls_and_a_crash_is_no_success():
    ((good,), _), ((bad,), _) = (
        play([[END], say("a"), ANSWER]),
        play([say("a"), ANSWER], makes(EchoEnv(crash_at=2))),
    )
    result = result_of(good)
    assert (result.task_id, result.success) == ("echo/3", True)
    assert (result.num_calls, result.num_valid_calls, result.num_failed_calls) == (2, 1, 1)
    assert result.calls == (
        ("say", '{"text": "it is empty"}', "it is empty"),
        ("say", '{"text": "a"}', "a"),
    )
    assert not result_of(bad).success
    assert not result_of(dataclasses.replace(good, failure="crash")).success
