"""The job file: what to train, the URL of its run, which machines to use, and how much they may cost.

Pure: takes the text of a file and returns a `Job`, or raises an error that names line, key and fix. No cloud is queried.
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
from hf_spot.aws_errors import nearest_region
from hf_spot.cloud.fleet_size import PLACEMENTS, ZONE, FleetSize, check_run
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
HUB_SECTION = "hf_jobs"  # what Hugging Face Jobs needs: hf_spot.cloud.hub_job reads it


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
        raise Invalid(path, f"{value!r} is not text", hint=_EXAMPLES.get(str(path[-1]), f'{dotted(path[-1:])}: "{value}"'))
    return value


def _match(value: Any, pattern: re.Pattern[str], path: tuple[Any, ...], example: str) -> str:
    if not pattern.fullmatch(_text(value, path)):
        raise Invalid(path, f"{value!r} is not valid", hint=f"{dotted(path[:1])}: {example}")
    return str(value)


def _names(value: Any, path: tuple[Any, ...]) -> tuple[str, ...]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise Invalid(path, f"{value!r} is not a list", hint=f"{dotted(path[-1:])}: [{value}]")
    for index, item in enumerate(value):
        _text(item, (*path, index))
    twice = next((item for index, item in enumerate(value) if item in value[:index]), None)
    if twice is not None:
        raise Invalid(path, f"{twice} appears twice", hint="remove one of them")
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
        raise Invalid(path, f"{value!r} is not one of {', '.join(allowed)}", hint=hint)


def _positive(value: Any, path: tuple[Any, ...], unit: str, *, hint: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise Invalid(path, f"{value!r} must be a number of {unit} above 0", hint=hint or f"{dotted(path[-1:])}: 10")
    return float(value)


def _region(value: Any, path: tuple[Any, ...]) -> None:
    if not isinstance(value, str) or not _REGION.fullmatch(value):
        zone = isinstance(value, str) and _REGION.fullmatch(value[:-1])
        meant = nearest_region(value) if isinstance(value, str) else None
        near = f"did you mean {meant}?" if meant else "such as us-east-1"
        raise Invalid(path, f"{value!r} is not a region", hint=f"{value[:-1]}, without the zone" if zone else near)


def _moment(value: Any, path: tuple[Any, ...]) -> datetime:
    moment = value
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.replace("Z", "+00:00"))  # Python 3.10 does not know the suffix Z
        except ValueError:
            moment = None
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise Invalid(path, f"{str(value)!r} is not a time with a time zone", hint="deadline: 2030-01-31T18:00:00Z")
    return moment.astimezone(timezone.utc)


def _regional(value: Any, key: str, check: Callable[[Any, tuple[Any, ...]], Any]) -> Any:
    """Check a value, or a mapping with one value for each region."""
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
    """Return whether the value exists in one region only, without naming the region."""
    return not isinstance(value, Mapping) and value != DEFAULT and not str(value).startswith("resolve:ssm:")


# -- the parts of a job ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: pools of machines without preference among them.

    Args:
        instance_types: such as ``p4d.24xlarge``; AWS's placement scores need three or more.
        market: ``spot`` or ``on-demand``.
        regions: region names, or `PREFERRED` (the job's own), or `ANY` (every region of the account that the job fits).
        max_price: maximum dollars per hour of a machine; more expensive pools are skipped. None for no limit.

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
                raise Invalid(("instance_types", index), f"{kind!r} is not an instance type", hint="such as p4d.24xlarge")
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
    # Eight V100s or A10Gs: less memory on each, and V100s do not support bf16.
    Rung(("p3dn.24xlarge", "p3.16xlarge", "g5.48xlarge"), SPOT, ANY),
    Rung(_A100, ON_DEMAND, PREFERRED),
)
"""Eight A100s as spot in the preferred region; then in any region; then smaller GPUs; then on-demand."""


@dataclass(frozen=True)
class Site:
    """The resources of a job in one region; ids are regional, so the job file may give each per region.

    Args:
        image_id: an AMI's id, or ``resolve:ssm:PARAMETER``.
        key_name: name of an EC2 key pair, or None.
        security_groups: ids; empty for the default group of the network.
        subnets: ids; empty for the default subnet of each zone.
    """

    image_id: str
    key_name: str | None
    security_groups: tuple[str, ...]
    subnets: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """A training that may move from machine to machine. Everything is validated at construction.

    Args:
        name: name of the job, used in names and tags of its resources.
        store: URL of the run.
        run: shell commands that start the training with ``hf-spot launch``; ``$HF_SPOT_STORE`` is set for it.
        region: the preferred region, ideally that of the bucket.
        max_spend: maximum dollars for all machines of the run, over its whole life.
        setup: shell commands that a new machine runs first, as root: fetch the script, install its dependencies.
        requirements: packages that pip installs before that, into a new environment; empty if the image has hf_spot. hf_spot
            itself comes from no registry, but from a wheel of the hf_spot that starts the machine (`hf_spot.cloud.wheel`).
        image_id: an AMI's id, ``resolve:ssm:PARAMETER``, or one of these per region.
        key_name: name of an EC2 key pair, or one per region.
        security_groups: ids (or ids per region); ``default`` is the network's default group, which blocks inbound traffic.
        subnets: ids (or ids per region); ``default`` is each zone's default subnet.
        instance_profile: name or ARN of the role that grants the machine access to the bucket.
        disk_gb: size of the encrypted root disk.
        tags: additional tags for all resources.
        ladder: rungs, tried in order.
        strategy: how AWS chooses among a rung's pools in a region.
        hours: estimated duration without interruptions, for cost and deadline; None if unknown.
        deadline: when the training must be finished.
        on_finish: what a machine does when its work is done: ``shutdown`` (it ends and costs nothing more) or ``stay``.
        machines: how many train together: a number, or a range such as ``2:8``.
        placement: where those of several machines are: in one ``zone``, in a ``cluster`` placement group of one zone, or in
            any zones of one ``region``.

    Raises:
        ConfigError: a value can't be used; the message names the key.
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
    machines: int | str | FleetSize = 1
    placement: str = ZONE

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(_text(self.name, ("name",))) or len(self.name) > 60:
            raise Invalid(("name",), f"{self.name!r} is not a valid name", hint="up to 60 letters, digits, '-', '_' and '.'")
        self._set(machines=FleetSize.of(self.machines))
        self._check_commands()
        _region(_text(self.region, ("region",)), ("region",))
        self._set(max_spend=_positive(self.max_spend, ("max_spend",), "dollars", hint="max_spend: 150, for the whole run"))
        self._set(requirements=_names(self.requirements, ("requirements",)))
        self._check_site()
        self._check_ladder()
        disk = self.disk_gb
        if isinstance(disk, bool) or not isinstance(disk, int) or not 8 <= disk <= _LARGEST_DISK_GB:
            raise Invalid(
                ("disk_gb",), f"{disk!r} is not a valid disk size", hint=f"a whole number from 8 to {_LARGEST_DISK_GB}"
            )
        self._check_tags()
        _choice(self.strategy, STRATEGIES, ("strategy",))
        _choice(self.on_finish, (SHUTDOWN, STAY), ("on_finish",))
        _choice(self.placement, PLACEMENTS, ("placement",))
        if self.hours is not None:
            self._set(hours=_positive(self.hours, ("hours",), "hours"))
        if self.deadline is not None:
            self._set(deadline=_moment(self.deadline, ("deadline",)))

    @property
    def size(self) -> FleetSize:
        """Return how many machines train together."""
        assert isinstance(self.machines, FleetSize)
        return self.machines

    def regions_of(self, rung: Rung, known: Sequence[str]) -> tuple[str, ...]:
        """Return the regions of a rung, the preferred one first.

        Args:
            rung: a rung of the ladder.
            known: the regions that the account can use.
        """
        if rung.regions == PREFERRED:
            return (self.region,)
        if rung.regions != ANY:
            return tuple(rung.regions)
        fitting = [region for region in known if self._fits(region)]
        return tuple(sorted(fitting, key=lambda region: (region != self.region, region)))

    def named_regions(self) -> tuple[str, ...]:
        """Return every region that the job file names for machines, the preferred one first."""
        named = [region for rung in self.ladder if rung.regions not in (PREFERRED, ANY) for region in rung.regions]
        return tuple(dict.fromkeys([self.region, *named]))

    def site(self, region: str) -> Site:
        """Return the resources for a region. Raises ConfigError if the job file does not name them."""
        groups, subnets = _in(self.security_groups, region), _in(self.subnets, region)
        for key, value in (("image_id", _in(self.image_id, region)), ("security_groups", groups), ("subnets", subnets)):
            if value is None:
                raise Invalid((key,), f"has no value for {region}", hint=f"{key}: {{{region}: …}}")
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
            raise Invalid(("store",), f"{self.store!r} is not reachable from every machine", hint="s3://bucket/runs/my-run")
        launches = "hf-spot launch" in " ".join(_text(self.run, ("run",)).split())
        if not launches:
            raise Invalid(("run",), "does not start the training with `hf-spot launch`", hint="run: hf-spot launch train.py")
        if re.search(r"--store\b", self.run):
            raise Invalid(("run",), "names the store again", hint=f"remove --store: the job file's store {self.store} is used")
        check_run(self.run, self.size)
        if not isinstance(self.setup, str):
            raise Invalid(("setup",), f"{self.setup!r} is not a shell script", hint="setup: |")

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
            raise Invalid(
                ("ladder",), "is not a list of rungs", hint="ladder: [{market: spot, instance_types: [p4d.24xlarge]}]"
            )
        if not ladder:
            raise Invalid(("ladder",), "has no rung", hint="omit it for the default ladder, or name a rung")
        self._set(ladder=tuple(ladder))
        for index, rung in enumerate(self.ladder):
            if not isinstance(rung, Rung):
                raise Invalid(
                    ("ladder", index), f"{rung!r} is not a rung", hint="{market: spot, instance_types: [p4d.24xlarge]}"
                )
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
                raise Invalid((key,), f"has no value for {region}, which ladder[{index}] tries", hint=f"{key}: {{{region}: …}}")

    def _fits(self, region: str) -> bool:
        return all(_in(getattr(self, key), region) is not None for key in ("image_id", "security_groups", "subnets"))

    def _check_tags(self) -> None:
        if not isinstance(self.tags, Mapping):
            raise Invalid(("tags",), f"{self.tags!r} is not a mapping of tags", hint="tags: {team: nlp}")
        for key, value in self.tags.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise Invalid(("tags", key), f"{value!r} must be text", hint=f'{key}: "{value}"')
            if key.lower().startswith(("aws:", _OWN_TAGS)) or key == "Name":
                raise Invalid(("tags", key), "is a reserved key", hint="use another key")
            if not 0 < len(key) <= 128 or len(value) > 256:
                raise Invalid(("tags", key), "is too long: 128 characters for a key, 256 for a value", hint="use a shorter one")


# -- the file ---------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> Job:
    """Read a job file.

    Raises:
        ConfigError: it can't be read or used; the message names line, key and fix.
    """
    return parse(yaml_file.read(Path(path)), str(path))


def parse(text: str, where: str = "job.yaml") -> Job:
    """Parse the text of a job file; ``where`` names it in errors."""
    return yaml_file.parse(text, where, _job)


def _job(value: Any) -> Job:
    if not isinstance(value, dict):
        raise Invalid((), "a job file must be a mapping of keys and values", hint="name: my-run")
    value = {name: one for name, one in value.items() if name != HUB_SECTION}
    _check(value, Job, ())
    made = dict(value)
    if isinstance(made.get("ladder"), list):
        made["ladder"] = tuple(_rung(rung, ("ladder", index)) for index, rung in enumerate(made["ladder"]))
    return Job(**made)


def _rung(value: Any, path: tuple[Any, ...]) -> Rung:
    if not isinstance(value, dict):
        raise Invalid(path, f"{value!r} is not a rung", hint="{market: spot, instance_types: [p4d.24xlarge]}")
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
