"""Tiny runs that several tests share: their inputs, and a config for every kind of training."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import SAY, EchoEnv, say
from flax import nnx

from agentx.cli.runs import load_run
from agentx.data.objectives import NextToken, PlainText
from agentx.data.store import TokenStore
from agentx.env.base import Task
from agentx.interop.tensors import flatten_params
from agentx.losses import NextTokenLoss, PolicyGradientLoss
from agentx.model import ModelConfig, abstract_transformer
from agentx.optim import OptimizerConfig
from agentx.render import ToolRenderer
from agentx.rollout import RolloutLimits
from agentx.sample import Engine
from agentx.source import Dataset, DatasetSource, MixtureSource, RolloutSource
from agentx.tokenizer import Tokenizer
from agentx.train import TrainConfig
from agentx.trajectory import Message, Outcome, Role, Span, Trajectory
from agentx_kernels.layout import causal

BYTES = Tokenizer.bytes()
MODEL = ModelConfig(
    vocab_size=BYTES.vocab_size,
    d_model=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    d_ff=48,
    rope_theta=1e4,
    max_length=128,
)


@dataclasses.dataclass(frozen=True)
class DigitTasks:
    """Ten tasks that ask for a 0 or a 1. A policy that knows only the format is right by luck."""

    def __len__(self) -> int:
        return 10

    def task(self, index: int, seed: int = 0) -> Task:
        digit = str(index % 2)
        return Task(f"digit/{index}", f"Say {digit}.", digit, kind="digit", seed=seed)

    def env(self) -> EchoEnv:
        return EchoEnv(num_turns=3)


def write_inputs(folder: Path) -> None:
    """A tokenizer and two stores: texts, and sessions in which some digit is said."""
    BYTES.save(folder / "tokenizer.model")
    rng = np.random.default_rng(0)
    texts = [
        Span(Role.TEXT, np.array([1, *BYTES.encode("to be or not to be " * n), 8], np.int32))
        for n in rng.integers(1, 9, 40)
    ]
    TokenStore.write(folder / "texts", [Trajectory([t]) for t in texts], BYTES.fingerprint)
    renderer = ToolRenderer(BYTES)
    sessions = []
    for asked, said in rng.integers(0, 2, (200, 2)).tolist():
        prompt = Message("user", f"Say {asked}.")
        reply = Message("tool", str(said), outcome=Outcome.OK)
        messages = [prompt, say(str(said)), reply, Message("assistant", str(said))]
        sessions.append(Trajectory(renderer.render(messages, (SAY,))))
    TokenStore.write(folder / "sessions", sessions, BYTES.fingerprint)


def make_config(kind: str, folder: Path, **changes: object) -> TrainConfig:
    """A run of `kind` on the inputs in `folder`: pretrain, sft after that, rl after that, both."""
    texts = Dataset(str(folder / "texts"), PlainText())
    sessions = Dataset(str(folder / "sessions"), NextToken())
    rollouts = RolloutSource(
        DigitTasks(),
        num_groups=2,
        group_size=8,
        rows=64,
        length=64,
        limits=RolloutLimits(max_new_tokens=10),
    )
    source, init_from = {
        "pretrain": (DatasetSource((texts, sessions), 8, 64), ""),
        "sft": (DatasetSource((sessions,), 8, 64), str(folder / "pretrain")),
        "rl": (rollouts, str(folder / "sft")),
        "both": (
            MixtureSource(DatasetSource((sessions,), 8, 64), rollouts),
            str(folder / "sft"),
        ),
    }[kind]
    is_data = isinstance(source, DatasetSource)
    config = TrainConfig(
        model=MODEL,
        source=source,
        loss=NextTokenLoss() if is_data else PolicyGradientLoss(importance_cap=2.0),
        optimizer=OptimizerConfig(learning_rate=1e-2 if is_data else 1e-3, schedule="constant"),
        tokenizer=str(folder / "tokenizer.model"),
        num_steps=24 if is_data else 5,
        init_from=init_from,
        checkpoint_every=8 if is_data else 2,
        log_every=4,
    )
    return dataclasses.replace(config, **changes)


def params_of(run: Path) -> dict[str, np.ndarray]:
    """The parameters of a run's newest complete checkpoint, by name."""
    return {name: np.asarray(x) for name, x in flatten_params(load_run(run).params).items()}


def assert_transformers_agrees(run: Path, folder: Path, prompt: list[int]) -> None:
    """A run and its Hugging Face folder have the same logits, to 1e-4, and the same greedy ids."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    policy = load_run(run)
    ids = np.random.default_rng(0).integers(0, policy.tokenizer.vocab_size, (1, 40))
    ids[0, : len(prompt)] = prompt[:40]
    model = nnx.merge(nnx.graphdef(abstract_transformer(policy.config)), policy.params)
    logits = model(jnp.asarray(ids), causal(*ids.shape)).hidden @ model.unembedding().T
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(np.asarray(logits), wanted, atol=1e-4, rtol=0)

    stop_ids = ToolRenderer(policy.tokenizer).stop_ids
    engine = Engine(policy.config, num_slots=1, max_length=64, stop_ids=stop_ids, temperature=0.0)
    engine.set_params(jax.device_get(policy.params), version=0)
    [turn] = engine.complete([prompt], [16])
    inputs = torch.tensor([prompt])
    generated = theirs.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=16)
    assert turn.ids.tolist() == generated[0, len(prompt) :].tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(turn.ids) == policy.tokenizer.decode(turn.ids.tolist())
