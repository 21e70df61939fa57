"""Seal journal entries, so that damaged or forged ones are detected.

Without a key the seal is the SHA-256 of the entry: it reveals damage. With ``$HF_SPOT_JOURNAL_KEY`` it is an HMAC-SHA-256
(RFC 2104): someone who can write to the bucket but does not have the key can't make an entry, and so can't make a launch
restore a file that no launch has committed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from typing import Any

from hf_spot.errors import ConfigError, CorruptCheckpoint, Untrusted

VARIABLE = "HF_SPOT_JOURNAL_KEY"
LARGEST = 2**63 - 1  # the largest number that a journal may hold, whatever it counts
_LONG = re.compile(r"\d{19}")
_SHORTEST = 16  # characters; shorter ones can be guessed
_SEAL = re.compile(rb',"seal":"(sha256|hmac-sha256):([0-9a-f]{64})"\}')


def key_from(environ: Mapping[str, str]) -> bytes | None:
    """Return the key in ``$HF_SPOT_JOURNAL_KEY``, or None. Raises ConfigError for a key that is too short to be safe."""
    value = environ.get(VARIABLE, "")
    if value and len(value) < _SHORTEST:
        raise ConfigError(
            f"${VARIABLE} has only {len(value)} characters", hint=f'export {VARIABLE}="$(openssl rand -hex 32)", and keep it'
        )
    return value.encode() or None


def seal(fields: Mapping[str, Any], key: bytes | None) -> bytes:
    """Return the fields as JSON, with the seal as the last field."""
    body = json.dumps(fields, separators=(",", ":")).encode()
    return body[:-1] + f',"seal":"{_digest(body, key)}"}}'.encode()


def unseal(data: bytes, key: bytes | None) -> Any:
    """Return the fields that were sealed.

    Raises:
        CorruptCheckpoint: these bytes are not sealed, or are damaged.
        Untrusted: they were sealed with another key, or with none.
    """
    end = max(data.rfind(b',"seal":"'), 0)
    match = _SEAL.fullmatch(data[end:])
    if match is None:
        raise CorruptCheckpoint(f"not a journal entry: {data[:80]!r}")
    body = data[:end] + b"}"
    signed = match[1] == b"hmac-sha256"
    if signed and key is None:
        raise Untrusted("the run's journal is signed, and there is no key here", hint=f"export {VARIABLE}=…")
    if not signed and key is not None:
        raise Untrusted(
            f"an entry of the run's journal is not signed, and ${VARIABLE} is set: who wrote it?",
            hint=f"for a run that was begun without the key: unset {VARIABLE}",
        )
    if not hmac.compare_digest(_digest(body, key).encode(), match[1] + b":" + match[2]):
        if signed:
            raise Untrusted("an entry of the run's journal was signed with another key", hint=f"is ${VARIABLE} the run's?")
        raise CorruptCheckpoint(f"a damaged journal entry: {data[:80]!r}")
    try:
        text = body.decode()
        return json.loads(text, parse_int=_counted) if _LONG.search(text) else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"not a journal entry: {data[:80]!r} ({error})") from error


def _counted(digits: str) -> int:
    number = int(digits)
    if abs(number) > LARGEST:
        raise ValueError(f"a number that is too large: {digits[:30]}")
    return number


def _digest(body: bytes, key: bytes | None) -> str:
    if key is None:
        return f"sha256:{hashlib.sha256(body).hexdigest()}"
    return f"hmac-sha256:{hmac.new(key, body, hashlib.sha256).hexdigest()}"
