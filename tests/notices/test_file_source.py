from __future__ import annotations

import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from hf_spot.errors import SpotError
from hf_spot.notices.file import FileSource
from hf_spot.notices.notice import NoticeKind, PreemptionNotice

WRITTEN = datetime(2026, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "notice"


@pytest.fixture
def source(path: Path) -> FileSource:
    return FileSource(path, sleep=lambda seconds: None)


def write(path: Path, text: str, at: datetime = WRITTEN) -> None:
    path.write_text(text)
    os.utime(path, (at.timestamp(), at.timestamp()))


def heard(source: FileSource) -> PreemptionNotice:
    notice = source.poll()
    assert notice is not None
    return notice


def test_no_file_is_no_notice(source: FileSource) -> None:
    assert source.poll() is None


def test_a_missing_folder_is_no_notice_either(tmp_path: Path) -> None:
    assert FileSource(tmp_path / "no" / "folder").poll() is None


@pytest.mark.parametrize("text", ["", "the node is drained\n", "120", "[]", '{"kind": "ADVI'])
def test_a_file_without_a_json_object_is_a_termination_without_deadline(source: FileSource, path: Path, text: str) -> None:
    write(path, text)
    notice = heard(source)
    assert (notice.kind, notice.source, notice.deadline) == (NoticeKind.TERMINATE, "file", None)


def test_deadline_s_counts_from_when_the_file_was_written(source: FileSource, path: Path) -> None:
    write(path, '{"deadline_s": 60}')
    notice = heard(source)
    assert (notice.kind, notice.deadline) == (NoticeKind.TERMINATE, WRITTEN + timedelta(seconds=60))


def test_a_file_can_advise(source: FileSource, path: Path) -> None:
    write(path, '{"kind": "ADVISORY"}')
    assert heard(source).kind is NoticeKind.ADVISORY


def test_a_whole_notice_is_taken_as_it_is(source: FileSource, path: Path) -> None:
    notice = PreemptionNotice(NoticeKind.TERMINATE, "scheduler", "job 7", WRITTEN + timedelta(seconds=45))
    write(path, notice.to_json())
    assert source.poll() == notice


def test_a_deadline_may_end_in_z(source: FileSource, path: Path) -> None:
    write(path, '{"deadline": "2026-01-01T00:02:00Z"}')
    assert heard(source).deadline == WRITTEN + timedelta(seconds=120)


def test_a_file_that_is_touched_again_is_the_same_notice(source: FileSource, path: Path) -> None:
    write(path, '{"deadline_s": 60}')
    first = heard(source)
    write(path, '{"deadline_s": 60}', at=WRITTEN + timedelta(seconds=30))
    assert source.poll() == first


def test_other_content_is_another_notice(source: FileSource, path: Path) -> None:
    write(path, '{"kind": "ADVISORY"}')
    first = heard(source)
    write(path, '{"kind": "TERMINATE"}')
    second = heard(source)
    assert second.kind is NoticeKind.TERMINATE and second.id != first.id


def test_removing_the_file_cancels_a_termination_once(source: FileSource, path: Path) -> None:
    write(path, "")
    heard(source)
    path.unlink()
    assert heard(source).kind is NoticeKind.CANCELLED
    assert source.poll() is None


def test_removing_an_advisory_cancels_nothing(source: FileSource, path: Path) -> None:
    write(path, '{"kind": "ADVISORY"}')
    heard(source)
    path.unlink()
    assert source.poll() is None


def test_a_file_written_again_after_its_removal_is_a_new_notice(source: FileSource, path: Path) -> None:
    write(path, "")
    first = heard(source)
    path.unlink()
    source.poll()
    write(path, "", at=WRITTEN + timedelta(hours=1))
    assert heard(source).id != first.id


def test_a_file_that_is_still_being_written_is_not_read_as_an_empty_one(path: Path) -> None:
    def finish_writing(seconds: float) -> None:
        write(path, '{"kind": "ADVISORY"}')

    source = FileSource(path, sleep=finish_writing)
    path.touch()
    assert source.poll() is None
    assert heard(source).kind is NoticeKind.ADVISORY


@pytest.mark.parametrize(
    "text",
    [
        '{"kind": "SOON"}',
        '{"deadline_s": "60"}',
        '{"deadline_s": true}',
        '{"deadline_s": NaN}',
        '{"deadline_s": 1e300}',
        '{"deadline": "2026-01-01T00:00:00"}',
        '{"deadline": "tomorrow"}',
    ],
)
def test_a_statement_that_can_not_be_used_is_an_error_with_an_example(source: FileSource, path: Path, text: str) -> None:
    write(path, text)
    with pytest.raises(SpotError) as caught:
        source.poll()
    assert str(path) in str(caught.value)
    write(path, caught.value.hint.split("'")[1])
    assert heard(source).deadline == WRITTEN + timedelta(seconds=120)


def test_a_folder_in_place_of_the_file_is_an_error(source: FileSource, path: Path) -> None:
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        source.poll()
