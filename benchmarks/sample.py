"""Times the engine: requests of one length, and requests of different lengths.

    python -m benchmarks.sample [--size small] [--steps 3]

Prints one JSON line. Tokens per second are those that were asked for, at temperature 1, medians
over repetitions, each of which samples anew; all are in `tokens_per_s_all`. One run of each kind
before compiles the programs (`first_call_s`). Ragged requests come in no order, and a row is free
when its request has ended. `greedy16` continues the first prompt at temperature 0.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from agentx.host import prepare_cpu
from agentx.model.transformer import abstract_transformer
from agentx.sample.engine import Engine
from agentx.sample.sampling import SamplingParams
from benchmarks import workload


def run(size: str, repeats: int | None = None) -> dict[str, Any]:
    """The fields of the JSON line."""
    work = workload.SIZES[size]
    repeats = repeats or work.sample_repeats
    mesh = workload.make_machine()
    params = workload.make_params(abstract_transformer(work.model), mesh)
    engine = Engine(
        work.model,
        mesh=mesh,
        num_slots=max(work.uniform_requests, work.ragged_requests),
        max_length=work.prompt_length + max(work.uniform_tokens, work.ragged_most),
    )
    engine.set_params(params, version=0)
    cases = {
        "uniform": [work.uniform_tokens] * work.uniform_requests,
        "ragged": workload.ragged_budgets(work),
    }

    [greedy] = engine.complete([*workload.prompts(work, 1)], [16], SamplingParams(temperature=0.0))
    first_call_s, rates = {}, {}
    for name, budgets in cases.items():
        prompts_R = [*workload.prompts(work, len(budgets))]

        def sample(repeat: int, prompts_R: Any = prompts_R, budgets: Any = budgets) -> float:
            start = time.perf_counter()
            turns = engine.complete(prompts_R, budgets, first_request=repeat * len(budgets))
            taken = time.perf_counter() - start
            assert [len(turn.ids) for turn in turns] == budgets
            return taken

        first_call_s[name] = round(sample(0), 2)
        num_compiled = engine.num_compilations
        taken = [sample(repeat) for repeat in range(1, repeats + 1)]
        assert engine.num_compilations == num_compiled, "a timed repetition compiled a program"
        rates[name] = [sum(budgets) / s for s in taken]

    return {
        "workload": "sample",
        "size": size,
        "params": workload.num_params(params),
        "uniform_tokens_per_s": round(float(np.median(rates["uniform"])), 1),
        "ragged_tokens_per_s": round(float(np.median(rates["ragged"])), 1),
        "tokens_per_s_all": {name: workload.rounded(all_, 1) for name, all_ in rates.items()},
        "first_call_s": first_call_s,
        "useful_tokens": {name: sum(budgets) for name, budgets in cases.items()},
        "greedy16": greedy.ids.tolist(),
    }


if __name__ == "__main__":
    arguments = workload.parse_arguments(__doc__, "timed repetitions, after one that compiles")
    prepare_cpu(workload.CPU_DEVICES)
    workload.print_result(run(arguments.size, arguments.steps))
