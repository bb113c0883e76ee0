"""A folder of named values, on this machine or in a bucket, by way of TensorStore's drivers.

Enters: a path, or gs://BUCKET/FOLDER, or s3://BUCKET/FOLDER. A value is read and written whole, in
one step: a reader sees all of it or nothing. Credentials are found where the services' own tools
find them; AWS_ENDPOINT_URL and STORAGE_EMULATOR_HOST name other servers than the usual ones.

Every wait ends: after `WAIT_S` seconds the error says what was waited for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.parse
from pathlib import Path
from typing import Any

import tensorstore

from agentx.data.formats.places import endpoint_of, scheme_of

WAIT_S = 120.0
# What TensorStore says of a value that is not what was written, or not there.
_DAMAGED = ("NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE", "FAILED_PRECONDITION")
# What it adds behind its sentence: [key='value'], for whoever mends TensorStore.
_ADDED = re.compile(r"(\s*\[[\w ]+='([^'\\]|\\.)*'\])+\s*$", re.DOTALL)


class Changed(ValueError):
    """A value is not what it was when it was last read: somebody else writes here too."""


class Damaged(OSError):
    """A value is gone, or is not what was written."""


class Storage:
    """Values by key below one folder. Keys are relative, with "/" between their parts."""

    def __init__(self, path: str | os.PathLike[str]):
        """Raises ValueError for a path that no driver reads."""
        given = os.fspath(path)
        scheme = scheme_of(given)
        self.path = given.rstrip("/") or given[:1]
        self.is_local = not scheme
        self._spec = _remote(scheme, given) if scheme else _local(self.path)
        self._values: Any = None

    def __str__(self) -> str:
        return self.path

    def name(self, key: str) -> str:
        """The whole path of a value, for messages."""
        return f"{self.path}/{key}"

    def array_spec(self, key: str) -> dict[str, Any]:
        """What TensorStore wants as the `kvstore` of an array whose files lie below `key`."""
        return {**self._spec, "path": f"{self._spec['path']}{key}/"}

    def read(self, key: str) -> tuple[bytes | None, bytes]:
        """A value, None where there is none, and its generation, which `write` may ask for."""
        if self.is_local and not Path(self.path).is_dir():
            return None, b""
        result = self._wait(self._opened().read(key), "read", key)
        found = result.value if result.state == "value" else None
        return found, result.stamp.generation

    def write(self, key: str, value: bytes | None, *, if_equal: bytes | None = None) -> bytes:
        """Writes a value, or deletes it (None), and returns its generation.

        if_equal: the generation that it must still have; raises Changed where it has another.
        """
        if self.is_local:
            Path(self.path).mkdir(parents=True, exist_ok=True)
        done = self._wait(self._opened().write(key, value, if_equal=if_equal), "write", key)
        if not done.generation:  # what TensorStore says where the condition does not hold
            raise Changed(f"{self.name(key)} was changed by somebody else")
        return bytes(done.generation)

    def list_keys(self, below: str = "") -> set[str]:
        """The keys of all values, or of those below a folder."""
        if self.is_local and not Path(self.path).is_dir():
            return set()
        span = tensorstore.KvStore.KeyRange()
        if below:
            span = tensorstore.KvStore.KeyRange(f"{below}/", f"{below}0")  # "0" follows "/"
        return {k.decode() for k in self._wait(self._opened().list(span), "list", below)}

    def size(self, key: str) -> int | None:
        """In bytes, of a local file; None in a bucket, where asking costs a request each."""
        return Path(self.path, key).stat().st_size if self.is_local else None

    def delete_below(self, folder: str) -> None:
        """Deletes every value below a folder, if there is one."""
        if self.is_local:  # TensorStore would leave folders, and what a killed writer left
            if Path(self.path, folder).is_dir():
                shutil.rmtree(Path(self.path, folder))
            return
        span = tensorstore.KvStore.KeyRange(f"{folder}/", f"{folder}0")
        self._wait(self._opened().delete_range(span), "delete", folder)

    def _opened(self) -> Any:
        if self._values is None:
            self._values = self._wait(tensorstore.KvStore.open(self._spec), "open", "")
        return self._values

    def _wait(self, future: Any, what: str, key: str) -> Any:
        return wait(future, f"{what} {self.name(key)}" if key else f"{what} {self.path}")


def wait(future: Any, what: str) -> Any:
    """The result of a TensorStore future. `what` is an infinitive: "read FILE".

    Raises TimeoutError, Damaged, and OSError for everything else that service or disk refused.
    """
    try:
        return future.result(timeout=WAIT_S)
    except TimeoutError:
        raise TimeoutError(f"waited {WAIT_S:g} s to {what}") from None
    except ValueError as error:
        reason = " ".join(_ADDED.sub("", str(error)).split())
        kind = Damaged if reason.startswith(_DAMAGED) else OSError
        raise kind(f"cannot {what}: {reason}") from None


def _local(path: str) -> dict[str, Any]:
    return {"driver": "file", "path": f"{Path(path).absolute()}/".replace("//", "/")}


def _remote(scheme: str, path: str) -> dict[str, Any]:
    """The spec of a bucket's folder."""
    bucket, _, folder = path[len(f"{scheme}://") :].rstrip("/").partition("/")
    if not bucket:
        raise ValueError(f"{path} names no bucket: write {scheme}://BUCKET/FOLDER")
    spec: dict[str, Any] = {"bucket": bucket, "path": f"{folder}/" if folder else ""}
    endpoint = endpoint_of(scheme)
    if scheme == "gs":
        spec["driver"] = "gcs"
        if endpoint:  # the one way to tell TensorStore
            os.environ["TENSORSTORE_GCS_HTTP_URL"] = endpoint
    else:
        spec["driver"] = "s3"
        if endpoint:
            host = urllib.parse.urlsplit(endpoint).netloc
            spec |= {"endpoint": endpoint, "host_header": host}
            spec["aws_region"] = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    try:
        tensorstore.KvStore.Spec(spec)
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    return spec


def to_json(value: Any) -> bytes:
    """JSON as it is written to a store: the same bytes for the same value."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
