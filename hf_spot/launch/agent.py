"""``python -m hf_spot.launch.agent [OPTIONS] SCRIPT``: ``accelerate launch``, whose collector rests while torch is imported.

What stays is left alone, as in the launcher and in the ranks: looking through it costs a processor second, before the ranks
start and when all has ended.
"""

from __future__ import annotations

import gc
import logging

gc.disable()
from accelerate.commands.launch import main  # noqa: E402

gc.freeze()
gc.enable()


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("The following values were not passed to `accelerate launch`")


if __name__ == "__main__":
    logging.getLogger(main.__module__).addFilter(_is_news)  # the launcher has said it, once for all restarts
    main()
