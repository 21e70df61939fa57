"""``hf-spot launch``: one watcher, one launch at a time, and a journal entry about how each launch ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from hf_spot.errors import (
    EXIT_FENCED,
    EXIT_FINISHED,
    EXIT_HUNG,
    EXIT_KILLED,
    EXIT_PREEMPTED,
    EXIT_USAGE,
    ConfigError,
    Fenced,
    SpotError,
    StoreError,
)
from hf_spot.every_python import python_path
from hf_spot.launch import early
from hf_spot.launch.budget import SOURCE as BUDGET
from hf_spot.launch.budget import BudgetKeeper
from hf_spot.launch.command import Command, Reading, likely_store
from hf_spot.launch.dry_run import describe
from hf_spot.launch.elastic import Elastic, Met
from hf_spot.launch.folder import RuntimeFolder
from hf_spot.launch.group import FINISHED, HUNG, Group
from hf_spot.launch.hangs import HangKeeper
from hf_spot.launch.left_behind import LeftBehind
from hf_spot.launch.peers import Host, Peers, Refused, join
from hf_spot.launch.prefetch import Prefetch, newest_of
from hf_spot.launch.process import ProcessTree
from hf_spot.launch.unhooked import Unhooked
from hf_spot.launch.warm import WarmSpares
from hf_spot.log import alert, shown_level
from hf_spot.notices.detect import grace_s, sources
from hf_spot.notices.notice import CHANGE_OF_MACHINES, NoticeKind, PreemptionNotice
from hf_spot.notices.signals import SignalSource, answered_signals
from hf_spot.notices.watcher import Watcher
from hf_spot.policy.restarts import (
    Verdict,
    exit_code,
    has_left,
    judge,
    may_restart,
    outlives_s,
    patience_s,
    pause_s,
    steps_in_words,
)
from hf_spot.policy.warm import OFF
from hf_spot.run import memory_copies
from hf_spot.run.first_contact import FirstContact, is_unavailable, patiently
from hf_spot.run.journal import TRAINING_KEY, CheckpointRef, RunState
from hf_spot.run.journal_writer import JournalWriter
from hf_spot.run.local_copies import LocalCopy
from hf_spot.run.machine_info import BY_LAUNCHER, about_this_machine
from hf_spot.run.mailbox import Mailbox
from hf_spot.run.memory_copies import MemoryCopies
from hf_spot.run.run import Run
from hf_spot.run.start_from import start_or_resume
from hf_spot.run.webhook import Hook, hook_url
from hf_spot.runtime import EXIT_UNAVAILABLE, SIGNALS_VARIABLE, Runtime
from hf_spot.timeouts import JOURNAL_LAST_WORD_S, MEETING_S, PEER_LAST_WORD_S

log = logging.getLogger("hf_spot")

EXIT_INTERRUPTED = 130
_TICK_S = 0.1
_LOOK_EVERY_S = 10.0  # for another launch, while machines are missing
_ANY_PORT = 29500
_HOW_TO_TRAIN_LONGER = "to train longer, raise max_steps or num_train_epochs in the command or in a file that it names; "
_HOW_TO_TRAIN_ON = "to train on from there in another run: --store ANOTHER-RUN --from"
_FEW = 16  # entries
_HOW_TO_PROTECT = (
    "Trainer is protected once it trains; in a custom loop, save with hf_spot.SpotCheckpointManager(), in one with accelerate "
    "with SpotCheckpointManager.for_accelerator(accelerator)"
)


def launch(reading: Reading) -> int:
    """Run ``hf-spot launch`` and return its exit code.

    Args:
        reading: of the arguments after ``hf-spot launch``.

    Raises:
        SpotError: the command line or the store can't be used; nothing was started.
    """
    log.setLevel(shown_level(logging.NOTSET, os.environ, is_first_rank=True))  # whatever rank the scheduler gave this machine
    store = None if early.has_flag(reading.argv, "--dry-run") else likely_store(reading.argv)
    ahead = None if store is None else Prefetch(partial(newest_of, store))
    with contextlib.ExitStack() as stack:
        if ahead is not None:
            stack.callback(ahead.close)
        command = reading.result()
        log.setLevel(shown_level(logging.NOTSET, command.environ, is_first_rank=True))
        found = ahead.run if ahead is not None and command.store == store else None
        run = Run(
            command.store if found is None else found.store,  # this one is already connected to its server
            allow_unfenced_store=command.arguments.allow_unfenced_store,
            workers=command.arguments.upload_workers,
        )
        state, finished_by = patiently(partial(_first_look, run), FirstContact())
        if command.dry_run:
            BudgetKeeper(command.budget, run, command.machines.count, command.environ).check()
            print(describe(run, state, command, finished_by))
            return EXIT_FINISHED
        if state.ended == "finished":
            newest = state.latest()
            step = newest.step if newest else 0
            if command.has_finished(finished_by):
                how = _HOW_TO_TRAIN_LONGER if finished_by else ""
                log.info("%s is finished at step %d: nothing to do (%s%s %s)", run.url, step, how, _HOW_TO_TRAIN_ON, run.url)
                return EXIT_FINISHED
            log.info(
                "%s is finished at step %d, but the command or a file that it names has changed: starting it", run.url, step
            )
        if state.latest() is None:  # on a resume the user has seen them, and the training reports batches that differ
            for remark in command.remarks:
                log.warning("%s", remark)
        if ahead is not None and (command.store != store or command.machines.count > 1):
            ahead.close()
        supervisor = Supervisor(run, command, ahead, finished_by=finished_by)
        return supervisor.supervise(early.stand_down)


class Supervisor:
    """Starts launches until one finishes, is preempted, or is given up.

    Args:
        run: the run to train.
        command: the command to start.
        early: a download of the run's newest checkpoint that has already begun.
        finished_by: the fingerprint of another command that has finished the run before, if one has.
        now: the wall clock.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        run: Run,
        command: Command,
        early: Prefetch | None = None,
        *,
        finished_by: str | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._command = command
        self._early = early
        self._finished_by = finished_by
        self._inputs = command.inputs()
        self._now = now
        self._clock = clock
        names = [one.name for one in answered_signals(command.arguments)]
        self._signals = SignalSource(names, grace_s(command.arguments, command.environ))
        made = sources(command.arguments, environ=command.environ)
        others = [one for one in made if not isinstance(one, SignalSource)]
        self._budget = BudgetKeeper(command.budget, run, command.machines.count, command.environ, clock=clock)
        self._watcher = Watcher([self._signals, *others, *([self._budget] if command.budget.is_set else [])], self._on_notice)
        self._heard = threading.Event()  # a TERMINATE
        self._heard_at = 0.0
        self._trained_s = 0.0  # time from then on in which a training was running
        self._unreachable = False
        self._training: bool | None = None  # the last report of this launch's workers; None if there is none yet
        self._notice: PreemptionNotice | None = None
        self._runtime: Runtime | None = None
        self._journal_writer = JournalWriter(run)  # its order lets the last reads see all that was written
        self._hook = Hook(hook_url(command.arguments, command.environ), run.url)
        self._hangs = HangKeeper(command.hang_timeout_s, run, self._journal_writer, self._hook, clock=clock)
        self._warm = WarmSpares(OFF if command.as_it_is else command.warm_spares, command.ranks, clock)
        self._cleaner = ThreadPoolExecutor(1, "hf_spot-cleaner")
        self._left_behind: list[Future[None]] = []
        self._machines = command.machines
        self._memory = () if command.arguments.save_memory_gb == 0 else _memory_for_copies()
        self._peers: Group | None = None
        self._elastic: Elastic | None = None
        self._met: Met | None = None
        if command.machines.are_elastic:
            about = partial(about_this_machine, "hf-spot launch", command.environ)
            self._elastic = Elastic(
                run,
                command.machines,
                command.arguments,
                about,
                self._wait_among,
                clock,
                command.word_digests(),
                run.journal.state.launch if finished_by is not None else 0,
            )

    def supervise(self, on_listening: Callable[[], None] = lambda: None) -> int:
        """Run launches until the end, and return the exit code of ``hf-spot launch``.

        Args:
            on_listening: called when the watcher runs, before the first launch.
        """
        with self._watcher, contextlib.closing(self._hook), contextlib.closing(self._warm), contextlib.ExitStack() as stack:
            for one in self._memory:
                stack.callback(os.close, one)
            stack.callback(self._cleaner.shutdown)
            stack.callback(self._wait_for_left_behind)
            on_listening()
            code = 1
            if (elastic := self._elastic) is not None:
                stack.callback(lambda: elastic.close(self._why_it_leaves(code)))
            code = self._supervise()
            return code

    def _why_it_leaves(self, code: int) -> str:
        if code == EXIT_HUNG and self._hangs.is_final():
            return HUNG
        return FINISHED if code == EXIT_FINISHED else "leaving"

    def _supervise(self) -> int:
        fruitless = launches = 0
        contact = FirstContact(clock=self._clock)
        while True:
            before = self._saved()
            try:
                self._budget.check()
                verdict, code = self._launch_once()
                launches += 1
                contact = FirstContact(clock=self._clock)
            except StoreError as error:
                if is_unavailable(error):
                    if self._heard.wait(contact.pause_s(error)):
                        return EXIT_PREEMPTED
                    continue
                if not launches:
                    raise
                log.error("%s", error)
                verdict, code = Verdict.FAILED, error.exit_code + 1
            if verdict is Verdict.FINISHED:
                return EXIT_FINISHED
            if verdict in (Verdict.PREEMPTED, Verdict.FENCED) and self._goes_on_with_others:
                continue
            if verdict is Verdict.PREEMPTED:
                if self._all_is_committed():
                    self._watcher.acknowledge()
                if self._notice is not None and self._notice.source == BUDGET:
                    log.error("the budget is used up, and the same command will start nothing until it is raised")
                    return EXIT_USAGE
                return EXIT_INTERRUPTED if self._impatient else EXIT_PREEMPTED
            if verdict is Verdict.FENCED:
                return EXIT_FENCED
            if code == EXIT_HUNG and self._hangs.is_final():
                return code
            fruitless = fruitless + 1 if self._saved() == before else 0
            if not may_restart(code, fruitless, self._command.max_restarts):
                log.error("the training process ended with %d; not started again", code)
                return EXIT_PREEMPTED if code == EXIT_UNAVAILABLE else code
            pause = pause_s(fruitless)
            log.error("the training process ended with %d; starting again in %.1f s", code, pause)
            if self._heard.wait(pause):
                return EXIT_PREEMPTED

    @property
    def _goes_on_with_others(self) -> bool:
        """Return whether this machine takes part in the next launch, although this one was ended."""
        return self._met is not None and not self._heard.is_set() and not self._impatient

    # -- one launch ---------------------------------------------------------------------------------------------------

    def _launch_once(self) -> tuple[Verdict, int]:
        if self._elastic is not None:
            return self._launch_among(self._elastic)
        try:
            met = self._meet()
        except Fenced as error:
            log.error("%s: this machine waits no longer", error.args[0])
            return Verdict.FENCED, EXIT_FENCED
        if met is None:
            return Verdict.PREEMPTED, EXIT_PREEMPTED
        launch, peers = met
        self._peers = peers
        try:
            verdict, code = self._train(launch)
            if peers is not None:
                peers.tell(self._machines.rank, verdict, code)
            return verdict, code
        finally:
            if peers is not None:
                peers.close()

    def _wait_among(self, timeout_s: float) -> bool:
        """Wait while no launch is under way here, and prepare for the next one. Return whether there is a notice."""
        self._warm.look(lambda: True, is_idle=True)
        return self._heard.wait(timeout_s)

    def _expect_launch(self) -> None:
        """Tell how the ranks would be started, on a machine that has not started any: in a launch of two machines or more."""
        machines = replace(self._machines, count=max(2, self._machines.least), rank=1, main_ip="127.0.0.1")
        arguments = replace(self._command.arguments, on_event=None)
        full_ranks = self._command.machines.count * self._command.machines.processes
        directory = Path(tempfile.gettempdir())
        runtime = Runtime(self._run.url, 0, directory, arguments, full_ranks=full_ranks, memory=self._memory)
        signals = answered_signals(arguments)
        argv = self._command.argv_among(machines, _ANY_PORT)
        self._warm.begin(argv, _environ(self._command.environ, runtime, signals), signals)

    def _launch_among(self, elastic: Elastic) -> tuple[Verdict, int]:
        """Make one launch of machines that come and go."""
        if self._met is None:
            self._expect_launch()
        self._met = None
        met = elastic.meet()
        if met is Verdict.FAILED:
            log.error("the training hangs after the same step each time: this machine ends as the others do")
            self._hangs.accept_end()
            return met, EXIT_HUNG
        if isinstance(met, Verdict):
            return met, EXIT_FINISHED if met is Verdict.FINISHED else EXIT_PREEMPTED
        self._met, self._machines, self._peers = met, met.machines, met.group
        self._budget.began(met.machines.count)
        verdict, code = self._train(met.launch)
        met.group.tell(met.machines.rank, verdict, code)
        elastic.concluded(verdict)
        return verdict, code

    def _meet(self) -> tuple[int, Peers | None] | None:
        """Claim the run, together with the other machines if there are any. Return the launch and the connections to them; None
        if a notice came first."""
        machines, arguments = self._machines, self._command.arguments
        about = about_this_machine(BY_LAUNCHER, self._command.environ)
        if machines.count == 1:
            return start_or_resume(self._run, about, arguments.start_from), None
        try:
            if machines.rank == 0:
                host = Host(machines.count)
                launch = start_or_resume(self._run, {**about, "machines": machines.count}, arguments.start_from)
                Mailbox(self._run).invite(host.invitation)
                peers = host.meet(self._wait_unfenced(launch), arguments.peer_timeout_s, MEETING_S)
                return None if peers is None else (launch, peers)
            found = join(
                machines.rank,
                machines.count,
                machines.main_ip,
                Mailbox(self._run).invitation,
                self._heard.wait,
                arguments.peer_timeout_s,
                MEETING_S,
            )
            if found is not None:
                self._run.adopt(found[0])
            return found
        except TimeoutError as error:
            log.error("%s", error)
            return None
        except Refused as error:
            raise ConfigError(
                f"machine 0 refused this machine: {error}", hint="use the same --num_machines on all machines"
            ) from error

    def _wait_unfenced(self, launch: int) -> Callable[[float], bool]:
        """Return what waits for a notice, and raises Fenced once another launch has begun."""
        looked_s = self._clock()

        def wait(timeout_s: float) -> bool:
            nonlocal looked_s
            if self._clock() - looked_s >= _LOOK_EVERY_S:
                looked_s = self._clock()
                try:
                    newest = self._run.state().launch
                except StoreError as error:  # the machines don't need it to meet
                    log.debug("whether another launch has begun is unknown: %s", error)
                    newest = launch
                if newest > launch:
                    raise Fenced(f"launch {newest} has begun while launch {launch} waited for its machines")
            return self._heard.wait(timeout_s)

        return wait

    def _train(self, launch: int) -> tuple[Verdict, int]:
        log.info("launch %d of %s", launch, self._run.url)
        self._wait_for_left_behind()  # what the launch before may still write on this machine
        with contextlib.ExitStack() as stack:
            try:
                folder = RuntimeFolder(self._clock)
            except OSError as error:
                raise _no_room(error) from error
            stack.callback(self._leave_behind, folder.close)
            if self._machines.rank == 0:
                self._hook.tell(f"launch {launch} has begun on {platform.node()}")
            arguments = replace(self._command.arguments, on_event=None)  # this process posts the events
            runtime = Runtime(
                self._run.url,
                launch,
                folder.path,
                arguments,
                claimed_at=self._run.journal.claimed_at,
                full_ranks=self._command.machines.count * self._command.machines.processes,
                memory=self._memory,
            )
            try:
                runtime.reserve()
            except OSError as error:
                raise _no_room(error) from error
            self._runtime, self._training = runtime, None
            stack.callback(setattr, self, "_runtime", None)
            if self._heard.is_set() and self._notice is not None:
                runtime.write_notice(self._notice)
            with contextlib.ExitStack() as running:
                self._fetch_ahead(runtime, running)
                signals = answered_signals(arguments)
                argv, environ = self._command.argv, self._command.environ
                if self._met is not None:
                    argv = self._command.argv_among(self._machines, self._met.port)
                    environ = {**self._met.environ(), **environ}
                environ = _environ(environ, runtime, signals)
                tree = self._warm.take(argv, environ)
                if tree is None:
                    tree = ProcessTree(argv, environ, signals, as_it_is=self._command.as_it_is, others=self._warm.processes)
                running.callback(self._end, tree)
                if self._met is not None and self._machines.count == 1:  # a spare for several machines serves one as well
                    self._expect_launch()
                else:
                    self._warm.begin(argv, environ, signals)
                code = self._wait(tree, runtime, folder)
                self._read_report(runtime)
            told = None if code == EXIT_HUNG else runtime.read_exit_code()
            code = exit_code(code, told, as_it_is=self._command.as_it_is)
            if code == EXIT_FINISHED and (lost := runtime.read_lost()):
                log.error(
                    "process %d was killed while it trained, and the command went on and ended with 0: its training is not "
                    "finished. If the system was out of memory, `dmesg` says so",
                    lost[0],
                )
                code = EXIT_KILLED
            return self._conclude(runtime, code)

    def _end(self, tree: ProcessTree) -> None:
        """End the processes of a launch. If this machine goes on with others, they meet while the processes disappear."""
        if self._goes_on_with_others:
            tree.kill()
        self._leave_behind(tree.end)

    def _leave_behind(self, work: Callable[[], None]) -> None:
        """Do what is left of a launch, or have it done before the next one begins on this machine, while it meets others."""
        if self._goes_on_with_others:
            self._left_behind.append(self._cleaner.submit(work))
        else:
            self._wait_for_left_behind()
            work()

    def _wait_for_left_behind(self) -> None:
        left, self._left_behind = self._left_behind, []
        for one in left:
            one.result()

    def _fetch_ahead(self, runtime: Runtime, stack: contextlib.ExitStack) -> None:
        newest = self._run.journal.state.latest()
        ahead, self._early = self._early, None
        if newest is not None and not self._has_in_memory(newest):
            if ahead is None or not ahead.serves(newest):
                ahead = Prefetch(lambda: (self._run, newest), self._machines)
            stack.callback(ahead.close)
            ahead.hand_to(runtime, needed=lambda: not self._heard.is_set())

    def _saved(self) -> tuple[CheckpointRef | None, int | None]:
        """Return the newest commit, and the newest step in memory: what another launch need not do again."""
        return self._run.journal.state.latest(), max((one.request.step for one in self._in_memory()), default=None)

    def _has_in_memory(self, newest: CheckpointRef) -> bool:
        """Return whether a checkpoint, or a newer one of its training, is in the memory of the only machine."""
        if self._machines.count > 1:
            return False
        of_this = [one for one in self._in_memory() if one.request.training == newest.training]
        return any(
            one.request.step == newest.step or (one.request.step > newest.step and one.launch >= newest.launch)
            for one in of_this
        )

    def _in_memory(self) -> list[LocalCopy]:
        """Return the index of each copy of a checkpoint in this machine's memory."""
        if not self._memory:
            return []
        try:
            with contextlib.closing(MemoryCopies([Path(f"/proc/self/fd/{one}") for one in self._memory])) as memory:
                return [one.copy for one in memory.copies(self._run.journal.key)]
        except OSError as error:
            log.debug("the copies of checkpoints in memory can't be read: %s", error)
            return []

    def _wait(self, tree: ProcessTree, runtime: Runtime, folder: RuntimeFolder) -> int:
        alone_since: float | None = None
        told = ""
        unhooked, left_behind = Unhooked(runtime, self._clock), LeftBehind(runtime, self._clock)
        self._hangs.begin(runtime, self._machines.rank, self._machines.count, self._peers)
        bell = None if self._peers is None else self._peers.bell
        while (code := tree.wait(_TICK_S, bell)) is None:
            self._keep(folder, runtime)
            unhooked.look(tree.processes)
            self._warm.look(lambda: any(step for _, _, step, _, _ in runtime.read_phases().values()))
            if (stopped := runtime.read_stopped()) is not None:
                return stopped  # and nothing that would come next in the command runs
            if (left := left_behind.code(self._training, tree.processes)) is not None:
                return left
            if self._impatient:
                log.warning("interrupted twice: killing the training process")
                return EXIT_INTERRUPTED
            if self._heard.is_set() and self._clock() - self._heard_at > self._patience_s():
                self._give_up()
                return EXIT_PREEMPTED
            if self._elastic is not None and not self._heard.is_set() and (change := self._elastic.look(runtime)) is not None:
                if change != told:
                    log.warning("the machines change, %s: the training saves, and goes on with them", change)
                told = change
                runtime.write_notice(PreemptionNotice(NoticeKind.TERMINATE, CHANGE_OF_MACHINES, change))
            if not self._heard.is_set() and self._hangs.look():
                return EXIT_HUNG
            if self._peers is not None and (ended := self._peers.ended()) is not None:
                if alone_since is None:
                    alone_since = self._clock()
                    log.warning("machine %d: %s", ended.machine, ended.verdict.value)
                drain_s, has_begun = self._command.arguments.drain_timeout_s, self._met is None or self._training is not None
                if self._clock() - alone_since > outlives_s(ended.verdict, drain_s, has_begun=has_begun):
                    if self._met is None:
                        log.error("the training can't continue without machine %d: killing it", ended.machine)
                        return ended.code or EXIT_PREEMPTED
                    log.warning("machine %d has left the training, which begins again without it", ended.machine)
                    return EXIT_PREEMPTED if has_left(ended.verdict, ended.code) else ended.code or EXIT_PREEMPTED
        return left_behind.seen_late(code)

    def _keep(self, folder: RuntimeFolder, runtime: Runtime) -> None:
        """Restore the notice in the folder if a cleanup deleted it, and read the workers' report."""
        self._read_report(runtime)
        runtime.mark_gone()
        try:
            was_deleted = folder.renew()
            if self._notice is not None and (was_deleted or not runtime.notice_path.exists()):
                runtime.write_notice(self._notice)
            if was_deleted:
                log.warning("%s was deleted, and was created again", folder.path)
        except OSError as error:
            if not self._unreachable:
                log.error("notices can no longer reach the training: %s", error)
            self._unreachable = True

    def _read_report(self, runtime: Runtime) -> None:
        told = runtime.read_training()
        self._training = self._training if told is None else told

    def _give_up(self) -> None:
        state = self._read_at_the_end() if self._training is False else None
        if state is not None and state.launch == self._run.launch and state.ended == Verdict.PREEMPTED.value:
            log.info("the training is committed, but its process is slow to exit: ending it")
        else:
            log.error("the training process did not end in time: killing it")

    def _patience_s(self) -> float:
        notice = self._notice
        left = notice.seconds_left(self._now()) if notice else None
        since_heard_s = self._clock() - self._heard_at
        if self._training:
            self._trained_s = since_heard_s
        return patience_s(
            None if left is None else left + since_heard_s,
            training=bool(self._training),
            drain_timeout_s=self._command.arguments.drain_timeout_s,
            trained_s=self._trained_s,
        )

    @property
    def _impatient(self) -> bool:
        return self._signals.count_of("SIGINT") > 1

    # -- how it ended -------------------------------------------------------------------------------------------------

    def _conclude(self, runtime: Runtime, code: int) -> tuple[Verdict, int]:
        state = self._read_at_the_end()
        newer = state is not None and state.launch > runtime.launch
        fenced = newer and self._machines.rank == 0  # on the others it may be machine 0's next launch, which they join
        other = None
        if self._peers is not None:
            spoken = code in (EXIT_FINISHED, EXIT_PREEMPTED, EXIT_FENCED)
            other = self._peers.ended(0.0 if spoken else PEER_LAST_WORD_S)
        lost = other is not None and other.verdict in (Verdict.LOST, Verdict.PREEMPTED)
        lost |= self._met is not None and other is not None and has_left(other.verdict, other.code, code)
        ended = state.ended if state is not None and not newer else None
        verdict = judge(code, ended, fenced=fenced, noticed=self._heard.is_set(), lost=lost)
        if self._machines.rank == 0:
            self._tell_ending(verdict, code, state)
        main_lost = other is not None and other.machine == 0 and other.verdict is Verdict.LOST
        if state is not None and not newer and (self._machines.rank == 0 or main_lost):
            self._write_ending(verdict, state, code, runtime)
        if verdict is Verdict.FENCED:
            log.error("a newer launch has claimed %s; this one has ended", self._run.url)
        elif verdict is Verdict.PREEMPTED and self._goes_on_with_others:
            log.info("launch %d has ended, and this machine goes on in the next one", runtime.launch)
        elif verdict is Verdict.PREEMPTED and not self._training_has_said_so(runtime, state):
            log.warning("%s", self._words_after_preemption(runtime, state, code))
        return verdict, code

    def _training_has_said_so(self, runtime: Runtime, state: RunState | None) -> bool:
        """Return whether the training on this machine's rank 0 has itself said that it was preempted, and how to resume."""
        is_told = self._training is not None and runtime.read_exit_code() == EXIT_PREEMPTED
        return is_told and self._machines.rank == 0 and state is not None and state.ended == Verdict.PREEMPTED.value

    def _words_after_preemption(self, runtime: Runtime, state: RunState | None, code: int) -> str:
        newest = state.latest() if state is not None else None
        if self._training is not None:
            # A training's own exit code counts too: the journal may refuse its entry, or machine 0 write it a little later.
            if state is None or state.ended is not None or runtime.read_exit_code() == EXIT_PREEMPTED:
                return "preempted; start the same command again to resume"
            return (
                f"preempted, and the training ended ({code}) before it had saved: {steps_in_words(_steps(runtime, state))}. "
                "Start the same command again to resume"
            )
        if newest is not None:
            return f"preempted before a training began; start the same command again to resume from step {newest.step}"
        return f"preempted, and nothing was saved: the same command will begin from the start. {_HOW_TO_PROTECT}"

    def _tell_ending(self, verdict: Verdict, code: int, state: RunState | None) -> None:
        newest = state.latest() if state is not None else None
        committed = f"; step {newest.step} is committed" if newest else ""
        self._hook.tell(f"{verdict.value}{f', exit code {code}' if verdict is Verdict.FAILED else ''}{committed}")

    def _read_at_the_end(self) -> RunState | None:
        asked = self._journal_writer.ask(self._run.state, patience_s=self._left_for_words_s)
        if asked is None:
            log.error("%s can't be read after the training: no answer", self._run.url)
            return None
        try:
            return asked.result()
        except Exception as error:  # no error of the journal, its store or a login may change the training's exit code
            log.error("%s can't be read after the training: %s", self._run.url, _describe(error))
            return None

    def _all_is_committed(self) -> bool:
        """Return whether, by the journal's last entries of this launch's trainings, every step that they made is committed."""
        state = self._run.journal.state
        if not self._heard.is_set() or state.ended != "preempted" or state.launch != self._run.launch:
            return False
        asked = self._journal_writer.ask(partial(self._last_words, state), patience_s=self._left_for_words_s)
        if asked is None:
            return False
        try:
            said = asked.result()
        except Exception as error:
            log.warning("%s can't be read before the machine is taken away: %s", self._run.url, _describe(error))
            return False
        return all(one.get("step") is not None and one["committed_step"] >= one["step"] for one in said)

    def _is_trained(self, newest: CheckpointRef, state: RunState) -> bool:
        """Return whether the newest training has said after its last commit that it is complete, as custom loops do."""
        later = range(newest.entry + 1, state.number + 1)
        asked = self._journal_writer.ask(
            lambda: [self._run.journal.read(one) for one in later], patience_s=self._left_for_words_s
        )
        try:
            said = [] if asked is None else asked.result()
        except Exception as error:
            log.error("%s can't be read after the training: %s", self._run.url, _describe(error))
            return False
        return any(one.kind == "trained" and one.data.get(TRAINING_KEY) == newest.training for one in said)

    def _last_words(self, state: RunState) -> list[dict[str, Any]]:
        """Return what the trainings of this launch have said when they were preempted: at least one has."""
        number, said = state.number, []
        while (entry := self._run.journal.read(number)).kind != "claim":
            if entry.kind == "preempted":
                said.append(entry.data)
            number -= 1
        return said

    @property
    def _left_for_words_s(self) -> float | None:
        if not self._heard.is_set():
            return None
        left = self._notice.seconds_left(self._now()) if self._notice else None
        return max(JOURNAL_LAST_WORD_S, left or 0.0)

    def _write_ending(self, verdict: Verdict, state: RunState, code: int, runtime: Runtime) -> None:
        newest = state.latest()
        trained = _steps(runtime, state)
        training = max(trained, default=1)  # finished ones have smaller numbers
        committed, step = trained.get(training, (0, None))
        data: dict[str, Any] = {"exit_code": code, "step": step, "committed_step": committed}
        if training > 1:
            data[TRAINING_KEY] = training
        if verdict is Verdict.FINISHED:
            if newest is None or not (newest.complete or self._is_trained(newest, state)):
                log.warning("the script succeeded, but none of its trainings was committed at its end: not marked as finished")
                return
            if self._training is None and self._finished_by is not None:
                data |= {**_of(newest), "command": self._finished_by}
                log.warning("the command has trained nothing: %s stays finished at step %d", self._run.url, newest.step)
            else:
                data |= {**_of(newest), "command": self._command.fingerprint(self._inputs)}
                log.info("%s is finished at step %d", self._run.url, newest.step)
        elif state.ended is not None or verdict is Verdict.FENCED:
            return
        self._journal_writer.record(verdict.value, data, patience_s=self._left_for_words_s)

    # -- notices ------------------------------------------------------------------------------------------------------

    def _on_notice(self, notice: PreemptionNotice) -> None:
        left = notice.seconds_left(self._now())
        told = f"{notice.in_words()}{'' if left is None else f', {left:.0f} s left'}"
        alert(told)
        if notice.kind is not NoticeKind.CANCELLED:
            self._hook.tell(f"{told} on {platform.node()}")
        runtime, self._notice = self._runtime, notice
        if runtime is not None:
            try:
                runtime.write_notice(notice)
            except FileNotFoundError:
                log.info("the launch had already ended")
            except OSError as error:
                log.error("the notice can't be passed on to the training, which will be killed when its time is up: %s", error)
        if notice.kind is NoticeKind.TERMINATE:
            if runtime is not None and self._training is None:
                log.warning("nothing of this script is protected yet, so nothing can be saved. %s", _HOW_TO_PROTECT)
            if not self._heard.is_set():
                self._heard_at, self._trained_s = self._clock(), 0.0
            self._heard.set()
        elif notice.kind is NoticeKind.CANCELLED:
            self._heard.clear()
        if runtime is not None:
            # The journal may be slow to answer, and neither the other sources nor the training may wait for it.
            self._journal_writer.record("notice", json.loads(notice.to_json()), patience_s=0.0)


def _memory_for_copies() -> tuple[int, ...]:
    try:
        return memory_copies.create()
    except OSError as error:
        log.info("after a kill, checkpoints are taken from the disk and not from memory: %s", error)
        return ()


def _steps(runtime: Runtime, state: RunState) -> dict[int, tuple[int, int]]:
    """Return the last committed and the last finished step of each training of a launch, by its number."""
    newest, finished = state.latest(), runtime.read_steps()
    if not finished and newest is not None:
        return {newest.training: (newest.step, newest.step)}
    committed = {training: ref.step for training in finished if (ref := state.latest(training)) is not None}
    return {training: (committed.get(training, 0), step) for training, step in finished.items()}


def _of(newest: CheckpointRef) -> dict[str, Any]:
    training = {TRAINING_KEY: newest.training} if newest.training > 1 else {}
    return {"step": newest.step, "committed_step": newest.step, **training}


def _environ(environ: Mapping[str, str], runtime: Runtime, signals: Iterable[signal.Signals]) -> dict[str, str]:
    """Return the environment of a launch, by which every Python in it meets hf_spot."""
    return {
        "PET_LOG_DIR": str(runtime.directory / "torchrun"),  # torchrun's folder in /tmp stays there if its agent is killed
        **environ,
        **runtime.to_environ(),
        SIGNALS_VARIABLE: ",".join(str(int(one)) for one in signals),
        "PYTHONPATH": python_path(environ),
    }


def _first_look(run: Run) -> tuple[RunState, str | None]:
    """Return a run's state, and what `_finished_by` returns if it is finished."""
    state = run.state()
    return state, _finished_by(run, state) if state.ended == "finished" else None


def _finished_by(run: Run, state: RunState) -> str | None:
    """Return the fingerprint of the command that finished the run; None if that was not recorded.

    Args:
        run: the run.
        state: its state. Few entries follow the one that says how a launch ended.
    """
    for number in range(state.number, max(0, state.number - _FEW), -1):
        entry = run.journal.read(number)
        if entry.kind == "finished":
            found = entry.data.get("command")
            return found if isinstance(found, str) else None
    return None


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, SpotError) else f"{type(error).__name__}: {error}"


def _no_room(error: OSError) -> SpotError:
    folder = tempfile.gettempdir()
    return SpotError(
        f"{folder} can't be written to: {error.strerror or error}", hint=f"df -h {folder}; or export TMPDIR=/another/disk"
    )
