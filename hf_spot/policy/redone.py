"""Compares the steps that a launch does again with those that an earlier launch did before it died. Pure.

The same step on the same state gives the same loss to the last bit, unless something in the script or on the device is not
deterministic. So losses are compared exactly; the difference is told, whatever its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_spot.policy.words import counted

VALUES = {"loss": "loss", "learning_rate": "learning rate", "data": "data"}  # the names in a journal, and for people
_FEWEST_DIGITS, _MOST_DIGITS = 5, 17


@dataclass(frozen=True)
class Step:
    """What a rank tells about one optimizer step.

    Args:
        launch: number of the launch that did it.
        step: its number, from 1.
        loss: the rank's own loss, the sum over its micro-batches; None if unknown.
        learning_rate: with which it was done; None if unknown.
        data: digest of the indices of the rank's samples; None if unknown, as for a stream.
    """

    launch: int
    step: int
    loss: float | None = None
    learning_rate: float | None = None
    data: str | None = None

    def to_json(self) -> list[Any]:
        """Return the fields as JSON values."""
        return [self.launch, self.step, _to_json(self.loss), _to_json(self.learning_rate), self.data]

    @classmethod
    def of(cls, fields: Any) -> Step:
        """Return the step that `to_json` wrote. Raises ValueError, TypeError."""
        launch, step, loss, learning_rate, data = fields
        if type(launch) is not int or type(step) is not int or not isinstance(data, str | None):
            raise TypeError(f"not a step: {fields!r}")
        return cls(launch, step, _float(loss), _float(learning_rate), data)


Steps = Mapping[int, Step]  # by number


def _to_json(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)  # JSON has no NaN


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def newest(steps: Iterable[Step], *, after: int, before_launch: int) -> dict[int, Step]:
    """Return the steps that a launch will do again, by number: each as the newest earlier launch did it.

    Args:
        steps: of any launches, in any order.
        after: the step from which the launch resumes.
        before_launch: number of the launch.
    """
    found: dict[int, Step] = {}
    for one in steps:
        if one.step > after and one.launch < before_launch and (one.step not in found or found[one.step].launch < one.launch):
            found[one.step] = one
    return found


@dataclass(frozen=True)
class Difference:
    """The first step that differs.

    Args:
        step: its number.
        rank: the rank on which it differs, the lowest one.
        before: by name (`VALUES`), what the earlier launch told, where it differs.
        again: the same of this launch.
        same: names of the values that are the same.
    """

    step: int
    rank: int
    before: dict[str, Any]
    again: dict[str, Any]
    same: tuple[str, ...]


@dataclass(frozen=True)
class Redone:
    """How the steps that a launch has done again compare with the earlier ones.

    Args:
        first: number of the first step that was done again.
        last: number of the last step that an earlier launch told.
        steps: number of steps compared, including one that differs.
        compared: by name (`VALUES`), in how many of these steps a value was known to both launches.
        different: the first difference; None if all are equal. Nothing is compared after it.
        changed: what has changed since, in words, so that differences are no surprise.
    """

    first: int
    last: int
    steps: int
    compared: dict[str, int]
    different: Difference | None = None
    changed: tuple[str, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """Return the fields as JSON values, for the journal."""
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Redone | None:
        """Return what `to_data` wrote; None if these are other values."""
        try:
            fields = {name: data[name] for name in cls.__dataclass_fields__}
            told = fields["different"]
            different = None if told is None else Difference(**{**told, "same": tuple(told["same"])})
            counts = [fields["first"], fields["last"], fields["steps"], *fields["compared"].values()]
            if not all(type(count) is int and count >= 0 for count in counts):
                return None
            return cls(**{**fields, "different": different, "changed": tuple(map(str, fields["changed"]))})
        except (KeyError, TypeError, AttributeError):
            return None


def compare(before: Mapping[int, Steps], now: Mapping[int, Steps], changed: Sequence[str] = ()) -> Redone | None:
    """Compare the steps in their order, up to the first that is not done yet by all ranks or that differs.

    Args:
        before: what earlier launches told, by rank.
        now: what this launch has told, by rank.
        changed: as in `Redone`.

    Returns:
        The result so far; None if there is nothing to compare yet.
    """
    numbers = sorted({step for steps in before.values() for step in steps})
    done, compared, different = 0, dict.fromkeys(VALUES, 0), None
    for number in numbers:
        ranks = sorted(rank for rank, steps in before.items() if number in steps)
        if any(number not in now.get(rank, {}) for rank in ranks):
            break
        found = [(rank, *_sort(before[rank][number], now[rank][number])) for rank in ranks]
        done += 1
        for name in VALUES:
            compared[name] += any(name in same or name in differing for _, same, differing in found)
        for rank, same, differing in found:
            if differing:
                old, new = before[rank][number], now[rank][number]
                told = [{name: _to_json_value(getattr(one, name)) for name in differing} for one in (old, new)]
                different = Difference(number, rank, before=told[0], again=told[1], same=same)
                break
        if different:
            break
    return Redone(numbers[0], numbers[-1], done, compared, different, tuple(changed)) if done else None


def _to_json_value(value: Any) -> Any:
    return _to_json(value) if isinstance(value, float) else value


def _sort(old: Step, new: Step) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the values that are the same in both, and of those that differ."""
    known = [name for name in VALUES if None not in (getattr(old, name), getattr(new, name))]
    same = tuple(name for name in known if _is_same(getattr(old, name), getattr(new, name)))
    return same, tuple(name for name in known if name not in same)


def _is_same(one: Any, other: Any) -> bool:
    return bool(one == other) or (one != one and other != other)  # NaN equals itself here


def is_complete(found: Redone | None, before: Mapping[int, Steps]) -> bool:
    """Return whether no further step will change the result of `compare`."""
    if found is None:
        return False
    return found.different is not None or found.steps == len({step for steps in before.values() for step in steps})


def only_learning_rates(steps: Steps) -> dict[int, Step]:
    """Return the steps without what depends on how the batch is divided among ranks."""
    return {number: replace(one, loss=None, data=None) for number, one in steps.items()}


# -- for people -----------------------------------------------------------------------------------------------------------


def in_words(redone: Redone) -> str:
    """Return the result in one line."""
    if redone.different is None:
        return f"{counted(redone.steps, 'step')} redone, all equal{_limits(redone)}"
    different = redone.different
    equal = redone.steps - 1
    where = f"step {different.step}" + (f" on rank {different.rank}" if different.rank else "")
    before = f"{counted(equal, 'step')} redone equal, then " if equal else ""
    told = [_values(name, different.before[name], different.again[name]) for name in different.before]
    same = _list([VALUES[name] for name in different.same])
    line = f"{before}{where} differs: {', '.join(told)}" + (f"; {same} equal" if same else "")
    return line + (f" (to be expected: {'; '.join(redone.changed)})" if redone.changed else "")


def _limits(redone: Redone) -> str:
    """Return what "all equal" does not cover."""
    told = []
    if redone.last - redone.first + 1 > redone.steps:
        told.append(f"of steps {redone.first} to {redone.last}")
    missing = [name for name in VALUES if not redone.compared.get(name)]
    if missing:
        known = _list([VALUES[name] for name in VALUES if name not in missing])
        told.append(f"{known or 'nothing'} compared, {_list([VALUES[name] for name in missing])} unknown")
    told += [f"{VALUES[name]} of {count} compared" for name, count in redone.compared.items() if 0 < count < redone.steps]
    return f" ({'; '.join(told)})" if told else ""


def _list(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _values(name: str, before: Any, now: Any) -> str:
    if name == "data":
        return "data: other samples, or in another order"
    one, other = float(before), float(now)
    digits = next(
        (count for count in range(_FEWEST_DIGITS, _MOST_DIGITS) if f"{one:.{count}g}" != f"{other:.{count}g}"), _MOST_DIGITS
    )
    told = f"{VALUES[name]} {one:.{digits}g} before, {other:.{digits}g} now"
    if not (math.isfinite(one) and math.isfinite(other)):
        return told
    return f"{told} (a relative difference of {abs(one - other) / max(abs(one), abs(other)):.1e})"
