"""Messages between the machines of one launch, each an object in the store, next to the files it concerns."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any, cast

from hf_spot.errors import CorruptCheckpoint, IncompleteCheckpoint, ObjectNotFound, StoreUnavailable
from hf_spot.run.checkpoint import CommitRequest
from hf_spot.run.manifest import FileEntry
from hf_spot.run.run import Run
from hf_spot.run.seal import seal, unseal
from hf_spot.run.told_steps import Heartbeat, Told
from hf_spot.storage.threads import Workers

_PARTS = ".parts"
_STEPS = re.compile(r"/steps-(\d{1,9})\.json$")
_MEETING = re.compile(r"/meeting-(\d{1,9})\.json$")
_READ_AT_ONCE = 16  # parts of a checkpoint
_LOOKS_BACK = 4  # launches: some end before they have told anything


class Mailbox:
    """Sends and reads messages. Each is sealed like a journal entry, together with the key that it was written to.

    Args:
        run: whose launch the machines belong to.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def hand_in(self, request: CommitRequest, files: list[FileEntry] | None) -> None:
        """Tell machine 0 that this machine has uploaded its part of a checkpoint, or (with None) that it never will."""
        key = self._part_key(request, request.part)
        self._send(key, {"files": None if files is None else [asdict(file) for file in files]})

    def other_parts(self, request: CommitRequest) -> list[FileEntry] | None:
        """Return the files that all other machines have uploaded, or None while one of them has not finished.

        Raises:
            IncompleteCheckpoint: a machine has given up uploading its part.
        """
        keys = [self._part_key(request, part) for part in range(1, request.parts)]
        folder = self._folder(request)
        there = {info.key for info in self._run.store.list(folder)} if keys else set()
        if not there.issuperset(keys):
            return None
        with Workers(min(len(keys), _READ_AT_ONCE) or 1, "hf_spot-parts") as pool:
            messages = list(pool.map(self._read, keys))
        found: list[FileEntry] = []
        for part, message in enumerate(messages, 1):
            if message is None:
                return None
            if message["files"] is None:
                raise IncompleteCheckpoint(f"checkpoint-{request.step}: machine {part} gave it up for a newer one")
            found += [FileEntry.of(file) for file in message["files"]]
        return found

    def invite(self, invitation: dict[str, Any]) -> None:
        """Publish the address at which the other machines of this launch reach machine 0."""
        self._send(_invitation_key(self._run.launch), invitation)

    def invitation(self) -> tuple[int, dict[str, Any]] | None:
        """Return the newest launch and the invitation of its machine 0, or None if there is none yet."""
        launch = self._run.state().launch
        found = self._read(_invitation_key(launch))
        return None if found is None else (launch, found)

    def open_meeting(self, launch: int, attempt: int, invitation: dict[str, Any]) -> bool:
        """Publish where machines can meet for a launch that is not claimed yet. Return whether this machine was the first.

        Args:
            launch: number of the launch to come.
            attempt: number of the meeting, from 1.
            invitation: for the other machines.
        """
        key = _meeting_key(launch, attempt)
        try:
            return self._run.store.create(key, self._sealed(key, invitation))
        except StoreUnavailable:
            if self._read(key) == invitation:  # only the answer was lost
                return True
            raise

    def meeting(self, launch: int, attempt: int) -> dict[str, Any] | None:
        """Return the invitation of `open_meeting`, or with ``attempt`` 0 that of the group that trains; None without one."""
        return self._read(_meeting_key(launch, attempt) if attempt else _invitation_key(launch))

    def newest_attempt(self, launch: int) -> int:
        """Return the number of the newest meeting for a launch; 0 if there was none."""
        keys = [info.key for info in self._run.store.list(_meeting_key(launch, 0).removesuffix("0.json"))]
        return max((int(found[1]) for key in keys if (found := _MEETING.search(key))), default=0)

    def tell_steps(self, training: int, told: Told) -> None:
        """Publish what this launch tells about its newest steps, in place of what it told before.

        The next launch deletes it with the other files of this one (`Run.collect_garbage`), and takes over what it still needs.
        """
        self._send(_steps_key(self._run.launch, training), told.to_json())

    def told_steps(self, training: int, before_launch: int) -> Told:
        """Return what the newest launch before ``before_launch`` told about its steps, and took over from earlier ones.

        Raises:
            CorruptCheckpoint: it is damaged.
            StoreUnavailable: the store did not answer.
        """
        for launch in range(before_launch - 1, max(0, before_launch - 1 - _LOOKS_BACK), -1):
            found = self._read(_steps_key(launch, training))
            if found is not None:
                try:
                    return Told.of(found)
                except (ValueError, TypeError, KeyError) as error:
                    raise CorruptCheckpoint(f"what launch {launch} told about its steps can't be read: {error}") from error
        return Told()

    def heartbeat(self, launch: int) -> tuple[int, Heartbeat] | None:
        """Return the number of the training and the newest heartbeat of a launch; None if it sent none, or it was deleted.

        Raises:
            CorruptCheckpoint: it is damaged.
            StoreUnavailable: the store did not answer.
        """
        found = []
        for info in self._run.store.list(f"e{launch:04d}/steps-"):
            match = _STEPS.search(info.key)
            if match is not None:
                told = self.told_steps(int(match[1]), launch + 1)
                if told.heartbeat is not None and told.heartbeat.launch == launch:
                    found.append((int(match[1]), told.heartbeat))
        return max(found, key=lambda one: one[1].time, default=None)

    def _part_key(self, request: CommitRequest, part: int) -> str:
        return f"{self._folder(request)}{part}.json"

    def _folder(self, request: CommitRequest) -> str:
        return "/".join(filter(None, (request.prefix(self._run.launch), _PARTS, request.attempt))) + "/"

    def _send(self, key: str, message: dict[str, Any]) -> None:
        self._run.store.put(key, self._sealed(key, message))

    def _sealed(self, key: str, message: dict[str, Any]) -> bytes:
        return seal({"key": key, "told": message}, self._run.journal.key)

    def _read(self, key: str) -> dict[str, Any] | None:
        try:
            sealed = unseal(self._run.store.get(key), self._run.journal.key)
        except ObjectNotFound:
            return None
        if not isinstance(sealed, dict) or sealed.get("key") != key or not isinstance(sealed.get("told"), dict):
            raise CorruptCheckpoint(f"{self._run.url}/{key} is not a message for this key")
        return cast(dict[str, Any], sealed["told"])


def _invitation_key(launch: int) -> str:
    return f"e{launch:04d}/meeting.json"


def _meeting_key(launch: int, attempt: int) -> str:
    return f"e{launch:04d}/meeting-{attempt}.json"


def _steps_key(launch: int, training: int) -> str:
    return f"e{launch:04d}/steps-{training}.json"
