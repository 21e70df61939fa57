from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from hf_spot.policy.retention import milestones, to_prune


@dataclass(frozen=True)
class Ref:
    step: int
    training: int = 1
    best: bool = False
    added: bool = False


def test_the_newest_three_and_the_best_stay() -> None:
    refs = [Ref(10), Ref(20, best=True), Ref(30), Ref(40), Ref(50)]
    assert to_prune(refs, 3) == [Ref(10)]


def test_the_last_checkpoint_of_an_earlier_stage_stays() -> None:
    refs = [Ref(10), Ref(20), Ref(5, training=2), Ref(6, training=2)]
    assert to_prune(refs, 1) == [Ref(10), Ref(5, training=2)]


def test_added_checkpoints_take_nobodys_place() -> None:
    old, new = [Ref(step) for step in (10, 20, 30)], [Ref(step, added=True) for step in (31, 32, 33)]
    assert to_prune([*old, *new], 3) == new[:1]
    assert to_prune([*old, *new], 1) == [*old[:2], *new[:2]]
    assert to_prune([*old, *new], 0) == to_prune([*old, *new], None) == new[:1]
    assert to_prune([*old, *new, Ref(40)], 3) == [old[0], *new[:2]]
    assert to_prune([*new, Ref(5, training=2), Ref(6, training=2)], 2) == new[:2]


def test_no_limit_and_zero_keep_everything() -> None:
    refs = [Ref(step) for step in range(9)]
    assert to_prune(refs, None) == to_prune(refs, 0) == []


refs = st.lists(st.builds(Ref, st.integers(0, 99), st.integers(1, 3), st.booleans()), unique=True)


@given(refs, st.integers(1, 5))
def test_pruning_never_takes_the_newest_and_pruning_again_takes_nothing(checkpoints: list[Ref], limit: int) -> None:
    gone = to_prune(checkpoints, limit)
    left = [ref for ref in checkpoints if ref not in gone]
    assert left[-limit:] == checkpoints[-limit:]
    assert to_prune(left, limit) == []
    assert not any(ref.best for ref in gone)


def test_the_first_checkpoint_at_or_after_each_multiple_lasts() -> None:
    refs = [Ref(90), Ref(110), Ref(130), Ref(200), Ref(290), Ref(410), Ref(50, training=2), Ref(150, training=2)]
    assert milestones(refs, 100) == [Ref(110), Ref(200), Ref(410), Ref(150, training=2)]
    assert milestones(refs[1:], 100, kept=[Ref(105)]) == [Ref(200), Ref(410), Ref(150, training=2)]


@given(refs, st.integers(1, 50), st.integers(1, 5))
def test_what_lasts_lasts_however_often_is_pruned(checkpoints: list[Ref], every: int, limit: int) -> None:
    checkpoints = sorted(checkpoints, key=lambda ref: (ref.training, ref.step))
    lasting = milestones(checkpoints, every)
    left: list[Ref] = []
    for ref in checkpoints:  # each commit is followed by a pruning
        left.append(ref)
        gone = [one for one in to_prune(left, limit) if one not in milestones(left, every)]
        left = [one for one in left if one not in gone]
    assert [ref for ref in left if ref in lasting] == lasting
