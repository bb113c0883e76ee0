"""Where files are: on this machine, or in a bucket of gs:// or s3://.

Enters: a path: a file, a folder, or a glob. Leaves: the files that it stands for, in order, each
with its name below what was asked for; their bytes; and what tells one version of a file from
another.

A bucket is asked through gcsfs or s3fs, which are imported when such a path is first named and take
credentials and endpoints from the usual variables (STORAGE_EMULATOR_HOST, AWS_ENDPOINT_URL). Every
question has `TIMEOUT_S` seconds. Whatever goes wrong is a ValueError that names the file: a bucket
that goes away while a file is read never makes the file shorter.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

PathLike = str | os.PathLike[str]

# Of one question to a bucket, its client's retries included: a list of files, or a block of one.
TIMEOUT_S = 60.0
_BLOCK = 4 << 20
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
# What a bucket may say of a file's content, the strongest first.
_CHECKSUMS = ("md5Hash", "crc32c", "ETag", "etag")


class File(NamedTuple):
    """One file of those that a path stands for.

    name: its path below the folder, or below the part of a glob that is fixed; else its last part.
    fault: why it is left out, "" where it is not: it, or a folder that it is in, begins with a dot
    ("hidden"); it is a link to a folder, to nothing, or no file at all ("no file"); nobody can
    write its name down ("name not UTF-8").
    """

    path: str
    name: str
    fault: str = ""


def find_files(path: PathLike, pattern: str = "*") -> list[File]:
    """What a path stands for: itself, the files below it, or those that it matches as a glob.

    pattern: of the names of the files below a folder, "*.py" for instance. In the order of the
    parts of their paths. Raises ValueError where there is nothing.
    """
    if scheme_of(path):
        return _find_remote(str(path), pattern)
    if os.path.isfile(path):
        return [File(str(path), os.path.basename(path))]
    if os.path.isdir(path):
        return _ordered(str(path), _walk(str(path)), pattern)
    return _matches(str(path), glob.glob(str(path), recursive=True), "")


def is_folder(path: PathLike) -> bool:
    """Whether a path is a folder. One of a bucket is what has files below it."""
    if not scheme_of(path):
        return os.path.isdir(path)
    info = _info(str(path))
    return info is not None and info["type"] == "directory"


def open_file(path: PathLike) -> IO[bytes]:
    """A file's bytes, to be read from anywhere. Raises OSError, or ValueError for a bucket's."""
    if scheme_of(path):
        return io.BufferedReader(_RemoteFile(str(path)), _BLOCK)
    return open(path, "rb")


def size_and_checksum(path: PathLike) -> tuple[int, str]:
    """Bytes of a file, and "KIND:..." that differs where its content does.

    sha256 of a file on this machine; what the bucket keeps for one there, without reading it.
    """
    if scheme_of(path):
        info = _file_info(str(path))
        kind = next((key for key in _CHECKSUMS if info.get(key)), None)
        if kind is None:
            raise ValueError(f"{path}: its bucket keeps no checksum of it")
        return info["size"], f"{kind.lower().removesuffix('hash')}:{info[kind].strip(chr(34))}"
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
        return file.tell(), f"sha256:{digest.hexdigest()}"


def scheme_of(path: PathLike) -> str:
    """ "gs" or "s3", "" for a path on this machine. Raises ValueError for what nobody reads."""
    match = _SCHEME.match(str(path))
    if match and match[1] not in ("gs", "s3"):
        raise ValueError(f"{path}: nothing here reads {match[1]}://; there are gs:// and s3://")
    return match[1] if match else ""


def endpoint_of(scheme: str) -> str:
    """The server that the usual variable names for "gs" or "s3", "" for the service's own."""
    if scheme == "s3":
        return os.environ.get("AWS_ENDPOINT_URL", "")
    host = os.environ.get("STORAGE_EMULATOR_HOST", "")
    return host if not host or "://" in host else f"http://{host}"


def _walk(top: str) -> Iterator[str]:
    """What is below a folder and is no folder. Links to folders count as what is no file."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None

    for folder, folders, files in os.walk(top, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        yield from (os.path.join(folder, name) for name in [*files, *links])


def _ordered(top: str, paths: Iterator[str], pattern: str) -> list[File]:
    """Files below a folder, with their faults."""
    found = []
    for path in paths:
        inner = PurePosixPath(Path(path[len(top) :].lstrip("/" + os.sep)).as_posix())
        if not inner.match(pattern):
            continue
        fault = ""
        if any(part.startswith(".") for part in inner.parts):
            fault = "hidden"
        elif not scheme_of(top) and not os.path.isfile(path):
            fault = "no file"
        elif str(inner) != os.fsencode(str(inner)).decode(errors="replace"):
            fault = "name not UTF-8"
        found.append((inner.parts, File(path, str(inner), fault)))
    return [file for _, file in sorted(found)]


def _matches(pattern: str, paths: list[str], scheme: str) -> list[File]:
    """The files among those that a glob matched, named from where its fixed part ends."""
    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    top = "/".join(parts[:fixed])
    found = [path for path in paths if scheme or os.path.isfile(path)]
    if not found:
        raise ValueError(f"there is no file or folder {pattern}")
    listed = _ordered(top, iter(found), "*")
    return [file._replace(fault="") for file in listed]  # a glob that names them means them


# --------------------------------------------------------------------------------------------------
# Buckets
# --------------------------------------------------------------------------------------------------


def _find_remote(path: str, pattern: str) -> list[File]:
    info = _info(path)
    if info is not None and info["type"] == "file":
        return [File(path, PurePosixPath(path).name)]
    scheme = scheme_of(path)
    if info is None:
        found = _ask(path, "_glob", path, detail=True) if glob.has_magic(path) else {}
    else:
        found = _ask(path, "_find", path, detail=True)
    files = [
        f"{scheme}://{key}"
        for key, about in found.items()
        if about["type"] == "file" and not key.endswith("/")
    ]
    if info is None:
        return _matches(path, files, scheme)
    return _ordered(path.rstrip("/"), iter(files), pattern)


def _info(path: str) -> dict[str, Any] | None:
    """What the bucket says of a path, None where there is nothing."""
    try:
        return _ask(path, "_info", path)
    except FileNotFoundError:
        return None


def _file_info(path: str) -> dict[str, Any]:
    info = _info(path)
    if info is None:
        raise ValueError(f"there is no file or folder {path}")
    if info["type"] != "file":
        raise ValueError(f"{path} cannot be read: Is a directory")
    return info


def _ask(path: str, method: str, *arguments: Any, **options: Any) -> Any:
    """What a method of the bucket's file system answers in time.

    Raises FileNotFoundError, and ValueError for whatever else goes wrong: each client has its own
    exceptions for that.
    """
    scheme = scheme_of(path)
    system = _file_system(scheme, endpoint_of(scheme), os.getpid())
    import fsspec.asyn

    ask: Callable[..., Any] = getattr(system, method)
    try:
        return fsspec.asyn.sync(system.loop, ask, *arguments, timeout=TIMEOUT_S, **options)
    except FileNotFoundError:
        raise
    except fsspec.FSTimeoutError:
        raise ValueError(
            f"{path}: the bucket did not answer within {TIMEOUT_S:g} s; is the network there?"
        ) from None
    except Exception as error:
        said = " ".join(str(error).split()) or "no reason given"
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {said}") from None


@functools.lru_cache(maxsize=4)
def _file_system(scheme: str, endpoint: str, process: int) -> Any:
    """The client of a kind of bucket, a new one for another endpoint and in a forked process."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Google's, of its own dependencies
            if scheme == "s3":
                import s3fs

                return s3fs.S3FileSystem(
                    endpoint_url=endpoint or None,
                    use_listings_cache=False,
                    skip_instance_cache=True,
                )
            import gcsfs.core
    except ImportError:
        raise ValueError(
            f"{scheme}:// needs packages that are not installed: pip install agentx[cloud]"
        ) from None
    # It logs a traceback for each error that it also raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
    return gcsfs.core.GCSFileSystem(
        endpoint_url=endpoint or None,
        token="anon" if endpoint else None,
        requests_timeout=TIMEOUT_S,
        use_listings_cache=False,
        skip_instance_cache=True,
    )


class _RemoteFile(io.RawIOBase):
    """A file of a bucket: what is asked for is fetched, and comes whole or not at all."""

    def __init__(self, path: str):
        self._path, self._at = path, 0
        self._size: int = _file_info(path)["size"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        try:
            data = _ask(self._path, "_cat_file", self._path, start=self._at, end=end)
        except FileNotFoundError:
            raise ValueError(f"{self._path} went away while it was read") from None
        if len(data) != end - self._at:
            raise ValueError(
                f"{self._path} changed while it was read: {len(data)} bytes came in the place of "
                f"{end - self._at}"
            )
        buffer[: len(data)] = data
        self._at = end
        return len(data)
