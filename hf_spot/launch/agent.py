"""``python -m hf_spot.launch.agent [OPTIONS] SCRIPT``: ``accelerate launch``, whose collector rests while torch is imported.

What stays is left alone, as in the launcher and in the ranks: looking through it costs a processor second, before the ranks
start and when all has ended.
"""

from __future__ import annotations

import gc

gc.disable()
from accelerate.commands.launch import main  # noqa: E402

gc.freeze()
gc.enable()

if __name__ == "__main__":
    main()
