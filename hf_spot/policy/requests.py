"""How many writes commits make to an object store, what they cost, and how often they may be made. Pure.

Reads cost a tenth of writes, and a launch makes few of them; deletions are free.
"""

from __future__ import annotations

from collections.abc import Iterable

PART_BYTES = 64 << 20  # of `hf_spot.storage.s3_parts`; others are alike
WRITE_USD = 0.005 / 1000  # S3 Standard, us-east-1
PRICE_SOURCE = "https://aws.amazon.com/s3/pricing/"
_OF_AN_ENTRY = 2  # the entry of the journal, and the hint to it
_HEARTBEATS_PER_HOUR = 60
# A repository of the Hub takes 128 commits per hour, and each write is one, but for files, which go into one together. Half of
# them are left for Trainer's own saves, and for people: https://huggingface.co/docs/hub/rate-limits
_REPOSITORY_COMMITS_PER_HOUR = 64


def writes_of_entry(sizes_bytes: Iterable[int] = ()) -> int:
    """Return the number of writes for an entry of the journal, and the files that it commits, if any.

    Args:
        sizes_bytes: size of each file.
    """
    return _OF_AN_ENTRY + sum(1 if size <= PART_BYTES else -(-size // PART_BYTES) + 2 for size in sizes_bytes)


def writes_of_commit(sizes_bytes: Iterable[int]) -> int:
    """Return the number of writes for a commit, and for the pruning after it.

    Args:
        sizes_bytes: size of each file.
    """
    return writes_of_entry(sizes_bytes) + _OF_AN_ENTRY


def heartbeats_in(seconds: float) -> int:
    """Return the number of writes for the heartbeats of a launch that lasts so long."""
    return int(seconds / 3600 * _HEARTBEATS_PER_HOUR)


def shortest_interval_s(writes: int, most_per_hour: int, *, in_repository: bool = False) -> float:
    """Return the fewest seconds between two commits.

    Args:
        writes: number of writes that one makes.
        most_per_hour: number of writes that all of them may make in an hour.
        in_repository: each write is a commit of a repository on the Hub.
    """
    if in_repository:
        writes, most_per_hour = writes_of_commit((0,)), min(most_per_hour, _REPOSITORY_COMMITS_PER_HOUR)
    return 3600 * writes / most_per_hour
