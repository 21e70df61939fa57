"""A bar for transfers, quiet when nobody looks at a terminal."""

from __future__ import annotations

from tqdm.auto import tqdm

from hf_spot.storage.store import Progress


def bar(what: str, size_bytes: int) -> Progress:
    """A callback that shows how much of ``size_bytes`` has moved, and clears the line at the end.

    Args:
        what: one word or two.
        size_bytes: of everything that is to be moved.
    """
    shown = tqdm(total=size_bytes, unit="B", unit_scale=True, desc=f"hf-spot {what}", disable=None, leave=False)

    def moved(count: int) -> None:
        shown.update(count)
        if shown.n >= size_bytes:
            shown.close()

    return moved
