"""hf_spot's log: the logger ``hf_spot``. Its lines appear exactly once, whatever logging a script has set up.

As in transformers, the handler and the level are set by the import, and the root logger is not changed:

- If a handler of the script accepts a line, that handler shows it, in the script's format. It may be at the logger ``hf_spot``
  or at the root, where `logging.basicConfig` puts it, before or after this import. Otherwise the line goes to standard error.
- The level is the one in ``HF_SPOT_LOG_LEVEL``, else the one set by ``transformers.utils.logging``, else by
  ``TRANSFORMERS_VERBOSITY`` or ``ACCELERATE_LOG_LEVEL``, else INFO. Ranks other than 0 show only warnings and errors. A level
  set at the logger ``hf_spot`` itself overrides all of these.
- `alert` and `log_always` show lines that must not be missed at every level.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from hf_spot.terminal import Style, paint

log = logging.getLogger("hf_spot")

_EVERYTHING = 1  # the logger's level until a user sets one: meanwhile `_is_wanted` decides
_HANDLER_NAME = "hf_spot"
_ALERT = ">>> "
LEVEL_VARIABLE = "HF_SPOT_LOG_LEVEL"
_TRANSFORMERS_LEVELS = {
    "detail": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # those that accelerate reads


def alert(text: str) -> None:
    """Log a warning that stands out, at every level."""
    log_always(logging.WARNING, "%s", f"{_ALERT}{text} <<<")


def log_always(level: int, message: str, *args: object, exc_info: bool = False) -> None:
    """Log a line that must not be missed: if the log would not show it, it goes to standard error.

    Args:
        level: a level of `logging`.
        message: with a ``%`` placeholder for each of ``args``.
        args: for the message.
        exc_info: add the traceback of the exception that is being handled.
    """
    is_shown_by_a_handler = any(map(_is_own, log.handlers)) or _is_taken(level)
    if log.isEnabledFor(level) and _is_wanted(level) and is_shown_by_a_handler:
        log.log(level, message, *args, exc_info=exc_info or None, stacklevel=2)  # not False: handlers compare it with None
    else:
        AboveBars().handle(log.makeRecord(log.name, level, __file__, 0, message, args, sys.exc_info() if exc_info else None))


def warn_for_all(message: str, *args: object) -> None:
    """Log a warning that applies to all ranks; only rank 0 shows it."""
    if is_first_rank():
        log.warning(message, *args, stacklevel=2)


def is_first_rank() -> bool:
    """Return whether this process is rank 0, or the only one, according to its environment."""
    return next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0") == "0"


def shown_level(transformers_level: int, environ: Mapping[str, str], *, is_first_rank: bool) -> int:
    """Return the lowest level that is shown.

    WARNING is the default of transformers, which each Trainer sets again: unless a variable asks for it, it does not count as
    the user's choice.

    Args:
        transformers_level: of the logger ``transformers``; NOTSET before it is imported.
        environ: the environment.
        is_first_rank: whether this is rank 0, which logs for all ranks.
    """
    of_hf_spot = _TRANSFORMERS_LEVELS.get(environ.get(LEVEL_VARIABLE, "").lower())
    named = _TRANSFORMERS_LEVELS.get(environ.get("TRANSFORMERS_VERBOSITY", ""))
    of_accelerate = logging.getLevelName(environ.get("ACCELERATE_LOG_LEVEL", "").upper())
    if of_hf_spot is not None:
        level = of_hf_spot
    elif transformers_level not in (logging.NOTSET, logging.WARNING):
        level = transformers_level
    elif named is not None:
        level = transformers_level or named
    else:
        level = of_accelerate if isinstance(of_accelerate, int) else logging.INFO
    return level if is_first_rank else max(level, logging.WARNING)


def level_now() -> int:
    """Return the lowest level that is shown in this process."""
    return shown_level(logging.getLogger("transformers").level, os.environ, is_first_rank=is_first_rank())


class AboveBars(logging.Handler):
    """Writes hf_spot's log to standard error, each line above a training's progress bars: otherwise it would begin behind what
    Trainer's bar has drawn. In a notebook it appears in the output of the running cell.

    Args:
        name: the handler's name.
    """

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.set_name(name)
        self.setFormatter(logging.Formatter("hf-spot: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, as `logging.Handler.emit` does."""
        try:
            text = _in_colour(self.format(record), record)
            if sys.stderr.isatty():
                text = f"\r\033[K{text}"  # the bar may belong to another process
            if _bars():
                _tqdm().write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


class _WhereNobodyElseDoes(AboveBars):
    """Writes the records that no other handler accepts, and clears the bars for a handler that writes to the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, unless another handler does."""
        if not _is_taken(record.levelno, record):
            super().emit(record)
        elif any(_writes_to_terminal(one) for one in _others()):
            for bar in _bars():
                if bar.fp in (sys.stdout, sys.stderr):
                    bar.clear()  # it is drawn again with its next step


def _in_colour(text: str, record: logging.LogRecord) -> str:
    if record.levelno < logging.WARNING:
        return text
    is_alert = record.getMessage().startswith(_ALERT)
    return paint(text, Style.ALERT if is_alert else Style.FAIL if record.levelno >= logging.ERROR else Style.WARN, sys.stderr)


def _others() -> Iterator[logging.Handler]:
    """Yield the handlers, other than hf_spot's own, that receive hf_spot's records."""
    logger: logging.Logger | None = log
    while logger is not None:
        for one in logger.handlers:
            if not _is_own(one) and not isinstance(one, logging.NullHandler):
                yield one
        logger = logger.parent if logger.propagate else None


def _is_own(handler: logging.Handler) -> bool:
    return handler.get_name() == _HANDLER_NAME


def _is_taken(level: int, record: logging.LogRecord | None = None) -> bool:
    # A handler's filter may let only the program's own messages through, as axolotl's does.
    return any(level >= one.level and (record is None or one.filter(record)) for one in _others())


def _writes_to_terminal(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)


def _is_wanted(level: int) -> bool:
    return log.level != _EVERYTHING or level >= level_now()


def _tqdm() -> Any:
    """Return tqdm's class; None if it was never imported, so that there are no bars."""
    module = sys.modules.get("tqdm.std")
    return getattr(module, "tqdm", None)


def _bars() -> list[Any]:
    return list(getattr(_tqdm(), "_instances", ()))


def _by_level(record: logging.LogRecord) -> bool:
    return _is_wanted(record.levelno)


if not any(map(_is_own, log.handlers)):  # there is one after `importlib.reload`
    log.addHandler(_WhereNobodyElseDoes(_HANDLER_NAME))
    log.addFilter(_by_level)
    if log.level == logging.NOTSET:
        log.setLevel(_EVERYTHING)
