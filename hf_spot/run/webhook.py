"""Post a run's events to a webhook, as ``{"text": …}``, which Slack, Mattermost and Discord (``/slack``) accept."""

from __future__ import annotations

import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import Future, wait
from urllib.parse import urlsplit

from hf_spot.arguments import SpotArguments, check_hook
from hf_spot.storage.threads import Workers
from hf_spot.timeouts import WEBHOOK_LAST_WORD_S

log = logging.getLogger("hf_spot")

VARIABLE = "HF_SPOT_ON_EVENT"
_TIMEOUT_S = 5.0
_PAUSE_S = 1.0


def hook_url(arguments: SpotArguments, environ: Mapping[str, str]) -> str | None:
    """Return the URL to post to, from the settings or ``$HF_SPOT_ON_EVENT``; None if neither has one. Raises ConfigError."""
    if arguments.on_event is not None or not environ.get(VARIABLE):
        return arguments.on_event
    check_hook(environ[VARIABLE], f"${VARIABLE}")
    return environ[VARIABLE]


class Hook:
    """Posts one event after the other, in a thread. Only `close` waits for it, for at most `WEBHOOK_LAST_WORD_S`.

    The URL is a secret (Slack's contains the token) and appears in no message.

    Args:
        url: to post to; None posts nothing.
        about: begins every text, such as the URL of the run.
    """

    def __init__(self, url: str | None, about: str) -> None:
        self._url = url
        self._about = about
        self._worker = Workers(1, "hf_spot-hook") if url else None
        self._told: list[Future[None]] = []

    def tell(self, text: str) -> None:
        """Post ``text`` soon. If that fails, try once more after a second; if that fails too, log one line."""
        if self._worker is not None:
            self._told.append(self._worker.submit(self._post_or_log, f"hf_spot: {self._about}: {text}"))

    def close(self, patience_s: float | None = None) -> None:
        """Wait until all events are posted, for at most ``patience_s`` seconds (default: `WEBHOOK_LAST_WORD_S`)."""
        if self._worker is not None:
            wait(self._told, WEBHOOK_LAST_WORD_S if patience_s is None else patience_s)
            self._worker.shutdown(wait=False, cancel_futures=True)

    def _post_or_log(self, text: str) -> None:
        try:
            try:
                self._post(text)
            except Exception:
                time.sleep(_PAUSE_S)
                self._post(text)
        except Exception as error:  # whatever it is, the training continues
            log.warning("the webhook at %s did not receive %r: %s", urlsplit(self._url or "").hostname, text, _in_words(error))

    def _post(self, text: str) -> None:
        body, headers = json.dumps({"text": text}).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url or "", body, headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            pass


def _in_words(error: Exception) -> str:
    """Return a description of the error, without its own text, which may contain the URL."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return (reason.strerror if isinstance(reason, OSError) else None) or type(reason).__name__
