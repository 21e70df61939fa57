"""Which training of the run a custom loop is, and what its steps were."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_spot.log import warn_for_all
from hf_spot.policy.trainings import WEIGHTS, Description
from hf_spot.run.checkpoint import Checkpoint
from hf_spot.training.data.loaders import Loaders
from hf_spot.training.loop.loop_objects import ObjectsInUse
from hf_spot.training.loop.loop_states import LoopState
from hf_spot.training.loop.loop_steps import LoopSteps, can_be_watched, inner_of
from hf_spot.training.session.recognition import KnownTraining, finished
from hf_spot.training.session.run_session import RunSession
from hf_spot.training.session.step_teller import COMPOSITION, DEVICE, StepTeller, kind_of

log = logging.getLogger("hf_spot")


class _Trained(NamedTuple):
    url: str
    number: int
    weights: str | None  # that it began with
    optimizers: tuple[Callable[[], Any], ...]  # references


_finished_last: dict[str, int] = {}  # by the run's URL, the number of the training that this process has finished last
# The models that this process has trained to the end.
_trained: weakref.WeakKeyDictionary[nn.Module, _Trained] = weakref.WeakKeyDictionary()


def forget_models() -> None:
    """Forget what this process has trained, as in a new process. For tests."""
    _finished_last.clear()
    _trained.clear()


def _is_continued(url: str, state: LoopState, description: Description) -> int:
    """Return the number of the finished training of this process that goes on with its own model; 0 if it is another one.

    A model with the weights that the training began with, and with another optimizer, was reset, to be trained once more.
    """
    for model in state.models():
        before = _trained.get(model)
        if before is None or before.url != url:
            continue
        if before.weights != description.get(WEIGHTS) or any(one() in state.optimizers() for one in before.optimizers):
            log.info("this process has finished training %d of this run, which goes on with the same model", before.number)
            return before.number
    return 0


class LoopTraining:
    """What the run knows about the training of a loop, and what it is told. Every rank must call every method.

    Args:
        session: connection to the run, before its claim.
        rank: number of this process.
        state: what the loop trains; None if it has not said that yet: the training is then known by its place in the script.
        loads_only: whether the loop has no optimizer, and so only uses a model: that of the training that was finished last.
    """

    def __init__(self, session: RunSession, rank: int, state: LoopState | None, *, loads_only: bool) -> None:
        self._session = session
        self._rank = rank
        self._state = state
        self._description = {} if state is None else state.describe()
        url = session.run.url
        again = _finished_last.get(url, 0) if loads_only else 0
        if state is not None and not loads_only:
            again = _is_continued(url, state, self._description)
        self._known = KnownTraining(session, self._description, first_is_known=True, again=again)
        self._teller: StepTeller | None = None
        self._steps: LoopSteps | None = None
        self._has_looked = False
        self._in_use: ObjectsInUse | None = None
        self._known.find()
        self._was_finished = session.agreement.from_main(lambda: session.run.journal.state.ended == "finished")

    @property
    def described(self) -> int:
        """Return the number of the journal's entry that describes what this training trains; 0 for none."""
        return self._known.described

    def record(self) -> None:
        """Record what the loop trains, once the run is claimed."""
        if self._state is not None:
            self._known.record()

    def compare(self, checkpoint: Checkpoint) -> None:
        """Report what has changed since a checkpoint was saved.

        Raises:
            ConfigError: something has changed, and ``on_change`` is ``stop``.
        """
        self._known.compare(checkpoint)
        if self._was_finished and WEIGHTS in self._known.changed:
            warn_for_all(
                "this run is finished at step %d, and its model began with other weights: the finished one is loaded. For "
                "another training, use another checkpoint_dir",
                checkpoint.step,
            )

    def watch(self, state: LoopState, optimizer: Any, loaders: Loaders, stepped: Callable[[], int], resumed_step: int) -> None:
        """Tell and compare the optimizer's steps from now on. Call it before the uploader starts.

        Args:
            state: what the loop trains.
            optimizer: whose steps are told; None if there is none.
            loaders: the data loaders of this process.
            stepped: called after each step; returns its number.
            resumed_step: the step from which the loop resumes; 0 for the start.
        """
        session = self._session
        for one in state.not_saved():
            warn_for_all("%s", one)
        self._in_use = ObjectsInUse()
        session.closing.callback(self._in_use.close)
        launch = session.agreement.from_main(lambda: session.run.launch)
        if optimizer is None or self._steps is not None:
            return
        if not can_be_watched(optimizer):
            kind = type(optimizer).__name__
            warn_for_all("%s does not tell its steps: those that are done again after a kill are not compared", kind)
            return
        if session.disk.index == 0:
            device = next((one.device for _, one in state.tensors()), torch.device("cpu"))
            circumstances = {COMPOSITION: f"{session.world_size} ranks", DEVICE: kind_of(device)}
            changed = self._known.changed_in_words
            self._teller = StepTeller(session, self._rank, launch, circumstances, resumed_step=resumed_step, changed=changed)
            session.closing.callback(self._teller.close)
            if self._teller.lost is not None:
                session.record_lost(self._teller.lost)
        self._steps = LoopSteps(optimizer, loaders, self._teller, stepped)
        session.closing.callback(self._steps.close)

    def name_forgotten(self, state: LoopState) -> None:
        """Name objects whose state is in no checkpoint, once: at the first save they have been used."""
        if self._has_looked:
            return
        self._has_looked = True
        if self._in_use is None:
            return
        saved = [inner_of(one) for one in state.optimizers()]
        if found := self._in_use.but([*saved, *state.others(), *state.models()]):
            shown = ", ".join(found)
            warn_for_all("in no checkpoint, so that a resume starts them anew: %s. %s", shown, state.how_to_save)
        self._in_use.close()

    def conclude(self) -> None:
        """Report what was compared, before the end of the launch is recorded."""
        if self._steps is not None:
            self._steps.settle()
        if self._teller is not None:
            self._teller.conclude()

    def finished(self) -> None:
        """Mark this training as finished: the next loop of this process is another training."""
        url, number = self._session.run.url, self._session.training
        finished(url, number)
        _finished_last[url] = number
        if self._state is None:
            return
        optimizers = tuple(weakref.ref(one) for one in self._state.optimizers())
        for model in self._state.models():
            _trained[model] = _Trained(url, number, self._description.get(WEIGHTS), optimizers)
        if self._teller is not None:
            self._teller.forget()
