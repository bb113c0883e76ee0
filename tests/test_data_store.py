import json
import re

import numpy as np
import pytest
import tensorstore

from agentx.data import store as store_module
from agentx.data.store import TokenStore
from agentx.trajectory import Origin, Outcome, Role, Span, Trajectory


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
    TokenStore.write(tmp_path, trajectories(), "tok", inputs_fingerprint="in")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["num_trajectories"] == 3
    assert manifest["num_spans"] == 7
    assert manifest["num_tokens"] == 17
    for name, expected in manifest["files"].items():
        assert (tmp_path / name).stat().st_size == expected["bytes"]


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
    monkeypatch.setattr(store_module, "_CHUNK", 64)
    rng = np.random.default_rng(0)
    written = [
        Trajectory([span(Role.TEXT, rng.integers(0, 999, n)), span(Role.USER, [n])], task_id=str(n))
        for n in rng.integers(1, 300, 40).tolist()
    ]
    store = TokenStore.write(tmp_path, iter(written), "tok")
    assert [plain(t) for t in store] == [plain(t) for t in written]
    assert len(list((tmp_path / "ids" / "c").iterdir())) == -(-store.num_tokens // 64)


def test_any_zarr_reader_reads_the_columns(tmp_path):
    TokenStore.write(tmp_path, trajectories(), "tok")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/ids/"}}
    ids = tensorstore.open(spec).result().read().result()
    assert ids.tolist() == [i for t in trajectories() for i in t.ids]


def test_equal_stores_have_equal_fingerprints_and_others_do_not(tmp_path):
    first = TokenStore.write(tmp_path / "a", trajectories(), "tok").fingerprint
    assert TokenStore.write(tmp_path / "b", trajectories(), "tok").fingerprint == first
    assert TokenStore.write(tmp_path / "c", trajectories(), "other").fingerprint != first
    assert TokenStore.write(tmp_path / "d", trajectories()[:2], "tok").fingerprint != first


def test_another_tokenizer_or_other_inputs_are_refused(tmp_path):
    TokenStore.write(tmp_path, trajectories(), "a" * 64, inputs_fingerprint="b" * 64)
    assert len(TokenStore.open(tmp_path, "a" * 64, inputs_fingerprint="b" * 64)) == 3
    with pytest.raises(ValueError, match=r"another tokenizer \(fingerprint aaaaaaaaaaaa, not cc"):
        TokenStore.open(tmp_path, "c" * 64)
    with pytest.raises(ValueError, match=r"from other inputs \(fingerprint bbbbbbbbbbbb, not cc"):
        TokenStore.open(tmp_path, inputs_fingerprint="c" * 64)


def test_a_changed_file_and_a_missing_one_are_named(tmp_path):
    TokenStore.write(tmp_path, trajectories(), "tok")
    chunk = tmp_path / "ids" / "c" / "0"
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"{chunk} has changed since it was written")):
        TokenStore.open(tmp_path)
    chunk.unlink()
    with pytest.raises(ValueError, match=re.escape(f"{chunk} is missing")):
        TokenStore.open(tmp_path)


def test_a_half_written_store_is_no_store_and_is_replaced_by_the_next_writer(tmp_path):
    def killed():
        yield from trajectories()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenStore.write(tmp_path / "s", killed(), "tok")
    assert (tmp_path / "s").is_dir()
    with pytest.raises(ValueError, match="holds no complete token store"):
        TokenStore.open(tmp_path / "s")
    assert len(TokenStore.write(tmp_path / "s", trajectories(), "tok")) == 3


def test_a_writer_spares_what_is_already_there(tmp_path):
    TokenStore.write(tmp_path / "s", trajectories(), "tok")
    with pytest.raises(ValueError, match="already holds a store"):
        TokenStore.write(tmp_path / "s", trajectories(), "tok")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds other things than a store"):
        TokenStore.write(tmp_path / "home", trajectories(), "tok")
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_an_empty_data_set_and_an_empty_trajectory_are_errors(tmp_path):
    with pytest.raises(ValueError, match="the data set is empty"):
        TokenStore.write(tmp_path / "a", [], "tok")
    with pytest.raises(ValueError, match=r"trajectory 1 \('t'\) has no tokens"):
        TokenStore.write(tmp_path / "b", [trajectories()[0], Trajectory([], task_id="t")], "tok")


def test_a_missing_store_and_a_damaged_manifest_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere holds no complete token store"):
        TokenStore.open(tmp_path / "nowhere")
    TokenStore.write(tmp_path / "s", trajectories(), "tok")
    (tmp_path / "s" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        TokenStore.open(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="is a store of format 99"):
        TokenStore.open(tmp_path / "s")
