"""probe: check that a store can do everything that a run needs, before a run relies on it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import TypeVar, cast

from hf_spot.errors import ConfigError, SpotError, StoreError, StoreNotFencing, StoreUnavailable
from hf_spot.storage.store import ObjectStore, fences

log = logging.getLogger("hf_spot")

LIMIT_S = 20.0
FOLDER = ".probe/"
_STALE_S = 86400.0
_LAG_S = 5.0
_LAG_POLL_S = 0.1

T = TypeVar("T")


class _Steps:
    """The checks, one after the other. ``doing`` names the one under way."""

    def __init__(self, store: ObjectStore, allow_unfenced: bool) -> None:
        self._store = store
        self._allow_unfenced = allow_unfenced
        self.doing = "reaching it"

    def run(self) -> None:
        store, key = self._store, f"{FOLDER}{time.time():.0f}-{uuid.uuid4().hex}"
        try:
            with self._step("writing (create)"):
                store.create(key, b"first")  # False can mean success: the answer was lost and the request was sent again
            with self._step("reading back"):
                data = store.get(key)
            if data != b"first":
                raise StoreError(f"{store.url} does not return what was written to it: {data[:20]!r} for b'first'")
            with self._step("creating what exists (create-if-absent)"):
                second = store.create(key, b"second")
            if second or not fences(store):
                self._unfenced()
            with self._step("listing"):
                listed = self._listed(key, [key], lambda: None)
            if listed != [key]:
                raise StoreError(f"{store.url} does not list what was written to it: {listed} for {[key]}")
        except BaseException:
            with contextlib.suppress(SpotError):  # the first error is the one to report
                store.delete([key])
            raise
        with self._step("deleting"):
            store.delete([key])
            # A request that timed out and was repeated may still be carried out later: then the object is deleted again.
            left = self._listed(key, [], lambda: store.delete([key]))
        if left:
            raise StoreError(f"{store.url} still lists {key} after it was deleted")

    def _listed(self, key: str, wanted: list[str], again: Callable[[], None]) -> list[str]:
        """Return the keys that are listed. Wait a little if the store's listings lag behind: a run does not rely on them."""
        give_up_at = time.monotonic() + _LAG_S
        while (listed := [info.key for info in self._store.list(key)]) != wanted and time.monotonic() < give_up_at:
            time.sleep(_LAG_POLL_S)
            again()
        return listed

    def _unfenced(self) -> None:
        url = self._store.url
        why = "ignores create-if-absent: it let a second writer replace what the first had created"
        if not fences(self._store):
            why = "has no create-if-absent: two writers at the same moment both succeed"
        if not self._allow_unfenced:
            raise StoreNotFencing(
                f"{url} {why}, so it can't keep two machines from damaging one run",
                hint="another store; or, if only ever one machine at a time uses this run, --allow-unfenced-store, "
                "SpotArguments(allow_unfenced_store=True)",
            )
        log.warning("%s %s: two machines that use this run at the same time will damage it", url, why.partition(":")[0])

    @contextlib.contextmanager
    def _step(self, doing: str) -> Iterator[None]:
        self.doing = doing
        try:
            yield
        except (StoreError, ConfigError) as error:
            raise type(error)(f"checking {self._store.url}, {doing}: {error.args[0]}", hint=error.hint) from error


def leftovers(store: ObjectStore) -> list[str]:
    """Return the keys left by probes that were killed a day ago or earlier."""
    times = ((info.key, info.key.removeprefix(FOLDER).partition("-")[0]) for info in store.list(FOLDER))
    return [key for key, began in times if not began.isdigit() or time.time() - int(began) > _STALE_S]


def probe(store: ObjectStore, *, allow_unfenced: bool = False) -> None:
    """Write, read back, create again, list and delete one small object, ``.probe/<time>-<uuid>``.

    This takes six requests if there is no error, and at most 20 seconds, even if the network drops packets or a fileserver
    hangs.

    Args:
        store: the store to check.
        allow_unfenced: accept, with a warning, a store that ignores create-if-absent.

    Raises:
        StoreNotFencing: the store ignores create-if-absent, and ``allow_unfenced`` is False.
        StoreUnavailable: the store did not answer.
        StoreError: another error; the message names the step that failed and what it needs.
        ConfigError: a setting of the store can't be used.
    """
    steps = _Steps(store, allow_unfenced)
    answer(steps.run, lambda: f"checking {store.url}, {steps.doing}")


def answer(work: Callable[[], T], doing: Callable[[], str]) -> T:
    """Return or raise the outcome of ``work``. After 20 seconds raise StoreUnavailable, with what it was ``doing``."""
    outcome: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as error:
            outcome.put((None, error))

    # A thread, because there is no other way to abandon a call that hangs in a name server or a dead mount; a daemon, because
    # it may then never end.
    threading.Thread(target=run, name="hf_spot-probe", daemon=True).start()
    try:
        value, error = outcome.get(timeout=LIMIT_S)
    except Empty:
        raise StoreUnavailable(
            f"{doing()}: no answer within {LIMIT_S:.0f} s",
            hint="is the address right, and can this machine reach it (route, VPC endpoint, proxy, mount)?",
        ) from None
    if error is not None:
        raise error
    return cast(T, value)
