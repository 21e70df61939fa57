"""A job file with every key, and what each means: ``hf-spot provision --example`` prints it.

Pure. `hf_spot.cloud.job` defines the keys and their defaults; optional ones have their default here, as comments.
"""

from __future__ import annotations

from dataclasses import MISSING, fields

from hf_spot.cloud.job import DEFAULT_LADDER, HUB_SECTION, Rung

_REQUIRED = {
    "name": ("my-run", "names and tags of all resources"),
    "store": ("s3://bucket/runs/my-run", "URL of the run"),
    "run": ("hf-spot launch train.py", "shell commands that start the training; $HF_SPOT_STORE is set for them"),
    "region": ("us-east-1", "the preferred region, ideally that of the bucket"),
    "max_spend": ("150", "dollars for all machines of the run, over its whole life"),
    "instance_profile": ("my-role", "role with the policy of `hf-spot doctor iam`; a store that needs none does without"),
}
_OPTIONAL = {
    "setup": ("git clone https://github.com/me/my-training .", "shell commands that a new machine runs first, as root"),
    "requirements": ("[hf_spot]", "what pip installs before that; [] if the image has hf_spot"),
    "image_id": ("resolve:ssm:…", "an AMI's id or an SSM parameter, or one for each region (default: AWS's deep learning AMI)"),
    "key_name": ("my-key", "an EC2 key pair, or one for each region (default: none)"),
    "security_groups": ("default", "[sg-…], or a list for each region; default blocks all inbound traffic"),
    "subnets": ("default", "[subnet-…], or a list for each region; default is each zone's default subnet"),
    "disk_gb": ("200", "size of the encrypted root disk"),
    "tags": ("{team: nlp}", "more tags for all resources (default: none)"),
    "strategy": ("price-capacity-optimized", "or capacity-optimized: how AWS chooses among a rung's pools"),
    "hours": ("20", "estimated duration without interruptions, for cost and deadline (default: unknown)"),
    "deadline": ("2030-01-31T18:00:00Z", "when the training must be finished (default: none)"),
    "machines": ("2:8", "how many train together: a number, or at least 2 and at most 8 (default: 1)"),
    "placement": ("zone", "or cluster (a placement group), or region (any of its zones): where several machines are"),
    "on_finish": ("shutdown", "or stay: what a machine does when its work is done"),
    "ladder": ("", "rungs, tried in order (default: these)"),
}
_RUNG = {
    "instance_types": "three or more, if AWS is to score the places",
    "market": "spot or on-demand",
    "regions": "preferred (the job's own), any, or [us-east-1, us-west-2]",
    "max_price": "dollars per hour of a machine; more expensive pools are skipped (default: no limit)",
}
_COLUMN = 44  # where the meanings begin


def example() -> str:
    """Return the text of the job file."""
    lines = [_line(f"{key}: {value}", means) for key, (value, means) in _REQUIRED.items()]
    lines += ["", "# Optional:"]
    lines += [_line(f"# {key}: {value}".rstrip(), means) for key, (value, means) in _OPTIONAL.items()]
    lines += [f"# - {_rung(rung)}" for rung in DEFAULT_LADDER]
    lines += ["", "# The keys of a rung:"]
    lines += [_line(f"#   {key}", means) for key, means in _RUNG.items()]
    lines += ["", "# For hf-spot jobs (Hugging Face Jobs), which needs none of region, instance_profile and the ladder:"]
    lines += [f"# {HUB_SECTION}: {{flavor: a10g-small, timeout: 24h, attempts: 3}}"]
    return "\n".join(lines) + "\n"


def keys() -> tuple[set[str], set[str], set[str]]:
    """Return the keys that are described here: the required and the optional ones of a job, and those of a rung."""
    return set(_REQUIRED), set(_OPTIONAL), set(_RUNG)


def _line(text: str, means: str) -> str:
    return f"{text:{_COLUMN}}  # {means}"


def _rung(rung: Rung) -> str:
    values = {one.name: getattr(rung, one.name) for one in fields(Rung)}
    changed = [one.name for one in fields(Rung) if one.default is MISSING or values[one.name] != one.default]
    shown = {name: values[name] if isinstance(values[name], str) else f"[{', '.join(values[name])}]" for name in changed}
    return "{" + ", ".join(f"{name}: {value}" for name, value in shown.items()) + "}"
