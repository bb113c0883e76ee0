"""`agentx data build`: files of any format to a store, with totals that add up."""

import json

import pytest

from agentx.cli.main import main
from agentx.data.store import TokenStore
from agentx.tokenizer import Tokenizer

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
# The tool format has no place for an argument that is given after one that is not.
HOLE = {
    "messages": [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"b": 1}}]},
    ],
    "tools": [{"name": "f", "description": "", "parameters": [{"name": "a"}, {"name": "b"}]}],
}


@pytest.fixture
def build(tmp_path, capsys):
    Tokenizer.bytes().save(tmp_path / "tokenizer.model")

    def build(*arguments):
        model, out = str(tmp_path / "tokenizer.model"), str(tmp_path / "store")
        code = main(["data", "build", *arguments, "--tokenizer", model, "--out", out])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return build


def test_files_of_several_kinds_by_a_glob(tmp_path, build):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / "b.json").write_text(json.dumps([GOOD, GOOD]))
    (tmp_path / "c.txt").write_text("text")
    code, out, _ = build(str(tmp_path / "[abc].*"))
    assert code == 0
    assert "4 records read = 4 kept + 0 skipped\n" in out
    assert len(TokenStore.open(tmp_path / "store")) == 4


def test_what_is_skipped_is_counted_by_reason(tmp_path, build):
    lines = [json.dumps(GOOD), "{", "", json.dumps(HOLE), json.dumps(GOOD)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    code, out, _ = build(str(tmp_path / "a.jsonl"), "--on-error", "skip")
    assert code == 0
    sentence = "5 records read = 2 kept + 3 skipped (1 empty, 1 no JSON, 1 not in the tool format)"
    assert sentence in out
    assert len(TokenStore.open(tmp_path / "store")) == 2


@pytest.mark.parametrize(
    ("line", "arguments", "sentence"),
    [
        (json.dumps(HOLE), [], "a.jsonl:2: call of f leaves out 'a' but gives a later argument"),
        ("{", [], "a.jsonl:2: this is no JSON"),
        ("{}", ["--format", "chatml"], "there is no format 'chatml'; there are tau_bench"),
        ("{}", ["--on-error", "ignore"], "--on-error ignore: it must be raise or skip"),
        ("{}", ["--format", "hermes"], "a.jsonl:1: there is no list 'conversations'"),
    ],
)
def test_a_mistake_ends_in_one_sentence(tmp_path, build, line, arguments, sentence):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + "\n" + line)
    code, _, err = build(str(tmp_path / "a.jsonl"), *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_a_glob_without_a_match_is_named(tmp_path, build):
    code, _, err = build(str(tmp_path / "*.jsonl"))
    assert (code, err) == (2, f"error: there is no file or folder {tmp_path}/*.jsonl\n")
