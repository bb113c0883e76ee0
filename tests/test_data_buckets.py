"""Files of buckets are read as those of this machine, and what goes wrong there is said."""

import gzip
import json
import re
import subprocess
import sys

import emulators
import pytest

from agentx.data.formats import ReadCounts, TextDocument, identify, places, read_documents

ASKED = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


@pytest.fixture(scope="module")
def s3():
    with emulators.s3_emulator():
        yield f"s3://{emulators.BUCKET}"


@pytest.fixture(scope="module")
def gs():
    with emulators.gs_emulator():
        yield f"gs://{emulators.BUCKET}"


@pytest.fixture(params=["s3", "gs"])
def bucket(request):
    return request.getfixturevalue(request.param)


def texts_of(found):
    return [(document.name, document.text) for document in found]


def test_a_tree_of_a_bucket_is_that_of_a_folder(bucket, tmp_path):
    tree = {"pkg/b.py": b"b = 1\n", "a.py": "ä = 1\n".encode(), ".git/config": b"x", "c.txt": b"c"}
    for name, data in tree.items():
        emulators.put(f"{bucket}/tree/{name}", data)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for top in (f"{bucket}/tree", tmp_path):
        counts = ReadCounts()
        found = texts_of(read_documents(top, counts=counts))
        assert found == [("a.py", "ä = 1\n"), ("c.txt", "c"), ("pkg/b.py", "b = 1\n")]
        assert (counts.read, counts.kept, dict(counts.skipped)) == (4, 3, {"hidden": 1})
        assert texts_of(read_documents(top, format="text", pattern="*.py")) == [found[0], found[2]]
        assert texts_of(read_documents(f"{top}/**/b.py")) == [("pkg/b.py", "b = 1\n")]
        assert texts_of(read_documents(f"{top}/*.*")) == found[:2]
        assert texts_of(read_documents(f"{top}/pkg/b.py")) == [("b.py", "b = 1\n")]
        assert [path for path, _, _ in identify(top)] == [f"{top}/{name}" for name, _ in found]


def test_records_of_a_bucket_have_the_places_of_its_files(bucket):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    line = json.dumps(ASKED).encode() + b"\n"
    emulators.put(f"{bucket}/shards/a.jsonl", line * 3)
    emulators.put(f"{bucket}/shards/b.jsonl.gz", gzip.compress(line * 2))
    emulators.put(f"{bucket}/shards/c.json", b"[" + line + b"," + line + b"]")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": ["x", "y"]}), sink)
    emulators.put(f"{bucket}/shards/d.parquet", sink.getvalue().to_pybytes())
    names = [document.name for document in read_documents(f"{bucket}/shards/")]
    assert names == [
        *(f"{bucket}/shards/a.jsonl:{i}" for i in (1, 2, 3)),
        *(f"{bucket}/shards/b.jsonl.gz:{i}" for i in (1, 2)),
        *(f"{bucket}/shards/c.json:{i}" for i in (1, 2)),
        *(f"{bucket}/shards/d.parquet:row {i}" for i in (1, 2)),
    ]


def test_a_file_of_many_blocks_comes_whole(bucket, monkeypatch):
    monkeypatch.setattr(places, "_BLOCK", 1000)
    lines = [json.dumps({"text": f"{i} " * (i % 50 + 1)}) for i in range(100)]
    path = emulators.put(f"{bucket}/many.jsonl", "\n".join(lines).encode())
    found = list(read_documents(path))
    assert [json.dumps({"text": document.text}) for document in found] == lines


def test_another_content_is_another_checksum(bucket):
    path = emulators.put(f"{bucket}/one.txt", b"one")
    ((_, size, checksum),) = identify(path)
    assert size == 3
    assert re.fullmatch(r"(md5|crc32c|etag):\S+", checksum)
    emulators.put(path, b"two")
    assert identify(path)[0][2] != checksum
    emulators.put(path, b"one")
    assert identify(path) == [(path, size, checksum)]


def test_what_a_bucket_has_not_is_named(bucket):
    for path in (f"{bucket}/none", f"{bucket}/none*", f"{bucket}-none/x"):
        with pytest.raises(ValueError, match=re.escape(f"there is no file or folder {path}")):
            list(read_documents(path))


def test_a_file_that_goes_away_or_shrinks_is_an_error_and_never_a_shorter_data_set(
    bucket, monkeypatch
):
    monkeypatch.setattr(places, "_BLOCK", 1000)
    path = f"{bucket}/leaving.jsonl"
    data = (json.dumps(ASKED) + "\n").encode() * 100
    changes = {
        "went away while it was read": lambda: emulators.remove(path),
        "changed while it was read|cannot be read": lambda: emulators.put(path, data[:1500]),
    }
    for sentence, change in changes.items():
        emulators.put(path, data)
        documents = read_documents(path, on_error="skip", format="agentx")
        next(documents)
        change()
        with pytest.raises(ValueError, match=f"{path} ({sentence})"):
            list(documents)


@pytest.mark.parametrize("start", [emulators.s3_emulator, emulators.gs_emulator])
def test_a_server_that_goes_away_ends_in_one_sentence_in_time(start, monkeypatch):
    monkeypatch.setattr(places, "_BLOCK", 1000)
    scheme = start.__name__[:2]
    with start() as server:
        path = emulators.put(
            f"{scheme}://{emulators.BUCKET}/f.jsonl", (json.dumps(ASKED) + "\n").encode() * 100
        )
        documents = read_documents(path, on_error="skip", format="agentx")
        next(documents)
        server.stop()
        monkeypatch.setattr(places, "TIMEOUT_S", 1.0)
        with pytest.raises(ValueError, match=f"{path}(: the bucket did not| cannot be)") as caught:
            list(documents)
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=f"{path}(: the bucket did not| cannot be)"):
            list(read_documents(path))


def test_a_scheme_that_nobody_reads_is_named():
    with pytest.raises(ValueError, match=r"http://x/y: nothing here reads http://; there are gs"):
        list(read_documents("http://x/y"))


def test_a_missing_extra_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    places._file_system.cache_clear()
    for path in ("s3://x/y", "gs://x/y"):
        with pytest.raises(ValueError, match=r"installed: pip install agentx\[cloud\]"):
            list(read_documents(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"installed: pip install agentx\[parquet\]"):
        list(read_documents(tmp_path / "x.parquet"))


def test_nothing_of_a_cloud_is_imported_for_a_file_of_this_machine(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    code = (
        "import sys; from agentx.data.formats import read_documents; "
        f"list(read_documents({str(tmp_path)!r})); "
        "print([m for m in ('fsspec', 's3fs', 'gcsfs', 'pyarrow') if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert shown.stdout == "[]\n"
    assert TextDocument("a.txt", "a") in read_documents(tmp_path)
