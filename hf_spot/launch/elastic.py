"""Machines that come and go: finds the group that trains or forms it, before each launch of the run.

`hf_spot.policy.membership` decides; this module looks, connects and claims for it.
"""

from __future__ import annotations

import logging
import platform
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError, CorruptCheckpoint, Fenced, SpotError, StoreError, StoreUnavailable
from hf_spot.launch.addresses import interface_of
from hf_spot.launch.command import Machines
from hf_spot.launch.group import FINISHED, HUNG, Go, Group, Hosting, Member, Unreached, Visiting, visit
from hf_spot.launch.peers import BEAT_S, Refused
from hf_spot.policy.membership import (
    Form,
    Gathering,
    Move,
    Outlook,
    Place,
    Sight,
    Size,
    Unanswered,
    form,
    is_void,
    may_be_minority,
    next_step,
    not_answered,
    quiet_for_s,
    takes_in,
)
from hf_spot.policy.restarts import Verdict
from hf_spot.run.first_contact import no_answer
from hf_spot.run.mailbox import Mailbox
from hf_spot.run.run import Run
from hf_spot.run.start_from import start_or_resume
from hf_spot.run.told_steps import Heartbeat
from hf_spot.runtime import Plan, Runtime
from hf_spot.timeouts import LAST_CALL_S, MEETING_S

log = logging.getLogger("hf_spot")

_TICK_S = 0.1
_FIRST_TICK_S = 0.02  # machines that have trained together meet again in a moment
_MOMENT_S = 5.0
_SAY_EVERY_S = 30.0
_LOOK_EVERY_S = 2.0  # while machines are missing
_WEIGH_EVERY_S = 1.0
_STORE_PAUSE_S = 2.0
_SILENT_HEART_S = 150.0  # a training sends a heartbeat once a minute
_A_CHANGE_S = 30.0  # until one was measured


@dataclass(frozen=True)
class Met:
    """A launch that can begin.

    Args:
        launch: its number.
        machines: how many, and which of them this is.
        group: the connections to the others.
        port: for the ranks to find each other.
        interface: the network interface by which they do.
    """

    launch: int
    machines: Machines
    group: Group
    port: int
    interface: str | None

    def environ(self) -> dict[str, str]:
        """Return variables for the ranks, which those of the user override."""
        # If a machine's name resolves to 127.0.1.1, as on Debian, gloo would listen on an unreachable address.
        return {} if self.interface is None or self.machines.count == 1 else {"GLOO_SOCKET_IFNAME": self.interface}


class Elastic:
    """Takes part in a group of machines from the first call of `meet` to `close`.

    Args:
        run: the run.
        machines: how many may train, as on the command line.
        arguments: settings.
        about: what a claim records of this machine.
        wait: waits for a number of seconds; True once this machine has a notice.
        clock: seconds, monotonic.
        words: digests of the command's words, as in `hf_spot.launch.command.Command.word_digests`.
        finished: the launch that has finished the run for another command; 0 if none has.
    """

    def __init__(
        self,
        run: Run,
        machines: Machines,
        arguments: SpotArguments,
        about: Callable[[], dict[str, Any]],
        wait: Callable[[float], bool],
        clock: Callable[[], float] = time.monotonic,
        words: Sequence[str] = (),
        finished: int = 0,
    ) -> None:
        self._run = run
        self._machines = machines
        self._arguments = arguments
        self._about = about
        self._wait = wait
        self._clock = clock
        self._mailbox = Mailbox(run)
        self._finished = finished
        self._size = Size(machines.least, machines.count, machines.processes, is_free=arguments.allow_batch_change)
        self._me = Member(uuid.uuid4().hex[:12], platform.node(), machines.processes, most=machines.count, words=list(words))
        self._hosting: Hosting | None = None
        self._visiting: Visiting | None = None
        self._at = Place(0)  # the group or meeting that this machine belongs, or has belonged to
        self._expected: frozenset[str] = frozenset()  # those that trained with this machine, and may come again
        self._host = ""  # its id
        self._unanswered: dict[Place, Unanswered] = {}
        self._times_fenced = 0
        self._beat: Heartbeat | None = None  # of a launch of fixed machines
        self._owes_invitation = self._is_checked = False
        self._said_s = self._looked_s = self._answered_s = clock()
        self._is_cut_off = False
        self._go: Go | None = None  # of a launch that this machine has not adopted yet
        self._plan: Plan | None = None
        self._told: int | None = None  # the samples of a step in the last plan that was read
        self._change = _Change(clock)

    # -- before a launch ----------------------------------------------------------------------------------------------

    def meet(self) -> Met | Verdict:
        """Find the others and wait for a launch to begin.

        Returns:
            The launch; PREEMPTED if a notice came first, or too few machines within the time for it; FINISHED if the run is;
            FAILED if it hangs for good.

        Raises:
            ConfigError: the others refuse this machine.
            NoAnswer: the store did not answer for as long as other machines are awaited.
            StoreError: the store refused a request.
        """
        if self._me.about == {}:
            self._me = replace(self._me, about=self._about())
        began_s = self._said_s = self._answered_s = self._clock()
        if self._visiting is not None:
            self._visiting.ready()
        while not self._wait(0.0):
            try:
                if self._hosting is not None:
                    met = self._gather(self._hosting, began_s)
                elif self._visiting is not None:
                    met, began_s = self._stay(self._visiting), self._clock()  # with a host that lives there is no hurry
                else:
                    met = self._seek(began_s)
            except StoreUnavailable as error:
                self._outlast(error)
                continue
            self._answered_s, self._is_cut_off = self._clock(), False
            if met is not None:
                return met
        return Verdict.PREEMPTED

    def _outlast(self, error: StoreUnavailable) -> None:
        """Wait a little for a store that does not answer. Raises NoAnswer if that has lasted too long."""
        if (waited_s := self._clock() - self._answered_s) > MEETING_S:
            raise no_answer(error, waited_s) from error
        if not self._is_cut_off:
            log.warning("%s; trying again for up to %.0f minutes", error.args[0], MEETING_S / 60)
        self._is_cut_off = True
        self._wait(_STORE_PAUSE_S)

    def _seek(self, began_s: float) -> Met | Verdict | None:
        sight, invitation = self._look()
        was_fenced = self._times_fenced > 0
        is_fixed = invitation is not None and bool(invitation.get("is_fixed"))
        beat = self._beat_of(sight) if is_fixed else None
        quiet_s = self._quiet_s if beat is None else max(self._quiet_s, _SILENT_HEART_S)
        step = next_step(sight, self._unanswered, self._clock(), quiet_s, was_fenced=was_fenced)
        if step.move is Move.END:
            return Verdict.FINISHED
        if step.move is Move.OPEN:
            hosting = Hosting(self._me, self._run.journal.key, self._arguments.peer_timeout_s, self._machines.interface)
            if self._mailbox.open_meeting(step.place.launch, step.place.attempt, hosting.invitation):
                self._hosting, self._at = hosting, step.place
                log.info("waiting for machines at %s", ", ".join(hosting.invitation["addresses"]))
            else:
                hosting.close("another machine was first")
            return None
        is_gone = False
        if step.move is Move.JOIN:
            found = invitation if not step.place.attempt else self._mailbox.meeting(step.place.launch, step.place.attempt)
            try:
                self._visiting = self._visit(found)
                if not step.place.attempt:
                    log.info("launch %d is under way: this machine waits as a spare", step.place.launch)
                self._at = step.place
                self._unanswered = {}
                return None
            except Unreached as unreached:
                is_gone = unreached.is_gone
        before = self._unanswered.get(step.place)
        if is_fixed and not step.place.attempt:
            self._beside_fixed(sight, before, beat, quiet_s)
            is_gone = False  # the others may have ended without machine 0, or be about to begin again
        self._unanswered[step.place] = not_answered(before, sight, self._clock(), is_gone=is_gone)
        if is_gone or (before is not None and before.is_gone):
            return None
        self._say(began_s, "machine 0 does not answer, and may be on the other side of a broken network")
        if self._clock() - began_s > MEETING_S:
            log.error("no machine answered within %.0f s", MEETING_S)
            return Verdict.PREEMPTED
        self._wait(BEAT_S)
        return None

    def _beat_of(self, sight: Sight) -> Heartbeat | None:
        """Return the newest heartbeat of the launch under way, if it has sent one."""
        try:
            found = None if sight.ended is not None else self._mailbox.heartbeat(sight.launch)
        except CorruptCheckpoint as error:
            log.warning("whether launch %d still trains can be seen by its commits only: %s", sight.launch, error)
            return None
        return None if found is None else found[1]

    def _beside_fixed(self, sight: Sight, before: Unanswered | None, beat: Heartbeat | None, quiet_s: float) -> None:
        """Say that this machine can't join a launch of fixed machines. Raises ConfigError once that launch has shown that it
        lives: it writes to the journal, or its heart beats."""
        told = f"launch {sight.launch} has fixed machines (--machine_rank), and this machine was started without a rank"
        if before is not None and (before.number != sight.number or beat != self._beat):
            raise ConfigError(f"{told}: it can't join them", hint="use the same command and version on all machines")
        if before is None:
            log.warning("%s: it begins another one if nothing is written to the run for %.0f s", told, quiet_s)
        self._beat = beat

    @property
    def _quiet_s(self) -> float:
        return quiet_for_s(self._arguments.peer_timeout_s, self._times_fenced)

    def _look(self) -> tuple[Sight, dict[str, Any] | None]:
        """Return what the store shows, and the invitation of the newest launch."""
        state = self._run.state()
        starts_over = state.ended == "finished" and state.launch == self._finished
        # Machines of the other command may still be about to end: they are no group to join.
        invitation = self._mailbox.meeting(state.launch, 0) if state.launch and not starts_over else None
        attempt = self._mailbox.newest_attempt(state.launch + 1)
        self._looked_s = self._clock()
        return Sight(state.number, state.launch, state.ended, invitation is not None, attempt, starts_over), invitation

    def _visit(self, invitation: dict[str, Any] | None) -> Visiting:
        if invitation is None:
            raise Unreached(is_gone=True)
        try:
            return visit(invitation, self._me, self._run.journal.key, self._arguments.peer_timeout_s, self._machines.interface)
        except Refused as error:
            raise ConfigError(
                f"machine 0 refused this machine: {error}", hint="use the same command and version on all machines"
            ) from error

    def _gather(self, hosting: Hosting, began_s: float) -> Met | Verdict | None:
        present = hosting.present()
        here = {one.id for one in (*present.waiting, *present.busy)}
        size = replace(self._size, samples=self._samples())
        is_minority = may_be_minority(present.lost_silently, len(present.waiting))
        gathering = Gathering(
            len(present.waiting),
            len(present.busy),
            bool(self._expected) and self._expected - present.gone <= here and not is_minority,
            began_s,
            max(began_s, present.changed_s),
        )
        call_s = self._arguments.peer_timeout_s if is_minority else LAST_CALL_S
        found = form(gathering, size, self._clock(), patience_s=MEETING_S, call_s=call_s)
        if found is Form.GIVE_UP:
            log.error("%d of at least %d machines came within %.0f s", 1 + len(present.waiting), size.least, MEETING_S)
            return Verdict.PREEMPTED
        if found is Form.WAIT:
            self._say(began_s, f"{1 + len(present.waiting)} of at least {size.least} are here")
            lacks = not size.of(1 + len(present.waiting)) and not present.busy
            if lacks and self._clock() - self._looked_s > _LOOK_EVERY_S:
                sight = self._look()[0]
                if is_void(self._at, sight, self._unanswered, self._clock(), self._quiet_s):
                    self._leave("machines meet elsewhere")
                    return None
            self._wait(_FIRST_TICK_S if self._clock() - began_s < _MOMENT_S else _TICK_S)
            return None
        return self._start(hosting, present.waiting, size.of(1 + len(present.waiting)))

    def _start(self, hosting: Hosting, waiting: tuple[Member, ...], count: int) -> Met | None:
        known = [one for one in waiting if one.id in self._expected]
        guests = [*known, *(one for one in waiting if one.id not in self._expected)][: count - 1]
        after = self._at.launch - bool(self._at.attempt)
        roster = [self._me, *guests]
        about = {
            **self._me.about,
            "machines": count,
            "roster": [{"name": one.name, "machine": one.about.get("machine", {})} for one in roster],
        }
        try:
            launch = start_or_resume(self._run, about, self._arguments.start_from, after=after)
        except Fenced as error:
            log.warning("%s: looking for its machines", error.args[0])
            self._leave("another launch has begun")
            return None
        go = hosting.start(launch, [one.id for one in guests], _free_port())
        self._invite(hosting)
        log.info("launch %d: %s", launch, ", ".join(one.name for one in roster))
        return self._met(go.launch, go.rank, go.members, go.main_ip, go.own_ip, go.port, hosting)

    def _invite(self, hosting: Hosting) -> None:
        try:
            self._mailbox.invite(hosting.invitation)
            self._owes_invitation = False
        except StoreError as error:
            if not self._owes_invitation:
                log.warning("machines that come can't find this one yet: %s", error)
            self._owes_invitation = True

    def _stay(self, visiting: Visiting) -> Met | Verdict | None:
        go = self._go = self._go or visiting.wait_for_go(_TICK_S)
        if go is not None:
            try:
                self._run.adopt(go.launch)
            except Fenced:
                self._leave("another launch has begun")
                return None
            self._go = None
            return self._met(go.launch, go.rank, go.members, go.main_ip, go.own_ip, go.port, visiting)
        if visiting.bye == FINISHED:
            return Verdict.FINISHED
        if visiting.bye == HUNG:
            return Verdict.FAILED
        if visiting.lost_s is not None:
            self._lose_host(visiting)
        return None

    def _met(self, launch: int, rank: int, members: tuple[str, ...], main_ip: str, own_ip: str, port: int, group: Group) -> Met:
        self._at = Place(launch)
        self._host, self._expected = members[0], frozenset(members) - {self._me.id}
        self._unanswered = {}
        self._change.began()
        if self._hosting is None and not self._is_checked:  # for when machine 0 is lost, and every request counts
            self._is_checked = True
            threading.Thread(target=self._check_store, name="hf_spot-check", daemon=True).start()
        machines = replace(self._machines, count=len(members), rank=rank, main_ip=main_ip)
        return Met(launch, machines, group, port, self._machines.interface or interface_of(own_ip))

    def _check_store(self) -> None:
        try:
            self._run.check_store()
        except SpotError as error:  # a claim of this machine would try again, and raise it
            log.debug("the store can't be checked before a claim: %s", error)

    def _lose_host(self, visiting: Visiting) -> None:
        assert visiting.lost_s is not None
        log.warning("machine 0 of launch %d is gone%s", self._at.launch, "" if visiting.was_closed else ": no sign of life")
        number = self._run.state().number  # what it has written before counts no longer
        self._unanswered = {self._at: Unanswered(visiting.lost_s, number)}
        self._visiting, self._expected = None, (visiting.here or self._expected) - {self._host, self._me.id}
        visiting.close()

    def _say(self, began_s: float, what: str) -> None:
        if self._clock() - self._said_s > _SAY_EVERY_S:
            self._said_s = self._clock()
            log.info("waiting for machines since %.0f s: %s", self._clock() - began_s, what)

    # -- during a launch ----------------------------------------------------------------------------------------------

    def look(self, runtime: Runtime) -> str | None:
        """Return why the machines should change now, on the host; otherwise None. Called all the time.

        Args:
            runtime: of the launch.
        """
        self._change.look(runtime)
        if not self._change.is_time_to_weigh():
            return None
        if self._hosting is not None and self._owes_invitation:
            self._invite(self._hosting)
        if self._plan is None or not self._plan.max_steps:
            self._plan = runtime.read_plan() or self._plan
            self._told = self._plan.samples if self._plan is not None else self._told
        if self._hosting is None or self._plan is None:
            return None
        present = self._hosting.present()
        if not present.waiting:
            return None
        now = 1 + len(present.busy)
        outlook = Outlook(
            machines=now,
            after=replace(self._size, samples=self._plan.samples).of(now + len(present.waiting)),
            steps_left=None if self._change.step is None else self._plan.max_steps - self._change.step,
            step_s=self._change.step_s,
            change_s=self._change.cost_s,
            lives_s=self._arguments.time_between_interruptions_s,
        )
        if not takes_in(outlook):
            return None
        self._change.begins()
        return f"from {outlook.machines} to {outlook.after} machines"

    def forget_plan(self) -> None:
        """Read the plan again: another training may have begun."""
        self._plan = None

    def concluded(self, verdict: Verdict) -> None:
        """Note how the launch has ended here."""
        self._change.begins()
        self.forget_plan()
        if verdict is Verdict.FENCED:
            self._times_fenced += 1
            self._leave("another launch has begun")

    def close(self, why: str) -> None:
        """Leave the group.

        Args:
            why: as in `hf_spot.launch.group.Hosting.close`.
        """
        self._leave(why)

    def _leave(self, why: str) -> None:
        self._go = None
        hosting, visiting, self._hosting, self._visiting = self._hosting, self._visiting, None, None
        if hosting is not None:
            hosting.close(why)
        if visiting is not None:
            visiting.close()

    def _samples(self) -> int | None:
        """Return the samples of an optimizer step, as a launch or the newest commit has told; None if none has."""
        if self._plan is not None:
            return self._plan.samples
        newest = self._run.journal.state.latest()
        if newest is None:
            return self._told  # nothing was committed yet
        details: Mapping[str, Any] = self._run.checkpoint(newest).details
        ranks = details.get("data_parallel_size", details.get("world_size", 1))
        each, times = details.get("per_device_train_batch_size"), details.get("gradient_accumulation_steps")
        if not (isinstance(each, int) and isinstance(times, int) and isinstance(ranks, int)):
            return None
        self._plan = Plan(0, each * times * ranks) if each * times * ranks > 0 else None
        return None if self._plan is None else self._plan.samples


class _Change:
    """What a change of the machines costs, and how long a step takes, as measured.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_s: float | None = None  # of the change under way
        self._weighed_s = 0.0
        self._seen: dict[int, int] = {}  # the newest step of each training
        self._training: int | None = None  # that is under way
        self._first: tuple[int, float] | None = None  # its first step, and when it was seen
        self.step: int | None = None
        self.step_s: float | None = None
        self.cost_s = _A_CHANGE_S

    def begins(self) -> None:
        """Note that the training stops for a change."""
        self._began_s = self._began_s or self._clock()

    def began(self) -> None:
        """Note that a launch begins."""
        self._began_s = self._began_s or self._clock()
        self._first = self.step = self.step_s = self._training = None
        self._seen = {}

    def look(self, runtime: Runtime) -> None:
        """Look at the steps of the launch."""
        steps = runtime.read_steps()
        moved = [training for training, step in steps.items() if step and step != self._seen.get(training)]
        self._seen = steps
        if not moved:
            return
        now, training = self._clock(), max(moved)
        step = self.step = steps[training]
        if training != self._training:  # the script goes on with its next one
            self._training, self._first = training, None
        if self._first is None:
            self._first = step, now
            if self._began_s is not None:
                self.cost_s, self._began_s = now - self._began_s, None
        elif step > self._first[0]:
            self.step_s = (now - self._first[1]) / (step - self._first[0])

    def is_time_to_weigh(self) -> bool:
        """Return whether a while has passed since the last time."""
        now = self._clock()
        if now - self._weighed_s < _WEIGH_EVERY_S:
            return False
        self._weighed_s = now
        return True


def _free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])
