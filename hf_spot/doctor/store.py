"""`hf-spot doctor` on a store: each permission separately, and whether a checkpoint can be uploaded in time."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hf_spot.arguments import SpotArguments
from hf_spot.aws_errors import Kind, code_of, explain
from hf_spot.doctor.finding import FAIL, OK, WARN, Finding, Notice
from hf_spot.errors import AccessDenied, ObjectNotFound, SpotError, StoreNotFencing
from hf_spot.policy.requests import WRITE_USD, writes_of_commit
from hf_spot.policy.words import counted
from hf_spot.run.journal import CheckpointRef
from hf_spot.run.run import Run
from hf_spot.storage.probe import FOLDER, answer, probe
from hf_spot.storage.store import ObjectStore, fences

if TYPE_CHECKING:
    from hf_spot.storage.s3 import Place

SIZES_BYTES = (8 << 20, 64 << 20, 256 << 20)
_LONG_ENOUGH_S = 1.0
_GIVE_UP_S = 10.0
_SKEW_NOTED_S, _SKEW_REFUSED_S = 60.0, 900.0  # S3 refuses a signature more than 15 minutes off

T = TypeVar("T")


def examine(
    run: Run,
    notice: Notice,
    *,
    size_bytes: int | None,
    home: str | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    clock: Callable[[], float] = time.monotonic,
) -> Generator[Finding, None, int | None]:
    """Check region, clock, permissions, create-if-absent, the newest checkpoint and bandwidth. Return a checkpoint's size.

    Test objects, below ``.probe/``, are deleted again.

    Args:
        run: a run in the store.
        notice: time between a notice and the end of the machine.
        size_bytes: size of a checkpoint; None for that of the run's newest.
        home: region of the machines, if known.
        now: the wall clock.
        clock: monotonic seconds.
    """
    if run.url.startswith("s3://"):
        from hf_spot.storage.s3 import S3Store  # importing boto3 is slow

        assert isinstance(run.store, S3Store)
        place = _tried(run.store.place, run.url)
        if isinstance(place, SpotError):
            yield _failed("store", place)
            return size_bytes
        yield from _place(place, home, now())
    listed = _tried(lambda: next(iter(run.store.list(FOLDER)), None), run.url)
    if isinstance(listed, SpotError) and not _is_permission(listed):
        yield _failed("store", listed)  # without bucket, server or credentials every other check fails, too
        return size_bytes
    yield _failed("list", listed) if isinstance(listed, SpotError) else Finding(OK, "list", f"{run.url} can be listed")
    key = f"{FOLDER}{now().timestamp():.0f}-{uuid.uuid4().hex}"
    usable = True
    for finding in _permissions(run.store, key, may_list=not isinstance(listed, SpotError)):
        usable = usable and finding.level != FAIL
        yield finding
    if usable and not isinstance(listed, SpotError):
        # The judge of `hf-spot launch` has the last word: what it refuses must not pass for good here.
        try:
            probe(run.store)
        except SpotError as error:
            usable = False
            yield Finding(FAIL, "launch", f"hf-spot launch would refuse this store: {error.args[0]}", error.hint)
    if not isinstance(listed, SpotError):
        state = _tried(run.state, run.url)
        if isinstance(state, SpotError):
            yield _failed("run", state)
        elif newest := state.latest():
            size_bytes = size_bytes or newest.size_bytes
            yield Finding(
                OK,
                "run",
                f"{counted(len(state.checkpoints), 'checkpoint')}, "
                f"the newest of step {newest.step} with {_size(newest.size_bytes)}"
                + (f"; {state.ended}" if state.ended else "")
                + _requests(run, newest),
            )
        else:
            yield Finding(OK, "run", "no checkpoint yet")
    if usable:
        yield _bandwidth(run.store, f"{key}-large", size_bytes, notice, clock)
    return size_bytes


def _requests(run: Run, newest: CheckpointRef) -> str:
    """Return what a commit costs in requests; empty for a directory, or if the newest one can't be read."""
    found = _tried(lambda: run.checkpoint(newest), run.url)
    if isinstance(found, SpotError) or "://" not in run.url:
        return ""
    writes, most = writes_of_commit(file.size for file in found.files), SpotArguments().max_writes_per_hour
    is_s3 = run.url.startswith("s3://")
    cost, bound = (f" (${writes * WRITE_USD:.6f})", f", ${most * WRITE_USD:.2f}") if is_s3 else ("", "")
    added = f"--cadence auto at most {most:,} per hour{bound} (--max-writes-per-hour)"
    return f"; a commit makes about {writes} writes{cost}, and {added}"


def _place(place: Place, home: str | None, now: datetime) -> Iterator[Finding]:
    if place.region is None:
        yield Finding(OK, "region", f"{place.endpoint} reports no region")
    elif place.region != place.asked_in:
        found = f"{explain('PermanentRedirect').means}: {place.region}, but this machine uses {place.asked_in}"
        yield Finding(WARN, "region", found, f"export AWS_REGION={place.region}")
    elif home not in (None, place.region):
        found = f"the bucket is in {place.region} and the job in {home}: slower, with charges for the traffic"
        yield Finding(WARN, "region", found, f"set region: {place.region} in the job file, or use a bucket in {home}")
    else:
        yield Finding(OK, "region", f"the bucket is in {place.region}, as configured on this machine")
    if place.time is not None:
        skew_s = (now - place.time).total_seconds()
        skew = f"this machine's clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the store's"
        repair = explain("RequestTimeTooSkewed").hint
        if abs(skew_s) > _SKEW_REFUSED_S:
            yield Finding(FAIL, "clock", f"{skew}: requests are refused", repair)
        elif abs(skew_s) > _SKEW_NOTED_S:
            yield Finding(WARN, "clock", f"{skew}; beyond {_SKEW_REFUSED_S:.0f} s requests are refused", repair)
        else:
            yield Finding(OK, "clock", skew)


def _permissions(store: ObjectStore, key: str, *, may_list: bool) -> Iterator[Finding]:
    put = _tried(lambda: store.put(key, b"first"), store.url)
    yield _failed("write", put) if isinstance(put, SpotError) else Finding(OK, "write", "objects can be written")
    got = _tried(lambda: store.get(key), store.url)
    if isinstance(put, SpotError) and isinstance(got, ObjectNotFound):
        yield Finding(OK, "read", "objects can be read")
    elif isinstance(put, SpotError) and isinstance(got, AccessDenied) and not may_list:
        found = (
            "can't check whether objects can be read: without the permission to list, S3 gives the same answer for missing ones"
        )
        yield Finding(WARN, "read", found, got.hint)
    elif isinstance(got, SpotError):
        yield _failed("read", got)
    elif got != b"first":
        yield Finding(FAIL, "read", f"{store.url} does not return what was written to it: {got[:20]!r}", "use another store")
    else:
        yield Finding(OK, "read", "objects can be read")
    if not isinstance(put, SpotError):
        yield _fencing(store, key)
    deleted = _tried(lambda: store.delete([key]), store.url)
    yield _failed("delete", deleted) if isinstance(deleted, SpotError) else Finding(OK, "delete", "objects can be deleted")
    found_uploads = _tried(lambda: store.abort(lambda key: False), store.url)
    if isinstance(found_uploads, SpotError):
        found = f"the remains of killed uploads can't be found; they stay and cost storage: {found_uploads.args[0]}"
        yield Finding(WARN, "uploads", found, found_uploads.hint)
    else:
        yield Finding(OK, "uploads", "the remains of killed uploads can be found")


def _fencing(store: ObjectStore, key: str) -> Finding:
    fresh = _tried(lambda: store.create(f"{key}-new", b"first"), store.url)
    if not isinstance(fresh, SpotError):
        _tried(lambda: store.delete([f"{key}-new"]), store.url)
    elif not isinstance(fresh, StoreNotFencing):
        return _failed("conditional", fresh)
    second = _tried(lambda: store.create(key, b"second"), store.url)
    if isinstance(second, StoreNotFencing) or second is True or not fences(store):
        return Finding(
            FAIL,
            "conditional",
            "the store does not support create-if-absent (If-None-Match): two machines could damage the same run",
            "use another store; or, if only one machine at a time ever uses this run, --allow-unfenced-store",
        )
    if isinstance(second, SpotError):
        return _failed("conditional", second)
    return Finding(OK, "conditional", "create-if-absent works: if two machines create the same object, one is refused")


class _Enough(Exception):
    """The time limit is reached; the bytes sent so far give the bandwidth."""


def _bandwidth(store: ObjectStore, key: str, size_bytes: int | None, notice: Notice, clock: Callable[[], float]) -> Finding:
    try:
        bytes_per_s = measured_bytes_per_s(store, key, clock)
    except SpotError as error:
        return _failed("bandwidth", error)
    except OSError as error:
        return Finding(WARN, "bandwidth", f"not measured: {error.strerror or error}", f"df -h {tempfile.gettempdir()}")
    return in_time(bytes_per_s, size_bytes, notice)


def in_time(bytes_per_s: float, size_bytes: int | None, notice: Notice) -> Finding:
    """Return whether a checkpoint can be uploaded between a notice and the end of the machine. Pure."""
    rate = f"{_size(bytes_per_s)}/s from here to the store"
    if size_bytes is None:
        return Finding(OK, "bandwidth", f"{rate}; the size of a checkpoint is not known yet (set --checkpoint-gb)")
    needs_s = size_bytes / bytes_per_s
    needs = f"a checkpoint of {_size(size_bytes)} needs {needs_s:.0f} s"
    if notice.seconds is None:
        return Finding(OK, "bandwidth", f"{rate}: {needs}")
    summary = f"{rate}: {needs}, your notice is {notice.seconds:g} s ({notice.by})"
    if needs_s <= notice.seconds:
        return Finding(OK, "bandwidth", summary)
    lost = "each interruption loses what was trained since the last commit"
    return Finding(
        WARN,
        "bandwidth",
        f"{summary}: {lost}",
        "save more often (save_steps), train an adapter, or use a bucket in the same region",
    )


def measured_bytes_per_s(store: ObjectStore, key: str, clock: Callable[[], float]) -> float:
    """Upload files of random bytes, growing until one takes a second. Return the bytes per second of the last one.

    Raises:
        StoreError: from the store.
        OSError: the temporary folder has no room.
    """
    rate = 0.0
    with tempfile.TemporaryDirectory(prefix="hf_spot-doctor-") as folder:
        path = Path(folder) / "random"
        for size in SIZES_BYTES:
            with path.open("ab") as file:  # keep the random bytes of the smaller file
                while (missing := size - file.tell()) > 0:
                    file.write(os.urandom(min(missing, 1 << 20)))
            began, moved = clock(), 0

            def progress(count: int, began: float = began) -> None:
                nonlocal moved
                moved += count
                if clock() - began > _GIVE_UP_S and moved:
                    raise _Enough

            try:
                store.put_file(key, path, progress)
            except _Enough:
                return moved / (clock() - began)
            finally:
                store.delete([key])
            took_s = max(clock() - began, 1e-6)
            rate = size / took_s
            if took_s >= _LONG_ENOUGH_S:
                break
    return rate


def _tried(work: Callable[[], T], url: str) -> T | SpotError:
    try:
        return answer(work, lambda: f"querying {url}")
    except SpotError as error:
        return error


def _is_permission(error: SpotError) -> bool:
    # Errors of directories have no code: AccessDenied is always a permission.
    code = code_of(error)
    return isinstance(error, AccessDenied) and (not code or explain(code).kind is Kind.PERMISSION)


def _failed(check: str, error: SpotError) -> Finding:
    return Finding(FAIL, check, str(error.args[0]), error.hint)


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.1f} MB"
