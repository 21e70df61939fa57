"""What an error code of AWS means for a ladder, and the error that says so, in the words of `hf_spot.aws_errors`."""

from __future__ import annotations

from hf_spot import aws_errors
from hf_spot.aws_errors import TABLE, Kind
from hf_spot.errors import CloudError

NEXT_RUNG = frozenset(code for code, meaning in TABLE.items() if meaning.kind in (Kind.CAPACITY, Kind.QUOTA))
"""Another pool, or another rung, may answer differently."""

LATER = frozenset(code for code, meaning in TABLE.items() if meaning.kind is Kind.BUSY)
"""The same call may work later."""


def explain(code: str, message: str = "", *, doing: str = "", **known: str) -> CloudError:
    """The error for a code, with what to do about it.

    Args:
        code: as the service spells it, or the name of botocore's exception.
        message: what the service said.
        doing: what was tried, such as ``CreateFleet in us-east-1``.
        known: as in `hf_spot.aws_errors.explain`.
    """
    meaning = aws_errors.explain(code, 0, message, **known)
    what = meaning.means or "no reason was given"
    said = f" ({message})" if message and message != what else ""
    hint = meaning.hint or ("hf-spot doctor --job job.yaml" if meaning.kind is Kind.OTHER else "")
    return CloudError(f"{doing}{': ' if doing else ''}{what}: {code}{said}", hint=hint, code=code)
