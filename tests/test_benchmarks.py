"""Benchmarks run at a size for tests, print their fields, and work on what they say they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agentx.data.formats import TextDocument
from agentx.model.sizes import num_params
from agentx.model.transformer import abstract_transformer
from benchmarks import copying, data, grpo_step, sample, tokenizing, train_step, workload

ROOT = Path(__file__).parents[1]
TINY = workload.SIZES["tiny"]


def test_a_training_benchmark_prints_one_line_with_its_fields():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "benchmarks/train_step.py", "--size", "tiny", "--steps", "4"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    [line] = done.stdout.splitlines()
    result = json.loads(line)
    assert result["workload"] == "train"
    assert result["params"] == num_params(TINY.model)
    assert len(result["step_s_all"]) == 4
    assert result["tokens_per_s"] == pytest.approx(
        2 * 48 / np.median(result["step_s_all"]), rel=0.1
    )
    assert result["time_to_first_step_s"] > result["first_step_s"] > 0
    assert len(result["losses"]) == 5
    # An untrained model is as good as guessing, and the fifth step has the first one's batch.
    assert result["losses"][0] == pytest.approx(np.log(64), abs=0.1)
    assert result["losses"][4] < result["losses"][0]
    assert result["matmul_gflops"] > 0


def test_a_sampling_benchmark_samples_every_budget_and_compiles_nothing_while_timed():
    result = sample.run("tiny", repeats=2)
    budgets = workload.ragged_budgets(TINY)
    assert result["useful_tokens"] == {"uniform": 2 * 16, "ragged": sum(budgets)}
    assert {name: len(rates) for name, rates in result["tokens_per_s_all"].items()} == {
        "uniform": 2,
        "ragged": 2,
    }
    assert result["uniform_tokens_per_s"] > 0
    assert result["ragged_tokens_per_s"] > 0
    assert len(result["greedy16"]) == 16
    assert result["greedy16"] == sample.run("tiny", repeats=1)["greedy16"]


def test_a_grpo_benchmark_updates_once_a_step_on_what_the_policy_sampled():
    result = grpo_step.run("tiny", steps=2)
    assert result["tokens_per_step"] == 2 * 4 * 16
    assert len(result["step_s_all"]) == 2
    assert set(result["split_s"]) == {"rollout", "reward_and_pack", "update"}
    # Adam moves a weight by about the learning rate, and there were three updates.
    assert 0.5 < result["max_param_change"] / (3 * 1e-5) < 1.2
    assert len(result["mean_reward"]) == 3
    assert result["sampler_difference_max"] < 1e-4


def test_a_group_of_the_grpo_benchmark_holds_its_prompt_once():
    mesh = workload.make_machine()
    engine = grpo_step.Engine(TINY.model, num_slots=8, max_length=24)
    engine.set_params(workload.make_params(abstract_transformer(TINY.model), mesh), version=0)
    groups = grpo_step.roll_out(engine, TINY, 0)
    batch = grpo_step.pack(groups, np.array([[0.0, 0.0, 0.0, 1.0]] * 2), TINY)
    prompts_RT = workload.grpo_prompts(TINY, 0)
    # 7 places of the prompt, and of 4 branches its last token and all sampled ones but the last.
    assert batch.tokens.shape == (2, 7 + 4 * 16)
    assert batch.tokens[1, :7].tolist() == prompts_RT[1, :7].tolist()
    assert (batch.tokens[:, 7::16] == prompts_RT[:, 7:]).all()
    assert batch.layout.position[0, [6, 7, 22, 23, 38]].tolist() == [6, 7, 22, 7, 22]
    assert batch.weights.sum(axis=1).tolist() == [64, 64]


def test_weights_and_data_are_the_same_everywhere():
    # What NumPy's PCG64 gives for the stated seeds and order; another framework relies on them.
    weights = workload.make_weights(TINY.model)
    assert weights["embed"][0, :2].tolist() == pytest.approx(
        [-0.0386116579, 0.0545178354], rel=1e-6
    )
    assert weights["layers.0.mlp.w_down"][1, -1, -1] == pytest.approx(0.127329692, rel=1e-6)
    assert sum(w.size for w in weights.values()) == num_params(TINY.model)
    assert workload.ragged_budgets(workload.SIZES["small"])[:4] == [227, 122, 107, 153]
    tokens_BS, mask_BS = workload.train_batches(TINY)[1]
    assert tokens_BS[0, :4].tolist() == [5, 29, 52, 44]
    assert mask_BS.sum(axis=1).tolist() == [9, 5]


def test_targets_of_the_training_benchmark_are_the_marked_tokens():
    batch = train_step.make_batch(np.array([[5, 6, 7, 8]]), np.array([[1, 0, 1, 1]]))
    assert batch.targets[0, :3].tolist() == [6, 7, 8]
    assert batch.weights.tolist() == [[0, 1, 1, 0]]


def test_sizes_are_those_that_others_run():
    assert num_params(workload.SIZES["small"].model) == 8_917_760
    assert num_params(workload.SIZES["medium"].model) == 41_957_376


def test_the_copying_benchmark_weighs_only_what_can_be_copied():
    batch = copying.make_batch(np.random.default_rng(0))
    rows = zip(batch.tokens, batch.targets, batch.weights, strict=True)
    for tokens_S, targets_S, weights_S in rows:
        period = int(np.flatnonzero(weights_S)[0]) + 1
        assert 4 <= period <= 20
        assert weights_S[period - 1 :].all()
        assert len(set(tokens_S[:period].tolist())) == period
        assert (targets_S[period - 1 :] == tokens_S[: len(tokens_S) - period + 1]).all()
    result = copying.run("copy", layers=1, steps=25, seed=0)
    assert result["steps"] == 25
    assert not result["learnt"]
    assert 2 < result["losses"][0] < 9


def test_the_tokenizing_benchmark_counts_the_tokens_of_all_documents_on_every_way():
    text = Path(tokenizing.__file__).read_text()
    documents = {
        "short": [TextDocument(str(i), line) for i, line in enumerate(text.split("\n"))],
        "long": [TextDocument("all", text)],
    }
    result = tokenizing.run(documents, vocab_size=400, processes=1, repeats=1)
    for kind in ("short", "long"):
        one, other = (result[f"{kind}_{name}"] for name in ("sentencepiece", "tokenizer_json"))
        assert one["tokens"] == other["tokens"] > 0
        assert one["share"] == pytest.approx(
            one["tokens_per_s"] / one["library_tokens_per_s"], abs=1e-2
        )
    both = result["short_sentencepiece"]["tokens"] + result["long_sentencepiece"]["tokens"]
    # Four times over, with <|bos|> and <|end|> around each document.
    assert result["parallel"]["tokens"] == 4 * (both + 2 * sum(map(len, documents.values())))


def test_the_data_benchmark_times_every_objective_beside_a_plain_reader(monkeypatch):
    for name, value in (("_SESSIONS", 30), ("_TEXTS", 20), ("_VOCAB", 600), ("_SECONDS", 0.01)):
        monkeypatch.setattr(data, name, value)
    monkeypatch.setattr(data, "_LENGTH", 512)
    result = data.run("", "", repeats=1)
    assert result["documents"] == [30, 20]
    assert set(result["tokens_per_s"]) == {"memmap", *result["fill"]}
    assert min(result["tokens_per_s"].values()) > 0
    assert result["of_memmap"]["memmap"] == 1
