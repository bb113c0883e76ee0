"""Times the SFT step: the project's model, loss, optimizer and train step.

    python -m benchmarks.train_step [--size small] [--steps 8]

Prints one JSON line. `step_s_all` is every timed step, from calling it until loss and parameters
are there; `tokens_per_s` is of their median. `time_to_first_step_s` holds imports and compilation.
`losses` begins with the step that compiles. `matmul_share` is what the model's own operations make
of `matmul_gflops`, XLA's product of two square matrices measured after the steps.
"""

from __future__ import annotations

# isort: off
import benchmarks  # first: it takes the time
# isort: on

import time
from typing import Any

import jax
import numpy as np

from agentx.batch import Batch
from agentx.host import prepare_cpu
from agentx.losses import NextTokenLoss
from agentx.model.sizes import train_flops_per_token
from agentx.model.transformer import abstract_transformer
from agentx.optim import make_optimizer
from agentx.step import make_train_step
from agentx_kernels.layout import causal
from benchmarks import workload


def make_batch(tokens_BS: Any, mask_BS: np.ndarray) -> Batch:
    """Whole rows as a batch; the target of a place is the next token, which its mask weights."""
    weights_BS: Any = np.zeros(mask_BS.shape, np.float32)
    weights_BS[:, :-1] = mask_BS[:, 1:]
    targets_BS: Any = np.roll(tokens_BS, -1, axis=1)
    return Batch(tokens_BS, targets_BS, weights_BS, causal(*tokens_BS.shape))


def run(size: str, steps: int | None = None) -> dict[str, Any]:
    """The fields of the JSON line."""
    work = workload.SIZES[size]
    steps = steps or work.train_steps
    mesh = workload.make_machine()
    model = abstract_transformer(work.model)
    optimizer = make_optimizer(workload.TRAIN_OPTIMIZER, steps + 1)
    micro_batches = workload.num_micro_batches(work, work.train_rows, mesh)
    step = make_train_step(model, NextTokenLoss(), optimizer, mesh, num_micro_batches=micro_batches)
    state = workload.make_state(model, optimizer, mesh)
    batches = [make_batch(*pair) for pair in workload.train_batches(work)]

    first_step_s = time_to_first_step_s = 0.0
    step_s, losses = [], []
    for number in range(steps + 1):
        start = time.perf_counter()
        state, metrics = step(state, batches[number % len(batches)])
        losses.append(float(metrics["loss"]))
        jax.block_until_ready(state)
        end = time.perf_counter()
        if number:
            step_s.append(end - start)
        else:
            first_step_s, time_to_first_step_s = end - start, end - benchmarks.START

    num_tokens = work.train_rows * work.train_length
    tokens_per_s = num_tokens / float(np.median(step_s))
    ceiling = workload.matmul_gflops()
    gflops = tokens_per_s * train_flops_per_token(work.model, work.train_length) / 1e9
    return {
        "workload": "train",
        "size": size,
        "params": workload.num_params(state.params),
        "tokens_per_s": round(tokens_per_s, 1),
        "step_s_all": workload.rounded(step_s),
        "first_step_s": round(first_step_s, 2),
        "time_to_first_step_s": round(time_to_first_step_s, 2),
        "losses": workload.rounded(losses, 5),
        "matmul_gflops": round(ceiling, 1),
        "matmul_share": round(gflops / ceiling, 3),
    }


if __name__ == "__main__":
    arguments = workload.parse_arguments(__doc__, "timed steps, after one that compiles")
    prepare_cpu(workload.CPU_DEVICES)
    workload.print_result(run(arguments.size, arguments.steps))
