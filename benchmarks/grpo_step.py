"""Times a whole GRPO step: rollouts by the engine, rewards, packing, one update.

    python -m benchmarks.grpo_step [--size small] [--steps 4]

Prints one JSON line. Each group's prompt is read once by the sampler and stands once in the batch:
a group is one prefix tree. The sampler uses the trainer's parameters where they lie. `split_s` are
medians of the parts; `rollout` ends with the sampled ids on the host. `mean_reward` begins with the
step that compiles, and `max_param_change` is over the first layer's down projection, all updates.
"""

from __future__ import annotations

# isort: off
import benchmarks  # first: it takes the time
# isort: on

import time
from typing import Any

import jax
import numpy as np

from agentx.advantages import group_advantages
from agentx.batch import Batch
from agentx.data.pack import pack_groups
from agentx.host import prepare_cpu
from agentx.losses import PolicyGradientLoss
from agentx.model.transformer import abstract_transformer
from agentx.optim import make_optimizer
from agentx.sample.engine import Engine
from agentx.step import TrainState, make_train_step
from agentx.trajectory import Origin, Role, Span, Trajectory
from benchmarks import workload


def roll_out(engine: Engine, work: workload.Workload, step: int) -> list[list[Trajectory]]:
    """A group of trajectories for every prompt of a step."""
    owners: dict[Any, tuple[int, int]] = {}
    first = step * work.grpo_prompts * work.grpo_group
    prompts_RT = workload.grpo_prompts(work, step)
    for group, prompt_T in enumerate(prompts_RT):
        requests = range(first + group * work.grpo_group, first + (group + 1) * work.grpo_group)
        for member, session in enumerate(engine.open(prompt_T, requests)):
            engine.submit(session, (), work.grpo_tokens)
            owners[session] = group, member
    turns: dict[tuple[int, int], Any] = {}
    while len(turns) < len(owners):
        for session, turn in engine.step():
            engine.close(session)
            turns[owners[session]] = turn

    def trajectory(group: int, member: int) -> Trajectory:
        turn = turns[group, member]
        prompt = Span(Role.USER, prompts_RT[group])
        sampled = Span(
            Role.ANSWER,
            turn.ids,
            Origin.SAMPLED,
            logprobs=turn.logprobs,
            weight_version=turn.weight_version,
        )
        return Trajectory([prompt, sampled], group=group, num_prompt_spans=1)

    return [
        [trajectory(group, member) for member in range(work.grpo_group)]
        for group in range(work.grpo_prompts)
    ]


def pack(groups: list[list[Trajectory]], rewards_GN: np.ndarray, work: workload.Workload) -> Batch:
    """One row for each group: its prompt once, and every rollout as a branch."""
    length = work.prompt_length - 1 + work.grpo_group * work.grpo_tokens
    return pack_groups(groups, [*group_advantages(rewards_GN)], len(groups), length)


def run(size: str, steps: int | None = None) -> dict[str, Any]:
    """The fields of the JSON line."""
    work = workload.SIZES[size]
    steps = steps or work.grpo_steps
    mesh = workload.make_machine()
    model = abstract_transformer(work.model)
    optimizer = make_optimizer(workload.GRPO_OPTIMIZER, steps + 1)
    micro_batches = workload.num_micro_batches(work, work.grpo_prompts, mesh)
    update = make_train_step(
        model, PolicyGradientLoss(), optimizer, mesh, num_micro_batches=micro_batches
    )
    state = workload.make_state(model, optimizer, mesh)
    engine = Engine(
        work.model,
        mesh=mesh,
        num_slots=work.grpo_prompts * work.grpo_group,
        max_length=work.prompt_length + work.grpo_tokens,
    )

    before = _down_projection(state)
    time_to_first_step_s = 0.0
    split: dict[str, list[float]] = {"rollout": [], "reward_and_pack": [], "update": []}
    step_s, mean_reward, difference = [], [], 0.0
    tokens_per_step = 0
    for number in range(steps + 1):
        start = time.perf_counter()
        engine.set_params(state.params, version=number)
        groups = roll_out(engine, work, number)
        sampled = time.perf_counter()
        rewards_GN = np.array(
            [
                [workload.reward(t.spans[1].ids.tolist(), work.model.vocab_size) for t in group]
                for group in groups
            ]
        )
        batch = pack(groups, rewards_GN, work)
        packed = time.perf_counter()
        state, metrics = update(state, batch)
        jax.block_until_ready((state, metrics))
        end = time.perf_counter()
        mean_reward.append(rewards_GN.mean())
        difference = max(difference, float(metrics["sampler_difference_max"]))
        tokens_per_step = int(metrics["tokens"])
        if number == 0:
            time_to_first_step_s = end - benchmarks.START
            continue
        step_s.append(end - start)
        for name, part in zip(
            split, (sampled - start, packed - sampled, end - packed), strict=True
        ):
            split[name].append(part)

    return {
        "workload": "grpo",
        "size": size,
        "params": workload.num_params(state.params),
        "step_s_median": round(float(np.median(step_s)), 4),
        "step_s_all": workload.rounded(step_s),
        "split_s": {name: round(float(np.median(parts)), 4) for name, parts in split.items()},
        "time_to_first_step_s": round(time_to_first_step_s, 2),
        "tokens_per_step": tokens_per_step,
        "max_param_change": float(np.abs(_down_projection(state) - before).max()),
        "mean_reward": workload.rounded(mean_reward),
        "sampler_difference_max": difference,
    }


def _down_projection(state: TrainState) -> np.ndarray:
    return np.array(state.params["layers"][0]["mlp"]["w_down"][...][0])


if __name__ == "__main__":
    arguments = workload.parse_arguments(__doc__, "timed steps, after one that compiles")
    prepare_cpu(workload.CPU_DEVICES)
    workload.print_result(run(arguments.size, arguments.steps))
