"""Times how soon a small model learns to copy from its context, by ModelConfig.init.

    python -m benchmarks.copying [--init copy] [--layers 2] [--steps 400] [--seed 0]

A row is a few random tokens, 4 to 20 of them, over and over. From the second time on, every token
can be told from what followed it before, and from nothing else: the loss of a model that only knows
which tokens occur is about 2.4, and 6.9 is that of guessing. Prints one JSON line: the mean loss of
every 25 steps of 2,048 tokens, until it is under 0.3 or the steps are over.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import numpy as np

from agentx.batch import Batch
from agentx.host import prepare_cpu
from agentx.losses import NextTokenLoss
from agentx.model.config import Init, ModelConfig
from agentx.model.transformer import abstract_transformer
from agentx.optim import OptimizerConfig, make_optimizer
from agentx.step import init_state, make_train_step
from agentx_kernels.layout import causal
from benchmarks import workload

_ROWS, _LENGTH, _VOCAB = 32, 64, 1024
_SHORTEST, _LONGEST = 4, 20
_EVERY, _LEARNT = 25, 0.3


def make_batch(rng: np.random.Generator) -> Batch:
    """Periodic rows; the tokens of the first period have no weight."""
    tokens_BS: Any = np.zeros((_ROWS, _LENGTH + 1), np.int32)
    weights_BS: Any = np.zeros((_ROWS, _LENGTH), np.float32)
    for tokens_S, weights_S in zip(tokens_BS, weights_BS, strict=True):
        period = int(rng.integers(_SHORTEST, _LONGEST + 1))
        tokens_S[:] = np.resize(rng.choice(_VOCAB, period, replace=False), len(tokens_S))
        weights_S[period - 1 :] = 1
    return Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], weights_BS, causal(_ROWS, _LENGTH))


def run(init: Init, layers: int, steps: int, seed: int) -> dict[str, Any]:
    """The fields of the JSON line."""
    config = ModelConfig(_VOCAB, 128, layers, 4, 4, 32, 256, rope_theta=200.0, init=init)
    model = abstract_transformer(config)
    mesh = workload.make_machine()
    schedule = OptimizerConfig(learning_rate=3e-3, warmup_steps=min(60, steps), b2=0.98)
    optimizer = make_optimizer(schedule, steps)
    train_step = make_train_step(model, NextTokenLoss(), optimizer, mesh)
    state = init_state(model, optimizer, mesh, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    losses: list[float] = []
    means: list[float] = []
    start = time.perf_counter()
    while len(losses) < steps and (not means or means[-1] > _LEARNT):
        state, metrics = train_step(state, make_batch(rng))
        losses.append(float(metrics["loss"]))
        if len(losses) % _EVERY == 0:
            means.append(float(np.mean(losses[-_EVERY:])))
    return {
        "workload": "copying",
        "init": init,
        "layers": layers,
        "seed": seed,
        "steps": len(losses),
        "seconds": round(time.perf_counter() - start, 1),
        "learnt": bool(means) and means[-1] <= _LEARNT,
        "losses": workload.rounded(means, 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--init", default="copy", choices=("normal", "copy"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    prepare_cpu(workload.CPU_DEVICES)
    workload.print_result(run(given.init, given.layers, given.steps, given.seed))
