"""Every error hf_spot raises, one tree. Each carries ``hint``: what to type or change next.

::

    SpotError                      exit_code 2 unless said otherwise
    ├── ConfigError                a value given by the user can't be used
    ├── StoreError                 the store said no, or said nothing
    │   ├── StoreUnavailable       network, throttling, 5xx: worth another try later
    │   ├── AccessDenied           credentials lack a permission, or are wrong or expired
    │   ├── BucketNotFound         the bucket (or the directory's parent) does not exist
    │   ├── ObjectNotFound         the key does not exist
    │   └── StoreNotFencing        the store ignores create-if-absent: two machines could both "win"
    ├── CloudError                 EC2 said no; ``code`` is what it called it
    │   └── NoCapacity             no rung of the ladder has a machine now: worth another try later (exit_code 75)
    ├── NoCheckpoint               the run has no commit to restore
    ├── CorruptCheckpoint          files differ from what the journal says was committed
    ├── IncompleteCheckpoint       a file without which a resume would silently reset something is missing
    ├── Untrusted                  the journal was not signed with this machine's key
    └── Fenced                     a newer launch owns the run (exit_code 76)

    TrainingPreempted              a SystemExit with code 75, so that no line behind ``train()`` runs
    └── TrainingInterrupted        the same after a Ctrl-C; a KeyboardInterrupt, too
"""

from __future__ import annotations

EXIT_FINISHED = 0
EXIT_USAGE = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
EXIT_FENCED = 76


class SpotError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: what went wrong and which value caused it.
        hint: the next command to type or setting to change; empty when there is none.
    """

    exit_code = EXIT_USAGE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  Try: {self.hint}" if self.hint else message

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel between ranks; the default would call __init__ without the keyword.
        return (_rebuild, (type(self), self.args, self.hint))


def _rebuild(cls: type[SpotError], args: tuple[str, ...], hint: str) -> SpotError:
    return cls(*args, hint=hint)


class ConfigError(SpotError):
    """A value given by the user can't be used."""


class StoreError(SpotError):
    """The store said no, or said nothing."""


class StoreUnavailable(StoreError):
    """Network trouble, throttling or a server error: the same call may work later."""


class AccessDenied(StoreError):
    """The credentials lack a permission, or are missing, wrong or expired."""


class BucketNotFound(StoreError):
    """The bucket, or the place where the directory should stand, does not exist."""


class ObjectNotFound(StoreError):
    """There is no object under this key."""


class StoreNotFencing(StoreError):
    """The store ignores create-if-absent, so it can't keep two machines apart."""


class CloudError(SpotError):
    """EC2, or another service of the cloud, said no.

    Args:
        message: what went wrong.
        hint: what to type next.
        code: the error code of the service, such as ``VcpuLimitExceeded``; empty when it gave none.
    """

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


class NoCapacity(CloudError):
    """No rung of the ladder has a machine now."""

    exit_code = EXIT_PREEMPTED


class NoCheckpoint(SpotError):
    """The run has no committed checkpoint."""


class CorruptCheckpoint(SpotError):
    """Files differ in size or checksum from what the journal says was committed."""


class IncompleteCheckpoint(SpotError):
    """A file is missing without which resuming would silently reset the optimizer, the schedule or the RNG."""


class Untrusted(SpotError):
    """A journal entry is not signed with the key of this machine: it may have been planted."""


class Fenced(SpotError):
    """A newer launch has claimed the run; this one must stop writing."""

    exit_code = EXIT_FENCED


class TrainingPreempted(SystemExit):
    """Training stopped because the machine is being taken away; the newest checkpoint is committed or was not reachable.

    It is a ``SystemExit`` with code 75, so an unaware script ends instead of evaluating or publishing a half-trained model.

    Args:
        message: for a person: step, store, and how to go on.
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
    """A person stopped the training with Ctrl-C, or with a notebook's "interrupt"; it has saved first.

    It is a ``KeyboardInterrupt`` as well, for programs that expect one.
    """
