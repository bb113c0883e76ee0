"""Token stores in buckets: S3 and Google Cloud Storage, by servers on the loopback."""

import contextlib
import json

import jax
import numpy as np
import pytest
from emulators import BUCKET, gs_emulator, put, s3_emulator

from agentx.data import storage as storage_module
from agentx.data.build import build
from agentx.data.objectives import NextToken
from agentx.data.pipeline import MixturePipeline, Source
from agentx.data.prepare import BuildConfig, Input
from agentx.data.storage import Storage
from agentx.data.store import StoreWriter, TokenStore
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Role, Span, Trajectory


@pytest.fixture(scope="module")
def s3():
    with s3_emulator():
        yield f"s3://{BUCKET}"


@pytest.fixture(scope="module")
def gs():
    with gs_emulator():
        yield f"gs://{BUCKET}"


@pytest.fixture(params=["s3", "gs"])
def bucket(request):
    return request.getfixturevalue(request.param)


def files(path):
    storage = Storage(path)
    return {key: storage.read(key)[0] for key in storage.list_keys()}


def text(*ids):
    return Trajectory([Span(Role.TEXT, np.array(ids, np.int32))])


def test_a_store_in_a_bucket_is_that_on_disk_though_its_build_was_stopped(bucket, tmp_path):
    Tokenizer.bytes().save(tmp_path / "tokenizer.model")
    lines = [json.dumps({"text": f"{n} " * (5 + n)}) for n in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))

    def config(source, out):
        inputs = (Input(source, name="texts", field="text"),)
        return BuildConfig(inputs, str(tmp_path / "tokenizer.model"), out, shard_tokens=60)

    def stop(seen, tokens):
        if seen == 8:
            raise KeyboardInterrupt

    there = config(
        put(f"{bucket}/in/texts.jsonl", (tmp_path / "texts.jsonl").read_bytes()),
        f"{bucket}/stores/texts",
    )
    with pytest.raises(KeyboardInterrupt):
        build(there, stop)
    with pytest.raises(ValueError, match=f"{bucket}/stores/texts is not complete"):
        TokenStore.open(there.out)
    remote, local = build(there), build(config(str(tmp_path / "texts.jsonl"), str(tmp_path / "s")))
    remote.verify()
    # The names of documents have their place in them, and all else is alike.
    assert len(remote.manifest["shards"]) == len(local.manifest["shards"]) > 2
    for ours, theirs in zip(local.manifest["shards"], remote.manifest["shards"], strict=True):
        assert {
            k: v for k, v in ours["files"].items() if not k.startswith(("task", "documents"))
        } == {k: v for k, v in theirs["files"].items() if not k.startswith(("task", "documents"))}
    batches = [
        MixturePipeline([Source("t", store, NextToken())], 2, 64, 0).batch(1)
        for store in (remote, local)
    ]
    jax.tree.map(np.testing.assert_array_equal, *batches)
    assert any(key.startswith("plans/") for key in files(there.out))


def test_two_writers_in_a_bucket_are_told_apart_when_one_has_written(bucket):
    path = f"{bucket}/stores/two"
    with StoreWriter(path, "tok", made_from={}) as first:
        with StoreWriter(path, "tok", made_from={}) as second:
            second.add(text(1, 2))
            second.write_shard()
        first.add(text(3, 4))
        assert "inputs.json" in files(path)
        with pytest.raises(ValueError, match=f"{path} is being written by somebody else too"):
            first.write_shard()
    assert [t.ids.tolist() for t in TokenStore.open(path, partial=True)] == [[1, 2]]


def test_a_writer_that_stops_at_once_leaves_the_manifest_of_another(bucket):
    path = f"{bucket}/stores/stopped"
    with contextlib.suppress(KeyError), StoreWriter(path, "tok", made_from={}):
        with StoreWriter(path, "tok", made_from={}) as second:
            second.add(text(1, 2))
            second.write_shard()
        raise KeyError
    assert [t.ids.tolist() for t in TokenStore.open(path, partial=True)] == [[1, 2]]
    path = f"{bucket}/stores/alone"
    with pytest.raises(KeyError), StoreWriter(path, "tok", made_from={}):
        raise KeyError
    assert files(path) == {}


def test_what_is_missing_in_a_bucket_is_named(bucket):
    path = f"{bucket}/stores/missing"
    with pytest.raises(ValueError, match=f"{path} holds no token store: build it"):
        TokenStore.open(path)
    store = TokenStore.write(path, [text(1, 2, 3)], "tok")
    key = next(key for key in sorted(files(path)) if "/ids/c/" in key)
    Storage(path).write(key, None)
    with pytest.raises(ValueError, match=f"{path}/{key} is missing: build the store again"):
        TokenStore.open(path)
    with pytest.raises(ValueError, match=f"{path}/{key} has changed since it was written"):
        store.verify()


def test_a_bucket_that_does_not_answer_is_waited_for_and_named(monkeypatch):
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(storage_module, "WAIT_S", 0.5)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        with pytest.raises(
            TimeoutError, match=r"waited 0\.5 s to read s3://silent/a/manifest\.json"
        ):
            TokenStore.open("s3://silent/a")
