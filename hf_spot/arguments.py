"""SpotArguments: the settings of a SpotCallback as one dataclass, which HfArgumentParser can parse."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from urllib.parse import urlsplit

from hf_spot.errors import ConfigError

NOTICE_NAMES = ("auto", "imds", "gcp", "azure", "alibaba", "slurm", "signal", "file", "none")
NOTICE_PLUGINS = "hf_spot.notices"  # the entry point group for sources from other packages
_TAKES_PARAMETER = ("file", "gcp", "slurm")
SAVE_ERROR_ANSWERS = ("stop", "go-on")
MISMATCH_ANSWERS = ("stop", "warn")
CHANGE_ANSWERS = ("go-on", "stop")
NAN_ANSWERS = ("stop", "rollback", "go-on")
CADENCES = ("fixed", "auto")


def notice_plugins() -> dict[str, EntryPoint]:
    """Return the notice sources of other installed packages, by their name for ``--notice``, without importing them."""
    return {one.name: one for one in entry_points(group=NOTICE_PLUGINS) if one.name not in NOTICE_NAMES}


@dataclass
class SpotArguments:
    """Settings shared by `SpotCallback` and `hf-spot launch`, validated at construction.

    Raises:
        ConfigError: a value can't be used; the message names the field.
    """

    notice: str = field(
        default="auto",
        metadata={
            "help": "Sources of preemption notices: a comma-separated list of imds, gcp[:SECONDS], azure, alibaba, "
            "slurm[:SECONDS], signal, file[:PATH], and the names of plugins; auto picks what this machine has; none disables "
            "notices."
        },
    )
    signals: str = field(
        default="SIGTERM,SIGUSR1,SIGHUP",
        metadata={
            "help": "Signals that the source 'signal' treats as a preemption notice. SIGHUP arrives when a terminal is closed "
            "or its connection is lost; under nohup it stays ignored."
        },
    )
    grace_s: float | None = field(
        default=None,
        metadata={
            "help": "Seconds between a signal that is a notice and the kill, if known (Kubernetes: "
            "terminationGracePeriodSeconds; default: $HF_SPOT_GRACE_S, or the platform's known value). If a notice states a "
            "deadline, that deadline counts instead."
        },
    )
    cadence: str = field(
        default="auto",
        metadata={
            "help": "When to save: 'auto' adds saves between Trainer's, at the interval that wastes the least time given what "
            "a save costs and how often this run is interrupted. Only hf_spot learns of an added save. It removes no save: "
            "use save_strategy='no' to leave all saves to it. 'fixed' follows Trainer's save_strategy alone."
        },
    )
    max_interval_s: float = field(
        default=1800.0,
        metadata={"help": "For --cadence auto: maximum seconds of training between two saves, even if interruptions are rare."},
    )
    time_between_interruptions_s: float = field(
        default=14400.0,
        metadata={
            "help": "For --cadence auto: expected seconds between two interruptions of this run. This estimate weighs as much "
            "as the first interruption recorded in the journal."
        },
    )
    share_without_notice: float = field(
        default=0.1,
        metadata={
            "help": "For --cadence auto: expected share of interruptions, from 0 to 1, without a notice or with one too short "
            "to save. This estimate weighs as much as the first two interruptions recorded in the journal."
        },
    )
    on_event: str | None = field(
        default=None,
        repr=False,
        metadata={
            "help": 'URL, such as a Slack webhook, to POST {"text": …} to when a launch claims the run, detects a notice, is '
            "preempted, finishes or fails. It is kept secret; $HF_SPOT_ON_EVENT also keeps it out of the list of processes."
        },
    )
    keep_checkpoints: int | None = field(
        default=3,
        metadata={"help": "Number of newest checkpoints to keep in the store, besides the best one; 0 keeps all."},
    )
    max_writes_per_hour: int = field(
        default=20_000,
        metadata={
            "help": "For --cadence auto: maximum number of writes to the store per hour that added saves may make ($0.10 per "
            "hour on S3). A commit makes one for each file, or each 64 MiB of it, and four more."
        },
    )
    keep_every: int | None = field(
        default=None,
        metadata={
            "help": "Keep for good, besides the newest, the first checkpoint at or after each multiple of so many steps "
            "(default: none)."
        },
    )
    keep_weights: bool = field(
        default=False,
        metadata={
            "help": "For --keep-every: once such a checkpoint is no longer among the newest, keep only the files that "
            "from_pretrained reads. No training resumes from them."
        },
    )
    drain_timeout_s: float = field(
        default=600.0,
        metadata={"help": "Maximum seconds to wait for the last upload at the end of training."},
    )
    peer_timeout_s: float = field(
        default=30.0,
        metadata={
            "help": "With several machines: seconds without a sign of life after which a machine is considered dead and the "
            "others exit with 75."
        },
    )
    # A full disk seldom empties by itself, and days of paid steps that can't be saved are worse than an error now. Plain
    # Trainer stops, too.
    on_save_error: str = field(
        default="stop",
        metadata={
            "help": "When a checkpoint can't be written to the local disk (full, read-only): 'stop' ends the training with an "
            "error once the current uploads are committed; 'go-on' continues the training and retries at the next save."
        },
    )
    on_mismatch: str = field(
        default="stop",
        metadata={
            "help": "When a resumed training differs from what was saved (weights, optimizer, scheduler, random states, "
            "counters, the next batch): 'stop' ends it before its first step, with exit code 2; 'warn' logs it and goes on."
        },
    )
    on_change: str = field(
        default="go-on",
        metadata={
            "help": "When settings, data or versions differ from those that the checkpoint was saved with: 'go-on' says what "
            "follows, in a line each, and continues; 'stop' ends the training before its first step, with exit code 2."
        },
    )
    on_nan: str = field(
        default="stop",
        metadata={
            "help": "When a weight that is trained, a state of the optimizer or the logged loss is NaN or infinite, no "
            "checkpoint is made: 'stop' ends the training, with exit code 2; 'rollback' resumes it from the newest checkpoint "
            "and passes over the steps around the first NaN; 'go-on' continues it, and saves again once all numbers are finite."
        },
    )
    max_rollbacks: int = field(
        default=3,
        metadata={"help": "For --on-nan rollback: how often a training may be rolled back; then it ends as with 'stop'."},
    )
    start_from: str | None = field(
        default=None,
        metadata={
            "help": "Start a new run from a checkpoint: RUN for the newest one of another run, RUN@STEP, or a folder such as "
            "out/checkpoint-500. Once the run has checkpoints of its own, it resumes from those."
        },
    )
    save_memory_gb: float | None = field(
        default=None,
        metadata={
            "help": "Host memory, in 10^9 bytes, for copies of a checkpoint, so that its files are written while training "
            "continues; what does not fit is written while training waits, and 0 saves as Trainer does (default: half of "
            "the free memory). Under hf-spot launch two more copies stay there, from which a killed training resumes, if "
            "three fit (default: if two take at most three tenths of the free memory)."
        },
    )
    upload_workers: int = field(default=4, metadata={"help": "Number of files uploaded or downloaded at the same time."})
    allow_batch_change: bool = field(
        default=False,
        metadata={
            "help": "Continue although the number of samples per optimizer step has changed: steps, learning rate and "
            "data then differ from those of an uninterrupted run."
        },
    )
    exact_on_any_gpus: bool = field(
        default=False,
        metadata={
            "help": "Make the result independent of the number of GPUs, bit for bit: a step keeps its micro-batches, "
            "their gradients are summed without rounding errors, and random numbers belong to the micro-batch. What can't be "
            "exact is refused or named at the start."
        },
    )
    allow_unfenced_store: bool = field(
        default=False,
        metadata={
            "help": "Use a store that does not support create-if-absent. Two machines can then damage the run: "
            "use it only if one machine at a time writes to the store."
        },
    )

    def __post_init__(self) -> None:
        names = [name.strip() for name in self.notice.split(",") if name.strip()]
        for name in names:
            base, _, text = name.partition(":")
            if base in NOTICE_NAMES and (not text or base in _TAKES_PARAMETER):
                continue
            plugins = {} if base in NOTICE_NAMES else notice_plugins()
            if base not in plugins:
                raise ConfigError(
                    f"notice={self.notice!r}: {name!r} is not a source of notices",
                    hint=f"one or more of {', '.join([*NOTICE_NAMES, *plugins])}, separated by commas (also "
                    "file:/a/path, gcp:SECONDS and slurm:SECONDS)",
                )
        if not names or (len(names) > 1 and {"auto", "none"} & set(names)):
            raise ConfigError(
                f"notice={self.notice!r}: name at least one source; 'auto' and 'none' can't be combined with others",
                hint="--notice imds,signal",
            )
        if self.grace_s is not None and not self.grace_s > 0:
            raise ConfigError(f"grace_s={self.grace_s} must be positive", hint="omit it if it is unknown")
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
        if self.keep_checkpoints is not None and self.keep_checkpoints < 0:
            raise ConfigError(
                f"keep_checkpoints={self.keep_checkpoints} (--save-total-limit) must not be negative", hint="0 keeps all"
            )
        if self.max_writes_per_hour < 1:
            raise ConfigError(
                f"max_writes_per_hour={self.max_writes_per_hour} must be at least 1", hint="--cadence fixed adds no saves"
            )
        if self.keep_every is not None and self.keep_every < 1:
            raise ConfigError(
                f"keep_every={self.keep_every} must be at least 1 step", hint="--keep-every 1000, or leave it out"
            )
        if self.keep_weights and self.keep_every is None:
            raise ConfigError(
                "keep_weights needs keep_every: it says of which checkpoints", hint="--keep-every 1000 --keep-weights"
            )
        if not self.drain_timeout_s > 0:
            raise ConfigError(f"drain_timeout_s={self.drain_timeout_s} must be positive", hint="--drain-timeout-s 600")
        if not self.peer_timeout_s >= 5:
            raise ConfigError(
                f"peer_timeout_s={self.peer_timeout_s} is less than 5: machines send a sign of life once a second",
                hint="--peer-timeout-s 30",
            )
        if self.on_save_error not in SAVE_ERROR_ANSWERS:
            raise ConfigError(
                f"on_save_error={self.on_save_error!r} must be one of {', '.join(SAVE_ERROR_ANSWERS)}",
                hint="--on-save-error go-on",
            )
        if self.on_mismatch not in MISMATCH_ANSWERS:
            raise ConfigError(
                f"on_mismatch={self.on_mismatch!r} must be one of {', '.join(MISMATCH_ANSWERS)}", hint="--on-mismatch warn"
            )
        if self.on_change not in CHANGE_ANSWERS:
            raise ConfigError(
                f"on_change={self.on_change!r} must be one of {', '.join(CHANGE_ANSWERS)}", hint="--on-change go-on"
            )
        if self.on_nan not in NAN_ANSWERS:
            raise ConfigError(f"on_nan={self.on_nan!r} must be one of {', '.join(NAN_ANSWERS)}", hint="--on-nan go-on")
        if self.max_rollbacks < 1:
            raise ConfigError(f"max_rollbacks={self.max_rollbacks} must be at least 1", hint="--on-nan stop makes none")
        if self.save_memory_gb is not None and not self.save_memory_gb >= 0:
            raise ConfigError(f"save_memory_gb={self.save_memory_gb} must not be negative", hint="0 saves as Trainer does")
        if self.upload_workers < 1:
            raise ConfigError(f"upload_workers={self.upload_workers} must be at least 1", hint="--upload-workers 4")


def check_hook(url: str, name: str) -> None:
    """Refuse a webhook URL that can't be posted to, without printing it: the URL is a secret.

    Args:
        url: URL of the webhook.
        name: name of the setting, for the error.

    Raises:
        ConfigError: it is not an HTTP URL.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isascii() and url.isprintable()
        usable = usable and " " not in url and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{name} is not an http:// or https:// URL", hint="--on-event https://hooks.slack.com/services/…")
