"""Buckets on this machine: servers that speak S3 and Google Cloud Storage, for as long as a test.

Each context manager starts one on a free port of the loopback, sets the variables that clients read
(tensorstore, s3fs and gcsfs alike), and puts both back as they were. Importing the servers takes
seconds: use them from a fixture of a module's scope.
"""

import contextlib
import http
import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

BUCKET = "agentx-test"


@contextlib.contextmanager
def s3_emulator() -> Iterator[Any]:
    """moto's S3, with a bucket. Gives the server: `stop()` takes it away."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with _variables(
            AWS_ENDPOINT_URL=f"http://{host}:{port}",
            AWS_ACCESS_KEY_ID="test",
            AWS_SECRET_ACCESS_KEY="test",
            AWS_DEFAULT_REGION="us-east-1",
        ):
            if not _s3().exists(BUCKET):  # all of a process's servers share their buckets
                _s3().mkdir(BUCKET)
            yield server
    finally:
        server.stop()


@contextlib.contextmanager
def gs_emulator() -> Iterator[Any]:
    """Google Cloud Storage, with an empty bucket. Gives the server: `stop()` takes it away."""
    from gcp_storage_emulator.server import create_server

    _complete()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        with _variables(
            STORAGE_EMULATOR_HOST=f"http://127.0.0.1:{port}",
            GOOGLE_AUTH_TOKEN_FOR_TESTING="test",  # TensorStore would look for credentials
            TENSORSTORE_GCS_HTTP_URL=f"http://127.0.0.1:{port}",  # Storage would set it for good
        ):
            yield server
    finally:
        server.stop()


def _complete() -> None:
    """Has the emulator do what the service does and it leaves out.

    It says the generation of an object, holds to one that a writer asks for, and lists no names
    outside the range that is asked for.
    """
    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    if objects.download.__module__ == __name__:  # it has been told already
        return

    def generation(storage: Any, bucket: str, name: str) -> str:
        try:
            return str(storage.get_file_obj(bucket, name)["generation"])
        except NotFound:
            return "0"

    def download(request: Any, response: Any, storage: Any, *rest: Any, **more: Any) -> None:
        names = request.params["bucket_name"], request.params["object_id"]
        response["x-goog-generation"] = generation(storage, *names)
        plain["download"](request, response, storage, *rest, **more)

    def held_to(change: str) -> Callable[..., None]:
        """A change of an object that is made only where it has the generation asked for."""

        def changed(request: Any, response: Any, storage: Any, *rest: Any, **more: Any) -> None:
            wanted = request.query.get("ifGenerationMatch")
            if wanted:
                key = request.params.get("object_id") or request.query["name"][0]
                if generation(storage, request.params["bucket_name"], key) != wanted[0]:
                    response.status = http.HTTPStatus.PRECONDITION_FAILED
                    return
            plain[change](request, response, storage, *rest, **more)

        changed.__name__ = change
        return changed

    def ls(request: Any, response: Any, storage: Any, *rest: Any, **more: Any) -> None:
        plain["ls"](request, response, storage, *rest, **more)
        first = request.query.get("startOffset", [""])[0]
        last = request.query.get("endOffset", ["\U0010ffff"])[0]
        found = json.loads(response._content or "{}")
        found["items"] = [o for o in found.get("items", ()) if first <= o["name"] < last]
        response.json(found)

    plain = {name: getattr(objects, name) for name in ("download", "insert", "delete", "ls")}
    for told in (download, held_to("insert"), held_to("delete"), ls):
        setattr(objects, told.__name__, told)  # `get` asks for it by its name
        for _, handlers in server.HANDLERS:
            for method, handler in handlers.items():
                if handler is plain[told.__name__]:
                    handlers[method] = told


def put(path: str, data: bytes) -> str:
    """Writes an object of a bucket, `gs://...` or `s3://...`, and returns its path."""
    (_s3() if path.startswith("s3://") else _gs()).pipe_file(path, data)
    return path


def remove(path: str) -> None:
    (_s3() if path.startswith("s3://") else _gs()).rm_file(path)


def _s3() -> Any:
    import s3fs

    return s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"], use_listings_cache=False)


def _gs() -> Any:
    import gcsfs.core

    return gcsfs.core.GCSFileSystem(
        endpoint_url=os.environ["STORAGE_EMULATOR_HOST"], token="anon", use_listings_cache=False
    )


@contextlib.contextmanager
def _variables(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
