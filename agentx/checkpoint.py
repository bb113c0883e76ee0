"""Checkpoints that a killed run can trust: written by Orbax in the background, checked when read.

A directory of checkpoints holds one folder a step, and nothing else:

    step_00000040/state/            the arrays, Orbax's PyTree format (OCDBT, Zarr)
    step_00000040/about.json        step, extras, and the shape and dtype of every array
    step_00000040/checksums.json    size and sha256 of every other file
    step_00000060.partial/          what a save leaves behind when it is cut short

A save fills the .partial folder; the rename that drops the suffix comes last, so a folder without
it was complete once. Whether it still is, the checksums say, and `restore` goes back past whatever
they refuse, naming it. Arrays come back in the sharding that the reader asks for, whatever the
devices of the writer were.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

logger = logging.getLogger(__name__)

T = TypeVar("T")
PathLike = str | os.PathLike[str]

_COMPLETE = re.compile(r"step_(\d{8,})")
_ENTRY = re.compile(r"step_\d{8,}(\.partial)?")


class Restored(NamedTuple):
    """What came back: the pytree of arrays, the step it was saved at, and the extras beside it."""

    state: Any
    step: int
    extras: dict[str, Any]


class Saved(NamedTuple):
    """A checkpoint whose files are all as they were written: its folder, its step, its extras."""

    folder: Path
    step: int
    extras: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run: saves in the background, keeps the newest `keep`.

    One process writes to a directory at a time. A save that fails raises at the next `save` or
    `wait`. The driver has to call `wait` before it exits, or the last save may be cut short.
    """

    def __init__(
        self,
        directory: PathLike,
        *,
        keep: int = 3,
        timeout_s: float = 1200.0,
        types: ocp.type_handlers.TypeHandlerRegistry | None = None,
    ):
        """Opens or makes `directory`. `timeout_s` bounds each wait for a save or a restore.

        types: Orbax's handlers of what is saved, where that is no tree of arrays (see
        `agentx.streamed`).

        Raises ValueError for a directory that holds something other than checkpoints.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least one checkpoint has to stay")
        self.directory = Path(directory).absolute()
        if self.directory.exists():
            _check_directory(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.keep = keep
        self.timeout_s = timeout_s
        self._pending: tuple[int, Future[None]] | None = None
        self._saved: set[int] = set()
        self._damaged: set[int] = set()
        self._writer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(type_handler_registry=types)
            if types is not None
            else ocp.PyTreeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(timeout_secs=int(timeout_s)),
        )

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps of the checkpoints that were completed, oldest first; their files unread."""
        return _steps(self.directory)

    def save(self, step: int, state: Any, extras: Mapping[str, Any]) -> None:
        """Starts to save and returns once the arrays are copied from the devices.

        state: a pytree of arrays. extras: whatever JSON can hold. A save still under way is waited
        for first. Saving a step again that this store has saved does nothing. Raises ValueError for
        a step that is not newer than every checkpoint here: that run was not resumed from them.
        """
        self.wait()
        if step in self._saved:
            return
        newest = max((s for s in self.steps() if s not in self._damaged), default=-1)
        if step <= newest:
            raise ValueError(
                f"{self.directory} has a checkpoint of step {newest} already, so step {step} of "
                "another run cannot go there; resume from it or give another directory"
            )
        about = json.dumps({"step": step, "arrays": _describe(state), "extras": dict(extras)})
        partial = self._folder(step, ".partial")
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            (partial / "about.json").write_text(about)
        self._writer.save(partial / "state", args=ocp.args.PyTreeSave(state))
        self._pending = (step, _in_thread(f"save-{step}", lambda: self._finish(step)))

    def wait(self) -> None:
        """Returns once nothing is being saved. Raises TimeoutError, or what the save failed with.

        A failed save leaves its .partial folder behind.
        """
        if self._pending is None:
            return
        step, future = self._pending
        self._pending = None
        _result(future, f"saving step {step} to {self.directory}", self.timeout_s)
        self._saved.add(step)

    def close(self) -> None:
        """Waits for the last save and frees Orbax's threads."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def latest(self) -> int | None:
        """The newest step whose files are all as they were written; None if there is none.

        Names every damaged or half-written checkpoint that it passes over.
        """
        return self._newest_undamaged()

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest undamaged checkpoint, or None if none was ever completed here.

        abstract_state: a pytree like the saved one, of `jax.ShapeDtypeStruct` with the shardings
        that the arrays shall have; a leaf without one comes back as a numpy array. Damaged and
        half-written checkpoints are named in the log and passed over. Raises ValueError when all
        are damaged, or when the arrays are not those of `abstract_state`.
        """
        self.wait()
        step = self._newest_undamaged()
        if step is None:
            if self._damaged:
                raise ValueError(_all_damaged(self.directory, self._damaged))
            return None
        return _restore(self._folder(step), abstract_state, field=None, timeout_s=self.timeout_s)

    def _newest_undamaged(self) -> int | None:
        step, damaged = _newest_undamaged(self.directory)
        self._damaged |= damaged
        return step

    def _folder(self, step: int, suffix: str = "") -> Path:
        return self.directory / f"step_{step:08d}{suffix}"

    def _finish(self, step: int) -> None:
        self._writer.wait_until_finished()
        if jax.process_index() != 0:
            return
        partial, final = self._folder(step, ".partial"), self._folder(step)
        (partial / "checksums.json").write_text(json.dumps(_checksums(partial)))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        self._damaged.discard(step)
        good = [s for s in self.steps() if s not in self._damaged]
        wanted = {self._folder(s).name for s in good[-self.keep :]}
        for entry in _entries(self.directory):
            if entry.name not in wanted:
                shutil.rmtree(entry)


def newest_checkpoint(directory: PathLike) -> Saved:
    """The newest undamaged checkpoint, every byte of which is read once for that.

    Nothing is written or deleted. Raises ValueError where there is none.
    """
    path = Path(directory).absolute()
    if not path.is_dir():
        raise ValueError(f"there is no directory of checkpoints at {path}")
    _check_directory(path)
    step, damaged = _newest_undamaged(path)
    if step is None:
        raise ValueError(
            _all_damaged(path, damaged) if damaged else f"{path} holds no complete checkpoint"
        )
    folder = path / f"step_{step:08d}"
    about = _about(folder)
    return Saved(folder, about["step"], about["extras"])


def checkpoint_at(directory: PathLike, step: int) -> Saved:
    """The checkpoint of a step, every byte of which is read once.

    Raises ValueError where it is not there, or damaged.
    """
    folder = Path(directory).absolute() / f"step_{step:08d}"
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there any more")
    fault = _fault(folder)
    if fault is not None:
        raise ValueError(f"{folder} is damaged ({fault})")
    about = _about(folder)
    return Saved(folder, about["step"], about["extras"])


def fingerprint(saved: Saved) -> str:
    """sha256 of a checkpoint's checksums, and so of all that it holds."""
    return hashlib.sha256((saved.folder / "checksums.json").read_bytes()).hexdigest()


def restore_params(saved: Saved, abstract_params: Any, *, timeout_s: float = 1200.0) -> Any:
    """The `params` of a checkpoint; the optimizer's state is not read.

    abstract_params: as in `CheckpointStore.restore`. Raises ValueError where the checkpoint is of
    another model.
    """
    return _restore(saved.folder, abstract_params, field="params", timeout_s=timeout_s).state


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{path} is a file, not a directory of checkpoints")
    others = [p.name for p in path.iterdir() if not _ENTRY.fullmatch(p.name) and p.name[:1] != "."]
    if others:
        raise ValueError(
            f"{path} is no directory of checkpoints: it holds {min(others)!r}; "
            "give an empty one or one that this program made"
        )


def _entries(directory: Path) -> list[Path]:
    return [p for p in directory.iterdir() if _ENTRY.fullmatch(p.name)]


def _steps(directory: Path) -> list[int]:
    matches = (_COMPLETE.fullmatch(p.name) for p in directory.iterdir())
    return sorted(int(m[1]) for m in matches if m)


def _newest_undamaged(directory: Path) -> tuple[int | None, set[int]]:
    """The newest good step, and the damaged ones found on the way to it."""
    for entry in _entries(directory):
        if entry.suffix == ".partial":
            logger.warning("%s is half-written, its save was cut short: passed over", entry)
    damaged: set[int] = set()
    for step in reversed(_steps(directory)):
        folder = directory / f"step_{step:08d}"
        fault = _fault(folder)
        if fault is None:
            return step, damaged
        logger.warning("%s is damaged (%s): passed over", folder, fault)
        damaged.add(step)
    return None, damaged


def _all_damaged(directory: Path, damaged: set[int]) -> str:
    steps = ", ".join(map(str, sorted(damaged)))
    return f"every checkpoint in {directory} is damaged (step {steps}); give another directory"


def _checksums(folder: Path) -> dict[str, tuple[int, str]]:
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / "checksums.json":
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            sums[path.relative_to(folder).as_posix()] = (path.stat().st_size, digest)
    return sums


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        written = json.loads((folder / "checksums.json").read_text())
        expected = {name: (int(size), str(digest)) for name, (size, digest) in written.items()}
        found = _checksums(folder)
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror}"
    except (ValueError, TypeError, AttributeError):
        return "checksums.json is not what was written"
    for name, (size, digest) in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes instead of {size}"
        if found[name][1] != digest:
            return f"{name} has other bytes than were written"
    return None


def _about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "about.json").read_text())


def _describe(tree: Any, prefix: str = "") -> dict[str, list[Any]]:
    """Path of every array in a tree -> [shape, dtype]."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        prefix + jax.tree_util.keystr(path, simple=True, separator="/"): [
            list(np.shape(leaf)),
            str(np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.result_type(leaf)),
        ]
        for path, leaf in leaves
    }


def _restore(folder: Path, abstract: Any, field: str | None, timeout_s: float) -> Restored:
    about = _about(folder)
    prefix = f"{field}/" if field else ""
    _check_arrays(folder, about["arrays"], _describe(abstract, prefix), prefix)
    item = {field: abstract} if field else abstract
    args = ocp.args.PyTreeRestore(
        item,
        restore_args=jax.tree.map(_restore_args, item),
        partial_restore=field is not None,
    )

    def read() -> Any:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(folder / "state", args=args)

    future = _in_thread(f"restore-{about['step']}", read)
    tree = _result(future, f"reading {folder}", timeout_s)
    return Restored(tree[field] if field else tree, about["step"], about["extras"])


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(
        sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True
    )


def _check_arrays(
    folder: Path, saved: dict[str, list[Any]], asked: dict[str, list[Any]], prefix: str
) -> None:
    saved = {name: about for name, about in saved.items() if name.startswith(prefix)}
    for name, (shape, dtype) in asked.items():
        if name not in saved:
            raise ValueError(f"{folder} is of another model: it has no {name}")
        if saved[name] != [shape, dtype]:
            raise ValueError(
                f"{folder} is of another model: its {name} is {saved[name][1]}{saved[name][0]}, "
                f"and {dtype}{shape} was asked for"
            )
    surplus = sorted(saved.keys() - asked.keys())
    if surplus:
        raise ValueError(f"{folder} is of another model: it has {surplus[0]}, not asked for")


def _in_thread(name: str, function: Callable[[], T]) -> Future[T]:
    """Runs a function in a daemon thread: one that hangs cannot keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _result(future: Future[T], what: str, timeout_s: float) -> T:
    try:
        return future.result(timeout_s)
    except FutureTimeout:
        if future.done():
            raise
        raise TimeoutError(f"{what} took more than {timeout_s:g} s") from None
