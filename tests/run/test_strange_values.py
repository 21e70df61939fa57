"""A journal whose values are of any kind: whoever can write to the bucket can seal what they like, where there is no key.

Each value of each entry is replaced in turn; whatever reads a run then says in one line what is wrong, or does its work.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_spot.cli import main
from hf_spot.errors import CorruptCheckpoint, SpotError
from hf_spot.launch.command import Machines
from hf_spot.launch.prefetch import Prefetch, newest_of
from hf_spot.run.history import read_past
from hf_spot.run.manifest import MOST_RANKS, missing_for_resume
from hf_spot.run.run import Run
from hf_spot.run.seal import seal

VALUES: tuple[Any, ...] = (
    *(None, "x", [], {}, -1, True, 10**400, 10**9, 1e308, 2**63, "2026-01-01T00:00:00", "9" * 5000),
    *(float("inf"), float("nan"), ["x"], {"x": 1}, 0, 1.5, "1", json.loads("[" * 500 + "]" * 500)),
)
TIMING = {"step": 5, "begins_s": 1.0, "restore_s": 1.0, "stall_s": 0.5, "trains_s": 3.0, "first_step": 1}


@pytest.fixture
def entries(make_checkpoint: Callable[[int], Path], tmp_path: Path) -> list[dict[str, Any]]:
    """A run with an entry of each kind, as JSON."""
    run = Run(tmp_path / "run")
    run.push(make_checkpoint(5))
    run.claim({"by": "hf-spot launch", "hostname": "here", "machine": {"usd_per_hour": 1.0, "instance_type": "g5"}})
    run.record(
        "notice", {"kind": "TERMINATE", "source": "imds", "id": "1", "deadline": "2026-01-01T00:00:00+00:00", "why": "?"}
    )
    run.record("preempted", {"step": 5, "committed_step": 5, "stage": 1, "why": "imds", "timing": TIMING})
    run.record("machine", {"event": "started", "id": "i-1", "usd_per_hour": 1.0, "step": 5})
    run.push(make_checkpoint(10))
    run.claim({"by": "hf-spot launch"})
    run.record("failed", {"exit_code": 1, "step": 10, "committed_step": 10})
    paths = sorted((tmp_path / "run" / "journal").glob("*.json"))
    return [json.loads(path.read_bytes()) for path in paths]


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value in it."""
    if above:
        yield above
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if key not in ("seal", "format", "versions"):
            yield from places(inner, (*above, key))


def changed(value: Any, place: tuple[Any, ...], to: Any) -> Any:
    if not place:
        return to
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = changed(value[place[0]], place[1:], to)
    return copy


def write(folder: Path, number: int, entry: dict[str, Any]) -> None:
    (folder / "journal" / f"{number:08d}.json").write_bytes(
        seal({key: value for key, value in entry.items() if key != "seal"}, None)
    )


def read_all(url: str) -> None:
    """Everything that reads a run before or without a training. Raises what is no SpotError."""
    with contextlib.suppress(SpotError):
        newest_of(url)
        read_past(Run(url).journal)
    ahead = Prefetch(lambda: newest_of(url), Machines(2, 0, "127.0.0.1"))
    assert ahead._fetched.exception(10) is None
    ahead.close()
    for command in (["report", url, "--json"], ["report", url], ["checkpoints", "ls", url], ["checkpoints", "verify", url]):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main(command) in (0, 1, 2), command


@pytest.mark.parametrize(
    "offset", [0, *(pytest.param(offset, marks=[pytest.mark.slow, pytest.mark.proof]) for offset in range(1, len(VALUES)))]
)
def test_a_value_of_any_kind_is_an_error_in_words_or_none(tmp_path: Path, entries: list[dict[str, Any]], offset: int) -> None:
    url = str(tmp_path / "run")
    failed = []
    for number, entry in enumerate(entries, 1):
        for turn, place in enumerate(places(entry)):
            value = VALUES[(turn + offset) % len(VALUES)]
            try:
                write(tmp_path / "run", number, changed(entry, place, value))
            except ValueError:
                continue
            try:
                read_all(url)
            except Exception as error:
                failed.append((entry["kind"], place, str(value)[:12], f"{type(error).__name__}: {error}"[:120]))
        write(tmp_path / "run", number, entry)
    assert not failed, "\n".join(map(str, failed))


@pytest.mark.parametrize(
    "hint", [b"[" * 100_000, b'{"entry":' * 100_000, b'{"entry":1' + b"0" * 400 + b"}", b'{"entry":-3}', b"\xff"]
)
def test_a_hint_of_any_kind_hides_no_entry(tmp_path: Path, entries: list[dict[str, Any]], hint: bytes) -> None:
    (tmp_path / "run" / "tip.json").write_bytes(hint)
    assert Run(tmp_path / "run").state().number == len(entries)


def test_the_journal_says_which_of_its_values_is_none(tmp_path: Path, entries: list[dict[str, Any]]) -> None:
    for number, entry in enumerate(entries, 1):
        if entry["kind"] == "commit":
            write(tmp_path / "run", number, changed(entry, ("data", "world_size"), 10**9))
    with pytest.raises(CorruptCheckpoint, match="world_size is 1000000000"):
        Run(tmp_path / "run").latest()
    write(tmp_path / "run", len(entries), changed(entries[-1], ("time",), "2026-01-01T00:00:00"))
    with pytest.raises(CorruptCheckpoint, match="no time zone"):
        Run(tmp_path / "run").state()
    write(tmp_path / "run", len(entries), changed(entries[-1], ("state", "checkpoints", 0, "size_bytes"), 10**400))
    with pytest.raises(CorruptCheckpoint, match="not a journal entry"):
        Run(tmp_path / "run").state()


def test_of_a_million_files_that_are_missing_the_first_are_named() -> None:
    assert len(missing_for_resume([], MOST_RANKS)) < 100
    assert missing_for_resume([f"rng_state_{rank}.pth" for rank in range(4) if rank != 2], 4)[-1] == "rng_state_2.pth"
