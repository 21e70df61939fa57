"""Who trains together: tables, and a simulation of three machines over many orders of what can happen to them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from hf_spot.policy.membership import (
    Form,
    Gathering,
    Move,
    Outlook,
    Place,
    Sight,
    Size,
    Step,
    Unanswered,
    form,
    is_void,
    may_be_minority,
    next_step,
    not_answered,
    quiet_for_s,
    takes_in,
)
from hf_spot.timeouts import LAST_CALL_S, UNHOSTED_S

TIMEOUT_S = 30.0
QUIET_S = quiet_for_s(TIMEOUT_S, 0)

NEW = Sight(0, 0, None, hosted=False, attempt=0)
TRAINS = Sight(9, 3, None, hosted=True, attempt=0)


@pytest.mark.parametrize(
    ("sight", "unanswered", "step"),
    [
        (NEW, {}, Step(Move.OPEN, Place(1, 1))),
        (replace(NEW, attempt=1), {}, Step(Move.JOIN, Place(1, 1))),
        (TRAINS, {}, Step(Move.JOIN, Place(3))),
        # The group that trains comes first, even if somebody has opened a meeting: that machine may only not reach it.
        (replace(TRAINS, attempt=1), {}, Step(Move.JOIN, Place(3))),
        (TRAINS, {Place(3): Unanswered(100.0, 9, is_gone=True)}, Step(Move.OPEN, Place(4, 1))),
        (replace(TRAINS, attempt=2), {Place(3): Unanswered(100.0, 9, is_gone=True)}, Step(Move.JOIN, Place(4, 2))),
        # It is silent, and for how long?
        (TRAINS, {Place(3): Unanswered(100.0 - QUIET_S + 1, 9)}, Step(Move.JOIN, Place(3))),
        (TRAINS, {Place(3): Unanswered(100.0 - QUIET_S, 9)}, Step(Move.OPEN, Place(4, 1))),
        # It can't be reached from here, but writes to the journal.
        (TRAINS, {Place(3): Unanswered(100.0 - QUIET_S, 8)}, Step(Move.JOIN, Place(3))),
        (
            replace(TRAINS, attempt=1),
            {Place(3): Unanswered(0.0, 9), Place(4, 1): Unanswered(0.0, 9)},
            Step(Move.OPEN, Place(4, 2)),
        ),
        # Claimed, and not yet said where.
        (replace(TRAINS, hosted=False), {}, Step(Move.WAIT, Place(3))),
        (replace(TRAINS, hosted=False), {Place(3): Unanswered(100.0 - UNHOSTED_S, 9)}, Step(Move.OPEN, Place(4, 1))),
        (replace(TRAINS, hosted=False, ended="preempted"), {}, Step(Move.OPEN, Place(4, 1))),
        # Its machines may be about to meet again.
        (replace(TRAINS, ended="preempted"), {}, Step(Move.JOIN, Place(3))),
        (replace(TRAINS, ended="finished"), {}, Step(Move.END, Place(3))),
        (replace(TRAINS, ended="finished", hosted=False, starts_over=True), {}, Step(Move.OPEN, Place(4, 1))),
    ],
)
def test_a_machine_in_no_group_knows_where_to_go(sight: Sight, unanswered: dict[Place, Unanswered], step: Step) -> None:
    assert next_step(sight, unanswered, 100.0, QUIET_S) == step


@pytest.mark.parametrize(
    ("place", "sight", "unanswered", "void"),
    [
        (Place(1, 1), replace(NEW, attempt=1), {}, False),
        (Place(1, 1), replace(NEW, attempt=2), {}, True),
        (Place(3), TRAINS, {}, False),  # its own machines meet again
        (Place(3), replace(TRAINS, launch=4), {}, True),
        (Place(4, 1), replace(TRAINS, attempt=1), {Place(3): Unanswered(0.0, 9)}, False),
        (Place(4, 1), replace(TRAINS, attempt=1, number=10), {Place(3): Unanswered(0.0, 9)}, True),  # they live
        (Place(4, 1), replace(TRAINS, attempt=1, number=10), {Place(3): Unanswered(0.0, 9, is_gone=True)}, False),
    ],
)
def test_a_meeting_where_nobody_comes_is_given_up(
    place: Place, sight: Sight, unanswered: dict[Place, Unanswered], void: bool
) -> None:
    assert is_void(place, sight, unanswered, 100.0, QUIET_S) is void


def test_a_launch_of_a_single_machine_that_has_claimed_the_run_gets_time_to_write() -> None:
    single, silent = replace(TRAINS, hosted=False), {Place(3): Unanswered(100.0 - UNHOSTED_S, 9)}
    assert next_step(single, silent, 100.0, QUIET_S).move is Move.OPEN
    assert next_step(single, silent, 100.0, QUIET_S, was_fenced=True).move is Move.WAIT


def test_silence_counts_from_its_beginning_and_from_the_last_entry_of_the_journal() -> None:
    first = not_answered(None, TRAINS, 10.0, is_gone=False)
    assert not_answered(first, TRAINS, 20.0, is_gone=False) == Unanswered(10.0, 9)
    assert not_answered(first, TRAINS, 20.0, is_gone=True) == Unanswered(10.0, 9, is_gone=True)
    assert not_answered(first, replace(TRAINS, number=10), 20.0, is_gone=False) == Unanswered(20.0, 10)


def test_who_was_fenced_again_and_again_waits_longer_and_longer() -> None:
    waits = [quiet_for_s(TIMEOUT_S, times) for times in range(4)]
    assert waits == sorted(set(waits))


GATHERED = Gathering(waiting=1, busy=0, is_whole=False, began_s=0.0, changed_s=10.0)
TWO_TO_FOUR = Size(2, 4, samples=24)


@pytest.mark.parametrize(
    ("gathering", "now_s", "found"),
    [
        (GATHERED, 10.0, Form.WAIT),
        (GATHERED, 10.0 + LAST_CALL_S, Form.START),
        (replace(GATHERED, is_whole=True), 10.0, Form.START),
        (replace(GATHERED, waiting=3), 10.0, Form.START),
        (replace(GATHERED, waiting=3, busy=1), 100.0, Form.WAIT),  # its ranks could still be training
        (replace(GATHERED, waiting=0, is_whole=True), 100.0, Form.WAIT),
        (replace(GATHERED, waiting=0), 2000.0, Form.GIVE_UP),
        (GATHERED, 2000.0, Form.START),
    ],
)
def test_a_launch_begins_when_enough_are_there(gathering: Gathering, now_s: float, found: Form) -> None:
    assert form(gathering, TWO_TO_FOUR, now_s, patience_s=1800.0) is found


@pytest.mark.parametrize(
    ("size", "present", "trains"),
    [
        (Size(2, 8, samples=64), 5, 4),
        (Size(2, 8, samples=64), 9, 8),
        (Size(2, 8, samples=60), 7, 6),
        (Size(3, 8, samples=64), 3, 0),  # two would divide, but three is the minimum
        (Size(2, 8, samples=63), 8, 7),
        (Size(1, 4, ranks=8, samples=96), 3, 3),
        (Size(2, 8), 5, 4),  # not known yet: what divides 8 divides any number of samples for 8
        (Size(2, 3), 2, 2),  # the samples of three devices may still be even
        (Size(2, 8, samples=64, is_free=True), 5, 5),
        (Size(2, 8, samples=64), 1, 0),
    ],
)
def test_the_most_machines_that_divide_a_step_train(size: Size, present: int, trains: int) -> None:
    assert size.of(present) == trains


@pytest.mark.parametrize(
    ("change", "is_worth_it"),
    [
        ({}, True),
        ({"steps_left": 100}, False),  # a minute and a half: it takes as long
        ({"lives_s": 300.0}, False),  # the next machine is lost before it has paid off
        ({"change_s": 2000.0}, False),
        ({"after": 2}, False),
        ({"step_s": None}, False),
        ({"steps_left": None}, False),
    ],
)
def test_a_spare_is_taken_in_if_it_is_worth_a_change(change: dict[str, float | None], is_worth_it: bool) -> None:
    outlook = Outlook(machines=2, after=3, steps_left=10_000, step_s=1.0, change_s=60.0, lives_s=14_400.0)
    assert takes_in(replace(outlook, **change)) is is_worth_it  # type: ignore[arg-type]


def test_the_smaller_part_of_a_broken_network_waits() -> None:
    assert may_be_minority(lost_silently=2, left=0)
    assert not may_be_minority(lost_silently=1, left=1)
    assert not may_be_minority(lost_silently=1, left=0)  # of two machines


# -- a simulation ------------------------------------------------------------------------------------------------------


@dataclass
class Store:
    """The journal and the mailbox, as all machines see them, and what happened."""

    claims: list[str] = field(default_factory=list)  # who has claimed each launch
    hosts: dict[Place, str] = field(default_factory=dict)  # the address under each invitation: a host's incarnation
    rosters: dict[int, tuple[str, ...]] = field(default_factory=dict)
    commits: list[tuple[int, str]] = field(default_factory=list)
    number: int = 0

    @property
    def launch(self) -> int:
        return len(self.claims)

    def sight(self) -> Sight:
        attempts = [place.attempt for place in self.hosts if place.launch == self.launch + 1]
        return Sight(self.number, self.launch, None, Place(self.launch) in self.hosts, max(attempts, default=0))


@dataclass
class Node:
    """A machine: what `hf_spot.launch.elastic.Elastic` keeps, and the sockets of `hf_spot.launch.group`."""

    name: str
    alive: bool = True
    frozen: bool = False
    place: Place = field(default_factory=lambda: Place(0))
    hosting: bool = False
    host: str | None = None  # it is a guest of this one
    guests: dict[str, float] = field(default_factory=dict)  # of a host, and when each was heard for the last time
    busy: set[str] = field(default_factory=set)
    expected: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    lost_silently: int = 0
    heard_s: float = 0.0
    changed_s: float = 0.0
    looked_s: float = 0.0
    launch: int = 0  # that its ranks work on; 0 while they don't
    go: tuple[int, tuple[str, ...]] | None = None  # on its way to a guest
    unanswered: dict[Place, Unanswered] = field(default_factory=dict)
    fenced: int = 0


class Simulation:
    """Machines, of which one acts at a time, in any order, while anything happens to them."""

    def __init__(self, seed: int, least: int) -> None:
        self.dice = random.Random(seed)
        self.size = Size(least, 3, samples=12)
        self.store = Store()
        self.nodes = {name: Node(name) for name in "abc"}
        self.cut: set[frozenset[str]] = set()
        self.now_s = 0.0
        self.born = 3

    # what may happen

    def disturb(self) -> None:
        node = self.dice.choice([*self.nodes.values()])
        what = self.dice.choice(["kill", "come", "cut", "heal", "freeze", "wake", "notice"])
        if what in ("kill", "notice") and node.alive:
            node.alive = node.frozen = False
            self.close_all(node)
        elif what == "come" and not node.alive:
            self.born += 1
            del self.nodes[node.name]
            self.nodes[f"m{self.born}"] = Node(f"m{self.born}")
        elif what == "cut":
            other = self.dice.choice([*self.nodes.values()])
            self.cut |= {frozenset((node.name, other.name))} if node is not other else set()
        elif what == "heal":
            self.cut.clear()
        elif what in ("freeze", "wake"):
            node.frozen = node.alive and what == "freeze"

    def close_all(self, node: Node) -> None:
        """The kernel closes the connections of a process that has died; whoever is cut off does not learn of it."""
        for other in self.nodes.values():
            if not self.reach(node, other):
                continue
            if other.host == node.name:
                self.lose_host(other, was_closed=True)
            if node.name in other.guests:
                self.lose_guest(other, node.name, silently=False)

    # one machine acts

    def act(self, node: Node) -> None:
        if not node.alive or node.frozen:
            return
        self.beat(node)
        if node.launch and self.has_ended(node):
            node.launch = 0  # its ranks are ended, and then it says that it is ready
            if node.host is not None and (host := self.nodes.get(node.host)) is not None and self.reach(node, host):
                host.busy.discard(node.name)
        if node.launch:
            self.commit(node)
        elif node.hosting:
            self.gather(node)
        elif node.host is not None:
            host = self.nodes.get(node.host)
            if node.go is not None and host is not None and self.reach(node, host):
                launch, roster = node.go
                node.go = None
                if launch == self.store.launch:
                    self.train(node, launch, roster)
                else:
                    self.leave(node)
        else:
            self.seek(node)

    def beat(self, node: Node) -> None:
        for name in [*node.guests]:
            guest = self.nodes.get(name)
            if guest is not None and guest.alive and not guest.frozen and guest.host == node.name and self.reach(node, guest):
                node.guests[name] = guest.heard_s = self.now_s
            elif guest is not None and guest.alive and guest.host != node.name and self.reach(node, guest):
                self.lose_guest(node, name, silently=False)
            elif self.now_s - node.guests[name] > TIMEOUT_S:
                self.lose_guest(node, name, silently=True)
        if node.host is not None and self.now_s - node.heard_s > TIMEOUT_S:
            self.lose_host(node, was_closed=False)

    def has_ended(self, node: Node) -> bool:
        roster = self.store.rosters[node.launch]
        if node.hosting:
            return any(name not in node.busy for name in roster[1:])
        if node.host is None:
            return True
        host = self.nodes.get(node.host)
        # The host tells it that another one is lost, or that the launch is over there.
        return host is None or (self.reach(node, host) and host.launch != node.launch)

    def commit(self, node: Node) -> None:
        roster = self.store.rosters[node.launch]
        if node.hosting and node.launch == self.store.launch and self.dice.random() < 0.7:  # it may die before
            self.store.hosts[Place(node.launch)] = node.name
        if node.hosting and self.dice.random() < 0.1:
            if node.launch == self.store.launch:
                # Its optimizer step needed the gradients of all: who has left the launch computes none.
                self.store.commits.append((node.launch, node.name))
                self.store.number += 1
                assert all(self.nodes[name].launch in (0, node.launch) for name in roster if name in self.nodes)
            else:
                node.launch = 0
                node.fenced += 1
                self.leave(node)

    def gather(self, node: Node) -> None:
        waiting = [name for name in node.guests if name not in node.busy]
        is_minority = may_be_minority(node.lost_silently, len(waiting))
        whole = bool(node.expected) and node.expected - node.gone <= {*node.guests} and not is_minority
        gathering = Gathering(len(waiting), len(node.guests) - len(waiting), whole, 0.0, node.changed_s)
        call_s = TIMEOUT_S if is_minority else LAST_CALL_S
        if form(gathering, self.size, self.now_s, patience_s=1e9, call_s=call_s) is Form.START:
            after = node.place.launch - bool(node.place.attempt)
            if self.store.launch != after:
                node.fenced += 1
                self.leave(node)
                return
            self.store.claims.append(node.name)
            self.store.number += 1
            launch = self.store.launch
            roster = (node.name, *waiting[: self.size.of(1 + len(waiting)) - 1])
            assert launch not in self.store.rosters
            self.store.rosters[launch] = roster
            for name in roster[1:]:
                guest = self.nodes[name]
                node.busy.add(name)
                if guest.alive and guest.host == node.name:  # it arrives late if the network heals before both have given up
                    guest.go = (launch, roster)
            self.train(node, launch, roster)
            return
        lacks = not self.size.of(1 + len(waiting)) and len(waiting) == len(node.guests)
        if lacks and self.now_s - node.looked_s > 2.0:
            node.looked_s = self.now_s
            if is_void(node.place, self.store.sight(), node.unanswered, self.now_s, quiet_for_s(TIMEOUT_S, node.fenced)):
                self.leave(node)

    def train(self, node: Node, launch: int, roster: tuple[str, ...]) -> None:
        assert roster == self.store.rosters[launch]  # nobody trains with another's batch
        assert node.name in roster
        node.launch, node.place = launch, Place(launch)
        node.expected = {*roster} - {node.name}
        node.lost_silently, node.unanswered = 0, {}

    def seek(self, node: Node) -> None:
        sight = self.store.sight()
        step = next_step(sight, node.unanswered, self.now_s, quiet_for_s(TIMEOUT_S, node.fenced))
        if step.move is Move.OPEN:
            if step.place not in self.store.hosts:
                self.store.hosts[step.place] = node.name
                node.hosting, node.place, node.guests, node.busy = True, step.place, {}, set()
                node.gone, node.changed_s, node.lost_silently = set(), self.now_s, 0
            return
        is_gone = False
        if step.move is Move.JOIN:
            host = self.nodes.get(self.store.hosts[step.place])
            reached = host is not None and self.reach(node, host)
            if host is not None and reached and host.alive and host.hosting and not host.frozen:
                if node.name in host.guests:  # its connection broke, and the host has not noticed yet
                    self.lose_guest(host, node.name, silently=False)
                node.host, node.place, node.heard_s, node.unanswered = host.name, step.place, self.now_s, {}
                host.guests[node.name] = host.changed_s = self.now_s
                host.gone.discard(node.name)
                return
            # A machine that was replaced answers nothing; a process that has ended is told by its kernel.
            is_gone = host is not None and reached and not host.frozen
        before = node.unanswered.get(step.place)
        node.unanswered[step.place] = not_answered(before, sight, self.now_s, is_gone=is_gone)

    # connections

    def reach(self, one: Node, other: Node) -> bool:
        return frozenset((one.name, other.name)) not in self.cut

    def lose_guest(self, node: Node, name: str, *, silently: bool) -> None:
        del node.guests[name]
        node.lost_silently += silently and name in node.busy
        node.busy.discard(name)
        node.gone.add(name)
        node.changed_s = self.now_s
        other = self.nodes.get(name)
        if other is not None and other.host == node.name and self.reach(node, other):
            self.lose_host(other, was_closed=True)

    def lose_host(self, node: Node, *, was_closed: bool) -> None:
        assert node.host is not None
        node.expected -= {node.host}
        number = self.store.number
        node.unanswered = {} if was_closed else {node.place: Unanswered(node.heard_s, number)}
        node.host = node.go = None

    def leave(self, node: Node) -> None:
        node.hosting = False
        for name in [*node.guests]:
            self.lose_guest(node, name, silently=False)
        node.host = node.go = None

    # the whole

    def play(self, events: int) -> None:
        for _ in range(events):
            self.now_s += self.dice.choice([0.1, 0.5, 3.0, 20.0])
            if self.dice.random() < 0.25:
                self.disturb()
            self.act(self.dice.choice([*self.nodes.values()]))
            self.check()

    def check(self) -> None:
        launches = [launch for launch, _ in self.store.commits]
        assert launches == sorted(launches), "a launch that was fenced has committed"
        assert all(self.store.claims[launch - 1] == name for launch, name in self.store.commits)
        working = [node for node in self.nodes.values() if node.launch == self.store.launch and node.alive and node.launch]
        assert len({node.name for node in working if node.hosting}) <= 1

    def settle(self) -> None:
        """Nothing happens any more, and the machines that are there act in turn."""
        self.cut.clear()
        for node in self.nodes.values():
            node.frozen = False
        alive = [node for node in self.nodes.values() if node.alive]
        if len(alive) < self.size.least:
            return
        for _ in range(20_000):
            self.now_s += 0.3
            for node in self.dice.sample(alive, len(alive)):
                self.act(node)
            self.check()
            group = [node for node in alive if node.launch == self.store.launch and node.launch]
            spares = [node for node in alive if node.host is not None and not node.launch and node.go is None]
            if group and len(group) == len(self.store.rosters[self.store.launch]) and len(group) + len(spares) == len(alive):
                return
        raise AssertionError(f"they wait for ever: {self.nodes}, {self.store}")


@pytest.mark.parametrize("least", [1, 2, 3])
def test_whatever_happens_one_group_trains_and_nobody_waits_for_ever(least: int) -> None:
    for seed in range(1000):
        simulation = Simulation(seed, least)
        try:
            simulation.play(80)
            simulation.settle()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
