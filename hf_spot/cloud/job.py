"""The job file: what to train, where its run stands, which machines may do it, and how much they may cost.

Pure: a file's text goes in, a `Job` comes out, or an error that names line, key and repair. Nothing is asked of a cloud.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_spot import yaml_file
from hf_spot.yaml_file import Invalid, check_keys, dotted

SPOT, ON_DEMAND = "spot", "on-demand"
MARKETS = (SPOT, ON_DEMAND)
PREFERRED, ANY = "preferred", "any"
STRATEGIES = ("price-capacity-optimized", "capacity-optimized")
SHUTDOWN, STAY = "shutdown", "stay"
DEFAULT = "default"
DEFAULT_IMAGE = "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"

_NAME = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
_REGION = re.compile(r"[a-z]{2,}(?:-[a-z]+)+-\d{1,2}")
_INSTANCE_TYPE = re.compile(r"[a-z][a-z0-9-]*\.[a-z0-9-]+")
_IMAGE = re.compile(r"ami-[0-9a-f]{8,17}|resolve:ssm:[\w./:-]+")
_GROUP = re.compile(r"sg-[0-9a-f]+")
_SUBNET = re.compile(r"subnet-[0-9a-f]+")
_STORE = re.compile(r"s3://[^/]+/.+|/.+")
_OWN_TAGS = "hf-spot:"
_LARGEST_DISK_GB = 65536  # of a gp3 volume


_EXAMPLES = {
    "name": "name: my-run",
    "store": "store: s3://bucket/runs/my-run",
    "run": "run: hf-spot launch train.py",
    "region": "region: us-east-1",
    "max_spend": "max_spend: 150, in dollars for the whole run",
    "instance_types": "instance_types: [p4d.24xlarge, p4de.24xlarge]",
}


# -- single values ----------------------------------------------------------------------------------------------------


def _text(value: Any, path: tuple[Any, ...]) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Invalid(path, f"{value!r} is no text", hint=_EXAMPLES.get(str(path[-1]), f'{dotted(path[-1:])}: "{value}"'))
    return value


def _match(value: Any, pattern: re.Pattern[str], path: tuple[Any, ...], example: str) -> str:
    if not pattern.fullmatch(_text(value, path)):
        raise Invalid(path, f"{value!r} can't be right", hint=f"{dotted(path[:1])}: {example}")
    return str(value)


def _names(value: Any, path: tuple[Any, ...]) -> tuple[str, ...]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise Invalid(path, f"{value!r} is no list", hint=f"{dotted(path[-1:])}: [{value}]")
    for index, item in enumerate(value):
        _text(item, (*path, index))
    twice = next((item for index, item in enumerate(value) if item in value[:index]), None)
    if twice is not None:
        raise Invalid(path, f"{twice} is there twice", hint="once is enough")
    return tuple(value)


def _ids(pattern: re.Pattern[str], example: str) -> Callable[[Any, tuple[Any, ...]], Any]:
    def check(value: Any, path: tuple[Any, ...]) -> Any:
        if value == DEFAULT:
            return value
        found = _names(value, path)
        if not found:
            raise Invalid(path, "is empty", hint=f"{path[0]}: {DEFAULT}")
        return tuple(_match(item, pattern, (*path, index), f"[{example}]") for index, item in enumerate(found))

    return check


def _image(value: Any, path: tuple[Any, ...]) -> str:
    return _match(value, _IMAGE, path, "ami-… or resolve:ssm:…")


def _choice(value: Any, allowed: Sequence[str], path: tuple[Any, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, 1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(allowed)}"
        raise Invalid(path, f"{value!r} is none of {', '.join(allowed)}", hint=hint)


def _positive(value: Any, path: tuple[Any, ...], unit: str, *, hint: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise Invalid(path, f"{value!r} must be a number of {unit} above 0", hint=hint or f"{dotted(path[-1:])}: 10")
    return float(value)


def _region(value: Any, path: tuple[Any, ...]) -> None:
    if not isinstance(value, str) or not _REGION.fullmatch(value):
        zone = isinstance(value, str) and _REGION.fullmatch(value[:-1])
        raise Invalid(path, f"{value!r} is no region", hint=f"{value[:-1]}, without the zone" if zone else "such as us-east-1")


def _moment(value: Any, path: tuple[Any, ...]) -> datetime:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))  # Python 3.10 does not know the suffix Z
        except ValueError:
            value = None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise Invalid(path, "is no point in time with a time zone", hint="deadline: 2030-01-31T18:00:00Z")
    return value.astimezone(timezone.utc)


def _regional(value: Any, key: str, check: Callable[[Any, tuple[Any, ...]], Any]) -> Any:
    """A value, or one for each region."""
    if not isinstance(value, Mapping):
        return check(value, (key,))
    if not value:
        raise Invalid((key,), "is empty", hint=f"{key}: {{us-east-1: …}}")
    for region in value:
        _region(region, (key, region))
    return {region: check(found, (key, region)) for region, found in value.items()}


def _in(value: Any, region: str) -> Any:
    return value.get(region) if isinstance(value, Mapping) else value


def _is_bound(value: Any) -> bool:
    """Whether it names something that only one region has, without saying which."""
    return not isinstance(value, Mapping) and value != DEFAULT and not str(value).startswith("resolve:ssm:")


# -- what a job is made of ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: pools of machines that are as welcome as each other.

    Args:
        instance_types: such as ``p4d.24xlarge``; three or more give AWS's placement scores something to say.
        market: ``spot`` or ``on-demand``.
        regions: region names, or `PREFERRED` (the job's own), or `ANY` (every region of the account that the job fits).
        max_price: dollars per hour and machine above which a pool is left out; None leaves none out.

    Raises:
        ConfigError: a value that can't be used.
    """

    instance_types: tuple[str, ...]
    market: str = SPOT
    regions: tuple[str, ...] | str = PREFERRED
    max_price: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "instance_types", _names(self.instance_types, ("instance_types",)))
        if not self.instance_types:
            raise Invalid(("instance_types",), "names no instance type", hint="instance_types: [p4d.24xlarge, p4de.24xlarge]")
        for index, kind in enumerate(self.instance_types):
            if not _INSTANCE_TYPE.fullmatch(kind):
                raise Invalid(("instance_types", index), f"{kind!r} is no instance type", hint="such as p4d.24xlarge")
        _choice(self.market, MARKETS, ("market",))
        if self.regions not in (PREFERRED, ANY):
            object.__setattr__(self, "regions", _names(self.regions, ("regions",)))
            if not self.regions:
                raise Invalid(("regions",), "names no region", hint=f"regions: {PREFERRED}, {ANY}, or [us-east-1, us-west-2]")
            for index, region in enumerate(self.regions):
                _region(region, ("regions", index))
        if self.max_price is not None:
            object.__setattr__(self, "max_price", _positive(self.max_price, ("max_price",), "dollars per hour"))


_A100 = ("p4d.24xlarge", "p4de.24xlarge")
DEFAULT_LADDER = (
    Rung(_A100, SPOT, PREFERRED),
    Rung(_A100, SPOT, ANY),
    # Eight V100s or A10Gs: fewer bytes of memory on each, and V100s know no bf16.
    Rung(("p3dn.24xlarge", "p3.16xlarge", "g5.48xlarge"), SPOT, ANY),
    Rung(_A100, ON_DEMAND, PREFERRED),
)
"""Eight A100s on the spot market where you are; then wherever they are; then smaller ones; then at the full price."""


@dataclass(frozen=True)
class Site:
    """What a job uses in one region; ids are regional, so each may be given per region in the job file.

    Args:
        image_id: an AMI's id, or ``resolve:ssm:PARAMETER``.
        key_name: of an EC2 key pair, or None.
        security_groups: ids; none means the default group of the network.
        subnets: ids; none means the default subnet of each zone.
    """

    image_id: str
    key_name: str | None
    security_groups: tuple[str, ...]
    subnets: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """A training that may be moved from machine to machine. Everything is checked at construction.

    Args:
        name: of the job, in names and tags of what it starts.
        store: URL of the run.
        run: shell commands that start the training with ``hf-spot launch``; ``$HF_SPOT_STORE`` is set for it.
        region: the preferred region, best the one that the bucket is in.
        max_spend: dollars that all machines of the run may cost together, over its whole life.
        setup: shell commands that a new machine runs first, as root: fetch the script, install what it imports.
        requirements: what pip installs before that, into an environment of its own; none when the image has hf_spot.
        image_id: an AMI's id, ``resolve:ssm:PARAMETER``, or one of these per region.
        key_name: of an EC2 key pair, or one per region.
        security_groups: ids (or ids per region); ``default`` is the network's default group, which lets nobody in.
        subnets: ids (or ids per region); ``default`` is each zone's default subnet.
        instance_profile: name or ARN of the role that lets the machine use the bucket.
        disk_gb: size of the encrypted root disk.
        tags: further tags for everything that is started.
        ladder: rungs, tried in order.
        strategy: by which AWS chooses among a rung's pools in a region.
        hours: how long the training would take without interruptions, for cost and deadline; None when not known.
        deadline: when it has to be finished.
        on_finish: what a machine does when nothing is left for it to do: ``shutdown`` (it is gone and costs no more) or
            ``stay``.

    Raises:
        ConfigError: a value that can't be used, naming the key.
    """

    name: str
    store: str
    run: str
    region: str
    max_spend: float
    setup: str = ""
    requirements: tuple[str, ...] = ("hf_spot",)
    image_id: str | Mapping[str, str] = DEFAULT_IMAGE
    key_name: str | Mapping[str, str] | None = None
    security_groups: str | tuple[str, ...] | Mapping[str, tuple[str, ...]] = DEFAULT
    subnets: str | tuple[str, ...] | Mapping[str, tuple[str, ...]] = DEFAULT
    instance_profile: str | None = None
    disk_gb: int = 200
    tags: Mapping[str, str] = field(default_factory=dict)
    ladder: tuple[Rung, ...] = DEFAULT_LADDER
    strategy: str = STRATEGIES[0]
    hours: float | None = None
    deadline: datetime | None = None
    on_finish: str = SHUTDOWN

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(_text(self.name, ("name",))) or len(self.name) > 60:
            raise Invalid(("name",), f"{self.name!r} is no name", hint="up to 60 letters, digits, '-', '_' and '.'")
        self._check_commands()
        _region(_text(self.region, ("region",)), ("region",))
        self._set(max_spend=_positive(self.max_spend, ("max_spend",), "dollars", hint="max_spend: 150, for the whole run"))
        self._set(requirements=_names(self.requirements, ("requirements",)))
        self._check_site()
        self._check_ladder()
        disk = self.disk_gb
        if isinstance(disk, bool) or not isinstance(disk, int) or not 8 <= disk <= _LARGEST_DISK_GB:
            raise Invalid(("disk_gb",), f"{disk!r} is no size of a disk", hint=f"a whole number from 8 to {_LARGEST_DISK_GB}")
        self._check_tags()
        _choice(self.strategy, STRATEGIES, ("strategy",))
        _choice(self.on_finish, (SHUTDOWN, STAY), ("on_finish",))
        if self.hours is not None:
            self._set(hours=_positive(self.hours, ("hours",), "hours"))
        if self.deadline is not None:
            self._set(deadline=_moment(self.deadline, ("deadline",)))

    def regions_of(self, rung: Rung, known: Sequence[str]) -> tuple[str, ...]:
        """Where a rung may be tried, the preferred region first.

        Args:
            rung: one of the ladder.
            known: the regions that the account can use.
        """
        if rung.regions == PREFERRED:
            return (self.region,)
        if rung.regions != ANY:
            return tuple(rung.regions)
        fitting = [region for region in known if self._fits(region)]
        return tuple(sorted(fitting, key=lambda region: (region != self.region, region)))

    def named_regions(self) -> tuple[str, ...]:
        """Every region that the job file names for machines, the preferred one first."""
        named = [region for rung in self.ladder if rung.regions not in (PREFERRED, ANY) for region in rung.regions]
        return tuple(dict.fromkeys([self.region, *named]))

    def site(self, region: str) -> Site:
        """What is used in a region. Raises ConfigError when the job file does not say it."""
        groups, subnets = _in(self.security_groups, region), _in(self.subnets, region)
        for key, value in (("image_id", _in(self.image_id, region)), ("security_groups", groups), ("subnets", subnets)):
            if value is None:
                raise Invalid((key,), f"has nothing for {region}", hint=f"{key}: {{{region}: …}}")
        return Site(
            image_id=str(_in(self.image_id, region)),
            key_name=_in(self.key_name, region),
            security_groups=() if groups == DEFAULT else tuple(groups or ()),
            subnets=() if subnets == DEFAULT else tuple(subnets or ()),
        )

    # -- checks -------------------------------------------------------------------------------------------------------

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_commands(self) -> None:
        if not _STORE.fullmatch(_text(self.store, ("store",))):
            raise Invalid(("store",), f"{self.store!r} is no place that every machine sees", hint="s3://bucket/runs/my-run")
        launches = "hf-spot launch" in " ".join(_text(self.run, ("run",)).split())
        if not launches:
            raise Invalid(("run",), "does not start the training by `hf-spot launch`", hint="run: hf-spot launch train.py")
        if re.search(r"--store\b", self.run):
            raise Invalid(("run",), "names the store a second time", hint=f"leave --store out: it is {self.store}")
        if not isinstance(self.setup, str):
            raise Invalid(("setup",), f"{self.setup!r} is no shell script", hint="setup: |")

    def _check_site(self) -> None:
        self._set(
            image_id=_regional(
                self.image_id, "image_id", lambda value, path: _match(value, _IMAGE, path, "ami-… or resolve:ssm:…")
            ),
            security_groups=_regional(self.security_groups, "security_groups", _ids(_GROUP, "sg-…")),
            subnets=_regional(self.subnets, "subnets", _ids(_SUBNET, "subnet-…")),
        )
        if self.key_name is not None:
            self._set(key_name=_regional(self.key_name, "key_name", _text))
        if self.instance_profile is not None:
            _text(self.instance_profile, ("instance_profile",))
        elif self.store.startswith("s3://"):
            raise Invalid(
                ("instance_profile",),
                f"is missing: without a role the machines can't use {self.store}",
                hint=f"give a role the policy that `hf-spot doctor iam --store {self.store}` prints",
            )

    def _check_ladder(self) -> None:
        ladder = self.ladder
        if isinstance(ladder, (str, Mapping)) or not isinstance(ladder, Sequence):
            raise Invalid(("ladder",), "is no list of rungs", hint="ladder: [{market: spot, instance_types: [p4d.24xlarge]}]")
        if not ladder:
            raise Invalid(("ladder",), "has no rung", hint="leave it out for the default ladder, or name a rung")
        self._set(ladder=tuple(ladder))
        for index, rung in enumerate(self.ladder):
            if not isinstance(rung, Rung):
                raise Invalid(("ladder", index), f"{rung!r} is no rung", hint="{market: spot, instance_types: [p4d.24xlarge]}")
            if rung.regions != ANY:
                for region in (self.region,) if rung.regions == PREFERRED else rung.regions:
                    self._check_fit(index, region)
        ids = [key for key in ("image_id", "security_groups", "subnets") if _is_bound(getattr(self, key))]
        regions = {*self.named_regions()}
        if ids and (len(regions) > 1 or any(rung.regions == ANY for rung in self.ladder)):
            value = getattr(self, ids[0])
            shown = value if isinstance(value, str) else ", ".join(value)
            raise Invalid(
                (ids[0],),
                f"{shown} exists in one region only, and the ladder tries several",
                hint=f"{ids[0]}: {{{self.region}: {shown}, us-west-2: …}}, or `regions: preferred` on each rung",
            )

    def _check_fit(self, index: int, region: str) -> None:
        for key in ("image_id", "security_groups", "subnets"):
            if _in(getattr(self, key), region) is None:
                raise Invalid((key,), f"has nothing for {region}, which ladder[{index}] tries", hint=f"{key}: {{{region}: …}}")

    def _fits(self, region: str) -> bool:
        return all(_in(getattr(self, key), region) is not None for key in ("image_id", "security_groups", "subnets"))

    def _check_tags(self) -> None:
        if not isinstance(self.tags, Mapping):
            raise Invalid(("tags",), f"{self.tags!r} are no tags", hint="tags: {team: nlp}")
        for key, value in self.tags.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise Invalid(("tags", key), f"{value!r} must be text", hint=f'{key}: "{value}"')
            if key.lower().startswith(("aws:", _OWN_TAGS)) or key == "Name":
                raise Invalid(("tags", key), "is not yours to set", hint="another key")
            if not 0 < len(key) <= 128 or len(value) > 256:
                raise Invalid(("tags", key), "is too long: 128 characters for a key, 256 for a value", hint="a shorter one")


# -- the file ---------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> Job:
    """Reads a job file.

    Raises:
        ConfigError: it can't be read, or says something that can't be done; with line, key and repair.
    """
    return parse(yaml_file.read(Path(path)), str(path))


def parse(text: str, where: str = "job.yaml") -> Job:
    """`load` for a text in hand; ``where`` names it in errors."""
    return yaml_file.parse(text, where, _job)


def _job(value: Any) -> Job:
    if not isinstance(value, dict):
        raise Invalid((), "a job is a mapping of keys and values", hint="name: my-run")
    _check(value, Job, ())
    made = dict(value)
    if isinstance(made.get("ladder"), list):
        made["ladder"] = tuple(_rung(rung, ("ladder", index)) for index, rung in enumerate(made["ladder"]))
    return Job(**made)


def _rung(value: Any, path: tuple[Any, ...]) -> Rung:
    if not isinstance(value, dict):
        raise Invalid(path, f"{value!r} is no rung", hint="{market: spot, instance_types: [p4d.24xlarge]}")
    _check(value, Rung, path)
    try:
        return Rung(**value)
    except Invalid as error:
        problem = error.args[0].partition(": ")[2]
        raise Invalid((*path, *error.path), problem, hint=error.hint) from error


def _check(value: dict[str, Any], kind: Any, path: tuple[Any, ...]) -> None:
    check_keys(value, [one.name for one in fields(kind)], path)
    for one in fields(kind):
        if one.default is MISSING and one.default_factory is MISSING and one.name not in value:
            raise Invalid(path, f"{one.name} is missing", hint=_EXAMPLES[one.name])
