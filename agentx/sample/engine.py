"""The sampler: sequences that live in the rows of a KV cache, many of them at once.

    session   one sequence: a prompt, then turns of new ids read and ids sampled
    slot      a row of the cache, which a session holds from its admission until it is closed
    turn      what was sampled in answer to some new ids
    slice     up to 64 steps of all rows in one dispatch, between two looks at the queue

Sessions are admitted in the order they were opened, as slots become free. A turn feeds only what
the cache has not seen; sessions opened together share their prompt's keys and values, computed
once.

What a session samples depends on the parameters, the seed, its request id and its ids alone: not on
its slot, its neighbours, their number or the order of events, up to the rounding of logits, which
may differ in the last bits between sizes of the cache (see `slots`).

There are two faces. `open`, `submit`, `step` and `complete` are plain calls. `open_group` and
`generate` are for coroutines, any number of which may share an engine: slices run in a thread,
whenever no coroutine is about to submit more.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from agentx.model.config import ModelConfig
from agentx.model.lora import LoraConfig
from agentx.sample.sampling import SamplingParams, check_sampling, check_seed
from agentx.sample.slots import Done, Reading, Running, Slice, Slots
from agentx.sharding import MeshConfig, make_mesh

Ids = Sequence[int] | np.ndarray
StopReason = Literal["stop", "length", "context"]

# A slice ends once this share of its rows or fewer go on: rows that have stopped cost as much as
# they did, and a slice costs a millisecond to start.
_PATIENCE = 0.75
# The cache gets more columns where it has not enough for so many steps.
_FEWEST_STEPS = 16
# A slice starts once the event loop has turned so often without a new turn.
_QUIET_TURNS = 32
_POLL_S = 0.005


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one turn sampled.

    ids: i32[n], the stop token included. logprobs, processed_logprobs: f32[n], see
    `programs.Decoded`; the trainer compares the former. stop_reason: "stop" at a stop id, "length"
    when the turn's budget was spent, "context" when the session's max_length came before that.
    weight_version: of the parameters that sampled it.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    processed_logprobs: np.ndarray
    stop_reason: StopReason
    weight_version: int


@dataclasses.dataclass
class _OpenTurn:
    """A turn that is not finished.

    end: the length of the session at which its budget is spent; cut: whether max_length made that
    less than was asked for. parts: ids and both logprobs, as the slices deliver them.
    """

    end: int
    cut: bool
    sampling: SamplingParams
    parts: list[tuple[np.ndarray, ...]] = dataclasses.field(default_factory=list)
    future: asyncio.Future[Turn] | None = None

    @property
    def awaited(self) -> bool:
        return self.future is not None and not self.future.done()

    def answer(self, outcome: Turn | BaseException) -> None:
        """Tells whoever awaits the turn."""
        if self.future is None or self.future.done():
            return
        if isinstance(outcome, Turn):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)


class Session:
    """One sequence, begun under the parameters `weight_version`; see `Engine.open`."""

    def __init__(self, prompt: list[int], request_id: int, group: object, weight_version: int):
        self.request_id, self.weight_version = request_id, weight_version
        self._group, self._prompt_length = group, len(prompt)
        self._ids = list(prompt)
        # What of it the cache holds, and in which row since the last slice.
        self._num_cached = 0
        self._row: int | None = None
        # The experts that the tokens in the cache took, in pieces.
        self._experts: list[np.ndarray] = []
        self._turn: _OpenTurn | None = None
        self._closed = ""

    @property
    def ids(self) -> np.ndarray:
        """All of it so far, prompt, new ids and sampled ones: i32[n]."""
        return np.array(self._ids, np.int32)

    @property
    def experts(self) -> np.ndarray | None:
        """The experts that its tokens took, i32[m, L, k], of the L layers that have experts: of all
        tokens that were read, which the last one sampled was not. None where no layer has any."""
        return np.concatenate(self._experts) if self._experts else None


class _Planned(NamedTuple):
    """A slice, and whom it serves: who samples, who reads a prompt, who copies whose, who reads new
    ids; in the order of the slice's own lists."""

    work: Slice
    running: list[Session]
    prompts: list[Session]
    copies: list[tuple[Session, Session]]
    readers: list[Session]

    def keep_experts(self, done: Done, decoded_IBLk: np.ndarray) -> None:
        """Gives every session the experts that its tokens took in this slice."""
        for session, experts in zip(self.prompts, done.prompts, strict=True):
            session._experts.append(experts)
        for source, target in self.copies:
            of_prompt = source.experts
            assert of_prompt is not None
            target._experts.append(of_prompt[: target._prompt_length - 1])
        for session, experts in zip(self.readers, done.readings, strict=True):
            session._experts.append(experts)
        for session, state in zip(self.running, self.work.running, strict=True):
            count = int(np.count_nonzero(done.decoded.ids[:, state.row] >= 0))
            session._experts.append(decoded_IBLk[:count, state.row])


class Engine:
    """Samples from the model of `config`, once `set_params` has given it parameters.

    mesh: where it runs; one device if None. Rows are split over data, fsdp and context, heads and
      vocabulary over tensor.
    num_slots: how many sessions hold a slot at once, rounded up to what the mesh divides.
    max_length: the most tokens of a session; at most the model's.
    vocab_size: only ids below it are drawn, those of the tokenizer: a model's vocabulary is often
      padded beyond. All of the model's if None.
    stop_ids: after which a turn ends. temperature, top_k, top_p: see `SamplingParams`; a turn may
      have others. seed: of all random numbers, in [0, 2^31).
    idle_timeout_s: how long `generate` waits for a slot while nothing runs.
    lora: the adapters of the model's weights, if any; `set_params` then takes all that it has,
      adapters and what is frozen, as one state.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_slots: int,
        max_length: int,
        mesh: Mesh | None = None,
        vocab_size: int | None = None,
        stop_ids: Sequence[int] = (),
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        idle_timeout_s: float = 600.0,
        lora: LoraConfig | None = None,
    ):
        if not 2 <= max_length <= config.max_length:
            raise ValueError(
                f"the engine's max_length is {max_length}; the model allows 2 to "
                f"{config.max_length}"
            )
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; it must be 1 or more")
        if vocab_size is None:
            vocab_size = config.vocab_size
        if not 1 <= vocab_size <= config.vocab_size:
            raise ValueError(
                f"the engine's vocab_size is {vocab_size}; the model allows 1 to "
                f"{config.vocab_size}"
            )
        check_seed("seed", seed)
        self.config, self.max_length = config, max_length
        self.sampling = SamplingParams(temperature, top_k, top_p)
        check_sampling(self.sampling)
        self._stop_ids = frozenset(int(i) for i in stop_ids)
        stops = tuple(sorted(self._stop_ids))
        self._slots = Slots(
            config, _sampler_mesh(mesh), num_slots, max_length, vocab_size, stops, seed, lora
        )
        self.num_slots = self._slots.row_sizes[-1]
        self._params: Any = None
        self._version: int | None = None
        self._waiting: collections.deque[Session] = collections.deque()
        self._holders: list[Session | None] = []
        self._idle_timeout_s = idle_timeout_s
        self._num_events = 0
        self._driver: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------ parameters

    def set_params(self, params: nnx.State, version: int) -> None:
        """Samples from `params` from now on, and records `version` with every turn.

        All open sessions are closed, for their keys and values came from other parameters: who
        awaits a turn of one, or uses it later, gets a ValueError. The arrays are referred to, not
        copied: after a train step that donates them, set them again.
        """
        self._close_all(f"the parameters were replaced by version {version}")
        self._slots.clear()
        self._params, self._version = self._slots.place(params), version

    @property
    def num_compilations(self) -> int:
        """How many programs have been compiled so far, by all engines of the same policy."""
        return self._slots.num_compiled

    def warm_up(self) -> None:
        """Compiles every program for every size of the cache. Closes all open sessions."""
        self._current_version()
        self._close_all("the engine was warmed up")
        self._slots.warm_up(self._params)

    # ------------------------------------------------------------------ sessions

    def open(self, prompt_ids: Ids, request_ids: Sequence[int]) -> list[Session]:
        """One session for each request id, all with the same prompt, which is computed once.

        They wait for slots in the order they were opened. Close every one.
        """
        version, prompt = self._current_version(), self._checked(prompt_ids)
        if not 0 < len(prompt) < self.max_length:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; it must have at least 1 and leave room for "
                f"one more in the engine's max_length of {self.max_length}"
            )
        group = object()
        sessions = [Session(prompt, int(r), group, version) for r in request_ids]
        self._waiting.extend(sessions)
        self._num_events += 1
        return sessions

    def submit(
        self,
        session: Session,
        new_ids: Ids,
        max_new_tokens: int,
        sampling: SamplingParams | None = None,
    ) -> None:
        """Queues a turn: `new_ids` (there may be none) are read, then up to max_new_tokens sampled.

        sampling: numbers, instead of the engine's own. Raises ValueError where the session is
        closed or busy, or the new ids leave no room in max_length.
        """
        if session._closed:
            raise ValueError(
                f"request {session.request_id} is closed ({session._closed}): open a new session"
            )
        if session._turn is not None:
            raise ValueError(f"request {session.request_id} has a turn that is not finished yet")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
        new, sampling = self._checked(new_ids), sampling or self.sampling
        check_sampling(sampling)
        length = len(session._ids) + len(new)
        if length >= self.max_length:
            raise ValueError(
                f"request {session.request_id} has {len(session._ids)} tokens and {len(new)} new "
                f"ones, which leaves no room to sample in the engine's max_length of "
                f"{self.max_length}"
            )
        session._ids.extend(new)
        end = length + max_new_tokens
        cut = end > self.max_length
        session._turn = _OpenTurn(min(end, self.max_length), cut, sampling)
        self._num_events += 1

    def close(self, session: Session) -> None:
        """Frees the session's slot. Closing twice is allowed."""
        self._close(session, "by its owner", None)

    def complete(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: Sequence[int],
        sampling: SamplingParams | None = None,
        first_request: int = 0,
    ) -> list[Turn]:
        """One turn for each prompt, in their order. Request ids count up from `first_request`.

        Raises ValueError where a prompt and its max_new_tokens exceed the engine's max_length.
        """
        sessions = []
        for number, (prompt, budget) in enumerate(zip(prompts, max_new_tokens, strict=True)):
            if len(prompt) + budget > self.max_length:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens, which with {budget} new ones makes "
                    f"{len(prompt) + budget}: more than the engine's max_length of "
                    f"{self.max_length}"
                )
            [session] = self.open(prompt, [first_request + number])
            self.submit(session, (), budget, sampling)
            sessions.append(session)
        turns: dict[Session, Turn] = {}
        while len(turns) < len(sessions):
            for session, turn in self.step():
                self.close(session)
                turns[session] = turn
        return [turns[session] for session in sessions]

    # ------------------------------------------------------------------ slices

    def step(self) -> list[tuple[Session, Turn]]:
        """Runs one slice and returns the turns that it finished.

        None of them: no turn can run, or none was finished yet.
        """
        planned = self._plan()
        if planned is None:
            return []
        return self._collect(planned, self._slots.run(self._params, planned.work))

    def _plan(self) -> _Planned | None:
        """Admits whom it can. The slice that serves those who have a turn."""
        self._admit()
        rows = {s: row for row, s in enumerate(self._holders) if s is not None}
        running = [s for s in rows if s._turn is not None]
        if not running:
            return None
        keeps = any(s._num_cached for s in rows)
        source = list(range(len(self._holders)))
        for s, row in rows.items():
            source[row] = row if s._row is None else s._row
            s._row = row
        prompts, copies = self._read_prompts(running, rows)
        readings, states, readers = [], [], []
        for s in running:
            assert s._turn is not None
            if s._num_cached < len(s._ids) - 1:
                readings.append(Reading(rows[s], s._ids[s._num_cached : -1], s._num_cached))
                readers.append(s)
                s._num_cached = len(s._ids) - 1
            budget = s._turn.end - len(s._ids)
            states.append(
                Running(rows[s], s._ids[-1], s._num_cached, s.request_id, budget, s._turn.sampling)
            )
        soon = (s.length + min(s.budget, _FEWEST_STEPS) for s in states)
        columns = max(*soon, *(s._num_cached for s in rows))
        floor = int(_PATIENCE * (len(running) - 1))
        work = Slice(
            source,
            keeps,
            columns,
            [Reading(rows[s], s._ids[: s._prompt_length - 1], 0) for s in prompts],
            [(rows[source], rows[target]) for source, target in copies],
            readings,
            states,
            floor,
        )
        return _Planned(work, running, prompts, copies, readers)

    def _admit(self) -> None:
        """Gives free rows to those who wait, in more rows or fewer if that fits them better."""
        kept = [s for s in self._holders if s is not None]
        size = self._slots.rows_for(len(kept) + len(self._waiting))
        if size != len(self._holders):
            self._holders = [*kept, *[None] * (size - len(kept))]
        for row, holder in enumerate(self._holders):
            if holder is None and self._waiting:
                self._holders[row] = self._waiting.popleft()

    def _read_prompts(
        self, running: list[Session], rows: dict[Session, int]
    ) -> tuple[list[Session], list[tuple[Session, Session]]]:
        """Who reads a prompt that nobody in a slot has read, and who copies whose."""
        readers = {s._group: s for s in rows if s._num_cached}
        prompts, copies = [], []
        for s in running:
            unread = s._prompt_length - 1
            if s._num_cached or not unread:
                continue
            if s._group in readers:
                copies.append((readers[s._group], s))
            else:
                readers[s._group] = s
                prompts.append(s)
            s._num_cached = unread
        return prompts, copies

    def _collect(self, planned: _Planned, done: Done) -> list[tuple[Session, Turn]]:
        """Adds what a slice sampled to its sessions; the turns that it finished."""
        finished = []
        decoded = done.decoded
        if decoded.experts is not None:
            planned.keep_experts(done, decoded.experts)
        for session, state in zip(planned.running, planned.work.running, strict=True):
            turn = session._turn
            if turn is None:
                continue
            count = int(np.count_nonzero(decoded.ids[:, state.row] >= 0))
            part = tuple(x[:count, state.row] for x in decoded[:3])
            turn.parts.append(part)
            session._ids.extend(part[0].tolist())
            session._num_cached = len(session._ids) - 1
            stopped = session._ids[-1] in self._stop_ids
            if not stopped and len(session._ids) < turn.end:
                continue
            ids, logprobs, processed = (np.concatenate(x) for x in zip(*turn.parts, strict=True))
            reason: StopReason = "stop" if stopped else "context" if turn.cut else "length"
            result = Turn(ids, logprobs, processed, reason, session.weight_version)
            session._turn = None
            turn.answer(result)
            finished.append((session, result))
        return finished

    # ------------------------------------------------------------------ coroutines

    async def open_group(self, prompt_ids: Ids, request_ids: Sequence[int]) -> list[Session]:
        """`open`, for coroutines. It is the first `generate` that waits for a slot."""
        return self.open(prompt_ids, request_ids)

    async def generate(
        self,
        session: Session,
        new_ids: Ids,
        max_new_tokens: int,
        sampling: SamplingParams | None = None,
    ) -> Turn:
        """`submit`, and then the finished turn. Raises ValueError as `submit` does.

        Raises TimeoutError where it has waited idle_timeout_s for a slot while nothing ran.
        """
        self.submit(session, new_ids, max_new_tokens, sampling)
        assert session._turn is not None
        future = session._turn.future = asyncio.get_running_loop().create_future()
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        return await future

    async def _drive(self) -> None:
        """Runs slices until nobody awaits a turn. A slice that fails closes all sessions."""
        try:
            while any(s._turn is not None and s._turn.awaited for s in self._sessions()):
                await self._settle()
                planned = self._plan()
                if planned is None:
                    await self._wait_for_a_slot()
                    continue
                done = await asyncio.to_thread(self._slots.run, self._params, planned.work)
                self._collect(planned, done)
        except BaseException as error:
            self._close_all(f"a slice ended with {type(error).__name__}: {error}", error)
            if not isinstance(error, Exception):
                raise

    async def _settle(self) -> None:
        """Lets the coroutines run until all sessions have a turn or nothing happens any more.

        So the slices, and with them every bit of the results, do not hang on how long anything
        took, unless a tool waits for something outside the event loop.
        """
        quiet, seen = 0, self._num_events
        while quiet < _QUIET_TURNS and any(s._turn is None for s in self._sessions()):
            await asyncio.sleep(0)
            quiet = quiet + 1 if seen == self._num_events else 0
            seen = self._num_events

    async def _wait_for_a_slot(self) -> None:
        seen, deadline = self._num_events, time.monotonic() + self._idle_timeout_s
        while seen == self._num_events:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"waited {self._idle_timeout_s:g} s for a free slot: all {self.num_slots} are "
                    f"held by sessions without a turn, and {len(self._waiting)} sessions wait"
                )
            await asyncio.sleep(_POLL_S)

    # ------------------------------------------------------------------ small parts

    def _sessions(self) -> list[Session]:
        return [*self._waiting, *(s for s in self._holders if s is not None)]

    def _close(self, session: Session, reason: str, error: BaseException | None) -> None:
        if session._closed:
            return
        turn, session._turn, session._closed = session._turn, None, reason
        if session in self._waiting:
            self._waiting.remove(session)
        else:
            self._holders[self._holders.index(session)] = None
        if turn is not None:
            closed = ValueError(f"request {session.request_id} was closed: {reason}")
            turn.answer(error or closed)
        self._num_events += 1

    def _close_all(self, reason: str, error: BaseException | None = None) -> None:
        for session in self._sessions():
            self._close(session, reason, error)

    def _current_version(self) -> int:
        if self._version is None:
            raise ValueError("the engine has no parameters yet: call set_params first")
        return self._version

    def _checked(self, ids: Ids) -> list[int]:
        array = np.asarray(ids, np.int64)
        if array.ndim != 1 or np.any((array < 0) | (array >= self.config.vocab_size)):
            raise ValueError(
                f"ids must be a list of numbers in [0, {self.config.vocab_size}), got an array of "
                f"shape {array.shape} with values up to {array.max(initial=-1)}"
            )
        return array.tolist()


def _sampler_mesh(mesh: Mesh | None) -> Mesh:
    """The devices of `mesh`, with those that split tokens or experts splitting rows instead."""
    if mesh is None:
        return make_mesh(MeshConfig(data=1), jax.devices()[:1])
    shape = dict(mesh.shape)
    if shape["context"] == shape["expert"] == 1:
        return mesh
    sizes = MeshConfig(data=-1, fsdp=shape["fsdp"], tensor=shape["tensor"])
    return make_mesh(sizes, mesh.devices.ravel().tolist())
