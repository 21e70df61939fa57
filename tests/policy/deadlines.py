"""How many notices end in a commit: `decide` and `gives_way` in a simulated machine, against the best that was possible.

    python -m tests.policy.deadlines

A notice comes at any moment of a training that saves, uploads and evaluates: between two saves, with an upload in flight or
not, with another one waiting, before anything was measured. Saves and links take up to a fifth more or less than the last
time, and a save that is written halves the speed of the upload beside it. The best possible knows all this beforehand: it
takes the best outcome of every way to act.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from hf_spot.notices.notice import NoticeKind
from hf_spot.policy.preemption import Action, Measured, decide, gives_way

NOTICES_S = (5, 15, 30, 60, 120)
SIZES_BYTES = (1e6, 1e7, 1e8, 1e9, 1e10, 1e11)
LINKS_BYTES_PER_S = (1e7, 1e8, 1e9, 1e10)
DISK_BYTES_PER_S = 1e9
SAVE_S = 0.2  # what a save of nothing takes
COMMIT_S = 0.3
NOISE = 0.2
BESIDE_A_SAVE = 0.5
TELLING_S = 2.0  # as in `Uploader`


@dataclass
class Upload:
    """A checkpoint on its way. Moments are seconds since the start of the training."""

    saved_at: float
    bytes: float
    bytes_per_s: float
    best: bool
    sent: float = 0.0
    began: float = 0.0
    commit_left_s: float = COMMIT_S


class Wire:
    """The uploader: one upload at a time, and what waits behind it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.current: Upload | None = None
        self.waiting: list[Upload] = []
        self.commits: list[tuple[float, float]] = []  # when, and the moment of the save
        self.bytes_per_s: float | None = None
        self.hurried = False

    def copy(self) -> Wire:
        other = Wire()
        other.__dict__.update(self.__dict__)
        other.current = None if self.current is None else replace(self.current)
        other.waiting = [replace(one) for one in self.waiting]
        other.commits = list(self.commits)
        return other

    def submit(self, upload: Upload) -> None:
        self.waiting = [one for one in self.waiting if one.best and not upload.best] + [upload]
        self.run(0.0)

    def give_way(self) -> None:
        if self.current and self.waiting and self.waiting[-1].saved_at > self.current.saved_at:
            if self.current.best:
                self.waiting.insert(0, replace(self.current, sent=0.0, commit_left_s=COMMIT_S))
            self.current = None
            self.run(0.0)

    def run(self, seconds: float, speed: float = 1.0) -> None:
        until = self.now + seconds
        while True:
            if self.current is None:
                if not self.waiting:
                    break
                self.current = self.waiting.pop(-1 if self.hurried else 0)
                self.current.began = self.now
            rate = self.current.bytes_per_s * speed
            left_s = (self.current.bytes - self.current.sent) / rate
            if self.now + left_s + self.current.commit_left_s > until:
                sent_s = min(left_s, until - self.now)
                self.current.sent += sent_s * rate
                self.current.commit_left_s -= until - self.now - sent_s
                break
            self.now += left_s + self.current.commit_left_s
            self.commits.append((self.now, self.current.saved_at))
            self.bytes_per_s = self.current.bytes_per_s
            self.current = None
        self.now = until

    def measured(self) -> Measured:
        rate, current = self.bytes_per_s, self.current
        if current and 0 < current.sent < current.bytes and self.now - current.began >= TELLING_S:
            rate = current.sent / (self.now - current.began)
        newer = [one for one in self.waiting if current and one.saved_at > current.saved_at]
        return Measured(
            bytes_per_s=rate,
            commit_s=COMMIT_S,
            in_flight_bytes=None if current is None else int(current.bytes - current.sent),
            waiting_bytes=int(newer[-1].bytes) if newer else None,
        )


@dataclass
class Moment:
    """A machine in the instant of a notice, and how long everything takes from there."""

    wire: Wire
    notice_s: float
    step_s: float
    save_s: float
    measured_save_s: float | None
    new: Upload

    def play(self, saves: Callable[[float, Measured], bool], yields: Callable[[float, Measured], bool]) -> float | None:
        """Until the deadline: how many seconds of work the newest commit of these last seconds lacks; None if there is none.

        Args:
            saves: whether to save at the end of the step; given the seconds left.
            yields: whether what is in flight gives way to what waits.
        """
        wire = self.wire.copy()
        gone_at = wire.now + self.notice_s
        known = {"save_s": self.measured_save_s, "size_bytes": int(self.new.bytes)}

        def measured() -> Measured:
            return replace(wire.measured(), **known if self.measured_save_s is not None else {})

        wire.run(self.step_s)
        ended_at = wire.now
        wire.hurried = True
        if saves(gone_at - wire.now, measured()):
            wire.run(self.save_s, BESIDE_A_SAVE)
            wire.submit(replace(self.new, saved_at=ended_at))
        if yields(gone_at - wire.now, measured()):
            wire.give_way()
        wire.run(max(0.0, gone_at - wire.now))
        done = [saved_at for at, saved_at in wire.commits[len(self.wire.commits) :] if at <= gone_at]
        return ended_at - max(done) if done else None


def moment(chance: random.Random, notice_s: float, size: float, link: float) -> Moment:
    """Any moment of a training with checkpoints of this size over this link."""

    def noise() -> float:
        return chance.uniform(1 - NOISE, 1 + NOISE)

    def save_s() -> float:
        return (SAVE_S + size / DISK_BYTES_PER_S) * noise()

    def upload(saved_at: float) -> Upload:
        return Upload(saved_at, size, link * noise(), chance.random() < 0.3)

    every_s = 60 * 30 ** chance.random()  # a minute to half an hour between two saves
    wire = Wire()
    took_s: float | None = None
    for _ in range(chance.randrange(8)):
        wire.run(every_s)
        saved_at, took_s = wire.now, save_s()
        wire.run(took_s, BESIDE_A_SAVE)
        wire.submit(upload(saved_at))
    wire.run(every_s * chance.random())
    return Moment(wire, notice_s, chance.random() * 10 ** chance.uniform(-1, 0.7), save_s(), took_s, upload(0.0))


def as_decided(left_s: float, measured: Measured) -> bool:
    return decide(NoticeKind.TERMINATE, left_s, measured).action is Action.SAVE_AND_STOP


def always(left_s: float, measured: Measured) -> bool:
    return True


def never(left_s: float, measured: Measured) -> bool:
    return False


WAYS = {
    "hf_spot": (as_decided, gives_way),
    "always save": (always, never),
    "always save, newest first": (always, always),
    "never save": (never, never),
}
EVERY_WAY = tuple(itertools.product((always, never), repeat=2))


@dataclass
class Score:
    """Of some notices: how many could end in a commit, how many did, and the work that the commits of both held back."""

    notices: int = 0
    possible: int = 0
    did: int = 0
    newest: int = 0

    def add(self, best: float | None, found: float | None) -> None:
        """One notice: the seconds of work that the best way to act and this one lose; None without a commit."""
        self.notices += 1
        self.possible += best is not None
        self.did += found is not None
        self.newest += found is not None and best is not None and found <= best

    @property
    def rate(self) -> float:
        """Notices that ended in a commit, of those that could."""
        return self.did / self.possible if self.possible else 1.0

    @property
    def rate_of_newest(self) -> float:
        """Notices that ended in the commit of the newest checkpoint that was possible, of those that could end in one."""
        return self.newest / self.possible if self.possible else 1.0


class Cell(NamedTuple):
    """Notices of one kind."""

    notice_s: float
    size_bytes: float
    link_bytes_per_s: float
    in_flight: bool


def simulate(notices_per_kind: int, seed: int = 0) -> dict[str, dict[Cell, Score]]:
    """Scores of each way to act; all ways meet the same notices."""
    chance = random.Random(seed)
    scores: dict[str, dict[Cell, Score]] = {way: {} for way in WAYS}
    for kind in itertools.product(NOTICES_S, SIZES_BYTES, LINKS_BYTES_PER_S):
        for way, busy in itertools.product(WAYS, (False, True)):
            scores[way][Cell(*kind, busy)] = Score()
        for _ in range(notices_per_kind):
            one = moment(chance, *kind)
            found = {way: one.play(*how) for way, how in WAYS.items()}
            losses = [loss for loss in (*(one.play(*how) for how in EVERY_WAY), *found.values()) if loss is not None]
            best = min(losses, default=None)
            for way, loss in found.items():
                scores[way][Cell(*kind, one.wire.current is not None)].add(best, loss)
    return scores


def total(scores: dict[Cell, Score], part: Callable[[Cell], bool] = lambda cell: True) -> Score:
    """One score of many."""
    chosen = [score for cell, score in scores.items() if part(cell)]
    return Score(*(sum(getattr(score, name) for score in chosen) for name in ("notices", "possible", "did", "newest")))


def table(scores: dict[str, dict[Cell, Score]]) -> Iterator[str]:
    """Line by line."""
    yield "notices that end in a commit, in % of those that could (in the newest commit that could be reached)"
    yield f"{'':>16}{'possible':>10}" + "".join(f"{way:>28}" for way in scores)
    rows: list[tuple[str, Callable[[Cell], bool]]] = [("all", lambda cell: True)]
    rows += [("upload in flight", lambda cell: cell.in_flight)]
    rows += [(f"{notice_s} s", lambda cell, notice_s=notice_s: cell.notice_s == notice_s) for notice_s in NOTICES_S]  # type: ignore[misc]
    rows += [(f"{size / 1e6:g} MB", lambda cell, size=size: cell.size_bytes == size) for size in SIZES_BYTES]  # type: ignore[misc]
    rows += [(f"{link / 1e6:g} MB/s", lambda cell, link=link: cell.link_bytes_per_s == link) for link in LINKS_BYTES_PER_S]  # type: ignore[misc]
    for name, part in rows:
        parts = {way: total(cells, part) for way, cells in scores.items()}
        first = next(iter(parts.values()))
        line = f"{name:>16}{100 * first.possible / first.notices:>9.1f}%"
        for one in parts.values():
            line += f"{100 * one.rate:>19.1f} ({100 * one.rate_of_newest:>5.1f})"
        yield line


if __name__ == "__main__":
    for line in table(simulate(300)):
        print(line)
