"""SpotArguments: every setting of a SpotCallback, in one dataclass that HfArgumentParser understands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from urllib.parse import urlsplit

from hf_spot.errors import ConfigError

NOTICE_NAMES = ("auto", "imds", "gcp", "azure", "alibaba", "slurm", "signal", "file", "none")
NOTICE_PLUGINS = "hf_spot.notices"  # the group of entry points that name further sources
_TAKES_TEXT = ("file", "gcp", "slurm")
SAVE_ERROR_ANSWERS = ("stop", "go-on")
CADENCES = ("fixed", "auto")


def notice_plugins() -> dict[str, EntryPoint]:
    """Sources of notices in other installed packages, by the name for ``--notice``. None is imported by this."""
    return {one.name: one for one in entry_points(group=NOTICE_PLUGINS) if one.name not in NOTICE_NAMES}


@dataclass
class SpotArguments:
    """Settings shared by `SpotCallback` and `hf-spot launch`. Everything is checked at construction.

    Raises:
        ConfigError: a value that can't be used, naming the field.
    """

    notice: str = field(
        default="auto",
        metadata={
            "help": "Where to listen for preemption: a comma-separated list of imds, gcp[:SECONDS], azure, alibaba, "
            "slurm[:SECONDS], signal, file[:PATH], and the names of plugins; auto picks what this machine has; none listens to "
            "nothing."
        },
    )
    signals: str = field(
        default="SIGTERM,SIGUSR1",
        metadata={"help": "Signals that mean preemption, for the source 'signal'."},
    )
    grace_s: float | None = field(
        default=None,
        metadata={
            "help": "Seconds between such a signal and the kill, if you know them (Kubernetes: "
            "terminationGracePeriodSeconds; default: $HF_SPOT_GRACE_S, or what the platform is known to give). A notice that "
            "states its own deadline is believed instead."
        },
    )
    # A run that saves as its TrainingArguments say must not save otherwise after an upgrade.
    cadence: str = field(
        default="fixed",
        metadata={
            "help": "When to save: 'fixed' leaves it to Trainer's save_strategy; 'auto' adds saves between Trainer's, as often "
            "as is worth it by what a save costs here and how often this run is interrupted. It removes none: "
            "save_strategy='no' leaves everything to it."
        },
    )
    max_interval_s: float = field(
        default=1800.0,
        metadata={
            "help": "For --cadence auto: seconds of training after which a save is due, however cheap interruptions are."
        },
    )
    time_between_interruptions_s: float = field(
        default=14400.0,
        metadata={
            "help": "For --cadence auto: seconds between two interruptions of this run, as far as you know. It counts as much "
            "as the first interruption that the journal tells of."
        },
    )
    share_without_notice: float = field(
        default=0.1,
        metadata={
            "help": "For --cadence auto: share of interruptions, from 0 to 1, that come without a notice or too soon after it, "
            "as far as you know. It counts as much as the first two interruptions that the journal tells of."
        },
    )
    on_event: str | None = field(
        default=None,
        repr=False,
        metadata={
            "help": 'URL that is posted {"text": …} when a launch claims the run, hears a notice, is preempted, finishes or '
            "fails, such as a Slack webhook. It is kept secret; $HF_SPOT_ON_EVENT keeps it out of the list of processes, too."
        },
    )
    save_total_limit: int | None = field(
        default=3,
        metadata={"help": "Newest checkpoints kept in the store, besides the best one; 0 keeps all."},
    )
    drain_timeout_s: float = field(
        default=600.0,
        metadata={"help": "At the end of training, how many seconds the last upload may take before giving up."},
    )
    peer_timeout_s: float = field(
        default=30.0,
        metadata={
            "help": "With several machines: seconds without a word after which one is taken for dead, and the others end "
            "with 75."
        },
    )
    # A full disk seldom empties by itself, and days of paid steps that nobody can save are worse than an error now: Trainer
    # alone stops, too.
    on_save_error: str = field(
        default="stop",
        metadata={
            "help": "When a checkpoint can't be written to the local disk (full, read-only): 'stop' ends the training with an "
            "error once the uploads under way are committed; 'go-on' trains on, and the next save tries again."
        },
    )
    save_memory_gb: float | None = field(
        default=None,
        metadata={
            "help": "Host memory, in 10^9 bytes, that copies of a checkpoint may take so that its files are written while "
            "training goes on; what does not fit is written while it waits, and 0 saves as Trainer does (default: half of "
            "what is free)."
        },
    )
    upload_workers: int = field(default=4, metadata={"help": "Files uploaded or downloaded at the same time."})
    allow_batch_change: bool = field(
        default=False,
        metadata={
            "help": "Go on although an optimizer step has another number of samples than before: steps, learning rate and "
            "data then differ from those of an uninterrupted run."
        },
    )
    allow_unfenced_store: bool = field(
        default=False,
        metadata={
            "help": "Use a store that ignores create-if-absent. Two machines can then damage the run: "
            "only for a store that one machine at a time uses."
        },
    )

    def __post_init__(self) -> None:
        names = [name.strip() for name in self.notice.split(",") if name.strip()]
        for name in names:
            base, _, text = name.partition(":")
            if base in NOTICE_NAMES and (not text or base in _TAKES_TEXT):
                continue
            plugins = {} if base in NOTICE_NAMES else notice_plugins()
            if base not in plugins:
                raise ConfigError(
                    f"notice={self.notice!r}: {name!r} is no source of notices",
                    hint=f"one or more of {', '.join([*NOTICE_NAMES, *plugins])}, separated by commas (file may be "
                    "file:/a/path; gcp and slurm may be gcp:SECONDS and slurm:SECONDS)",
                )
        if not names or (len(names) > 1 and {"auto", "none"} & set(names)):
            raise ConfigError(
                f"notice={self.notice!r}: 'auto' and 'none' stand alone, and something must be named",
                hint="--notice imds,signal",
            )
        if self.grace_s is not None and not self.grace_s > 0:
            raise ConfigError(f"grace_s={self.grace_s} must be positive", hint="leave it out when it is not known")
        if self.cadence not in CADENCES:
            raise ConfigError(f"cadence={self.cadence!r} must be one of {', '.join(CADENCES)}", hint=f"--cadence {CADENCES[1]}")
        for name in ("max_interval_s", "time_between_interruptions_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive", hint=f"--{name.replace('_', '-')} 3600")
        if not 0 <= self.share_without_notice <= 1:
            raise ConfigError(
                f"share_without_notice={self.share_without_notice} must be from 0 to 1", hint="--share-without-notice 0.1"
            )
        if self.on_event is not None:
            check_hook(self.on_event, "on_event")
        if self.save_total_limit is not None and self.save_total_limit < 0:
            raise ConfigError(f"save_total_limit={self.save_total_limit} must not be negative", hint="0 keeps all")
        if not self.drain_timeout_s > 0:
            raise ConfigError(f"drain_timeout_s={self.drain_timeout_s} must be positive", hint="--drain-timeout-s 600")
        if not self.peer_timeout_s >= 5:
            raise ConfigError(
                f"peer_timeout_s={self.peer_timeout_s} is less than 5: machines say each second that they live",
                hint="--peer-timeout-s 30",
            )
        if self.on_save_error not in SAVE_ERROR_ANSWERS:
            raise ConfigError(
                f"on_save_error={self.on_save_error!r} must be one of {', '.join(SAVE_ERROR_ANSWERS)}",
                hint="--on-save-error go-on",
            )
        if self.save_memory_gb is not None and not self.save_memory_gb >= 0:
            raise ConfigError(f"save_memory_gb={self.save_memory_gb} must not be negative", hint="0 saves as Trainer does")
        if self.upload_workers < 1:
            raise ConfigError(f"upload_workers={self.upload_workers} must be at least 1", hint="--upload-workers 4")


def check_hook(url: str, name: str) -> None:
    """Refuses what can't be posted to, without saying what it is: the URL of a webhook is a secret.

    Args:
        url: of the webhook.
        name: of the setting.

    Raises:
        ConfigError: it is no HTTP URL.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isascii() and url.isprintable()
        usable = usable and " " not in url and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{name} is no http:// or https:// URL", hint="--on-event https://hooks.slack.com/services/…")
