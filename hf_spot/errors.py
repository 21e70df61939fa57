"""Every error hf_spot raises, one tree. Each carries ``hint``: what to type or change next.

::

    SpotError                      exit_code 2 unless said otherwise
    ├── ConfigError                a value given by the user can't be used
    ├── StoreError                 the store refused, or did not answer
    │   ├── StoreUnavailable       network, throttling, 5xx: may work later
    │   ├── AccessDenied           credentials lack a permission, or are wrong or expired
    │   ├── BucketNotFound         the bucket (or the directory's parent) does not exist
    │   ├── ObjectNotFound         the key does not exist
    │   └── StoreNotFencing        the store ignores create-if-absent: two machines could both "win"
    ├── CloudError                 EC2 or another cloud service refused; ``code`` is its error code
    │   └── NoCapacity             no rung of the ladder has capacity: may work later (exit_code 75)
    ├── NoAnswer                   a store or cloud service did not answer when a command started: may work later (exit_code 75)
    ├── NoCheckpoint               the run has no commit to restore
    ├── CorruptCheckpoint          files differ from what the journal says was committed
    ├── IncompleteCheckpoint       a file is missing, and resuming without it would silently reset something
    ├── Untrusted                  the journal was not signed with this machine's key
    ├── RolledBack                 NaN: the next launch passes over the steps that went wrong (exit_code 1)
    └── Fenced                     a newer launch owns the run (exit_code 76)

    TrainingPreempted              a SystemExit with code 75, so that no line after ``train()`` runs
    └── TrainingInterrupted        the same after Ctrl-C; also a KeyboardInterrupt
"""

from __future__ import annotations

import re

EXIT_FINISHED = 0
EXIT_USAGE = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
EXIT_FENCED = 76
EXIT_HUNG = 79  # the first number behind those of sysexits.h
EXIT_KILLED = 137  # what shells say of a process that SIGKILL has ended


def without_passwords(text: str) -> str:
    """Return a text in which no URL has a user and password before its host."""
    return _USERINFO.sub("//…@", text)


def without_pages(text: str) -> str:
    """Return a text in which each HTML page, as proxies send them, is replaced by its title or first words."""
    return _PAGE.sub(lambda page: _words_of(page[0]), text)


def _words_of(page: str) -> str:
    title = _TITLE.search(page)
    words = " ".join(_TAG.sub(" ", title[1] if title else _UNSHOWN.sub(" ", page)).replace("\\n", " ").split())
    return f"a web page: {words[:_PAGE_LENGTH]}" if words else "a web page"


_PAGE = re.compile(r"<(?:!doctype\s+html|html|head|body)\b.*?(?:</html\s*>|\Z)", re.IGNORECASE | re.DOTALL)
_TITLE = re.compile(r"<title[^>]*>(.*?)</title", re.IGNORECASE | re.DOTALL)
_UNSHOWN = re.compile(r"<(script|style)\b.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_PAGE_LENGTH = 120
_USERINFO = re.compile(r"//[^/\s@'\"]*@(?:[^/\s@'\"]*@)*")


class SpotError(Exception):
    """Base class of every error that hf_spot raises on purpose.

    Args:
        message: what went wrong and which value caused it.
        hint: the next command to type or setting to change; empty when there is none.
    """

    exit_code = EXIT_USAGE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(without_passwords(without_pages(message)))
        self.hint = without_passwords(hint)

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  Try: {self.hint}" if self.hint else message

    def __reduce__(self) -> tuple[object, ...]:
        # Errors are pickled between ranks; the default would call __init__ without the keyword.
        return (_rebuild, (type(self), self.args, self.hint))


def _rebuild(cls: type[SpotError], args: tuple[str, ...], hint: str) -> SpotError:
    return cls(*args, hint=hint)


class ConfigError(SpotError):
    """A value given by the user can't be used."""


class StoreError(SpotError):
    """The store refused a request, or did not answer."""


class StoreUnavailable(StoreError):
    """Network trouble, throttling or a server error: the same call may work later."""


class AccessDenied(StoreError):
    """The credentials lack a permission, or are missing, wrong or expired."""


class BucketNotFound(StoreError):
    """The bucket, or the parent of the directory, does not exist."""


class ObjectNotFound(StoreError):
    """No object exists under this key."""


class StoreNotFencing(StoreError):
    """The store ignores create-if-absent, so it can't keep two machines apart."""


class CloudError(SpotError):
    """EC2, or another cloud service, refused a request.

    Args:
        message: what went wrong.
        hint: the next command to type.
        code: the error code of the service, such as ``VcpuLimitExceeded``; empty if it sent none.
    """

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


class NoCapacity(CloudError):
    """No rung of the ladder has capacity at the moment."""

    exit_code = EXIT_PREEMPTED


class NoAnswer(SpotError):
    """A store or a cloud service has not answered for as long as the start of a command waits for it: it may work later."""

    exit_code = EXIT_PREEMPTED


class NoCheckpoint(SpotError):
    """The run has no committed checkpoint."""


class CorruptCheckpoint(SpotError):
    """Files differ in size or checksum from what the journal says was committed."""


class IncompleteCheckpoint(SpotError):
    """A file is missing, and resuming without it would silently reset the optimizer, the schedule or the random state."""


class Untrusted(SpotError):
    """A journal entry is not signed with this machine's key: someone may have planted it."""


class Fenced(SpotError):
    """A newer launch has claimed the run; this one must stop writing."""

    exit_code = EXIT_FENCED


class RolledBack(SpotError):
    """The training has met NaN: the next launch resumes from the newest commit, and passes over the steps that went wrong."""

    exit_code = 1  # not that of a usage error: `hf-spot launch` starts it again


class TrainingPreempted(SystemExit):
    """Training stopped because the machine is being taken away. `step` says which checkpoint is committed.

    It is a ``SystemExit`` with code 75, so an unmodified script ends instead of evaluating or publishing a half-trained model.

    Args:
        message: for people: step, store, and how to resume.
        step: the last optimizer step that is committed, or None when none is.
    """

    def __init__(self, message: str = "", *, step: int | None = None) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.message = message
        self.step = step

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_preempted, (type(self), self.message, self.step))

    def __str__(self) -> str:
        return self.message or "training was preempted"


def _rebuild_preempted(cls: type[TrainingPreempted], message: str, step: int | None) -> TrainingPreempted:
    return cls(message, step=step)


class TrainingInterrupted(TrainingPreempted, KeyboardInterrupt):
    """Someone stopped the training with Ctrl-C or a notebook's stop button; it saved first.

    It is also a ``KeyboardInterrupt``, for programs that expect one.
    """
