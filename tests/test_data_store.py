import concurrent.futures
import contextlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorstore

from agentx.data import chunks as chunks_module
from agentx.data import shards as shards_module
from agentx.data import store as store_module
from agentx.data.shards import Entry, shard_columns, write_shard
from agentx.data.storage import Storage, wait
from agentx.data.store import StoreWriter, TokenStore
from agentx.trajectory import Markers, Origin, Outcome, Role, Span, Trajectory


def span(role, ids, origin=Origin.DATA, outcome=Outcome.OK):
    return Span(role, np.array(ids, np.int32), origin, outcome)


def trajectories():
    return [
        Trajectory([span(Role.TEXT, [1, 70_000, 8])], task_id="läs/mig.py"),
        Trajectory(
            [
                span(Role.USER, [1, 3, 20]),
                span(Role.CALL, [5, 21], Origin.SAMPLED, Outcome.FAILED),
                span(Role.ARGUMENTS, [6, 22, 8], Origin.SAMPLED, Outcome.FAILED),
                span(Role.OBSERVATION, [9, 8], Origin.ENVIRONMENT, Outcome.FAILED),
                span(Role.ANSWER, [10, 23, 8], Origin.SAMPLED, Outcome.RECOVERED),
            ],
            reward=0.5,
            task_id="t1",
            group=7,
            num_prompt_spans=1,
        ),
        Trajectory([span(Role.TEXT, [4])]),
    ]


def plain(trajectory):
    spans = [(s.role, s.ids.tolist(), s.origin, s.outcome) for s in trajectory.spans]
    rest = (trajectory.reward, trajectory.task_id, trajectory.group, trajectory.num_prompt_spans)
    return spans, rest


def test_what_is_written_is_read(tmp_path):
    store = TokenStore.write(tmp_path / "s", iter(trajectories()), "tok")
    assert [plain(t) for t in store] == [plain(t) for t in trajectories()]
    assert plain(store[1]) == plain(trajectories()[1])
    assert (len(store), store.num_tokens) == (3, 17)
    assert store.lengths.tolist() == [3, 13, 1]
    assert [store.token_start(i) for i in range(3)] == [0, 3, 16]
    assert store[1].spans[0].role is Role.USER
    with pytest.raises(IndexError, match="trajectory 3 of a store of 3"):
        store[3]


def test_the_manifest_counts_what_is_in_the_store(tmp_path):
    TokenStore.write(tmp_path, trajectories(), "tok")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["num_trajectories"] == 3
    assert manifest["num_spans"] == 7
    assert manifest["num_tokens"] == 17
    (shard,) = manifest["shards"]
    assert (shard["trajectories"], shard["spans"], shard["tokens"]) == (3, 7, 17)
    on_disk = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert on_disk == {
        "manifest.json",
        "inputs.json",
        *(f"{shard['name']}/{name}" for name in shard["files"]),
    }
    for name, expected in shard["files"].items():
        assert (tmp_path / shard["name"] / name).stat().st_size == expected["bytes"]


def test_a_piece_has_the_spans_and_parts_of_spans_that_it_covers(tmp_path):
    store = TokenStore.write(tmp_path, trajectories(), "tok")
    piece = store.piece(1, 4, 9)
    assert [(s.role, s.ids.tolist()) for s in piece.spans] == [
        (Role.CALL, [21]),
        (Role.ARGUMENTS, [6, 22, 8]),
        (Role.OBSERVATION, [9]),
    ]
    assert piece.num_prompt_spans == 0
    assert store.piece(1, 1, 3).ids.tolist() == [3, 20]
    assert store.piece(1, 1, 3).num_prompt_spans == 1


def test_every_cut_gives_the_tokens_asked_for(tmp_path):
    store = TokenStore.write(tmp_path, trajectories(), "tok")
    whole = trajectories()[1]
    for begin in range(13):
        for end in range(begin + 1, 14):
            piece = store.piece(1, begin, end)
            assert piece.ids.tolist() == whole.ids[begin:end].tolist()
            assert piece.per_token("role").tolist() == whole.per_token("role")[begin:end].tolist()
            assert all(len(s.ids) for s in piece.spans)


def test_a_store_of_many_chunks_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "CHUNK", 64)
    monkeypatch.setattr(chunks_module, "CHUNK", 64)
    monkeypatch.setattr(shards_module, "_FILE", 256)
    monkeypatch.setattr(chunks_module, "_CACHE_BYTES", 1000)
    rng = np.random.default_rng(0)
    written = [
        Trajectory([span(Role.TEXT, rng.integers(0, 999, n)), span(Role.USER, [n])], task_id=str(n))
        for n in rng.integers(1, 300, 40).tolist()
    ]
    store = TokenStore.write(tmp_path, iter(written), "tok")
    assert [plain(t) for t in store] == [plain(t) for t in written]
    files = list(tmp_path.glob("shard-*/ids/c/*"))
    assert len(files) == -(-store.num_tokens // 256)


def test_any_zarr_reader_reads_the_columns(tmp_path):
    TokenStore.write(tmp_path, trajectories(), "tok")
    (folder,) = tmp_path.glob("shard-*/ids")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    ids = tensorstore.open(spec).result().read().result()
    assert ids.tolist() == [i for t in trajectories() for i in t.ids]


def test_equal_stores_have_equal_fingerprints_and_others_do_not(tmp_path):
    first = TokenStore.write(tmp_path / "a", trajectories(), "tok").fingerprint
    assert TokenStore.write(tmp_path / "b", trajectories(), "tok").fingerprint == first
    assert TokenStore.write(tmp_path / "c", trajectories(), "other").fingerprint != first
    assert TokenStore.write(tmp_path / "d", trajectories()[:2], "tok").fingerprint != first


def test_another_tokenizer_is_refused(tmp_path):
    TokenStore.write(tmp_path, trajectories(), "a" * 64)
    assert len(TokenStore.open(tmp_path, "a" * 64)) == 3
    with pytest.raises(ValueError, match=r"another tokenizer \(fingerprint aaaaaaaaaaaa, not cc"):
        TokenStore.open(tmp_path, "c" * 64)


def test_a_changed_file_and_a_missing_one_are_named(tmp_path):
    TokenStore.write(tmp_path, trajectories(), "tok")
    (chunk,) = tmp_path.glob("shard-*/ids/c/0")
    written = chunk.read_bytes()
    chunk.write_bytes(bytes([written[0] ^ 1]) + written[1:])
    with pytest.raises(ValueError, match=re.escape(f"{chunk} has changed since it was written")):
        TokenStore.open(tmp_path).verify()
    with pytest.raises(
        ValueError, match=r"shard-00000-\w+/ids is damaged or gone \(.*\): build the"
    ):
        TokenStore.open(tmp_path)[0]
    chunk.write_bytes(written[:-1])
    with pytest.raises(ValueError, match=re.escape(f"{chunk} has another size")):
        TokenStore.open(tmp_path)
    chunk.unlink()
    with pytest.raises(ValueError, match=re.escape(f"{chunk} is missing")):
        TokenStore.open(tmp_path)


def test_a_file_that_goes_away_while_a_store_is_open_is_an_error_and_not_zeros(tmp_path):
    store = TokenStore.write(tmp_path, trajectories(), "tok")
    (chunk,) = tmp_path.glob("shard-*/ids/c/0")
    chunk.unlink()
    with pytest.raises(ValueError, match=r"/ids is damaged or gone \(.* missing\): build the"):
        store[0]


def test_what_a_store_holds_may_be_zero_all_over(tmp_path):
    store = TokenStore.write(tmp_path, [Trajectory([span(Role.TEXT, [0, 0])])], "tok")
    assert store[0].ids.tolist() == [0, 0]


def test_a_file_that_may_not_be_read_is_none_that_is_damaged(tmp_path, monkeypatch):
    store = TokenStore.write(tmp_path, trajectories(), "tok")
    refused = concurrent.futures.Future()
    refused.set_exception(ValueError("PERMISSION_DENIED: \"a[1]\" [os_error_code='13'] [x='y']"))
    monkeypatch.setattr(chunks_module, "wait", lambda future, what: wait(refused, what))
    with pytest.raises(OSError, match=r'^cannot read .*: PERMISSION_DENIED: "a\[1\]"$'):
        store[0]


def test_a_place_that_nobody_writes_to_is_refused_and_the_root_is_one():
    for path, sentence in (
        ("hdfs://host/x", "hdfs://host/x: nothing here reads hdfs://; there are gs:// and s3://"),
        ("gs://", "gs:// names no bucket: write gs://BUCKET/FOLDER"),
        ("s3:///x", "s3:///x names no bucket"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            Storage(path)
    assert Storage("/").array_spec("a")["path"] == "/a/"


def begun(path, made_from, documents, shard_tokens=4):
    """What a writer leaves that is stopped after these documents."""
    with StoreWriter(path, "tok", made_from=made_from, shard_tokens=shard_tokens) as writer:
        for document in documents:
            writer.add(document)
            if writer.is_full:
                writer.write_shard(note=f"up to {document.task_id}")


def test_a_half_written_store_is_none_for_training_and_opens_at_its_last_complete_shard(tmp_path):
    begun(tmp_path, {}, trajectories())
    with pytest.raises(ValueError, match="is not complete: it holds 2 documents so far; run what"):
        TokenStore.open(tmp_path)
    store = TokenStore.open(tmp_path, partial=True)
    assert [plain(t) for t in store] == [plain(t) for t in trajectories()[:2]]


def test_a_writer_goes_on_behind_the_complete_shards_and_makes_the_same_store(tmp_path):
    begun(tmp_path / "s", {"inputs": "in"}, trajectories()[:2])
    half = tmp_path / "s" / "shard-00001-0123456789ab" / "ids" / "c"
    half.mkdir(parents=True)
    for name in ("0", "1.__lock"):  # the second is what TensorStore is at when it is killed
        (half / name).write_text("x")
    for folder in ("s", "whole"):
        with StoreWriter(
            tmp_path / folder, "tok", made_from={"inputs": "in"}, shard_tokens=4
        ) as writer:
            assert writer.num_documents == (2 if folder == "s" else 0)
            assert writer.notes == ["up to t1"] * (folder == "s")
            for document in trajectories()[writer.num_documents :]:
                writer.add(document)
                if writer.is_full:
                    writer.write_shard(note=f"up to {document.task_id}")
            writer.finish(read=3)
    files = {
        folder: {
            str(p.relative_to(tmp_path / folder)): p.read_bytes()
            for p in (tmp_path / folder).rglob("*")
            if p.is_file()
        }
        for folder in ("s", "whole")
    }
    assert files["s"] == files["whole"]
    store = TokenStore.open(tmp_path / "s")
    assert [plain(t) for t in store] == [plain(t) for t in trajectories()]
    assert store.manifest["notes"] == {"read": 3}
    assert len(store.manifest["shards"]) == 2


def test_a_writer_refuses_what_was_begun_from_other_things_and_says_from_which(tmp_path):
    made_from, inputs = {"filters": "Length()"}, {"a.txt": [3, "aa"], "b.txt": [4, "bb"]}
    with StoreWriter(tmp_path, "tok", made_from=made_from, inputs=inputs) as writer:
        writer.add(trajectories()[0])
        writer.write_shard()
    for changed, sentence in (
        ({"inputs": {**inputs, "b.txt": [4, "cc"]}}, "other inputs: b.txt is changed; delete it"),
        ({"inputs": {"a.txt": [3, "aa"]}}, "was begun from other inputs: b.txt is gone"),
        ({"inputs": {**inputs, "c.txt": [1, "c"]}}, "was begun from other inputs: c.txt is new"),
        ({"made_from": {}}, r"was begun with another filters: Length\(\), not None"),
        ({"sources": ("a",)}, r"was begun with another sources: \[''\], not \['a'\]"),
    ):
        given = {"made_from": made_from, "inputs": inputs} | changed
        with pytest.raises(ValueError, match=sentence):
            StoreWriter(tmp_path, "tok", **given)
    with pytest.raises(ValueError, match="was begun with another tokenizer fingerprint: tok, not"):
        StoreWriter(tmp_path, "other", made_from=made_from, inputs=inputs)


def test_a_complete_store_from_the_same_inputs_is_done(tmp_path):
    for is_complete in (False, True):
        with StoreWriter(tmp_path, "tok", made_from={}) as writer:
            assert writer.is_complete is is_complete
            if not is_complete:
                writer.add(trajectories()[0])
            assert len(writer.finish()) == 1


def test_the_markers_of_a_tokenizer_come_back_with_every_piece(tmp_path):
    markers = Markers(*range(100, 115))
    with StoreWriter(tmp_path, "tok", markers=markers) as writer:
        writer.add(trajectories()[0])
        assert writer.finish()[0].markers == markers
    assert TokenStore.write(tmp_path / "b", trajectories(), "tok")[0].markers == Markers()


def test_without_knowing_its_inputs_a_writer_begins_anew(tmp_path):
    begun(tmp_path, None, trajectories())
    store = TokenStore.write(tmp_path, trajectories()[2:], "tok")
    assert [plain(t) for t in store] == [plain(trajectories()[2])]
    assert len(list(tmp_path.glob("shard-*"))) == 1


def test_two_writers_at_once_are_told_apart(tmp_path):
    with (
        StoreWriter(tmp_path, "tok", made_from={}),
        pytest.raises(ValueError, match=f"is being written by process {os.getpid()}: wait for it"),
    ):
        StoreWriter(tmp_path, "tok", made_from={})


def test_a_writer_whose_store_somebody_else_changed_stops(tmp_path):
    # As in a bucket, where no lock keeps the second one out.
    with StoreWriter(tmp_path, "tok", made_from={}) as first:
        first.add(trajectories()[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store_module, "_lock", lambda storage: None)
            with StoreWriter(tmp_path, "tok", made_from={}) as second:
                second.add(trajectories()[0])
                second.write_shard()
        with pytest.raises(ValueError, match="is being written by somebody else too: this writer"):
            first.write_shard()
    assert len(TokenStore.open(tmp_path, partial=True)) == 1


def test_a_second_writer_spares_what_the_first_is_at(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_lock", lambda storage: None)
    made = {"made_from": {}}
    with StoreWriter(tmp_path, "tok", **made) as first:
        written = write_shard(Storage(tmp_path), 0, shard_columns([Entry(trajectories()[0], 0)]))
        with contextlib.suppress(KeyError), StoreWriter(tmp_path, "tok", **made):
            assert (tmp_path / written["name"]).is_dir()
            # The first writer's manifest is the newest: the second may not delete it.
            first._generation = Storage(tmp_path).read("manifest.json")[1]
            first.add_shard(written)
            raise KeyError
        assert len(first.finish()) == 1


def test_a_full_disk_leaves_the_complete_shards(tmp_path):
    # A limit on the size of files stands for the disk: the same path through the writer.
    script = f"""
import resource, signal
from agentx.data.store import StoreWriter
from agentx.trajectory import Role, Span, Trajectory
import numpy as np
rng = np.random.default_rng(0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with StoreWriter({str(tmp_path)!r}, "tok", made_from={{}}, shard_tokens=1) as writer:
    for size in (1000, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        writer.add(Trajectory([Span(Role.TEXT, rng.integers(0, 1 << 30, size, np.int32))]))
        writer.write_shard()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(
        r"OSError: cannot write .*: .*File too large.*; .* holds 1 complete shard: run the same "
        "command again to go on",
        last,
    )
    store = TokenStore.open(tmp_path, partial=True)
    assert store.lengths.tolist() == [1000]
    store.verify()


def test_a_writer_spares_what_is_already_there(tmp_path):
    TokenStore.write(tmp_path / "s", trajectories(), "tok")
    with pytest.raises(ValueError, match="already holds a store"):
        TokenStore.write(tmp_path / "s", trajectories(), "tok")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds other things than a store"):
        TokenStore.write(tmp_path / "home", trajectories(), "tok")
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["shard-0/a", "plans-for-thesis/a", "plans/thesis.tex", "taken/a"])
def test_a_folder_that_only_looks_like_ours_is_not_deleted(tmp_path, name):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"other things than a store, {name} for one: write else"):
        TokenStore.write(tmp_path, trajectories(), "tok")
    assert (tmp_path / name).read_text() == "mine"


def test_what_a_writer_leaves_without_a_shard_is_not_in_the_next_store(tmp_path):
    for folder in ("taken", "entries"):
        (tmp_path / folder).mkdir()
    (tmp_path / "taken" / "00000.jsonl").write_text("{}")
    (tmp_path / "entries" / "00000.json").write_text("{}")
    TokenStore.write(tmp_path, trajectories(), "tok")
    assert not list(tmp_path.glob("taken/*")) + list(tmp_path.glob("entries/*"))


def test_a_shard_counts_as_complete_when_the_manifest_names_it(tmp_path, monkeypatch):
    def refuse(storage, key, *rest, **more):
        raise OSError("the disk is full")

    with StoreWriter(tmp_path, "tok", made_from={}) as writer:
        writer.add(trajectories()[0])
        writer.write_shard()
        writer.add(trajectories()[1])
        entry = {"name": "shard-00001-0123456789ab", "trajectories": 1, "spans": 5, "tokens": 13}
        monkeypatch.setattr(Storage, "write", refuse)
        with pytest.raises(OSError, match=r"the disk is full; .* holds 1 complete shard: run the"):
            writer.add_shard({**entry, "files": {}})
        assert writer.num_shards == 1


def test_an_empty_data_set_and_an_empty_trajectory_are_errors(tmp_path):
    with pytest.raises(ValueError, match="the data set is empty"):
        TokenStore.write(tmp_path / "a", [], "tok")
    with pytest.raises(ValueError, match=r"trajectory 1 \('t'\) has no tokens"):
        TokenStore.write(tmp_path / "b", [trajectories()[0], Trajectory([], task_id="t")], "tok")


def test_a_missing_store_and_a_damaged_manifest_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere holds no token store: build it"):
        TokenStore.open(tmp_path / "nowhere")
    TokenStore.write(tmp_path / "s", trajectories(), "tok")
    (tmp_path / "s" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        TokenStore.open(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="is a store of format 99"):
        TokenStore.open(tmp_path / "s")
