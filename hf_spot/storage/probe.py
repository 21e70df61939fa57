"""probe: proves that a store can do all that a run needs, before anything is trusted to it."""

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
    """The checks, one after the other; ``doing`` says which one is under way."""

    def __init__(self, store: ObjectStore, allow_unfenced: bool) -> None:
        self._store = store
        self._allow_unfenced = allow_unfenced
        self.doing = "reaching it"

    def run(self) -> None:
        store, key = self._store, f"{FOLDER}{time.time():.0f}-{uuid.uuid4().hex}"
        try:
            with self._step("writing (create)"):
                store.create(key, b"first")  # False can be our own success, when its answer was lost and it was sent again
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
            with contextlib.suppress(SpotError):  # the first error is the one to be told
                store.delete([key])
            raise
        with self._step("deleting"):
            store.delete([key])
            # A request that was given up, and repeated, may still be carried out: that is then deleted, too.
            left = self._listed(key, [], lambda: store.delete([key]))
        if left:
            raise StoreError(f"{store.url} still lists {key} after it was deleted")

    def _listed(self, key: str, wanted: list[str], again: Callable[[], None]) -> list[str]:
        """What is listed, after some patience with a store whose listings lag behind: nothing here relies on them."""
        give_up_at = time.monotonic() + _LAG_S
        while (listed := [info.key for info in self._store.list(key)]) != wanted and time.monotonic() < give_up_at:
            time.sleep(_LAG_POLL_S)
            again()
        return listed

    def _unfenced(self) -> None:
        url = self._store.url
        why = "ignores create-if-absent: it let a second writer replace what the first had created"
        if not fences(self._store):
            why = "has no create-if-absent: of two writers at the same moment both win"
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
    """Keys of probes that were killed a day ago or earlier."""
    times = ((info.key, info.key.removeprefix(FOLDER).partition("-")[0]) for info in store.list(FOLDER))
    return [key for key, began in times if not began.isdigit() or time.time() - int(began) > _STALE_S]


def probe(store: ObjectStore, *, allow_unfenced: bool = False) -> None:
    """Writes, reads back, creates again, lists and deletes one small object, ``.probe/<time>-<uuid>``.

    Six requests where all is well. Ends after 20 seconds at most, also when the network swallows packets or a
    fileserver hangs.

    Args:
        store: the store to check.
        allow_unfenced: accept, with a warning, a store that ignores create-if-absent.

    Raises:
        StoreNotFencing: the store ignores create-if-absent, and that was not accepted.
        StoreUnavailable: no answer.
        StoreError: other trouble, naming the step that failed and what it needs.
        ConfigError: a setting of the store can't be used.
    """
    steps = _Steps(store, allow_unfenced)
    answer(steps.run, lambda: f"checking {store.url}, {steps.doing}")


def answer(work: Callable[[], T], doing: Callable[[], str]) -> T:
    """What ``work`` returns or raises. After 20 seconds StoreUnavailable, which says what it was ``doing``."""
    outcome: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as error:
            outcome.put((None, error))

    # A thread, because nothing else ends a call that hangs in a name server or in a dead mount; a daemon, because it
    # may then never end.
    threading.Thread(target=run, name="hf_spot-probe", daemon=True).start()
    try:
        value, error = outcome.get(timeout=LIMIT_S)
    except Empty:
        raise StoreUnavailable(
            f"{doing()}: no answer within {LIMIT_S:.0f} s",
            hint="is the address right, and does this machine have a way there (route, VPC endpoint, proxy, mount)?",
        ) from None
    if error is not None:
        raise error
    return cast(T, value)
