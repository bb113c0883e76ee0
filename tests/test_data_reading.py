"""`read_documents`: whatever a path holds, and whatever is wrong with it, ends in documents that
are counted or in one sentence that names the file."""

import contextlib
import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentx.data.formats import (
    Conversation,
    ReadCounts,
    TextDocument,
    identify,
    parquet,
    read_documents,
    reading,
    sniff,
    text_trajectory,
)
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Message, Role, ToolCall

ASKED = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
OPENAI = {
    "id": "o1",
    "messages": [
        {"role": "user", "content": "Bern?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "a", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ],
}
TAU = {"task_id": 3, "trial": 0, "reward": 1.0, "traj": OPENAI["messages"]}
SHAREGPT = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
HERMES = {
    "conversations": [
        {"from": "system", "value": "Calls stand within <tool_call></tool_call>."},
        {"from": "human", "value": "?"},
        {"from": "gpt", "value": '<tool_call>{"name": "f", "arguments": {}}</tool_call>'},
        {"from": "tool", "value": "<tool_response>1</tool_response>"},
    ]
}
SWE = {
    "history": [
        {"role": "user", "content": "Mend it."},
        {"role": "assistant", "content": "ls", "thought": "I look.", "action": "ls"},
        {"role": "user", "content": "a.py"},
    ]
}
INTERCODE = {
    "query": "?",
    "turn_history": {
        "actions": ["ls"],
        "observations": ["a"],
        "rewards": [1.0],
        "valid_action": [True],
    },
}
VERIFIERS = {
    "prompt": [{"role": "user", "content": "?"}],
    "completion": [{"role": "assistant", "content": "!"}],
    "example_id": 3,
}
RECORDS = {
    "openai": OPENAI,
    "tau_bench": TAU,
    "sharegpt": SHAREGPT,
    "hermes": HERMES,
    "swe_agent": SWE,
    "intercode": INTERCODE,
    "verifiers": VERIFIERS,
    "agentx": ASKED,
    "text": {"text": "a text"},
}
# No list, where a format has one.
ODD = [{"text": "a", "conversations": 5}, {"text": "a", "messages": {}}, {"text": "a", "traj": ""}]


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path, *records, **options):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path, **options)
    return path


def assert_refused(path, sentence, reason="", **options):
    """An error of one sentence; under "skip" one record is counted by this reason."""
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        list(read_documents(path, **options))
    assert "\n" not in str(caught.value)
    counts = ReadCounts()
    if not reason:
        with pytest.raises(ValueError, match=re.escape(sentence)):
            list(read_documents(path, **options, on_error="skip"))
        return
    with contextlib.suppress(ValueError):  # where nothing else is there
        list(read_documents(path, **options, on_error="skip", counts=counts))
    assert counts.skipped[reason] == 1
    assert counts.read == counts.kept + counts.num_skipped


# --------------------------------------------------------------------------------------------------
# Whatever a path holds
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
@pytest.mark.parametrize("name", RECORDS)
def test_every_format_is_recognised_in_every_kind_of_file(tmp_path, name, suffix):
    record, path = RECORDS[name], tmp_path / f"f{suffix}"
    if suffix == ".parquet":
        write_parquet(path, record)
    else:
        data = json.dumps([record] if suffix == ".json" else record).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert sniff(path) == name
    (found,) = read_documents(path)
    place = f"{path}:row 1" if suffix == ".parquet" else f"{path}:1"
    (line,) = read_documents(write_lines(tmp_path / "g.jsonl", record))
    if name == "text":
        assert found == TextDocument(place, "a text")
        assert list(read_documents(path, field="text")) == [found]
    else:
        assert isinstance(found, Conversation)
        assert (found.name, found.messages, found.reward) == (place, line.messages, line.reward)
        assert list(read_documents(path, format=name)) == [found]


@pytest.mark.parametrize("record", ODD)
def test_a_name_that_formats_use_may_hold_something_else(tmp_path, record):
    (found,) = read_documents(write_lines(tmp_path / "f.jsonl", record))
    assert found.text == "a"


def test_a_folder_of_records_is_read_as_such_and_any_other_is_a_tree_of_texts(tmp_path):
    write_lines(tmp_path / "b.jsonl", {"text": "b"})
    write_lines(tmp_path / "a.json", ASKED)
    (tmp_path / "empty.jsonl").write_text("")
    counts = ReadCounts()
    found = list(read_documents(tmp_path, counts=counts))
    assert [document.name for document in found] == [f"{tmp_path}/a.json", f"{tmp_path}/b.jsonl:1"]
    assert (counts.read, counts.kept, dict(counts.skipped)) == (3, 2, {"empty file": 1})
    (tmp_path / "README.md").write_text("what this is")
    (tmp_path / "LICENSE").write_text("what may be done with it")
    for options in ({}, {"field": "text", "pattern": "[!a]*"}):
        counts = ReadCounts()
        assert list(read_documents(tmp_path, counts=counts, **options))[-1] == found[-1]
        assert counts.skipped == {"empty file": 1, "beside records": 2}
    (tmp_path / "LICENSE").unlink()
    (tmp_path / "README.md").rename(tmp_path / "NEWS")
    names = [document.name for document in read_documents(tmp_path)]
    assert names == ["NEWS", "a.json", "b.jsonl"]
    assert names[1:] == [d.name for d in read_documents(tmp_path, pattern="*.js*", format="text")]
    found = list(read_documents(f"{tmp_path}/*"))
    assert [document.name for document in found] == [
        "NEWS",
        f"{tmp_path}/a.json",
        f"{tmp_path}/b.jsonl:1",
    ]
    assert [d.text for d in read_documents(tmp_path / "b.jsonl", field="text")] == ["b"]


def test_a_field_or_a_name_says_that_a_file_holds_records(tmp_path):
    for name in ("f.ndjson", "f.ndjson.gz", "f.data"):
        data = b'{"text": "a"}\n{"text": "b"}\n'
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        texts = [d.text for d in read_documents(tmp_path / name, field="text")]
        assert texts == ["a", "b"]
        if "ndjson" in name:
            assert [d.text for d in read_documents(tmp_path / name)] == ["a", "b"]
    (found,) = read_documents(tmp_path / "f.data")
    assert found.text == '{"text": "a"}\n{"text": "b"}\n'


def test_what_is_hidden_or_no_file_is_counted_and_never_read(tmp_path):
    tree = tmp_path / "tree"
    for name in ("a.py", ".git/objects/1", ".git/2", "pkg/.cache", "pkg/b.py", "pkg/data.bin"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"\xff\0" if name.endswith("bin") else b"x")
    (tree / "nowhere").symlink_to("gone")
    (tree / "again").symlink_to(tree)
    os.mkfifo(tree / "pipe")
    (tree / os.fsdecode(b"caf\xe9.py")).write_text("x")
    counts = ReadCounts()
    found = list(read_documents(tree, on_error="skip", counts=counts))
    assert [document.name for document in found] == ["a.py", "pkg/b.py"]
    assert counts.skipped == {
        "hidden": 3,
        "no file": 3,
        "name not UTF-8": 1,
        "not UTF-8": 1,
    }
    assert counts.read == counts.kept + counts.num_skipped == 10
    assert [document.name for document in read_documents(tree / ".git")] == ["2", "objects/1"]
    found = [path for path, _, _ in identify(tree, "*.py")]
    assert found == [f"{tree}/a.py", f"{tree}/pkg/b.py"]


def test_files_are_told_apart_by_their_content(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert identify(tmp_path) == [(f"{tmp_path}/a.txt", 3, f"sha256:{sha256}")]


def test_a_trace_beside_a_text_becomes_a_thought(tmp_path):
    records = [{"body": "2+2", "why": "4"}, {"body": "x", "why": None}]
    expected = [("2+2", "4"), ("x", "")]
    write_parquet(tmp_path / "f.parquet", *records)
    write_lines(tmp_path / "f.jsonl", *records)
    for path in (tmp_path / "f.parquet", tmp_path / "f.jsonl"):
        found = list(read_documents(path, field="body", trace="why"))
        assert [(document.text, document.trace) for document in found] == expected
    tokenizer = Tokenizer.bytes()
    trajectory = text_trajectory(found[0], tokenizer)
    assert [span.role for span in trajectory.spans] == [Role.TEXT, Role.THOUGHT]
    assert tokenizer.decode(trajectory.ids) == "<|bos|>2+2<|thought|>4<|end|>"
    assert_refused(
        write_lines(tmp_path / "g.jsonl", {"body": "x"}),
        f"{tmp_path}/g.jsonl:1: there is no string 'why'",
        "no string 'why'",
        field="body",
        trace="why",
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "chatml"}, "there is no format 'chatml'; there are text, tau_bench, swe_agent"),
        ({"format": "openai", "field": "x"}, "field 'x' is of texts in records, and the format"),
        ({"trace": "x"}, "trace 'x' stands beside a text: name the field of the text too"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; it must be 'raise' or 'skip'"),
    ],
)
def test_options_that_contradict_are_refused(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        list(read_documents(tmp_path, **options))


# --------------------------------------------------------------------------------------------------
# Parquet
# --------------------------------------------------------------------------------------------------


def test_a_row_is_the_object_that_a_line_would_be(tmp_path):
    schema = pyarrow.schema(
        [
            ("s", pyarrow.struct([("a", pyarrow.int64()), ("b", pyarrow.string())])),
            ("m", pyarrow.map_(pyarrow.string(), pyarrow.list_(pyarrow.float32()))),
            ("d", pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),
            ("b", pyarrow.binary()),
            ("t", pyarrow.timestamp("s")),
            ("none", pyarrow.null()),
        ]
    )
    row = {"s": {"a": 1}, "m": [("k", [0.5, None])], "d": "x", "b": b"\xc3\xa4", "t": 0}
    path = tmp_path / "f.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row], schema), path)
    time = "1970-01-01 00:00:00"
    expected = {"s": {"a": 1}, "m": {"k": [0.5, None]}, "d": "x", "b": "ä", "t": time}
    assert list(parquet.rows(path)) == [(f"{path}:row 1", expected)]
    assert list(parquet.rows(path, ["d"])) == [(f"{path}:row 1", {"d": "x"})]


def test_a_column_of_messages_may_be_a_string_of_json(tmp_path):
    texts = {"messages": json.dumps(OPENAI["messages"]), "tools": "[]"}
    path = write_parquet(tmp_path / "f.parquet", texts, {"messages": "[", "tools": None})
    with pytest.raises(ValueError, match=re.escape(f"{path}:row 2: the text of 'messages' is no")):
        list(read_documents(path))
    counts = ReadCounts()
    (found,) = read_documents(path, on_error="skip", counts=counts)
    call = ToolCall("weather", {"city": "Bern"})
    assert found.messages[1] == Message("assistant", tool_calls=(call,))
    assert (counts.read, dict(counts.skipped)) == (2, {"no JSON": 1})


def test_a_large_parquet_file_comes_in_batches_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_BATCH", 1 << 16)
    texts = [{"text": f"{i} " + "x" * 1000, "other": "y"} for i in range(1000)]
    path = write_parquet(tmp_path / "f.parquet", *texts, row_group_size=400, compression="none")
    table = pyarrow.parquet.ParquetFile(path)
    assert max(batch.nbytes for batch in parquet._batches(table, None)) < 2 << 16
    found = list(read_documents(path))
    assert [document.text for document in found] == [record["text"] for record in texts]
    assert found[999].name == f"{path}:row 1000"


def test_a_row_that_is_too_long_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_RECORD", 1000)
    path = write_parquet(tmp_path / "f.parquet", *({"text": "x" * n} for n in (10, 2000, 10)))
    assert_refused(path, f"{path}:row 2 is longer than", "too long")


def test_a_column_that_is_not_there_is_named(tmp_path):
    path = write_parquet(tmp_path / "f.parquet", {"text": "x", "id": 1})
    assert_refused(path, f"{path}: there is no column 'body'; there are text, id", field="body")


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f.parquet", "f.jsonl.gz", "f.json.gz", "f.json"])
def test_a_file_that_breaks_off_is_an_error_even_where_records_are_skipped(tmp_path, name):
    path, plain = tmp_path / name, tmp_path / "plain"
    records = [OPENAI | {"id": i} for i in range(500)]
    if "jsonl" in name:
        write_lines(plain, *records)
    elif "json" in name:
        plain.write_text(json.dumps(records))
    else:
        write_parquet(plain, *records, row_group_size=50)
    data = plain.read_bytes()
    data = gzip.compress(data) if name.endswith(".gz") else data
    path.write_bytes(data[: len(data) // 2])
    assert_refused(path, str(path))
    assert_refused(f"{tmp_path}/f.*", str(path))
    path.write_bytes(data)
    assert len(list(read_documents(path))) == 500
    damaged = bytearray(data)
    damaged[len(data) // 2 : len(data) // 2 + 400] = b"\xff" * 400
    path.write_bytes(damaged)
    assert_refused(path, str(path))


def test_a_damaged_text_of_a_tree_is_one_record_that_can_be_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    whole = gzip.compress(os.urandom(100_000).hex().encode())
    (tmp_path / "b.txt.gz").write_bytes(whole[:5000])
    assert_refused(tmp_path, f"{tmp_path}/b.txt.gz breaks off: the gzip file is trunc", "damaged")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": "é"}'.encode("latin-1"), ":2 is not UTF-8: byte 10 is 0xe9; convert it"),
        (b"\xff\xfe{\0}\0", ":2 is not UTF-8: it begins like UTF-16: convert it with iconv"),
        (gzip.compress(b"{}", mtime=0), ":2 is not UTF-8: it begins like gzip: call it .gz"),
    ],
)
def test_encodings_that_are_mixed_in_a_file(tmp_path, line, sentence):
    path = tmp_path / "f.jsonl"
    good = '{"text": "ä"}'.encode()
    path.write_bytes(b"\n".join([b"\xef\xbb\xbf" + good, line, good]))
    assert_refused(path, f"{path}{sentence}", "not UTF-8")
    assert [d.text for d in read_documents(path, on_error="skip")] == ["ä", "ä"]


@pytest.mark.parametrize("name", ["f.txt", "f.json", "f.json.gz"])
def test_a_byte_order_mark_at_the_start_is_no_text(tmp_path, name):
    data = json.dumps([{"text": "a"}]).encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (found,) = read_documents(tmp_path / name)
    assert found.text == ('[{"text": "a"}]' if name == "f.txt" else "a")


def test_a_whole_file_in_utf_16_is_named_as_that(tmp_path):
    for name, reason in (("f.txt", "not UTF-8"), ("f.json", ""), ("f.jsonl", "not UTF-8")):
        (tmp_path / name).write_bytes('{"text": "a"}'.encode("utf-16"))
        assert_refused(tmp_path / name, f"{tmp_path}/{name}", reason)
    (tmp_path / "g.txt").write_bytes("ab".encode("utf-16-le"))
    assert_refused(tmp_path / "g.txt", "g.txt is no text: it has a byte 0 at 1", "binary")


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.txt", "e.jsonl.gz", "e.parquet", "e"])
def test_what_is_empty_is_named(tmp_path, name):
    path = tmp_path / name
    if name == "e.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), path)
    elif name == "e":
        path.mkdir()
    else:
        path.write_bytes(b"")
    said = "the file breaks off here" if name == "e.json" else "holds no document: the data set is"
    assert_refused(path, said)
    if name == "e.parquet":
        path.write_bytes(b"")
        assert_refused(path, f"{path} is truncated or damaged: Parquet file size is 0 bytes")


def test_where_every_record_was_skipped_it_says_why(tmp_path):
    path, counts = tmp_path / "f.jsonl", ReadCounts(read=3, kept=2, skipped=Counter(empty=1))
    path.write_text("x\n\ny\n")
    sentence = "3 records read = 0 kept + 3 skipped (1 empty, 2 no JSON)"
    with pytest.raises(ValueError, match="holds no document: the data set is empty: ") as caught:
        list(read_documents(path, field="text", on_error="skip", counts=counts))
    assert str(caught.value).endswith(sentence)
    assert (counts.read, counts.kept) == (6, 2)


def test_a_folder_where_a_file_was_expected_is_named(tmp_path):
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/d.jsonl cannot be read: Is a dir")):
        sniff(tmp_path / "d.jsonl")
    assert_refused(tmp_path / "none*", f"there is no file or folder {tmp_path}/none*")


def test_a_text_that_is_too_long_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_RECORD", 1 << 20)
    (tmp_path / "a.txt").write_bytes(b"x" * ((1 << 20) + 1))
    (tmp_path / "b.txt").write_text("b")
    assert_refused(tmp_path, "a.txt is longer than 1 MiB; cut it into parts, or skip", "too long")


@pytest.mark.parametrize(
    ("record", "name", "sentence"),
    [
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "agentx",
            ":1: message 0: this observation answers no call before it",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "openai",
            ":1: message 0: this result answers no call that waits for one",
        ),
        (
            {"conversations": [{"from": "observation", "value": "x"}]},
            "sharegpt",
            ":1: message 0: this result answers no call that waits for one",
        ),
    ],
)
def test_an_observation_without_a_call_is_refused(tmp_path, record, name, sentence):
    path = write_lines(tmp_path / "f.jsonl", record)
    assert_refused(path, f"{path}{sentence}", "no conversation", format=name)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
@pytest.mark.parametrize("name", ["openai", "tau_bench", "text", "agentx"])
def test_an_id_that_comes_twice_is_refused_with_both_places(tmp_path, name, suffix):
    given = RECORDS[name] if name == "tau_bench" else RECORDS[name] | {"id": 7}
    key, other = ("trial", 1) if name == "tau_bench" else ("id", 8)
    path, records = tmp_path / f"f{suffix}", [given, given | {key: other}, given]
    if suffix == ".parquet":
        write_parquet(path, *records)
        first, last = "row 1", "row 3"
    elif suffix == ".json":
        path.write_text(json.dumps(records))
        first, last = "1", "1 (record 3)"
    else:
        write_lines(path, *records)
        first, last = "1", "3"
    shown = "(3, 0)" if name == "tau_bench" else "7"
    sentence = f"{path}:{last}: its id {shown} is that of {path}:{first} too; give each record"
    assert_refused(path, sentence, "duplicate id")
    assert len(list(read_documents(path, on_error="skip"))) == 2


def test_attempts_at_one_example_may_share_its_id_and_files_may_count_from_one(tmp_path):
    path = write_lines(tmp_path / "f.jsonl", VERIFIERS | {"id": 3}, VERIFIERS | {"id": 3})
    assert len(list(read_documents(path))) == 2
    for name in "gh":
        write_lines(tmp_path / f"{name}.jsonl", {"text": name, "id": 1}, {"text": name, "id": None})
    assert len(list(read_documents(f"{tmp_path}/[gh].jsonl"))) == 4


def test_records_of_one_line_have_names_of_their_own(tmp_path):
    (tmp_path / "f.json").write_text(json.dumps([ASKED, ASKED]))
    names = [document.name for document in read_documents(tmp_path / "f.json")]
    assert names == [f"{tmp_path}/f.json:1", f"{tmp_path}/f.json:1 (record 2)"]


def test_a_line_of_100_mb_is_skipped_in_bounded_memory(tmp_path):
    with (tmp_path / "f.jsonl").open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        file.seek(100 << 20, os.SEEK_CUR)  # a hole: no disk is used
        file.write(b'"}\n{"text": "b"}\n')
    code = f"""
import resource, sys
from agentx.data.formats import ReadCounts, read_documents
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
counts = ReadCounts()
for document in read_documents({str(tmp_path)!r}, on_error="skip", counts=counts): pass
print(counts, "|", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    counted, mebibytes = shown.split("|")
    assert counted == "3 records read = 2 kept + 1 skipped (1 too long) "
    assert int(mebibytes) < 200


# --------------------------------------------------------------------------------------------------
# Anything at all
# --------------------------------------------------------------------------------------------------

# Twenty times as many take minutes: for a change to a reader.
EXAMPLES = int(os.environ.get("AGENTX_FUZZ_EXAMPLES", "60"))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """The folder that examples write to, and a good file of each format and kind by its name."""
    folder = tmp_path_factory.mktemp("fuzz")
    good = {"f.txt": "a text\nof lines, ä".encode()}
    for name, record in RECORDS.items():
        records = [record | {"id": i, "task_id": i} for i in range(3)]
        lines = "\n".join(map(json.dumps, records)).encode()
        listed = json.dumps(records, indent=1).encode()
        write_parquet(folder / "table", *records, compression="snappy")
        good |= {
            f"{name}.jsonl": lines,
            f"{name}.jsonl.gz": gzip.compress(lines),
            f"{name}.json": listed,
            f"{name}.traj": json.dumps(record).encode(),
            f"{name}.json.gz": gzip.compress(listed),
            f"{name}.parquet": (folder / "table").read_bytes(),
        }
    return folder, good


def assert_read_or_refused(folder, name, data):
    """Any exception but a ValueError of one sentence with the file's name fails the test."""
    path = folder / name
    path.write_bytes(data)
    for on_error in ("raise", "skip"):
        counts, kept, refused = ReadCounts(), 0, ""
        try:
            for document in read_documents(path, on_error=on_error, counts=counts):
                kept += 1
                assert isinstance(document, TextDocument | Conversation)
        except ValueError as error:
            refused = str(error)
        assert not refused or (str(path) in refused and "\n" not in refused)
        assert (counts.read, counts.kept) == (counts.kept + counts.num_skipped, kept)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    data=st.binary(max_size=200) | st.text(max_size=100).map(str.encode),
    suffix=st.sampled_from([".txt", ".jsonl", ".json", ".traj", ".parquet"]),
    zipped=st.booleans(),
    magic=st.booleans(),
)
def test_any_bytes_are_read_or_refused(fuzzed, data, suffix, zipped, magic):
    if suffix == ".parquet" and magic:
        data = b"PAR1" + data + len(data).to_bytes(4, "little") + b"PAR1"
    if zipped:
        data = gzip.compress(data) if magic else b"\x1f\x8b" + data
    assert_read_or_refused(fuzzed[0], f"f{suffix}{'.gz' if zipped else ''}", data)


@settings(max_examples=EXAMPLES * 5, deadline=None)
@given(st.data())
def test_files_of_every_format_cut_or_changed_are_read_or_refused(fuzzed, data):
    folder, good = fuzzed
    name = data.draw(st.sampled_from(sorted(good)))
    content = bytearray(good[name])
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b'"', b"[]", b"{", b"null", b"\n", b",", b"1"])
        )
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    assert_read_or_refused(folder, name, bytes(content))
