"""`agentx data build` and `stats`: files of any format to a store, with totals that add up."""

import json

import matplotlib.image
import numpy as np
import pytest

from agentx.cli.main import main
from agentx.cli.stats import read_stats
from agentx.data.store import TokenStore
from agentx.render import ToolRenderer
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Message, Origin, Outcome, Role, Span, Trajectory

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
    assert "4 records read (3 conversations, 1 text) = 4 kept + 0 skipped + 0 filtered\n" in out
    assert len(TokenStore.open(tmp_path / "store")) == 4


def test_what_is_skipped_is_counted_by_reason(tmp_path, build):
    lines = [json.dumps(GOOD), "{", "", json.dumps(HOLE), json.dumps(GOOD)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    code, out, _ = build(str(tmp_path / "a.jsonl"), "--on-error", "skip")
    assert code == 0
    sentence = (
        "5 records read (3 conversations) = 2 kept + "
        "3 skipped (1 empty, 1 no JSON, 1 not in the tool format) + 0 filtered\n"
    )
    assert sentence in out
    assert len(TokenStore.open(tmp_path / "store")) == 2


@pytest.mark.parametrize(
    ("line", "arguments", "sentence"),
    [
        (json.dumps(HOLE), [], "a.jsonl:2: call of f leaves out 'a' but gives a later argument"),
        ("{", [], "a.jsonl:2: this is no JSON"),
        ("{}", ["--format", "chatml"], "there is no format 'chatml'; there are text, tau_bench"),
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
    assert not list(tmp_path.glob("store/*"))


def test_a_glob_without_a_match_is_named(tmp_path, build):
    code, _, err = build(str(tmp_path / "*.jsonl"))
    assert (code, err) == (2, f"error: there is no file or folder {tmp_path}/*.jsonl\n")


def written(folder, name, *trajectories):
    TokenStore.write(folder / name, trajectories, Tokenizer.bytes().fingerprint)
    return str(folder / name)


def test_stats_count_every_token_once(tmp_path, capsys):
    ids = [np.arange(n, dtype=np.int32) for n in (3, 5, 7)]
    failed = Trajectory(
        [Span(Role.CALL, ids[0], Origin.DATA, Outcome.FAILED), Span(Role.CALL, ids[1])],
        reward=0.5,
    )
    rendered = Trajectory(
        ToolRenderer(Tokenizer.bytes()).render([Message("user", "hi")], ()), reward=float("nan")
    )
    first = written(tmp_path, "first", failed, Trajectory([Span(Role.TEXT, ids[2])], reward=1.0))
    second = written(tmp_path, "second", rendered)
    stats = read_stats([tmp_path / "first", tmp_path / "second"])
    assert stats[0].tokens[Role.CALL].tolist() == [5, 3, 0]
    assert stats[0].tokens[Role.TEXT].tolist() == [7, 0, 0]
    for s in stats:
        assert s.tokens.sum() == s.lengths.sum()
    assert main(["data", "stats", first, second, "--plot", str(tmp_path / "stats.png")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "first 2 15 7 7 8 0.75 of 2" in lines
    assert "second 1 5 5 5 5 none" in lines
    assert "all 3 20 7 7 8 0.75 of 2" in lines
    assert "call 5 3 0 40.0 %" in lines
    picture = matplotlib.image.imread(tmp_path / "stats.png")
    assert picture.shape[1] == 1200
    assert picture.std() > 0.05


def test_stats_verify_what_they_count_where_they_are_asked_to(tmp_path, capsys):
    store = written(tmp_path, "store", Trajectory([Span(Role.TEXT, np.arange(3, dtype=np.int32))]))
    assert main(["data", "stats", store, "--verify"]) == 0
    assert f"That was {store}, every file as it was written\n" in capsys.readouterr().out
    (chunk,) = (tmp_path / "store").glob("shard-*/ids/c/0")
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["data", "stats", store]) == 0
    assert main(["data", "stats", store, "--verify"]) == 2
    assert f"error: {chunk} has changed since it was written" in capsys.readouterr().err


def test_stats_of_what_is_no_store_or_no_picture_end_in_one_sentence(tmp_path, capsys):
    assert main(["data", "stats", str(tmp_path)]) == 2
    assert f"error: {tmp_path} holds no token store" in capsys.readouterr().err
    store = written(tmp_path, "store", Trajectory([Span(Role.TEXT, np.arange(3, dtype=np.int32))]))
    assert main(["data", "stats", store, "--plot", "stats.txt"]) == 2
    assert "--plot stats.txt: it must end in .png, .svg or .pdf" in capsys.readouterr().err
