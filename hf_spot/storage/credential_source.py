"""Handle errors of credential sources: files, helper programs, login services, metadata services. They may raise anything."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from hf_spot.errors import SpotError, without_passwords

_LONGEST_WORDS = 300
_SPEAK_IN_SENTENCES = ("botocore", "google", "azure")


class SourceFailed(Exception):
    """A source of credentials failed. The message has the source's own text, in one line; ``hint`` is the command to type.

    Args:
        error: what the source raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(f"the source of the credentials fails: {_own_words(error)}")
        self.hint = _hint(error)


@contextlib.contextmanager
def credential_source() -> Iterator[None]:
    """Raise `SourceFailed` for any exception that a source of credentials raises within the block."""
    try:
        yield
    except (SpotError, SourceFailed):
        raise
    except Exception as error:  # there is no common base: each helper, file and service has its own
        raise SourceFailed(error) from error


class GuardedSource:
    """A wrapper around a client library's source of credentials. It raises `SourceFailed` for any exception of the source.

    Args:
        source: the library's object. Its methods and properties are passed on.
        passed_on: exceptions that are passed on unchanged, because the library's own client handles them.
    """

    def __init__(self, source: Any, passed_on: tuple[type[Exception], ...] = ()) -> None:
        self._source = source
        self._passed_on = passed_on

    def __getattr__(self, name: str) -> Any:
        with self._guarded(AttributeError):  # `hasattr` asks for what is missing
            value = getattr(self._source, name)
        return self._guard(value) if callable(value) else value

    def _guard(self, act: Any) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            with self._guarded():
                return act(*args, **kwargs)

        return guarded

    @contextlib.contextmanager
    def _guarded(self, *passed: type[Exception]) -> Iterator[None]:
        try:
            with credential_source():
                yield
        except SourceFailed as failed:
            passed_on(failed, *passed, *self._passed_on)
            raise


def passed_on(failed: SourceFailed, *kinds: type[Exception]) -> None:
    """Raise the source's own exception if it is one of ``kinds``."""
    if isinstance(failed.__cause__, kinds):
        raise failed.__cause__ from None


def _own_words(error: Exception) -> str:
    said = " ".join(without_passwords(str(error)).split())
    sentence = said and type(error).__module__.partition(".")[0] in _SPEAK_IN_SENTENCES
    return (said if sentence else f"{type(error).__name__}: {said}".rstrip(": "))[:_LONGEST_WORDS]


def _hint(error: Exception) -> str:
    if isinstance(error, EOFError) or "MFA" in str(error):
        return "it asks for a code (MFA), and there is no terminal: log in first, aws sso login or aws sts get-session-token"
    if isinstance(error, json.JSONDecodeError):
        return "what the helper program (credential_process, credential_source) prints must be JSON: run it by hand"
    if isinstance(error, OSError):
        return f"is {error.filename} there, and readable by this user?" if error.filename else "run the helper program by hand"
    return ""
