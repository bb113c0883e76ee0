"""From a run to transformers: trained, exported and generated from, all by the command line."""

import dataclasses
import pathlib

import pytest
from runs import MODEL, assert_transformers_agrees, make_config

from agentx.cli.config import save_config
from agentx.cli.main import main
from agentx.data.store import TokenStore
from agentx.render import ToolRenderer
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Message, Trajectory

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

QUESTION = "What is `path`?"
ANSWERS = ("a string", "a list of names", "an integer: 64")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of `agentx train` with a tokenizer of its own, and its export by `agentx export`."""
    folder = tmp_path_factory.mktemp("export")
    source = pathlib.Path(pathlib.__file__).read_text(encoding="utf-8")
    tokenizer = Tokenizer.train([source], 400)
    tokenizer.save(folder / "tokenizer.model")
    renderer = ToolRenderer(tokenizer)
    sessions = [
        Trajectory(renderer.render([Message("user", QUESTION), Message("assistant", answer)], ()))
        for answer in ANSWERS
    ]
    TokenStore.write(folder / "sessions", sessions, tokenizer.fingerprint)
    model = dataclasses.replace(MODEL, vocab_size=400)
    config = make_config("sft", folder, model=model, init_from="", num_steps=8)
    save_config(config, folder / "run.gin")
    assert main(["train", str(folder / "run.gin"), "--run", str(folder / "run")]) == 0
    assert main(["export", str(folder / "run"), str(folder / "huggingface")]) == 0
    return folder / "run"


def test_the_exported_run_has_the_same_logits_and_greedy_ids(run):
    tokenizer = Tokenizer.load(run / "tokenizer.model")
    spans = ToolRenderer(tokenizer).render([Message("user", QUESTION)], ())
    prompt = [int(i) for span in spans for i in span.ids]
    assert_transformers_agrees(run, run.parent / "huggingface", prompt)


def test_the_chat_template_and_greedy_search_write_what_agentx_sample_writes(run, capsys):
    folder = run.parent / "huggingface"
    assert {p.name for p in folder.iterdir()} >= {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert main(["sample", "--checkpoint", str(run), "--max-tokens", "12", QUESTION]) == 0
    ours = capsys.readouterr().out.split("\n\nThat was")[0]

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**inputs, max_new_tokens=12)[0]
    assert tokenizer.decode(generated).rstrip("\n") == ours
    assert ours.startswith(f"<|bos|><|system|><|user|>{QUESTION}<|answer|>")


def test_an_export_is_not_written_over(run, capsys):
    assert main(["export", str(run), str(run.parent / "huggingface")]) == 2
    assert "exists and is not empty; give another directory" in capsys.readouterr().err
