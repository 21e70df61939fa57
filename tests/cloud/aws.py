"""A real moto server, and answers for what it lacks: capacity, prices, placement scores, quotas, the price list.

What is answered here is checked against botocore's model of the API, as its Stubber does: an answer that AWS could not give
is an error. Everything else goes to moto over HTTP.
"""

from __future__ import annotations

import json
import logging
import urllib.request
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import botocore.session
from botocore.awsrequest import AWSResponse
from botocore.loaders import create_loader
from botocore.validate import validate_parameters
from moto.core import DEFAULT_ACCOUNT_ID
from moto.ec2.models import ec2_backends
from moto.ec2.models.instance_types import INSTANCE_TYPE_OFFERINGS
from moto.ec2.models.instances import StateReason
from moto.server import ThreadedMotoServer

REGIONS = ("eu-west-1", "us-east-1", "us-west-2")
QUOTAS = (
    ("L-7212CCBC", "All P4, P3 and P2 Spot Instance Requests"),
    ("L-C4BD4855", "All P5 Spot Instance Requests"),
    ("L-3819A6DF", "All G and VT Spot Instance Requests"),
    ("L-34B43A08", "All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests"),
    ("L-417A185B", "Running On-Demand P instances"),
    ("L-DB2E81BA", "Running On-Demand G and VT instances"),
    ("L-1216C47A", "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances"),
    ("L-0263D0A3", "EC2-VPC Elastic IPs"),
)


class Clock:
    """A clock that only sleeping moves; ``on_sleep`` may do something at each pause."""

    def __init__(self) -> None:
        self.time = datetime.now(timezone.utc).replace(microsecond=0)
        self.slept: list[float] = []
        self.on_sleep: Callable[[], object] = lambda: None

    def now(self) -> datetime:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        assert len(self.slept) < 500, "it never ends"
        self.time += timedelta(seconds=seconds)
        self.on_sleep()


class Aws:
    """An account. Attributes say what it has; tests change them as they like.

    ``spot``: dollars per hour by instance type, or by (type, zone), which wins. ``full``: on demand, by type. ``scores`` by
    region. ``quotas``: vCPUs by code; others are large. ``refuse``: the error code for (type, zone, market), or "".
    ``tried``: how many pools of one fleet EC2 really looks at. ``fail``: error codes by operation, used up one by one.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self.server.start()
        host, port = self.server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        self._sessions: dict[bool, _Session] = {}
        core = _core()
        core.set_credentials("AKTEST", "secret")
        self._plain = _Session(core, self.endpoint)
        self.reset()

    def reset(self) -> None:
        request = urllib.request.Request(f"{self.endpoint}/moto-api/reset", method="POST", data=b"")
        urllib.request.urlopen(request, timeout=20).close()
        self.spot: dict[Any, float] = {"p4d.24xlarge": 9.0, "p4de.24xlarge": 12.0, "g5.48xlarge": 5.0}
        self.full: dict[str, float] = {"p4d.24xlarge": 22.0, "p4de.24xlarge": 27.0, "g5.48xlarge": 16.0}
        self.scores: dict[str, int] = {}
        self.quotas: dict[str, float] = {}
        self.refuse: Callable[[str, str, str], str] = lambda kind, zone, market: ""
        self.tried = 1000
        self.fail: dict[str, list[str]] = {}
        self.calls: list[tuple[str, str]] = []
        self.orders: list[dict[str, Any]] = []
        self.templates: list[dict[str, Any]] = []
        self._launched: set[str] = set()

    def close(self) -> None:
        self.server.stop()

    # -- what the product talks to ------------------------------------------------------------------------------------

    def session(self, *, credentials: bool = True) -> _Session:
        """Stands for a boto3 session whose every client talks to this account."""
        if credentials not in self._sessions:
            core = _core()
            if credentials:
                core.set_credentials("AKTEST", "secret")
            else:
                core.get_component("credential_provider").providers = []
            core.register("before-parameter-build", self._note)
            core.register("before-call", self._answer)
            core.register("after-call.ec2.TerminateInstances", self._stamp)
            for name in ("CreateFleet", "RequestSpotInstances", "RequestSpotFleet"):
                core.register(f"after-call.ec2.{name}", self._stamp_new)
            self._sessions[credentials] = _Session(core, self.endpoint)
        return self._sessions[credentials]

    def client(self, region: str = "us-east-1", service: str = "ec2") -> Any:
        """Talks to moto alone: for what a test does to the account."""
        return self._plain.client(service, region_name=region)

    def _note(self, params: dict[str, Any], model: Any, context: dict[str, Any], **kwargs: Any) -> None:
        context["asked"] = params
        if model.name == "CreateFleet":
            self._capacity(params, context)

    def _capacity(self, params: dict[str, Any], context: dict[str, Any]) -> None:
        """Leaves only those pools of a fleet that have capacity; moto takes the first."""
        self.orders.append(json.loads(json.dumps(params)))
        config = params["LaunchTemplateConfigs"][0]
        market = params["TargetCapacitySpecification"]["DefaultTargetCapacityType"]
        errors, kept = [], []
        for place, override in enumerate(config["Overrides"]):
            zone = self.zone_of(override["SubnetId"], context["client_region"])
            refused = self.refuse(override["InstanceType"], zone, market) and place < self.tried
            code = self.refuse(override["InstanceType"], zone, market) if refused else "UnfulfillableCapacity"
            if place < self.tried and not refused:
                kept.append(override)
                continue
            errors.append(
                {
                    "LaunchTemplateAndOverrides": {
                        "LaunchTemplateSpecification": config["LaunchTemplateSpecification"],
                        "Overrides": override,
                    },
                    "Lifecycle": market,
                    "ErrorCode": code,
                    "ErrorMessage": "canned",
                }
            )
        config["Overrides"] = kept
        if not kept:
            context["canned"] = {"FleetId": "fleet-0", "Errors": errors, "Instances": []}

    def _answer(self, model: Any, params: Any, context: dict[str, Any], **kwargs: Any) -> Any:
        name, asked, region = model.name, context.get("asked", {}), context["client_region"]
        self.calls.append((name, region))
        if self.fail.get(name):
            code = self.fail[name].pop(0)
            status = 500 if code.startswith("Ins") else 503 if code == "RequestLimitExceeded" else 403
            return _http(status), {"Error": {"Code": code, "Message": f"{code} was said"}, "ResponseMetadata": {}}
        answers: Mapping[str, Callable[[], dict[str, Any] | None]] = {
            "DescribeRegions": lambda: {"Regions": [{"RegionName": name} for name in REGIONS]},
            "CreateFleet": lambda: context.get("canned"),
            "DescribeSpotPriceHistory": lambda: {"SpotPriceHistory": self._history(asked, region)},
            "GetSpotPlacementScores": lambda: {
                "SpotPlacementScores": [
                    {"Region": one, "Score": self.scores[one]} for one in asked["RegionNames"] if one in self.scores
                ]
            },
            "ListServiceQuotas": lambda: {
                "Quotas": [{"QuotaCode": c, "QuotaName": n, "Value": self.quotas.get(c, 1000.0)} for c, n in QUOTAS]
            },
            "ListAWSDefaultServiceQuotas": lambda: {
                "Quotas": [{"QuotaCode": c, "QuotaName": n, "Value": 0.0} for c, n in QUOTAS]
            },
            "GetProducts": lambda: {"PriceList": self._products(asked)},
        }
        if name == "CreateLaunchTemplate":
            self.templates.append(asked)
        found = answers.get(name, lambda: None)()
        if found is None:
            return None
        validate_parameters(found, model.output_shape)
        return _http(200), {**found, "ResponseMetadata": {"HTTPStatusCode": 200}}

    def _stamp(self, context: dict[str, Any], **kwargs: Any) -> None:
        """moto would write down when this test runs."""
        for one in self.instances("terminated"):
            if one.id in context["asked"]["InstanceIds"]:
                one._reason = f"User initiated ({self.clock.time:%Y-%m-%d %H:%M:%S} UTC)"

    def _stamp_new(self, **kwargs: Any) -> None:
        for one in self.instances("pending", "running"):
            if one.id not in self._launched:
                self._launched.add(one.id)
                one.launch_time = self.clock.time.replace(tzinfo=None)

    def _history(self, asked: dict[str, Any], region: str) -> list[dict[str, Any]]:
        offers = INSTANCE_TYPE_OFFERINGS["availability-zone"][region]
        return [
            {
                "InstanceType": kind,
                "AvailabilityZone": zone,
                "SpotPrice": f"{usd:.6f}",
                "ProductDescription": "Linux/UNIX",
                "Timestamp": self.clock.time - timedelta(days=30),
            }
            for kind, zone in sorted((one["InstanceType"], one["Location"]) for one in offers)
            if kind in asked["InstanceTypes"] and (usd := self.spot.get((kind, zone), self.spot.get(kind))) is not None
        ]

    def _products(self, asked: dict[str, Any]) -> list[str]:
        wanted = {one["Field"]: one["Value"] for one in asked["Filters"]}
        usd = self.full.get(wanted.get("instanceType", ""))
        dimension = {"unit": "Hrs", "pricePerUnit": {"USD": f"{usd}"}}
        term = {"effectiveDate": "2025-06-01T00:00:00Z", "priceDimensions": {"x": dimension}}
        return [] if usd is None else [json.dumps({"terms": {"OnDemand": {"x": term}}})]

    # -- what happens to the account ----------------------------------------------------------------------------------

    def image(self, region: str) -> str:
        """Registers an AMI."""
        return str(self.client(region).register_image(Name="ours", RootDeviceName="/dev/sda1")["ImageId"])

    def zone_of(self, subnet: str, region: str) -> str:
        return str(ec2_backends[DEFAULT_ACCOUNT_ID][region].get_subnet(subnet).availability_zone)

    def instances(self, *states: str) -> list[Any]:
        """All instances in these states, oldest first, with ``.region``."""
        found = []
        for region in REGIONS:
            for one in ec2_backends[DEFAULT_ACCOUNT_ID][region].all_instances():
                one.region = region
                found += [one] if one.state in states else []
        return found

    def end(self, instance: Any, reason: str) -> None:
        """Takes an instance away as EC2 (or its own system) would, and says why."""
        instance._state.name, instance._state.code = "terminated", 48
        instance._reason = f"{reason} ({self.clock.time:%Y-%m-%d %H:%M:%S} UTC)"
        instance.state_reason = StateReason(reason, reason)


class _Session:
    """What `Cloud` needs of a boto3 session, with every service at one address; a client is made once."""

    def __init__(self, core: botocore.session.Session, endpoint: str) -> None:
        self._core = core
        self._endpoint = endpoint
        self._made: dict[tuple[str, Any], Any] = {}

    def client(self, service: str, region_name: str | None = None, **options: Any) -> Any:
        key = service, region_name
        if key not in self._made:
            self._made[key] = self._core.create_client(service, region_name=region_name, endpoint_url=self._endpoint, **options)
        return self._made[key]


_LOADER = create_loader()


def _core() -> botocore.session.Session:
    core = botocore.session.Session()
    core.register_component("data_loader", _LOADER)  # the models of AWS's APIs are large, and read once
    core.set_config_variable("region", "us-east-1")
    return core


def _http(status: int) -> AWSResponse:
    return AWSResponse("http://canned", status, {}, None)
