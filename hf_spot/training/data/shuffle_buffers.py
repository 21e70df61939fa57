"""Shuffle buffers of ``datasets`` that resume with the same samples in the same order, without reading what came before.

A shuffle buffer holds samples from earlier positions of its source, in an order that is in no state of ``datasets``. What it
does depends on its generator and on how many samples it was given, never on what they are. A `_Reading` therefore remembers
where in its source a buffer was at several times. A second buffer of the same code and generator, a `_Twin` that is given
numbers instead of samples, tells which samples are still inside after *n* of them have come out. A resume gives the buffer
placeholders up to a remembered position before the oldest of these, then the source from there on, and drops the first *n* that
come out.

Nothing here repeats the algorithm of ``datasets``: both buffers run its own code, row by row or table by table. With datasets
5.2 a buffer of 1000 samples needs about six thousand of its source again, one of 10 000 about eighty thousand.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hf_spot.training.upstream import (
    ARROW_OF_BUFFER,
    BEGIN_STATE_OF_BUFFER,
    ITERATE_BUFFER,
    LOAD_STATE_OF_BUFFER,
    LOAD_STATE_OF_STREAM,
    START_OF_STREAM,
    STATE_OF_STREAM,
)

_TYPE = "BufferShuffledExamplesIterable"
_BUFFER = "buffer"  # number of a buffer, in its state in this process
_OURS = "of_hf_spot"  # in a state of a stream, beside what `datasets` reads
_ROWS = 64  # between two remembered positions of a source
_POSITIONS = 128
_PER_AGE = 8  # a remembered position is closer to the next one than an eighth of its age
_MOST_RUNS = 20_000
_PASSED: Any = object()

_readings: weakref.WeakValueDictionary[int, _Reading] = weakref.WeakValueDictionary()
_buffers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
_lock = threading.RLock()


class StreamChangedError(Exception):
    """A shuffle buffer can't be resumed at a saved position, because it or its source has changed."""


def install() -> None:
    """Let all shuffle buffers of this process say where they are. Do nothing if ``datasets`` is not imported."""
    plain, begin = ITERATE_BUFFER.find(), BEGIN_STATE_OF_BUFFER.find()
    arrow, load, state_of = ARROW_OF_BUFFER.find(), LOAD_STATE_OF_BUFFER.find(), STATE_OF_STREAM.find()
    load_stream = LOAD_STATE_OF_STREAM.find()
    if None in (plain, begin, arrow, load, state_of, load_stream) or hasattr(plain, "of_hf_spot"):
        return

    def iterate(self: Any) -> Iterator[Any]:
        return _iterate(self, plain, tables=False)

    def iter_arrow(self: Any) -> Any:
        found = arrow.fget(self)
        return None if found is None else lambda: _iterate(self, lambda part: arrow.fget(part)(), tables=True)

    def begin_state(self: Any) -> dict[str, Any]:
        BEGIN_STATE_OF_BUFFER.of(self.ex_iterable)()
        self._state_dict = _state(given=0) | {_BUFFER: next(_numbers)}
        _buffers[self._state_dict[_BUFFER]] = self
        return self._state_dict  # type: ignore[no-any-return]

    def load_state(self: Any, state: dict[str, Any]) -> dict[str, Any]:
        begin_state(self)
        self._state_dict.update(copy.deepcopy(state))
        return self._state_dict  # type: ignore[no-any-return]

    def state_dict(self: Any) -> dict[str, Any]:
        state = state_of(self)
        # What `datasets` itself reads, for a process without hf_spot; it ignores the other key.
        plain: dict[str, Any] = _as_of_datasets(state)
        return plain | ({_OURS: _settled(state)["examples_iterable"]} if _has_buffers(state) else {})

    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        load_stream(self, {**state, "examples_iterable": state[_OURS]} if _OURS in state else state)

    vars(iterate)["of_hf_spot"] = True
    vars(state_dict)["plain_of_hf_spot"] = state_of
    ITERATE_BUFFER.put(iterate)
    ARROW_OF_BUFFER.put(property(iter_arrow))
    BEGIN_STATE_OF_BUFFER.put(begin_state)
    LOAD_STATE_OF_BUFFER.put(load_state)
    STATE_OF_STREAM.put(state_dict)
    LOAD_STATE_OF_STREAM.put(load_state_dict)


def is_installed() -> bool:
    """Return whether shuffle buffers say where they are."""
    return hasattr(ITERATE_BUFFER.find(), "of_hf_spot")


def take_over_state(dataset: Any) -> None:
    """Let a stream begin where a state says that the script has loaded before `install`, if hf_spot has added to it."""
    if START_OF_STREAM.is_on(dataset) and _OURS in (START_OF_STREAM.of(dataset) or {}):
        dataset.load_state_dict(START_OF_STREAM.of(dataset))


def state_of_stream(dataset: Any) -> dict[str, Any]:
    """Return the state of a stream of ``datasets`` with those of its shuffle buffers, as `install` lets it be loaded."""
    plain = getattr(type(dataset).state_dict, "plain_of_hf_spot", None)
    state: dict[str, Any] = dataset.state_dict() if plain is None else _settled(plain(dataset))
    return state


def _state(given: int, *, reading: int | None = None, resume: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": _TYPE, "given": given, "reading": reading, "resume": resume}


def _has_buffers(state: Any) -> bool:
    if isinstance(state, dict | list):
        return _is_of_a_buffer(state) or any(map(_has_buffers, state.values() if isinstance(state, dict) else state))
    return False


def _as_of_datasets(state: Any) -> Any:
    """Return a state as ``datasets`` has it: that of a shuffle buffer is the state of its source."""
    if isinstance(state, list):
        return [_as_of_datasets(one) for one in state]
    if not isinstance(state, dict):
        return state
    if _is_of_a_buffer(state):
        loaded = state["resume"] or {}  # and not begun
        return _as_of_datasets(loaded["source"] if "source" in loaded else _buffers[state[_BUFFER]].ex_iterable.state_dict())
    return {name: _as_of_datasets(value) for name, value in state.items()}


def _settled(state: Any) -> Any:
    """Return a state in which each shuffle buffer says what to read again, instead of a number of this process."""
    lowest: dict[int, int] = {}
    for one in _states(state):
        lowest[one["reading"]] = min(one["given"], lowest.get(one["reading"], one["given"]))
    return _settle(state, lowest)


def _states(state: Any) -> Iterator[dict[str, Any]]:
    """Yield the states of buffers that are being read, of which there may be several of each: of now, and of a while ago."""
    if _is_of_a_buffer(state):
        if state["reading"] is not None and state["resume"] is None:
            yield state
    elif isinstance(state, dict | list):
        for one in state.values() if isinstance(state, dict) else state:
            yield from _states(one)


def _is_of_a_buffer(state: Any) -> bool:
    return isinstance(state, dict) and state.get("type") == _TYPE and "reading" in state


def _settle(state: Any, lowest: dict[int, int]) -> Any:
    if isinstance(state, list):
        return [_settle(one, lowest) for one in state]
    if not isinstance(state, dict):
        return state
    if not _is_of_a_buffer(state):
        return {name: _settle(value, lowest) for name, value in state.items()}
    reading = _readings.get(state["reading"] or 0)
    if reading is None or state["resume"] is not None:
        return {name: value for name, value in state.items() if name != _BUFFER} | {"reading": None}
    return _state(state["given"], resume=reading.resume_at(state["given"], lowest[state["reading"]]))


def _iterate(part: Any, plain: Callable[[Any], Iterator[Any]], *, tables: bool) -> Iterator[Any]:
    state = part._state_dict
    if not state or "reading" not in state:
        return plain(part)
    reading = _Reading(part, plain, state, tables=tables)
    vars(part)["_reading_of_hf_spot"] = reading  # it is asked for as long as the part is
    return reading.run()


class _Source:
    """Stands for the source of a shuffle buffer.

    Args:
        plain: the source itself.
        items: returns what the buffer is given.
    """

    def __init__(self, plain: Any, items: Callable[[], Iterator[Any]]) -> None:
        self._plain, self._items = plain, items

    def __iter__(self) -> Iterator[Any]:
        return self._items()

    @property
    def iter_arrow(self) -> Callable[[], Iterator[Any]]:
        return self._items

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_plain"], name)


class _Reading:
    """One iteration of a shuffle buffer.

    An *item* is what its source gives it at once: a row, or a table of rows.

    Args:
        part: the shuffle buffer.
        plain: iterates one.
        state: its state, which says where to begin, and is kept up to date.
        tables: whether it is given tables.
    """

    def __init__(self, part: Any, plain: Callable[[Any], Iterator[Any]], state: dict[str, Any], *, tables: bool) -> None:
        self._part, self._plain, self._state, self._tables = part, plain, state, tables
        self._resumed: dict[str, Any] = state["resume"] or {}
        self._before: int = state["given"]
        state |= _state(self._before, reading=next(_numbers))
        _readings[state["reading"]] = self
        self._first: int = self._resumed.get("items", 0)
        self._items = self._first
        known = [length for length, count in self._resumed.get("lengths", ()) for _ in range(count)]
        self._ends = list(itertools.accumulate(known))  # rows up to the end of each table
        self._runs: list[list[int]] = [list(run) for run in self._resumed.get("lengths", ())]
        self._known: int = self._resumed.get("pulled", 0)
        self._positions: list[tuple[int, Any]] = []
        self._rows_at_position = -_ROWS
        self._ended = False
        self._whole: int | None = None
        self._twin = _Twin(part, plain, self._ends if tables else None, self._is_known)

    def run(self) -> Iterator[Any]:
        """Yield what the buffer gives, from its saved position on.

        Raises:
            StreamChangedError: this buffer or its source is not the saved one.
        """
        if self._resumed.get("done"):
            self._whole = self._before
            return
        if self._resumed:
            self._check()
            self._part.ex_iterable.load_state_dict(self._resumed["source"])
        shuffles = copy.copy(self._part)
        shuffles.ex_iterable = _Source(self._part.ex_iterable, self._given_tables if self._tables else self._given_rows)
        given = 0
        for one in self._plain(shuffles):
            given += 1
            if given <= self._before:
                continue
            if one is _PASSED:
                raise StreamChangedError("a shuffle buffer gave a sample that was given before its saved position")
            self._state["given"] = given
            yield one
        self._whole = given

    def _check(self) -> None:
        if self._resumed["buffer"] != self._about():
            raise StreamChangedError("a shuffle buffer has another size or another generator than at the save")
        oldest = self._twin.oldest_after(self._before)
        first = self._first if not self._tables else self._ends[self._first - 1] if self._first else 0
        if oldest is not None and oldest < first:
            raise StreamChangedError("this version of datasets shuffles in another way than the one at the save")

    def _about(self) -> list[Any]:
        state = json.dumps(self._part.generator.bit_generator.state, default=repr, sort_keys=True)
        return [self._part.buffer_size, hashlib.sha256(state.encode()).hexdigest()]

    # -- what the buffer is given -------------------------------------------------------------------------------------

    def _given_rows(self) -> Iterator[Any]:
        yield from itertools.repeat(_PASSED, self._first)
        source = iter(self._part.ex_iterable)
        while True:
            self._remember(self._items)
            try:
                row = next(source)
            except StopIteration:
                self._ended = True
                return
            self._items += 1
            yield row

    def _given_tables(self) -> Iterator[Any]:
        source = self._part.ex_iterable.iter_arrow()
        placeholders = self._first > 0
        while True:
            self._remember(self._ends[self._items - 1] if self._items else 0)
            try:
                key, table = next(source)
            except StopIteration:
                self._ended = True
                return
            if placeholders:
                placeholders = False
                for number in range(self._first):
                    rows = self._ends[number] - (self._ends[number - 1] if number else 0)
                    yield key, _nothing(table.schema, rows)
            self._note_length(len(table))
            yield key, table

    def _note_length(self, rows: int) -> None:
        with _lock:
            end = (self._ends[self._items - 1] if self._items else 0) + rows
            if self._items < len(self._ends):
                if self._ends[self._items] != end:
                    raise StreamChangedError("the source of a shuffle buffer gives tables of other lengths than at the save")
            else:
                self._ends.append(end)
                if self._runs and self._runs[-1][0] == rows:
                    self._runs[-1][1] += 1
                else:
                    self._runs.append([rows, 1])
            self._items += 1

    # -- where the source was -----------------------------------------------------------------------------------------

    def _remember(self, rows: int) -> None:
        """Remember the position of the source before its next item, if there is none nearby."""
        if rows - self._rows_at_position < _ROWS:
            return
        with _lock:
            self._rows_at_position = rows
            self._positions.append((self._items, self._part.ex_iterable.state_dict()))
            if len(self._positions) > _POSITIONS:
                self._forget_some()

    def _forget_some(self) -> None:
        now, kept = self._items, self._positions[:1]
        for one, after in itertools.pairwise(self._positions[1:]):
            if after[0] - kept[-1][0] > (now - after[0]) / _PER_AGE:
                kept.append(one)
        self._positions = [*kept, self._positions[-1]]

    def _is_known(self, item: int) -> bool:
        """Return whether the source has an item; False at its end.

        Raises:
            LookupError: it has not been asked for that item.
        """
        if item < max(self._items, self._known):
            return True
        if self._ended or self._resumed.get("ended"):
            return False
        raise LookupError(item)

    def resume_at(self, given: int, lowest: int) -> dict[str, Any] | None:
        """Return what a resume needs to continue after so many outputs; None to give the buffer its whole source again.

        Args:
            given: number of outputs.
            lowest: a number that is not higher, and not lower than in earlier calls; its position in the source is used.
        """
        with _lock:
            if given == 0:
                return None
            if given == self._whole:
                return {"done": True}
            if lowest == self._before and self._resumed:
                return self._resumed
            if len(self._runs) > _MOST_RUNS:
                return None
            try:
                oldest = self._twin.oldest_after(lowest)
            except (LookupError, TypeError, ValueError, ArithmeticError):  # the buffer is not of a kind that is known
                return None
            item = self._twin.pulled
            if oldest is not None:
                item = bisect_right(self._ends, oldest) if self._tables else oldest
            while len(self._positions) > 1 and self._positions[1][0] <= item:
                del self._positions[0]
            if not self._positions or self._positions[0][0] > item:
                return None
            first, source = self._positions[0]
            return {
                "items": first,
                "pulled": max(self._items, self._known),
                "ended": self._ended or self._resumed.get("ended", False),
                "lengths": [list(run) for run in self._runs],
                "source": _settled(source),
                "buffer": self._about(),
            }


class _Twin:
    """The same shuffle buffer, given the numbers of rows instead of rows.

    Args:
        part: the shuffle buffer.
        plain: iterates one.
        ends: number of rows up to the end of each table; None if it is given rows.
        is_known: returns whether the source has an item, as `_Reading._is_known`.
    """

    def __init__(
        self, part: Any, plain: Callable[[Any], Iterator[Any]], ends: list[int] | None, is_known: Callable[[int], bool]
    ) -> None:
        self._ends, self._is_known = ends, is_known
        shuffles = copy.copy(part)
        shuffles.ex_iterable = _Source(part.ex_iterable, self._rows if ends is None else self._numbered_tables)
        self._outputs = plain(shuffles)
        self._given = 0
        self.pulled = 0
        self._inside = np.empty(0, np.int64)
        self._rows_inside = 0  # number of rows that have been counted in

    def _rows(self) -> Iterator[tuple[int, None]]:
        while self._is_known(self.pulled):
            self.pulled += 1
            yield self.pulled - 1, None

    def _numbered_tables(self) -> Iterator[tuple[int, Any]]:
        import pyarrow as pa  # type: ignore[import-untyped]

        assert self._ends is not None
        while self._is_known(self.pulled):
            first = self._ends[self.pulled - 1] if self.pulled else 0
            rows = np.arange(first, self._ends[self.pulled])
            self.pulled += 1
            yield self.pulled - 1, pa.table({"number": rows})

    def oldest_after(self, given: int) -> int | None:
        """Return the lowest number of a row that is inside after so many outputs; None if the buffer is empty.

        Raises:
            LookupError: the buffer has been asked for later outputs before, or they are not known yet.
        """
        if given < self._given:
            raise LookupError(given)
        out: list[Any] = []
        while self._given < given:
            number, table = next(self._outputs)
            self._given += 1
            out.append(number if table is None else table["number"].to_numpy())
        rows = self.pulled if self._ends is None else self._ends[self.pulled - 1] if self.pulled else 0
        if out or rows > self._rows_inside:
            inside = np.concatenate([self._inside, np.arange(self._rows_inside, rows)])
            gone = np.asarray(out) if self._ends is None else np.concatenate(out) if out else self._inside[:0]
            self._inside, self._rows_inside = np.setdiff1d(inside, gone, assume_unique=True), rows
        return int(self._inside.min()) if len(self._inside) else None


def _nothing(schema: Any, rows: int) -> Any:
    """Return a table of a schema whose rows are null."""
    import pyarrow as pa

    return pa.Table.from_arrays([pa.nulls(rows, field.type) for field in schema], schema=schema)
