"""`agentx data inspect`: what it shows of a row is what the run trains on, token for token."""

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
import rich.console
from pages import Page
from runs import BYTES, MODEL, make_config, write_inputs

from agentx.batch import Batch
from agentx.cli.config import save_config
from agentx.cli.main import main
from agentx.cli.records import document_records
from agentx.cli.rows import Row, page_fields, read_document, read_row, runs_of
from agentx.cli.screen import print_row
from agentx.data.objectives import Example, InfillCall, NextToken, PlainText, Schedule
from agentx.data.store import StoreWriter, TokenStore
from agentx.report.row import mask, write_row_page
from agentx.source import Dataset, DatasetSource, MixtureSource, SourceContext
from agentx.trajectory import Outcome, Role, Span, Trajectory
from agentx_kernels.layout import ROOT, prefix_tree

HOSTILE = "</script><script>alert(1)</script>\x1b[2J"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def config(inputs):
    texts, sessions = make_config("pretrain", inputs).source.datasets
    infill = dataclasses.replace(sessions, objective=InfillCall(rate=1.0), share=3.0)
    source = DatasetSource((texts, infill), rows=6, length=160)
    model = dataclasses.replace(MODEL, max_length=160)
    return make_config("pretrain", inputs, source=source, model=model, seed=5)


def texts_row(folder: Path, *texts: str) -> Row:
    """Row 0 of a run on texts that fit into one row."""
    spans = [Span(Role.TEXT, np.array(BYTES.encode(text), np.int32)) for text in texts]
    TokenStore.write(folder / "store", [Trajectory([span]) for span in spans], BYTES.fingerprint)
    BYTES.save(folder / "tokenizer.model")
    source = DatasetSource((Dataset(str(folder / "store"), PlainText()),), 1, 64)
    return read_row(make_config("sft", folder, source=source), "run.gin", 0, 0)


def printed(row: Row, width: int = 100) -> str:
    console = rich.console.Console(file=io.StringIO(), width=width, highlight=False)
    print_row(row, console)
    return console.file.getvalue()


def rebuilt(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, weights and positions of a row, from what is shown of its tokens."""
    tokens, positions = np.zeros((2, row.length), np.int32)
    weights = np.zeros(row.length, np.float32)
    for segment in page_fields(row)["segments"]:
        for this, following in zip(segment["tokens"], segment["tokens"][1:], strict=False):
            tokens[this["place"]], positions[this["place"]] = this["id"], this["position"]
            weights[this["place"]] = following["weight"]
    return tokens, weights, positions


# --------------------------------------------------------------------------------------------------
# What is shown is what is trained on
# --------------------------------------------------------------------------------------------------


def trained_on(config, step: int) -> Batch:
    context = SourceContext(BYTES, config.model, None, config.seed, step, config.num_steps)
    source = config.source.open(context)
    try:
        return source.batch(step, None).batch
    finally:
        source.close()


def test_a_row_is_what_the_run_trains_on(config):
    batch = trained_on(config, 7)
    changed = set()
    for number in range(6):
        row = read_row(config, "run.gin", number, 7)
        tokens, weights, positions = rebuilt(row)
        np.testing.assert_array_equal(tokens, batch.tokens[number])
        np.testing.assert_array_equal(weights, batch.weights[number])
        np.testing.assert_array_equal(positions, batch.layout.position[number])
        changed |= {(s.source, s.change) for s in row.segments}
    assert changed >= {("texts", ""), ("sessions", "changed by InfillCall, 3 tokens more")}


def test_data_beside_rollouts_has_the_weights_of_the_mixture(inputs, config):
    rollouts = dataclasses.replace(make_config("rl", inputs).source, length=160)
    mixture = MixtureSource(config.source, rollouts, data_weight=0.25)
    alone = read_row(config, "run.gin", 1, 0)
    beside = read_row(dataclasses.replace(config, source=mixture), "run.gin", 1, 0)
    np.testing.assert_array_equal(rebuilt(beside)[1], rebuilt(alone)[1] * 0.25)
    np.testing.assert_array_equal(beside.batch.weights, alone.batch.weights * 0.25)


def test_segments_are_the_documents_of_the_row_in_order(config):
    row = read_row(config, "run.gin", 1, 0)
    store = TokenStore.open(config.source.datasets[1].store)
    assert [s.source for s in row.segments] == ["sessions"] * 3
    place = 0
    for segment in row.segments:
        whole = store[segment.document]
        np.testing.assert_array_equal(segment.stored.ids, whole.ids[segment.begin : segment.end])
        assert segment.piece == f"whole, {len(whole)} tokens"
        assert segment.place == place
        place += segment.num_places
    assert [part.share for part in row.parts] == [0.25, 0.75]


def test_runs_are_those_that_the_layout_was_made_of(config):
    row = read_row(config, "run.gin", 0, 0)
    assert [run[:2] for run in runs_of(row)] == [
        (s.place, s.place + s.num_places) for s in row.segments
    ]
    layout = prefix_tree([[(2, ROOT), (2, 0), (1, 0), (3, 2), (2, ROOT)]], 12)
    tree = dataclasses.replace(row, number=0, batch=row.batch._replace(layout=layout))
    assert [tuple(run) for run in runs_of(tree)] == [
        (0, 2, 8, 0, -1, 0), (2, 4, 4, 2, 0, 1), (4, 8, 8, 2, 0, 1), (8, 10, 10, 0, -1, 0),
    ]  # fmt: skip
    empty = row.batch._replace(layout=prefix_tree([[]], 4))
    assert runs_of(dataclasses.replace(row, number=0, batch=empty)) == []


# --------------------------------------------------------------------------------------------------
# In the terminal
# --------------------------------------------------------------------------------------------------


def test_without_colours_roles_weights_and_outcomes_are_there_all_the_same(tmp_path):
    def span(role, text, outcome=Outcome.OK):
        return Span(role, np.array(BYTES.encode(text), np.int32), outcome=outcome)

    spans = [span(Role.USER, "go\n on "), span(Role.CALL, "ls", Outcome.FAILED)]
    spans += [Span(Role.ANSWER, np.array([10, *BYTES.encode("2"), 8], np.int32))]
    TokenStore.write(tmp_path / "store", [Trajectory(spans, task_id="t/1")], BYTES.fingerprint)
    BYTES.save(tmp_path / "tokenizer.model")
    row, count = read_document(str(tmp_path / "store"), str(tmp_path / "tokenizer.model"), 0)
    assert count == 1
    lines = [line.rstrip() for line in printed(row).splitlines()]
    assert "task t/1" in lines
    at = lines.index("0  user         0  go↵")
    assert lines[at : at + 4] == [
        "0  user         0  go↵",
        "                    on",
        "7  call failed  0  ls",
        "9  answer       1  <|answer|>2<|end|>",
    ]


def test_the_picture_says_who_sees_whom(tmp_path):
    row = texts_row(tmp_path, "aaaa", "bbb", "cc")
    shown = [" ".join(line.split()) for line in printed(row).splitlines()]
    assert "0 ◣ 0 to 2 3 0 to 2 3 store 0, whole, 4 tokens" in shown
    assert "1 ·◣ 3 to 4 5 0 to 1 2 store 1, whole, 3 tokens" in shown
    assert "2 ··◣ 5 to 5 6 0 to 0 1 store 2, whole, 2 tokens" in shown
    assert any(line.startswith("row 6 tokens, 6 of them trained") for line in shown)
    layout = prefix_tree([[(2, ROOT), (2, 0), (1, 0)]], 64)
    tree = dataclasses.replace(row, batch=row.batch._replace(layout=layout))
    assert re.findall("[█·]*◣", printed(tree)) == ["◣", "█◣", "█·◣"]


def test_a_block_of_tokens_has_the_number_of_its_run_in_the_picture(tmp_path):
    row = texts_row(tmp_path, "bbb", "dd")
    first, second = row.segments
    # What an objective has left a single token of stands in no run.
    bare = dataclasses.replace(
        first, example=Example(*(x[:1] for x in vars(first.example).values()))
    )
    row = dataclasses.replace(
        row, segments=[bare, first, dataclasses.replace(bare, place=2), second]
    )
    titles = re.findall("^(run .|no place): store ([0-9])", printed(row), re.MULTILINE)
    assert titles == [("no place", "0"), ("run 0", "0"), ("no place", "0"), ("run 1", "1")]
    write_row_page(tmp_path / "row.html", page_fields(row))
    assert "whole, 3 tokens · no place · " in Page(tmp_path / "row.html").text


def test_a_schedule_is_shown_as_it_begins(inputs, config):
    schedule = Schedule((PlainText(), NextToken()), until=(0.9, 1.0))
    datasets = [dataclasses.replace(d, objective=schedule) for d in config.source.datasets]
    source = dataclasses.replace(config.source, datasets=tuple(datasets))
    _, record = document_records(source, BYTES, stage="pretrain", seed=0)
    assert {token["weight"] for token in record["tokens"][1:]} == {1.0}


def test_nothing_in_a_document_steers_the_terminal(tmp_path):
    shown = printed(texts_row(tmp_path, HOSTILE))
    assert "\x1b" not in shown
    assert "<script>alert(1)</script>\\u001b[2J" in shown


@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_are_no_wider_than_the_screen(config, width):
    row = read_row(config, "run.gin", 0, 0)
    assert max(len(line) for line in printed(row, width).splitlines()) <= width


# --------------------------------------------------------------------------------------------------
# On the page
# --------------------------------------------------------------------------------------------------


def test_the_page_holds_each_token_once_with_its_weight_and_loads_nothing(config, tmp_path):
    row = read_row(config, "run.gin", 1, 0)
    write_row_page(tmp_path / "row.html", page_fields(row))
    page = Page(tmp_path / "row.html")
    attrs = [attrs for _, attrs in page.tags if "data-id" in attrs]
    examples = [segment.example for segment in row.segments]
    assert [int(a["data-id"]) for a in attrs] == np.concatenate([e.ids for e in examples]).tolist()
    weights = np.concatenate([e.weights for e in examples]).tolist()
    assert [float(a["data-weight"]) for a in attrs] == weights
    assert sum("data-place" not in a for a in attrs) == len(examples)
    fim = BYTES.special["<|fim_middle|>"]
    [marker, *_] = [a for a in attrs if int(a["data-id"]) == fim]
    assert "marker" in marker["class"].split()
    assert "Row 1 of batch 0" in page.text
    assert "changed by InfillCall, 3 tokens more" in page.text
    assert "sessionsInfillCall75.0 %" in page.text
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed"}
    assert not re.search(r"https?://|@import|url\(", (tmp_path / "row.html").read_text())


def test_a_script_in_a_document_is_escaped(tmp_path):
    row = texts_row(tmp_path, HOSTILE)
    write_row_page(tmp_path / "row.html", page_fields(row))
    assert (tmp_path / "row.html").read_text().count("</script>") == 1
    assert "".join(Page(tmp_path / "row.html").tokens).startswith("</script><script>alert(1)")


def test_a_byte_of_a_character_shows_as_its_number(tmp_path):
    row = texts_row(tmp_path, "a€\n")
    write_row_page(tmp_path / "row.html", page_fields(row))
    assert Page(tmp_path / "row.html").tokens == ["a", "\\xe2", "\\x82", "\\xac", "↵"]
    # In the terminal the tokens of a block stand together, and make whole characters.
    assert "€↵" in printed(row)


def test_the_mask_is_drawn_exactly_however_long_the_row_is():
    runs = [
        {"begin": 0, "end": 2000, "subtree_end": 5000, "parent": -1, "name": "<b>"},
        {"begin": 2000, "end": 5000, "subtree_end": 5000, "parent": 0, "name": ""},
    ]
    drawn = str(mask(runs, 8000))
    assert 'viewBox="0 0 8000 8000"' in drawn
    assert 'd="M0 0L2000 2000V5000H0Z"' in drawn
    assert 'd="M2000 2000L5000 5000V5000H2000Z"' in drawn
    assert "&lt;b&gt;: keys 0 to 1999, seen by queries up to 4999" in drawn


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_file(config, tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "run.gin"
    save_config(config, file)
    return str(file)


def test_the_command_shows_a_row_and_says_what_is_next(run_file, capsys):
    override = "--gin.DatasetSource.rows=2"
    assert main(["data", "inspect", run_file, "--row", "1", override]) == 0
    out = capsys.readouterr().out
    assert f"That was row 1 of the 2 of batch 0 of {run_file}" in out
    assert f"agentx data inspect {run_file} --row 0 --step 1 {override}" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["RUN", "--row", "6"], "--row 6: a batch of RUN has rows 0 to 5 of data"),
        (["RUN", "--row", "-1"], "--row -1: a batch of RUN has rows 0 to 5 of data"),
        (["RUN", "--step", "24"], "--step 24: RUN trains for steps 0 to 23"),
        (["RUN", "--index", "1"], "RUN is a run file, which names its tokenizer and has rows"),
        (["STORE"], "give the tokenizer that STORE was built with: --tokenizer FILE"),
        (["STORE", "--row", "0"], "STORE is no run file (.gin), so it has no --row and --step"),
        (["STORE", "--gin.a=1"], "--gin.a=1: `agentx data inspect` reads no run file to override"),
    ],
)
def test_a_mistake_ends_in_one_sentence(inputs, run_file, capsys, arguments, sentence):
    names = {"RUN": run_file, "STORE": str(inputs / "texts")}
    assert main(["data", "inspect", *(names.get(a, a) for a in arguments)]) == 2
    err = capsys.readouterr().err
    for name, path in names.items():
        sentence = sentence.replace(name, path)
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1


def test_rollouts_alone_have_no_row(inputs):
    with pytest.raises(ValueError, match=r"^rl\.gin trains on rollouts alone, which have no rows"):
        read_row(make_config("rl", inputs), "rl.gin", 0, 0)


def test_a_store_that_is_not_complete_is_shown_as_far_as_it_goes(tmp_path, inputs):
    ids = np.array(BYTES.encode("so far"), np.int32)
    with StoreWriter(tmp_path / "store", BYTES.fingerprint, made_from={}) as writer:
        writer.add(Trajectory([Span(Role.TEXT, ids)]))
        writer.write_shard()
        row, count = read_document(str(tmp_path / "store"), str(inputs / "tokenizer.model"), 0)
    assert count == 1
    assert "o far" in printed(row)
