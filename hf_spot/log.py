"""hf_spot's log: the logger ``hf_spot``, whose lines appear exactly once, whatever a script has set up for its own.

Like those of transformers, its handler and its level come with the import, and no root logger is touched:

- A handler of the script's that takes a line (at the root, as `logging.basicConfig` puts it there before us or after us, or at
  the logger ``hf_spot``) shows it, in the script's format. Where there is none, the line goes to standard error.
- The level is the one that ``transformers.utils.logging`` has been set to, else that of ``TRANSFORMERS_VERBOSITY`` or
  ``ACCELERATE_LOG_LEVEL``, else INFO; ranks other than 0 show warnings and errors only. A level that somebody sets at the
  logger ``hf_spot`` itself overrides all of these.
- What must not be missed, `alert` and `log_always` show at every level.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

log = logging.getLogger("hf_spot")

_EVERYTHING = 1  # at the logger: nobody has set a level there, and `_is_wanted` decides
_HANDLER_NAME = "hf_spot"
_TRANSFORMERS_LEVELS = {
    "detail": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # as accelerate looks for it


def alert(text: str) -> None:
    """Log a warning that stands out, at every level."""
    log_always(logging.WARNING, "%s", f">>> {text} <<<")


def log_always(level: int, message: str, *args: object, exc_info: bool = False) -> None:
    """Log a line that must not be missed: it goes to standard error where the log would keep it to itself.

    Args:
        level: of `logging`.
        message: with ``%`` for each of ``args``.
        args: for the message.
        exc_info: adds the traceback of the exception that is being handled.
    """
    heard_by_a_handler = any(map(_is_own, log.handlers)) or _is_taken(level)
    if log.isEnabledFor(level) and _is_wanted(level) and heard_by_a_handler:
        log.log(level, message, *args, exc_info=exc_info, stacklevel=2)
    else:
        AboveBars().handle(log.makeRecord(log.name, level, __file__, 0, message, args, sys.exc_info() if exc_info else None))


def warn_for_all(message: str, *args: object) -> None:
    """Log a warning that every rank has: rank 0 shows it, for all of them."""
    if is_first_rank():
        log.warning(message, *args, stacklevel=2)


def is_first_rank() -> bool:
    """Tell whether this process is rank 0, or the only one, as its environment has it."""
    return next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0") == "0"


def shown_level(transformers_level: int, environ: Mapping[str, str], *, is_first_rank: bool) -> int:
    """Return the lowest level that is shown.

    WARNING is where transformers begins, and where each Trainer sets it again: as long as no variable names it, it is nobody's
    wish.

    Args:
        transformers_level: of the logger ``transformers``; NOTSET before it is imported.
        environ: the environment.
        is_first_rank: whether this is rank 0, which speaks for all.
    """
    named = _TRANSFORMERS_LEVELS.get(environ.get("TRANSFORMERS_VERBOSITY", ""))
    of_accelerate = logging.getLevelName(environ.get("ACCELERATE_LOG_LEVEL", "").upper())
    if transformers_level not in (logging.NOTSET, logging.WARNING):
        level = transformers_level
    elif named is not None:
        level = transformers_level or named
    else:
        level = of_accelerate if isinstance(of_accelerate, int) else logging.INFO
    return level if is_first_rank else max(level, logging.WARNING)


def level_now() -> int:
    """Return `shown_level` of this process."""
    return shown_level(logging.getLogger("transformers").level, os.environ, is_first_rank=is_first_rank())


class AboveBars(logging.Handler):
    """Writes hf_spot's log to standard error, each line on a line of its own above the bars of a training: Trainer's would
    have it begin behind what it has drawn. In a notebook it goes into the cell that runs.

    Args:
        name: of the handler.
    """

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.set_name(name)
        self.setFormatter(logging.Formatter("hf-spot: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """As `logging` calls it."""
        try:
            text = self.format(record)
            if sys.stderr.isatty():
                text = f"\r\033[K{text}"  # the bar may be another process's
            if _bars():
                _tqdm().write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


class _WhereNobodyElseDoes(AboveBars):
    """Writes what no other handler takes; one of those that write to the terminal finds its line free of bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """As `logging` calls it."""
        if not _is_taken(record.levelno):
            super().emit(record)
        elif any(_writes_to_terminal(one) for one in _others()):
            for bar in _bars():
                if bar.fp in (sys.stdout, sys.stderr):
                    bar.clear()  # it is drawn again with its next step


def _others() -> Iterator[logging.Handler]:
    """Yield the handlers that see hf_spot's records beside our own."""
    logger: logging.Logger | None = log
    while logger is not None:
        for one in logger.handlers:
            if not _is_own(one) and not isinstance(one, logging.NullHandler):
                yield one
        logger = logger.parent if logger.propagate else None


def _is_own(handler: logging.Handler) -> bool:
    return handler.get_name() == _HANDLER_NAME


def _is_taken(level: int) -> bool:
    return any(level >= one.level for one in _others())


def _writes_to_terminal(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)


def _is_wanted(level: int) -> bool:
    return log.level != _EVERYTHING or level >= level_now()


def _tqdm() -> Any:
    """Return tqdm's class, or None: who never imported it has no bars."""
    module = sys.modules.get("tqdm.std")
    return getattr(module, "tqdm", None)


def _bars() -> list[Any]:
    return list(getattr(_tqdm(), "_instances", ()))


def _by_level(record: logging.LogRecord) -> bool:
    return _is_wanted(record.levelno)


if not any(map(_is_own, log.handlers)):  # as after `importlib.reload`
    log.addHandler(_WhereNobodyElseDoes(_HANDLER_NAME))
    log.addFilter(_by_level)
    if log.level == logging.NOTSET:
        log.setLevel(_EVERYTHING)
