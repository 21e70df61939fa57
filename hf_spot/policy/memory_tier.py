"""Whether a machine has room to keep copies of checkpoints in memory, from which a killed training resumes. Pure."""

from __future__ import annotations

COPIES = 2  # one is whole while the other one is written
_SHARE = 0.3  # of the free memory
_SHORT = 0.05  # of all memory


def why_no_room(
    size_bytes: int, held_bytes: int, limit_bytes: int | None, available_bytes: int, total_bytes: int
) -> str | None:
    """Return why no copies of a checkpoint of this size are kept in memory, for people; None if there is room for them.

    Args:
        size_bytes: of the checkpoint.
        held_bytes: memory that earlier copies have taken already.
        limit_bytes: memory for the copies of saves, as the user has set it; None if they have not.
        available_bytes: memory that may still be allocated on this machine, or in this container.
        total_bytes: all memory of either.
    """
    needed = COPIES * size_bytes
    if limit_bytes is not None and needed + size_bytes > limit_bytes:  # that of the save under way is the third
        return f"--save-memory-gb {limit_bytes / 1e9:g} has no room for three copies of {size_bytes / 1e9:.2g} GB"
    if available_bytes < _SHORT * total_bytes:
        return f"only {available_bytes / 1e9:.2g} GB of memory are free"
    if limit_bytes is None and needed - held_bytes > _SHARE * available_bytes:
        return f"two copies of {size_bytes / 1e9:.2g} GB are too much for {available_bytes / 1e9:.2g} GB of free memory"
    return None
