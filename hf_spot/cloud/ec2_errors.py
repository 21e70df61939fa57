"""How an AWS error code affects a ladder, and the CloudError for it, explained by `hf_spot.aws_errors`."""

from __future__ import annotations

from hf_spot import aws_errors
from hf_spot.aws_errors import SOURCE_FAILS, TABLE, Kind
from hf_spot.errors import CloudError

NEXT_RUNG = frozenset(code for code, meaning in TABLE.items() if meaning.kind in (Kind.CAPACITY, Kind.QUOTA))
"""Codes after which another pool, or another rung, may succeed."""

LATER = frozenset(code for code, meaning in TABLE.items() if meaning.kind is Kind.BUSY)
"""Codes after which the same call may work later."""

OF_CREDENTIALS = frozenset(code for code, meaning in TABLE.items() if meaning is SOURCE_FAILS)
"""Codes for a program or service that should give credentials and does not: it may work later, after a login."""


def explain(code: str, message: str = "", *, doing: str = "", **known: str) -> CloudError:
    """Return the error for a code, with a hint.

    Args:
        code: as the service spells it, or the name of botocore's exception.
        message: the service's own message.
        doing: the attempted action, such as ``CreateFleet in us-east-1``.
        known: as in `hf_spot.aws_errors.explain`.
    """
    meaning = aws_errors.explain(code, 0, message, **known)
    what = meaning.means or "no reason was given"
    detail = f" ({message})" if message and message != what else ""
    hint = meaning.hint or ("hf-spot doctor --job job.yaml" if meaning.kind is Kind.OTHER else "")
    return CloudError(f"{doing}{': ' if doing else ''}{what}: {code}{detail}", hint=hint, code=code)
