"""A store from a run file: filters, duplicates, several sources; stopped, resumed, refused."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentx.cli.config import load_config
from agentx.cli.main import main
from agentx.cli.registry import REGISTRY
from agentx.data.build import build
from agentx.data.curate import Decontaminate, Deduplicate, Length, MinReward
from agentx.data.prepare import BeamConfig, BuildConfig, Input, describe
from agentx.data.store import StoreWriter, TokenStore
from agentx.tokenizer import Tokenizer

# The tool format has no place for an argument that is given after one that is not.
HOLE = {
    "messages": [
        {"role": "user", "content": "?" * 40},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"b": 1}}]},
    ],
    "tools": [{"name": "f", "description": "", "parameters": [{"name": "a"}, {"name": "b"}]}],
    "reward": 1.0,
}


def conversation(number, reward):
    asked, told = f"What is {number}?", "It is a number. " * (1 + number % 3)
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    return {"messages": messages, "reward": reward}


@pytest.fixture
def inputs(tmp_path):
    """A tokenizer, 40 conversations of which every fourth failed, 20 texts, one twice."""
    Tokenizer.bytes().save(tmp_path / "tokenizer.model")
    told = [conversation(number, float(number % 4 > 0)) for number in range(40)]
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, told)))
    texts = [f"Text number {n}: " + f"{n * n} words. " * 9 for n in (*range(19), 3)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return tmp_path


def config(folder, out="store", **changes):
    return BuildConfig(
        **{
            "inputs": (
                Input(str(folder / "runs.jsonl"), name="runs"),
                Input(str(folder / "texts.jsonl"), name="texts", field="text"),
            ),
            "tokenizer": str(folder / "tokenizer.model"),
            "out": str(folder / out),
            "filters": (Length(min_characters=30), MinReward(0.5)),
            "deduplicate": Deduplicate(threshold=0.9),
            "shard_tokens": 700,
        }
        | changes
    )


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_is_read_is_kept_skipped_or_filtered_and_the_totals_add_up(inputs):
    store = build(config(inputs))
    notes = store.manifest["notes"]
    assert notes["read"] == 60
    assert notes["read"] == (
        notes["kept"] + sum(notes["skipped"].values()) + sum(notes["filtered"].values())
    )
    assert notes["kept"] == len(store)
    assert notes["filtered"]["Deduplicate: exact duplicate"] == 1
    assert describe(notes).startswith(
        f"60 records read (40 conversations, 20 texts) = {len(store)} kept + 0 skipped + "
    )
    assert store.sources == ["runs", "texts"]
    assert {store.sources[n] for n in store.source_of} == {"runs", "texts"}
    left = [
        json.loads(line)
        for path in sorted((inputs / "store" / "taken").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert len(left) == sum(notes["filtered"].values())
    twice = next(one for one in left if one["reason"] == "exact duplicate")
    assert twice["name"].endswith("texts.jsonl:20")
    assert twice["evidence"][0].endswith("texts.jsonl:4")


def test_the_notes_say_how_many_evaluation_items_were_sought(inputs):
    items = ["Text number 3: 9 words. 9 words. 9 words.", "two words", "or three words"]
    (inputs / "test.jsonl").write_text("\n".join(json.dumps({"q": item}) for item in items))
    filters = (Decontaminate((str(inputs / "test.jsonl"),), ("q",)),)
    notes = build(config(inputs, filters=filters)).manifest["notes"]
    assert notes["filtered"]["Decontaminate: contaminated"] == 2
    assert notes["evaluation"] == {"sought": 1, "too short": 2}
    assert describe(notes).endswith("(1 evaluation items sought, 2 evaluation items too short)")


@pytest.mark.parametrize("stop_after", [1, 17, 40, 58])
def test_a_build_that_was_stopped_goes_on_to_the_same_bytes(inputs, stop_after):
    class Stopped(Exception):
        pass

    def stop(seen, tokens):
        if seen >= stop_after:
            raise Stopped

    build(config(inputs, "whole"))
    with pytest.raises(Stopped):
        build(config(inputs, "parts"), stop)
    written = []
    build(config(inputs, "parts"), lambda seen, tokens: written.append(seen))
    assert files(inputs / "parts") == files(inputs / "whole")
    if stop_after > 20:  # what complete shards hold isn't tokenised again
        assert written[0] > 1
    assert build(config(inputs, "parts"), lambda seen, tokens: pytest.fail("done already"))


def test_what_cannot_be_told_is_counted_once_though_the_build_was_stopped(inputs):
    with (inputs / "runs.jsonl").open("a") as file:
        file.write("\n" + json.dumps(HOLE))
    both = {"on_error": "skip"}
    whole = build(config(inputs, "whole", **both))
    assert whole.manifest["notes"]["skipped"] == {"not in the tool format": 1}

    def stop(seen, tokens):
        if seen >= 55:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(config(inputs, "parts", **both), stop)
    build(config(inputs, "parts", **both))
    assert files(inputs / "parts") == files(inputs / "whole")
    with pytest.raises(ValueError, match=r"runs\.jsonl:41: call of f leaves out 'a'"):
        build(config(inputs, "raised"))


def test_why_a_conversation_cannot_be_told_is_written_down(inputs):
    (inputs / "hole.jsonl").write_text(json.dumps(HOLE))
    given = (Input(str(inputs / "hole.jsonl")), *config(inputs).inputs)
    build(config(inputs, inputs=given, on_error="skip"))
    line = (inputs / "store" / "taken" / "00000.jsonl").read_text().splitlines()[0]
    told = json.loads(line)
    assert told.pop("evidence")[0].startswith(
        "call of f leaves out 'a' but gives a later argument;"
    )
    assert told == {
        "name": f"{inputs}/hole.jsonl:1",
        "filter": "renderer",
        "reason": "not in the tool format",
    }


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_renderer_that_cannot_be_loaded_ends_the_build_at_once(inputs, num_processes):
    skipping = {"on_error": "skip", "num_processes": num_processes}
    with pytest.raises(ValueError, match="tokenizer") as caught:
        build(config(inputs, renderer="qwen3", **skipping))
    assert "runs.jsonl" not in str(caught.value)
    assert not list((inputs / "store").glob("*"))


def test_several_processes_write_the_same_bytes(inputs):
    build(config(inputs, "one"))
    build(config(inputs, "two", num_processes=2))
    assert files(inputs / "one") == files(inputs / "two")


def test_beam_writes_the_same_bytes(inputs):
    from agentx.data.beam import build_on_beam

    with (inputs / "runs.jsonl").open("a") as file:
        file.write("\n".join(["", json.dumps(HOLE), "{", json.dumps(conversation(50, 1.0))]))
    here = config(inputs, "local", on_error="skip")
    build(here)
    there = config(inputs, "beam", on_error="skip", beam=BeamConfig())
    store = build(there)
    assert files(inputs / "beam") == files(inputs / "local")
    assert store.manifest["notes"]["skipped"] == {"no JSON": 1, "not in the tool format": 1}
    assert len(build_on_beam(there)) == len(store)
    with pytest.raises(ValueError, match=r"runs\.jsonl:4\d: .* \[while running"):
        build_on_beam(config(inputs, "raised", beam=BeamConfig()))


def test_what_a_beam_build_left_when_it_failed_is_not_in_the_store(inputs):
    text = (Input(str(inputs / "texts.jsonl"), field="text"),)
    few = {"inputs": text, "filters": (), "deduplicate": None, "shard_tokens": 1 << 20}
    build(config(inputs, "here", **few))
    (inputs / "beam" / "entries").mkdir(parents=True)
    entry = {"name": "shard-00007-0123456789ab", "trajectories": 1, "spans": 1, "tokens": 1}
    (inputs / "beam" / "entries" / "00007.json").write_text(
        json.dumps({**entry, "files": {"ids/c/0": {"bytes": 1, "sha256": ""}}, "note": None})
    )
    build(config(inputs, "beam", beam=BeamConfig(), **few))
    assert files(inputs / "beam") == files(inputs / "here")


def test_a_changed_input_or_config_is_refused_with_what_changed(inputs):
    build(config(inputs))
    with pytest.raises(ValueError, match=r"another list of filters: \(Length\(.*\), not \(\); del"):
        build(config(inputs, filters=()))
    with (inputs / "texts.jsonl").open("a") as file:
        file.write('\n{"text": "one more"}')
    with pytest.raises(ValueError, match=r"from other inputs: .*/texts\.jsonl is changed; del"):
        build(config(inputs))
    Tokenizer.train(["a b c d e f g"] * 9, 290).save(inputs / "tokenizer.model")
    with pytest.raises(ValueError, match="was begun"):
        build(config(inputs))


def test_a_tokenizer_that_has_changed_is_read_again(inputs):
    build(config(inputs))
    Tokenizer.train(["a b c d e f g"] * 9, 290).save(inputs / "tokenizer.model")
    with pytest.raises(ValueError, match="was begun with another tokenizer fingerprint"):
        build(config(inputs))


def test_files_of_one_name_in_two_folders_are_told_apart(inputs):
    paths = []
    for folder in ("a", "b"):
        (inputs / folder).mkdir()
        paths.append(inputs / folder / "same.txt")
        paths[-1].write_text(f"the text of {folder}, long enough to be kept")
    both = {"inputs": tuple(Input(str(path)) for path in paths)}
    build(config(inputs, **both))
    paths[0].write_text("another text, of which nobody spoke before")
    with pytest.raises(ValueError, match=r"other inputs: .*/a/same\.txt is changed"):
        build(config(inputs, **both))


def test_evaluation_sets_of_one_name_are_told_apart(inputs):
    paths = [inputs / folder / "a" / "test.jsonl" for folder in ("x", "y")]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"text": f"a question of {path.parent} that nobody asks"}))
    filters = {
        "filters": (Decontaminate(tuple(map(str, paths)), fields=("text",), n=5, min_words=3),)
    }
    build(config(inputs, **filters))
    paths[0].write_text(json.dumps({"text": "another question that nobody asks at all"}))
    with pytest.raises(ValueError, match=r"other inputs: .*/x/a/test\.jsonl is changed"):
        build(config(inputs, **filters))


def test_inputs_that_change_places_are_another_build(inputs):
    (inputs / "more.jsonl").write_text(json.dumps({"text": "a text " * 20}))
    names, paths = ("a", "b"), [str(inputs / name) for name in ("texts.jsonl", "more.jsonl")]
    first, second = (
        {"inputs": tuple(Input(p, name=n, field="text") for p, n in zip(order, names, strict=True))}
        for order in (paths, paths[::-1])
    )
    build(config(inputs, **first))
    with pytest.raises(ValueError, match="was begun with another way of reading"):
        build(config(inputs, **second))


def test_a_run_file_says_it_all(inputs, capsys):
    run_file = inputs / "build.gin"
    run_file.write_text(
        f"""
BuildConfig.inputs = (@runs/Input(), @texts/Input())
BuildConfig.tokenizer = "{inputs}/tokenizer.model"
BuildConfig.out = "{inputs}/store"
BuildConfig.filters = (@Length(),)
Length.min_characters = 30
runs/Input.path = "{inputs}/runs.jsonl"
texts/Input.path = "{inputs}/texts.jsonl"
texts/Input.field = "text"
"""
    )
    assert main(["data", "build", str(run_file), "--gin.Length.min_characters=1"]) == 0
    out = capsys.readouterr().out
    assert (
        "60 records read (40 conversations, 20 texts) = 60 kept + 0 skipped + 0 filtered\n" in out
    )
    assert f"Documents: 60, tokens: 4,079, in {inputs}/store" in out
    assert main(["data", "build", str(run_file), "--out", "elsewhere"]) == 2
    assert "says it all: override it with --gin.BuildConfig.field" in capsys.readouterr().err
    assert main(["data", "build", str(inputs / "runs.jsonl")]) == 2
    assert "give --tokenizer and --out, or a .gin file" in capsys.readouterr().err


def test_the_run_file_for_agents_holds_and_the_docs_name_what_a_run_file_may():
    given = load_config("data/agents.gin", ["DATA=there"], root="BuildConfig")
    assert [i.name for i in given.inputs][-1] == "prose"
    assert given.filters[-1].files == ("there/gsm8k/test.jsonl",)
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    named = set(re.findall(r"`([A-Z]\w+)`", text))
    rooms = ("agentx.data.curate", "agentx.data.objectives")
    ours = {name for name, path in REGISTRY.items() if path.startswith(rooms)}
    assert ours <= named
    assert named <= set(REGISTRY)


def test_a_second_builder_is_refused(inputs, capsys):
    run_file = inputs / "build.gin"
    run_file.write_text(
        f"""
BuildConfig.inputs = (@Input(),)
BuildConfig.tokenizer = "{inputs}/tokenizer.model"
BuildConfig.out = "{inputs}/store"
Input.path = "{inputs}/runs.jsonl"
"""
    )
    with StoreWriter(inputs / "store", "tok", made_from={}):
        assert main(["data", "build", str(run_file)]) == 2
    assert f"is being written by process {os.getpid()}: wait for it" in capsys.readouterr().err


def test_a_killed_build_leaves_its_complete_shards_and_goes_on_behind_them(inputs):
    given = config(inputs, shard_tokens=1, deduplicate=None)
    code = f"""
import os, signal
from agentx.data.build import build
from agentx.data.prepare import *
from agentx.data.curate import *
build({given!r}, lambda seen, tokens: seen >= 30 and os.kill(os.getpid(), signal.SIGKILL))
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="is not complete"):
        TokenStore.open(inputs / "store")
    partial = TokenStore.open(inputs / "store", partial=True)
    partial.verify()
    assert len(partial) > 10
    written = []
    build(given, lambda seen, tokens: written.append(seen))
    assert written[0] == 30
    build(dataclasses.replace(given, out=str(inputs / "whole")))
    assert files(inputs / "store") == files(inputs / "whole")
