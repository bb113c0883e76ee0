"""A trained policy at work, for the screen: one answer to a prompt, or the scores of a suite."""

from __future__ import annotations

from pathlib import Path

from agentx.cli.registry import nearest
from agentx.cli.rollouts import episode_conversations
from agentx.cli.runs import Policy, load_run
from agentx.data.formats import write_conversations
from agentx.env.base import Task, TaskSet
from agentx.env.tasks.library import LibraryTasks
from agentx.eval.scores import cut_short, score_episodes
from agentx.eval.suite import evaluate, result_of
from agentx.render import ToolRenderer
from agentx.rollout import RolloutLimits, run_groups
from agentx.sample.engine import Engine
from agentx.trajectory import Message

SUITES: dict[str, TaskSet] = {
    "library": LibraryTasks(split="held_out"),
    "library_new_tool": LibraryTasks(split="held_out", new_tool=True),
    "library_dev": LibraryTasks(split="dev"),
}
_MAX_SLOTS = 64


def find_suite(name: str) -> TaskSet:
    if name not in SUITES:
        raise ValueError(f"--suite {name}: there is no such suite{nearest(name, SUITES)}")
    return SUITES[name]


def sample_text(
    checkpoint: Path, prompt: str, *, suite: str, raw: bool, temperature: float, max_tokens: int
) -> str:
    """What the policy says to `prompt`, markers and all.

    raw: it goes on with the text itself. Otherwise the prompt is a user's message, and where a
    suite is named its tools are on offer and its calls are really made.
    """
    task_set = find_suite(suite) if suite else None
    if raw and task_set is not None:
        raise ValueError("--raw goes on with a text and offers no tools: leave out --suite")
    policy = load_run(checkpoint)
    renderer = ToolRenderer(policy.tokenizer)
    if task_set is not None:
        engine = _engine(policy, renderer, num_slots=1, temperature=temperature)
        task = Task(id="prompt", prompt=prompt, answer="")
        limits = RolloutLimits(max_new_tokens=max_tokens)
        [[episode]] = run_groups(engine, task_set.env, [task], renderer, limits, group_size=1)
        if not len(episode.trajectory):
            raise ValueError(episode.failure)
        return policy.tokenizer.decode(episode.trajectory.ids.tolist())
    if raw:
        ids = [policy.tokenizer.special["<|bos|>"], *policy.tokenizer.encode(prompt)]
    else:
        spans = renderer.render([Message("user", prompt)], ())
        ids = [int(i) for span in spans for i in span.ids]
    length = min(policy.config.max_length, len(ids) + max_tokens)
    engine = _engine(policy, renderer, num_slots=1, temperature=temperature, max_length=length)
    [turn] = engine.complete([ids], [max_tokens])
    return policy.tokenizer.decode([*ids, *turn.ids.tolist()])


def evaluate_suite(
    checkpoint: Path, suite: str, *, num_episodes: int, seed: int, save: Path | None = None
) -> str:
    """The scores of greedy episodes of a suite with their 95 % intervals, as lines to print.

    The last says how many ran out of context or crashed, where any did.

    save: a JSONL file for the episodes as conversations, which `agentx data build` reads.
    """
    task_set = find_suite(suite)
    policy = load_run(checkpoint)
    renderer = ToolRenderer(policy.tokenizer)
    engine = _engine(policy, renderer, num_slots=min(_MAX_SLOTS, num_episodes), temperature=0.0)
    episodes = evaluate(
        engine, task_set, renderer, RolloutLimits(), num_episodes=num_episodes, seed=seed
    )
    if save is not None:
        write_conversations(save, episode_conversations(episodes))
    scores = score_episodes([result_of(episode) for episode in episodes])
    lines = [
        f"{s.name:<12}{100 * s.value:5.1f} %  [{100 * s.low:.1f}, {100 * s.high:.1f}]  "
        f"{s.count} of {s.total}"
        for s in scores.values()
    ]
    if cut := cut_short(sum(e.truncated for e in episodes), sum(bool(e.failure) for e in episodes)):
        lines.append(f"Of {num_episodes} episodes {cut}: no success")
    return "\n".join(lines)


def _engine(
    policy: Policy,
    renderer: ToolRenderer,
    *,
    num_slots: int,
    temperature: float,
    max_length: int | None = None,
) -> Engine:
    """A sampler that holds the policy; of the model's longest rows if max_length is None."""
    engine = Engine(
        policy.config,
        mesh=policy.mesh,
        num_slots=num_slots,
        max_length=max_length or policy.config.max_length,
        vocab_size=policy.tokenizer.vocab_size,
        stop_ids=renderer.stop_ids,
        temperature=temperature,
    )
    engine.set_params(policy.params, version=0)
    return engine
