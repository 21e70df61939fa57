"""Tracker runs that a script begins itself, or accelerate for it: each launch continues those of the launch before.

`watch` wraps the functions of trackers that begin a run. A tracker run gets an id that follows from the run, the command, and
the names that the script gives it: the same in each launch. What the script chooses itself is left as it is.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_spot.log import warn_for_all
from hf_spot.policy.trackers import MLFLOW, SWANLAB, TRACKIO, WANDB, Tracker
from hf_spot.training.session.after_import import AfterImport
from hf_spot.training.session.mlflow_run import TAG, run_with_tag

if TYPE_CHECKING:
    from hf_spot.run.run import Run

_BEGIN = {WANDB: ("wandb", "init"), MLFLOW: ("mlflow", "start_run"), TRACKIO: ("trackio", "init"), SWANLAB: ("swanlab", "init")}


_NAMES = ("project", "group", "name", "run_name", "experiment_name", "experiment_id")


class ScriptRuns:
    """Continues the tracker runs of a script in this process.

    Args:
        run: returns the run; None if it isn't known yet. Called when the script begins a tracker run.
    """

    def __init__(self, run: Callable[[], Run | None]) -> None:
        self._run = run
        self._counts: Counter[str] = Counter()
        self._ids: dict[str, str] = {}
        self._undo: list[Callable[[], object]] = []

    def watch(self) -> None:
        """Wrap the functions that begin tracker runs, in modules that are imported already and in those that will be."""
        for tracker, (module, function) in _BEGIN.items():
            wrap = functools.partial(self._wrap, tracker, module, function)
            if module in sys.modules and hasattr(sys.modules[module], function):  # it may be importing this very moment
                wrap()
            else:
                finder = AfterImport(module, wrap)
                sys.meta_path.insert(0, finder)
                self._undo.append(functools.partial(_remove, finder))

    def close(self) -> None:
        """Restore the functions."""
        while self._undo:
            self._undo.pop()()

    def is_one(self, tracker: Tracker, id: str) -> bool:
        """Return whether the script has begun a tracker run with this id."""
        return self._ids.get(tracker.key) == id

    def places(self) -> dict[str, Any]:
        """Return the newest tracker runs of the script, by the trackers' keys: for the journal."""
        return {key: {"id": id, "url": _url(key)} for key, id in self._ids.items()}

    def _wrap(self, tracker: Tracker, module: str, function: str) -> None:
        owner = sys.modules[module]
        plain = vars(owner)[function]

        @functools.wraps(plain)
        def begin(*args: Any, **more: Any) -> Any:
            if os.environ.get("RANK", "0") != "0":  # known late: a warm spare has imported the tracker before
                return plain(*args, **more)
            try:
                more = self._continuing(tracker, plain, args, more)
            except Exception as error:  # no tracker may end a training
                told = f"{type(error).__name__}: {error}"
                warn_for_all("%s begins a new run in this launch: %s", tracker.shown, told)
            begun = plain(*args, **more)
            id = _id_of(tracker, begun)
            if id is not None:
                self._ids[tracker.key] = id
            return begun

        vars(owner)[function] = begin
        self._undo.append(functools.partial(_restore, owner, function, begin, plain))

    def _continuing(self, tracker: Tracker, plain: Callable[..., Any], args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        """Return the arguments with which a tracker run is continued."""
        given = inspect.signature(plain).bind_partial(*args, **more).arguments
        if _is_chosen(tracker, {**given, **given.get("kwargs", {})}):
            return more
        run = self._run()
        if run is None:
            warn_for_all(
                "%s begins a new run in this launch: its id follows from the run, which several ranks join first; call "
                "manager.load_latest(…) before it",
                tracker.shown,
            )
            return more
        names = [str(given.get(one) or "") for one in _NAMES]
        called = "\0".join([tracker.key, *sys.argv, *names])
        self._counts[called] += 1
        id = run.script_run_id(called, self._counts[called])
        if tracker is MLFLOW:
            found = run_with_tag(id)
            if found is not None:
                return {**more, "run_id": found}
            return {**more, "tags": {**(given.get("tags") or {}), TAG: id}}
        if tracker is TRACKIO:
            return {**more, "name": given.get("name") or id, "resume": "allow"}
        return {**more, "id": id, "resume": "allow"}


def _is_chosen(tracker: Tracker, given: dict[str, Any]) -> bool:
    """Return whether the script decides itself which tracker run it continues, or continues the active one."""
    chosen = any(given.get(name) for name in ("id", "run_id", "resume", "resume_from", "fork_from", "nested", "parent_run_id"))
    variable = tracker.id_variable is not None and os.environ.get(tracker.id_variable)
    if chosen or variable or os.environ.get("WANDB_SWEEP_ID") or given.get("mode") == "disabled":
        return True
    if tracker is WANDB:
        return importlib.import_module("wandb").run is not None
    if tracker is SWANLAB:
        return active_swanlab_run() is not None
    return tracker is MLFLOW and importlib.import_module("mlflow").active_run() is not None


def active_swanlab_run() -> Any:
    """Return the active run of SwanLab; None if there is none."""
    try:
        return importlib.import_module("swanlab").get_run()
    except RuntimeError:  # from swanlab 0.8 on
        return None


def _id_of(tracker: Tracker, begun: Any) -> str | None:
    """Return the id of a tracker run that a library has returned; None if it has none."""
    if tracker is MLFLOW:
        return str(begun.info.run_id)
    found = getattr(begun, "name" if tracker is TRACKIO else "id", None)
    return None if found is None else str(found)


def _url(key: str) -> str:
    """Return where a tracker shows its active run; empty if it doesn't say so."""
    module = sys.modules.get(key)
    if key == MLFLOW.key and module is not None:
        return str(module.get_tracking_uri())
    run = None if module is None else getattr(module, "run", None)
    return "" if key != WANDB.key or run is None else str(run.url or Path(run.dir).parent)


def _remove(finder: AfterImport) -> None:
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)


def _restore(owner: Any, function: str, ours: Any, plain: Any) -> None:
    if vars(owner).get(function) is ours:  # otherwise somebody else has wrapped it since
        vars(owner)[function] = plain


_of_launch: list[ScriptRuns] = []


def watch_launch(store: str) -> None:
    """Continue the tracker runs of this process's script in each launch. Call it once in a process of a launch.

    Args:
        store: URL of the run.
    """
    if not _of_launch:

        @functools.cache
        def run() -> Run:
            from hf_spot.run.run import Run  # a script that begins no tracker run need not wait for it

            return Run(store)

        _of_launch.append(ScriptRuns(run))
        _of_launch[0].watch()


def of_launch() -> ScriptRuns | None:
    """Return what `watch_launch` has begun in this process, if anything."""
    return _of_launch[0] if _of_launch else None
