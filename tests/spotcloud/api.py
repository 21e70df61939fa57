"""The API of the local spot cloud: a proxy before moto's server that knows of capacity, quotas, prices and client tokens.

What moto lacks, or does otherwise than EC2, is answered here, read and written by the API's own model; everything else passes.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import parse_qsl
from xml.sax.saxutils import escape

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError
from botocore.utils import parse_timestamp
from moto.backends import get_backend
from moto.core.parse import PROTOCOL_PARSERS
from moto.core.serialize import SERIALIZERS
from moto.core.utils import get_service_model
from moto.ec2.models.instance_types import INSTANCE_TYPE_OFFERINGS, INSTANCE_TYPES

from tests.proxy import Answer, Exchange, Proxy
from tests.spotcloud import iam
from tests.spotcloud.market import (
    DISK_DOLLARS_PER_GB_AND_MONTH,
    DOLLARS_PER_HOUR,
    ON_DEMAND,
    SPOT,
    TRAFFIC_DOLLARS_PER_GB,
    Market,
    Pool,
)
from tests.spotcloud.placement import PlacementGroups

ACCOUNT = "123456789012"
IMAGE = "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base/latest/ami-id"  # one that every region has
_TRIED_BY_A_FLEET = 3
_SCORED_FROM = 3  # types that must be named for a placement score to say something
_IMAGES = "/aws/service/deeplearning/ami/"
_SCOPE = re.compile(r"Credential=[^/]+/\d{8}/([^/]+)/([^/]+)/aws4_request")
_REPEATABLE = ("CreateFleet", "RunInstances", "RequestSpotInstances", "RequestSpotFleet")  # with one token only once

QUOTAS = {  # code: name, first letters of the families, market
    "L-C4BD4855": ("All P5 Spot Instance Requests", ("p5",), SPOT),
    "L-7212CCBC": ("All P4, P3 and P2 Spot Instance Requests", ("p4", "p3", "p2"), SPOT),
    "L-3819A6DF": ("All G and VT Spot Instance Requests", ("g", "vt"), SPOT),
    "L-34B43A08": ("All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests", tuple("acdhimrtz"), SPOT),
    "L-417A185B": ("Running On-Demand P instances", ("p",), ON_DEMAND),
    "L-DB2E81BA": ("Running On-Demand G and VT instances", ("g", "vt"), ON_DEMAND),
    "L-1216C47A": ("Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances", tuple("acdhimrtz"), ON_DEMAND),
}
_LONG_NAMES = {
    "us-east-1": "US East (N. Virginia)",
    "us-east-2": "US East (Ohio)",
    "us-west-2": "US West (Oregon)",
    "eu-west-1": "EU (Ireland)",
}


class Refusal(Exception):
    """An error of EC2's."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.status = code, message, status


@dataclass
class SpotRequest:
    """Of RequestSpotInstances: it stays until there is a machine for it."""

    id: str
    region: str
    data: Mapping[str, Any]
    pool: Pool | None
    max_price: float | None
    created: datetime
    tags: Sequence[Mapping[str, str]]
    code: str = "pending-evaluation"
    state: str = "open"
    instance_id: str | None = None
    updated: datetime | None = None  # from then on it has this code; before, the machine's request is fulfilled


@dataclass
class SpotFleet:
    """Of RequestSpotFleet."""

    id: str
    region: str
    config: Mapping[str, Any]
    created: datetime
    tags: Sequence[Mapping[str, str]]
    state: str = "active"
    activity: str = "pending_fulfillment"
    instances: dict[str, str] = field(default_factory=dict)
    history: list[tuple[datetime, str, str]] = field(default_factory=list)


class Held:
    """A launch whose answer is held back."""

    def __init__(self) -> None:
        self.started, self.reached, self.go_on = False, threading.Event(), threading.Event()


class Api(Proxy):
    """Answers for all regions.

    Args:
        moto: endpoint of moto's server.
        market: what there is.
        now: the cloud's clock.
        launched: is told id, region and pool of each new machine, and may not call back.
    """

    def __init__(self, moto: str, market: Market, now: Callable[[], datetime], launched: Callable[[str, Pool], None]) -> None:
        super().__init__(moto)
        self._moto, self._market, self._now, self._launched = moto, market, now, launched
        self._lock = threading.RLock()
        self._answers: dict[tuple[str, ...], tuple[Mapping[str, Any], Answer]] = {}
        self._faults: list[tuple[str, Refusal | None]] = []
        self._clients: dict[str, Any] = {}
        self._requests: dict[str, SpotRequest] = {}
        self._fleets: dict[str, SpotFleet] = {}
        self.asked_to_end: dict[str, datetime] = {}
        self.quotas: dict[tuple[str, str], float] = {}
        self.regions = list(_LONG_NAMES)
        self.policy: Mapping[str, Any] | None = None
        self.permitted: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.broken: list[Exception] = []
        self._hold: Held | None = None
        self.placements = PlacementGroups(Refusal, self._is_alive)

    # -- what goes wrong, and how much one may have -------------------------------------------------------------------

    def fail(self, action: str, code: str, message: str = "injected", *, status: int = 400, times: int = 1) -> None:
        """The next calls of this action are refused."""
        with self._lock:
            self._faults += [(action, Refusal(code, message, status))] * times

    def lose_answer(self, action: str) -> None:
        """The next call of this action is carried out, and the connection breaks before the answer is sent."""
        with self._lock:
            self._faults.append((action, None))

    def hold_launch(self) -> Held:
        """The next call that starts a machine gets its answer when it is told to go on."""
        with self._lock:
            self._hold = Held()
            return self._hold

    def quota(self, code: str, region: str) -> float:
        """vCPUs."""
        return self.quotas.get((code, region), 1000.0)

    def _refused(self, service: str, region: str, action: str, form: Mapping[str, str]) -> str:
        """Why the policy does not permit a call; empty if it does."""
        assert self.policy is not None
        wanted: Iterable[iam.Need] = [iam.Need(f"{service}:{action}")]
        if service == "ec2":
            asked = self._parsed(service, action, {"values": form, "body": b"", "headers": {}, "method": "POST"})
            wanted = iam.needs(
                action,
                asked,
                lambda named: self._template(region, named),
                lambda name: self._tags_of(region, name),
                ACCOUNT,
            )
        for need in wanted:
            if not iam.is_permitted(self.policy, need):
                return f"{need.action} on {need.resource} with {dict(need.context)}"
            self.permitted.add(need.action)
        return ""

    def _tags_of(self, region: str, name: str) -> dict[str, str]:
        """Tags of an instance, a launch template, a security group, or a placement group by its name."""
        if (region, name) in self.placements.groups:
            found: Sequence[Mapping[str, str]] = self.placements.groups[region, name].tags
        else:
            filters = [{"Name": "resource-id", "Values": [name]}]
            found = self._client(region).describe_tags(Filters=filters)["Tags"]
        return {tag["Key"]: tag["Value"] for tag in found}

    def _parsed(self, service: str, action: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        operation = get_service_model(_MODELS.get(service, service)).operation_model(action)
        parser = PROTOCOL_PARSERS[operation.service_model.protocol](operation, timestamp_parser=_moment)
        parsed: Mapping[str, Any] = parser.parse(request)
        return parsed

    # -- requests -----------------------------------------------------------------------------------------------------

    def carry(self, exchange: Exchange) -> None:
        """Answers a request, or passes it on."""
        scope = _SCOPE.search(exchange.headers.get("Authorization", ""))
        if scope is None:
            exchange.answer(exchange.forward())
            return
        region, service = scope[1], scope[2]
        target = exchange.headers.get("X-Amz-Target", "")
        form = dict(parse_qsl(exchange.body.decode(), keep_blank_values=True)) if not target and service != "s3" else {}
        action = target.rpartition(".")[2] or form.get("Action", "")
        self.calls[action] += 1
        if self.policy is not None and (why := self._refused(service, region, action, form)):
            exchange.answer(_error(service, Refusal("UnauthorizedOperation", f"You are not authorized: {why}", 403)))
            return
        with self._lock:
            at = next((place for place, (failing, _) in enumerate(self._faults) if failing == action), None)
            fault = None if at is None else self._faults.pop(at)
        if fault is not None and fault[1] is not None:
            exchange.answer(_error(service, fault[1]))
            return
        try:
            answer = self._answer(service, region, action, form, exchange)
        except Exception as error:  # goes to whoever closes the cloud; a thread's own would only be printed
            self.broken.append(error)
            told = escape("".join(traceback.format_exception(error)))
            exchange.answer(_error(service, Refusal("InternalError", told, 500)))
            return
        held = self._hold
        if held is not None and held.started and action in _REPEATABLE:
            self._hold = None
            held.reached.set()
            held.go_on.wait()
        exchange.reset() if fault is not None else exchange.answer(answer)

    def _answer(self, service: str, region: str, action: str, form: Mapping[str, str], exchange: Exchange) -> Answer:
        handler = getattr(self, f"{service}_{_snake(action)}", None)
        if handler is None:
            return exchange.forward()
        operation = get_service_model(_MODELS.get(service, service)).operation_model(action)
        request = {"values": form, "body": exchange.body, "headers": exchange.headers, "method": "POST"}
        asked = self._parsed(service, action, request)
        if asked.get("DryRun"):
            return exchange.forward()  # moto checks it as it checks the real thing, and launches nothing
        inner = asked.get("SpotFleetRequestConfig") or asked
        token = inner.get("ClientToken") if action in _REPEATABLE else None
        with self._lock:
            if token and (known := self._answers.get((region, action, token))):
                if known[0] != asked:
                    message = (
                        "Arguments on this idempotent request are inconsistent with arguments used in previous request(s)."
                    )
                    return _error(service, Refusal("IdempotentParameterMismatch", message))
                return known[1]
            try:
                said = SERIALIZERS[operation.service_model.protocol](operation).serialize(handler(region, asked))
            except Refusal as refusal:
                return _error(service, refusal)
            except ClientError as error:  # moto's own
                said_by_moto = error.response["Error"]
                return _error(service, Refusal(said_by_moto["Code"], said_by_moto["Message"]))
            body = said["body"].encode() if isinstance(said["body"], str) else said["body"]
            answer = Answer(said["status_code"], said["headers"], body)
            if token:
                self._answers[(region, action, token)] = (asked, answer)
            return answer

    # -- launching ----------------------------------------------------------------------------------------------------

    def ec2_create_fleet(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Instant fleets. Three pools are tried, in order of price; of all others EC2 says that it can't."""
        if asked.get("Type", "maintain") != "instant":
            raise Refusal("InvalidParameterValue", "the local spot cloud has instant fleets only")
        wanted = asked["TargetCapacitySpecification"]
        market = wanted.get("DefaultTargetCapacityType", ON_DEMAND)
        options = asked.get("SpotOptions" if market == SPOT else "OnDemandOptions") or {}
        fleet_id = f"fleet-{secrets.token_hex(16)}"
        tags = _tags(asked.get("TagSpecifications", ()), "instance")
        candidates = []
        for config in asked["LaunchTemplateConfigs"]:
            specification = config["LaunchTemplateSpecification"]
            data = self._template(region, specification)
            for override in config.get("Overrides") or [{}]:
                for pool in self._pools(region, {**data, **override}, market):
                    candidates.append((pool, specification, override, {**data, **override}))
        by_priority = options.get("AllocationStrategy", "").endswith("prioritized")
        candidates.sort(key=lambda one: (by_priority and one[2].get("Priority", 0), self._market.price(one[0], self._now())))
        total, least = int(wanted["TotalTargetCapacity"]), int(options.get("MinTargetCapacity") or 1)
        one_zone = bool(options.get("SingleAvailabilityZone"))
        if options.get("MinTargetCapacity") and not (one_zone or options.get("SingleInstanceType")):
            raise Refusal("InvalidParameterCombination", "MinTargetCapacity needs SingleAvailabilityZone or SingleInstanceType")
        if least > total:
            raise Refusal("InvalidParameterValue", "MinTargetCapacity is larger than TotalTargetCapacity")
        errors, rooms = [], []
        for place, (pool, specification, override, _) in enumerate(candidates):
            cap = min(float(price) for price in (override.get("MaxPrice"), options.get("MaxTotalPrice"), "inf") if price)
            refusal = self._obstacle(pool, cap, "InvalidFleetConfiguration")
            if place >= _TRIED_BY_A_FLEET:
                message = (
                    "Unable to fulfill capacity due to your request configuration. Please adjust your request and try again."
                )
                refusal = Refusal("UnfulfillableCapacity", message)
            shown = {
                "LaunchTemplateAndOverrides": {"LaunchTemplateSpecification": specification, "Overrides": override},
                "Lifecycle": market,
            }
            if refusal is not None:
                errors.append({**shown, "ErrorCode": refusal.code, "ErrorMessage": refusal.message})
                continue
            rooms.append((place, shown, self._room(pool, total)))
        zones = dict.fromkeys(candidates[place][0].zone for place, _, _ in rooms)
        groups = [[one for one in rooms if candidates[one[0]][0].zone == zone] for zone in zones] if one_zone else [rooms]
        chosen = next((one for one in groups if sum(room for *_, room in one) >= least), [])
        if not chosen:
            for _, shown, room in rooms:
                message = f"There is capacity for {room} machines, and MinTargetCapacity is {least}."
                errors.append({**shown, "ErrorCode": "InsufficientInstanceCapacity", "ErrorMessage": message})
        instances: list[dict[str, Any]] = []
        missing = total
        for place, shown, room in chosen:
            pool, _, _, data = candidates[place]
            ids = [self._launch(data, pool, tags, fleet_id) for _ in range(min(room, missing))]
            missing -= len(ids)
            if ids:
                instances.append({**shown, "InstanceIds": ids, "InstanceType": pool.instance_type})
        return {"FleetId": fleet_id, "Instances": instances, "Errors": errors if missing else []}

    def _room(self, pool: Pool, wanted: int) -> int:
        """How many machines of this pool can be launched now, of so many."""
        mine = sum(
            one.instance_type == pool.instance_type
            and one.placement.zone == pool.zone
            and (SPOT if one.lifecycle == SPOT else ON_DEMAND) == pool.market
            for one in self.running(pool.region)
        )
        allowed = self.quota(_quota_of(pool), pool.region) - self._held(pool)
        return int(min(wanted, self._market.capacity(pool) - mine, allowed // _vcpus(pool.instance_type)))

    def ec2_run_instances(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """In the first zone that has a machine, where none is named."""
        data = {**(self._template(region, asked["LaunchTemplate"]) if asked.get("LaunchTemplate") else {}), **asked}
        options = data.get("InstanceMarketOptions") or {}
        market = SPOT if options.get("MarketType") == SPOT else ON_DEMAND
        cap = float((options.get("SpotOptions") or {}).get("MaxPrice") or "inf")
        refusals = {pool: self._obstacle(pool, cap, "Unsupported") for pool in self._pools(region, data, market)}
        pool = next((pool for pool, refusal in refusals.items() if refusal is None), None)
        if pool is None:
            raise next(iter(refusals.values())) or AssertionError("unreachable")
        tags = _tags(asked.get("TagSpecifications", ()), "instance")
        instance_id = self._launch({name: value for name, value in data.items() if name != "ClientToken"}, pool, tags)
        [found] = self._client(region).describe_instances(InstanceIds=[instance_id])["Reservations"]
        return dict(found)

    def ec2_request_spot_instances(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Requests, which wait until there is a machine."""
        data = dict(asked["LaunchSpecification"])
        made = []
        for _ in range(int(asked.get("InstanceCount") or 1)):
            price = asked.get("SpotPrice")
            tags = _tags(asked.get("TagSpecifications", ()), "spot-instances-request")
            pool = next(iter(self._pools(region, data, SPOT)), None)
            request = SpotRequest(
                f"sir-{secrets.token_hex(4)}", region, data, pool, float(price) if price else None, self._now(), tags
            )
            if refusal := self._over_quota(pool) if pool else None:
                raise refusal
            self._requests[request.id] = request
            made.append(request)
        self.evaluate()
        return {"SpotInstanceRequests": [_shown(request, self._now()) for request in made]}

    def ec2_describe_spot_instance_requests(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        ids, filters = asked.get("SpotInstanceRequestIds") or [], asked.get("Filters") or []
        found = [one for one in self._requests.values() if one.region == region and (not ids or one.id in ids)]
        if len(found) < len(ids):
            raise Refusal("InvalidSpotInstanceRequestID.NotFound", f"The spot instance request IDs {ids} do not exist")
        return {"SpotInstanceRequests": [shown for one in found if _passes(shown := _shown(one, self._now()), filters)]}

    def ec2_cancel_spot_instance_requests(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in asked["SpotInstanceRequestIds"]:
            request = self._requests[name]
            request.state = "cancelled"
            request.code = "request-canceled-and-instance-running" if request.instance_id else "canceled-before-fulfillment"
        return {
            "CancelledSpotInstanceRequests": [
                {"SpotInstanceRequestId": name, "State": "cancelled"} for name in asked["SpotInstanceRequestIds"]
            ]
        }

    def ec2_request_spot_fleet(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fleets, which wait until there is a machine."""
        config = asked["SpotFleetRequestConfig"]
        tags = _tags(config.get("TagSpecifications", ()), "spot-fleet-request")
        fleet = SpotFleet(f"sfr-{secrets.token_hex(8)}", region, config, self._now(), tags)
        self._fleets[fleet.id] = fleet
        self.evaluate()
        return {"SpotFleetRequestId": fleet.id}

    def ec2_describe_spot_fleet_requests(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        ids = asked.get("SpotFleetRequestIds") or []
        found = [one for one in self._fleets.values() if one.region == region and (not ids or one.id in ids)]
        return {
            "SpotFleetRequestConfigs": [
                {
                    "SpotFleetRequestId": one.id,
                    "SpotFleetRequestState": one.state,
                    "ActivityStatus": one.activity,
                    "CreateTime": one.created,
                    "SpotFleetRequestConfig": one.config,
                    "Tags": one.tags,
                }
                for one in found
            ]
        }

    def ec2_describe_spot_fleet_instances(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        fleet = self._fleets[asked["SpotFleetRequestId"]]
        active = [
            {"InstanceId": name, "InstanceType": kind, "InstanceHealth": "healthy"} for name, kind in fleet.instances.items()
        ]
        return {"SpotFleetRequestId": fleet.id, "ActiveInstances": active}

    def ec2_describe_spot_fleet_request_history(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        fleet = self._fleets[asked["SpotFleetRequestId"]]
        records = [
            {"Timestamp": at, "EventType": kind, "EventInformation": {"EventSubType": what}}
            for at, kind, what in fleet.history
            if at >= asked["StartTime"]
        ]
        return {"SpotFleetRequestId": fleet.id, "HistoryRecords": records, "StartTime": asked["StartTime"]}

    def ec2_cancel_spot_fleet_requests(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        done = []
        for name in asked["SpotFleetRequestIds"]:
            fleet = self._fleets[name]
            before, ends = fleet.state, bool(asked.get("TerminateInstances"))
            fleet.state = "cancelled_terminating" if ends else "cancelled_running"
            if ends and fleet.instances:
                self._client(region).terminate_instances(InstanceIds=list(fleet.instances))
            states = {"CurrentSpotFleetRequestState": fleet.state, "PreviousSpotFleetRequestState": before}
            done.append({"SpotFleetRequestId": name, **states})
        return {"SuccessfulFleetRequests": done, "UnsuccessfulFleetRequests": []}

    def evaluate(self) -> None:
        """Gives waiting requests a machine, if there is one by now."""
        with self._lock:
            for request in self._requests.values():
                if request.state == "open":
                    self._evaluate(request)
            for fleet in self._fleets.values():
                if fleet.state == "active" and len(fleet.instances) < int(fleet.config.get("TargetCapacity", 1)):
                    self._fulfil(fleet)

    def ended(self, instance_id: str, reason: str, at: datetime) -> None:
        """A machine is gone; its request says so, of one that shut itself down a minute later."""
        with self._lock:
            for request in self._requests.values():
                if request.instance_id == instance_id:
                    request.state = "closed"
                    by_user = reason.startswith("Client.")
                    request.code = "instance-terminated-by-user" if by_user else "instance-terminated-no-capacity"
                    late = timedelta(seconds=60 if reason == "Client.InstanceInitiatedShutdown" else 0)
                    request.updated = at.replace(microsecond=0) + late

    def _evaluate(self, request: SpotRequest) -> None:
        if request.pool is None:
            return  # nobody has ever sold this here: pending-evaluation is all that it will be
        cap = float("inf") if request.max_price is None else request.max_price
        refusal = self._obstacle(request.pool, cap, "Unsupported")
        if refusal is not None:
            request.code = "price-too-low" if refusal.code == "SpotMaxPriceTooLow" else "capacity-not-available"
            return
        request.instance_id = self._launch(request.data, request.pool, (), asks=True)
        request.state, request.code = "active", "fulfilled"

    def _fulfil(self, fleet: SpotFleet) -> None:
        candidates = []
        for data in fleet.config.get("LaunchSpecifications") or ():
            groups = [one["GroupId"] for one in data.get("SecurityGroups") or ()]
            plain = {name: value for name, value in data.items() if name not in ("SecurityGroups", "TagSpecifications")}
            candidates += [
                (pool, {**plain, "SecurityGroupIds": groups}, data) for pool in self._pools(fleet.region, data, SPOT)
            ]
        for config in fleet.config.get("LaunchTemplateConfigs") or ():
            data = self._template(fleet.region, config["LaunchTemplateSpecification"])
            for override in config.get("Overrides") or [{}]:
                mixed = {**data, **override}
                candidates += [(pool, mixed, mixed) for pool in self._pools(fleet.region, mixed, SPOT)]
        for pool, data, told in sorted(candidates, key=lambda one: self._market.price(one[0], self._now())):
            cap = float(told.get("SpotPrice") or fleet.config.get("SpotPrice") or "inf")
            refusal = self._obstacle(pool, cap, "Unsupported")
            if refusal is None:
                name = self._launch(data, pool, _tags(told.get("TagSpecifications", ()), "instance"))
                fleet.instances[name] = pool.instance_type
                fleet.activity = "fulfilled"
                fleet.history.append((self._now(), "instanceChange", "launched"))
                return
            fleet.history.append((self._now(), "information", refusal.code))

    # -- prices, scores, quotas ---------------------------------------------------------------------------------------

    def ec2_describe_spot_price_history(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Newest first; the price that held when the time asked for began is in it."""
        said = {one["Name"]: one["Values"] for one in asked.get("Filters") or ()}
        zones = [asked["AvailabilityZone"]] if asked.get("AvailabilityZone") else said.get("availability-zone")
        products = asked.get("ProductDescriptions") or said.get("product-description") or ["Linux/UNIX"]
        began, ended = asked.get("StartTime") or self._market.began, asked.get("EndTime") or self._now()
        found = []
        for kind in asked.get("InstanceTypes") or said.get("instance-type") or sorted(DOLLARS_PER_HOUR):
            for zone in _zones(region, kind) if set(products) & {"Linux/UNIX", "Linux/UNIX (Amazon VPC)"} else ():
                if zones and zone not in zones:
                    continue
                history = self._market.history(Pool(kind, zone))
                nexts = [*(since for since, _ in history[1:]), None]
                for (since, price), until in zip(history, nexts, strict=True):
                    if since <= ended and (until is None or until > began):
                        one = {"AvailabilityZone": zone, "InstanceType": kind, "SpotPrice": f"{price:.6f}", "Timestamp": since}
                        found.append({**one, "ProductDescription": "Linux/UNIX"})
        found.sort(key=lambda one: one["Timestamp"], reverse=True)
        page, from_ = int(asked.get("MaxResults") or 1000), int(asked.get("NextToken") or 0)
        more = str(from_ + page) if from_ + page < len(found) else ""
        return {"SpotPriceHistory": found[from_ : from_ + page], "NextToken": more}

    def ec2_describe_regions(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Four: moto takes a second to make each."""
        wanted = asked.get("RegionNames") or self.regions
        return {
            "Regions": [
                {"RegionName": name, "Endpoint": f"ec2.{name}.amazonaws.com", "OptInStatus": "opt-in-not-required"}
                for name in self.regions
                if name in wanted
            ]
        }

    def ec2_get_spot_placement_scores(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """9 where there is capacity now and 1 where there is none; never more than 3 for fewer than three types."""
        kinds = asked.get("InstanceTypes") or []
        scores = []
        for name in asked.get("RegionNames") or [region]:
            pools = [Pool(kind, zone) for kind in kinds for zone in _zones(name, kind)]
            best = 9 if any(map(self._market.has_capacity, pools)) else 1
            scores.append({"Region": name, "Score": best if len(kinds) >= _SCORED_FROM else min(best, 3)})
        return {"SpotPlacementScores": scores}

    def servicequotas_list_service_quotas(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"Quotas": [self._quota(code, region) for code in QUOTAS] if asked["ServiceCode"] == "ec2" else []}

    servicequotas_list_aws_default_service_quotas = servicequotas_list_service_quotas

    def servicequotas_get_service_quota(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        if asked["QuotaCode"] not in QUOTAS:
            raise Refusal("NoSuchResourceException", "The specified quota does not exist.")
        return {"Quota": self._quota(asked["QuotaCode"], region)}

    servicequotas_get_aws_default_service_quota = servicequotas_get_service_quota

    def pricing_get_products(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """On-demand prices, in the shape of AWS's price list."""
        wanted = [(one["Field"], one["Value"]) for one in asked.get("Filters") or ()]
        if asked["ServiceCode"] == "AWSDataTransfer":
            return {"FormatVersion": "aws_v1", "PriceList": _traffic_products(dict(wanted))}
        found = []
        of_disk = dict(wanted).get("productFamily") == "Storage"
        offers = {"gp3": DISK_DOLLARS_PER_GB_AND_MONTH} if of_disk else DOLLARS_PER_HOUR
        for kind, price in offers.items():
            for code, name in _LONG_NAMES.items():
                attributes = {
                    "instanceType": kind,
                    "regionCode": code,
                    "location": name,
                    "operatingSystem": "Linux",
                    "tenancy": "Shared",
                    "preInstalledSw": "NA",
                    "capacitystatus": "Used",
                    "licenseModel": "No License required",
                    "marketoption": "OnDemand",
                    "operation": "RunInstances",
                    "servicecode": "AmazonEC2",
                }
                if of_disk:
                    attributes |= {"productFamily": "Storage", "volumeApiName": kind}
                if all(attributes.get(key) == value or key == "ServiceCode" for key, value in wanted):
                    dimension = {
                        "unit": "GB-Mo" if of_disk else "Hrs",
                        "pricePerUnit": {"USD": f"{price:.10f}"},
                        "description": f"${price} per {kind}",
                    }
                    term = {"priceDimensions": {"A.B.C": dimension}, "effectiveDate": "2025-06-01T00:00:00Z"}
                    product = {"product": {"sku": "A", "attributes": attributes}, "terms": {"OnDemand": {"A.B": term}}}
                    found.append(json.dumps({**product, "serviceCode": "AmazonEC2", "publicationDate": "2025-06-01T00:00:00Z"}))
        return {"FormatVersion": "aws_v1", "PriceList": found}

    def ssm_get_parameter(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """AWS's deep learning images: their names lead to an image that moto has."""
        name = asked["Name"]
        if name.startswith(_IMAGES):
            value, version = self._image(region), 1
        else:
            held = get_backend("ssm")[ACCOUNT][region].get_parameter(name)
            if held is None:
                raise Refusal("ParameterNotFound", f"Parameter {name} not found.")
            value, version = held.value, held.version
        return {"Parameter": {"Name": name, "Type": "String", "Value": value, "Version": version, "DataType": "aws:ec2:image"}}

    # -- inside -------------------------------------------------------------------------------------------------------

    def _launch(
        self, data: Mapping[str, Any], pool: Pool, tags: Sequence[Mapping[str, str]], fleet_id: str = "", *, asks: bool = False
    ) -> str:
        """Starts a machine; every spot machine has a request, also one of a fleet.

        Args:
            asks: it is for a request that exists.
        """
        client = self._client(pool.region)
        known = client.meta.service_model.operation_model("RunInstances").input_shape.members
        wanted = {name: value for name, value in data.items() if name in known and value not in (None, [], {})}
        for name in ("MaxPrice", "Priority", "LaunchTemplate", "InstanceMarketOptions", "Placement", "TagSpecifications"):
            wanted.pop(name, None)
        image = wanted["ImageId"]
        if image.startswith("resolve:ssm:"):
            image = self.ssm_get_parameter(pool.region, {"Name": image.removeprefix("resolve:ssm:")})["Parameter"]["Value"]
        if image not in self._backend(pool.region).amis:
            raise Refusal("InvalidAMIID.NotFound", f"The image id '[{image}]' does not exist")
        subnet = self._subnet(pool, data)
        placed = (data.get("Placement") or {}).get("GroupName")
        group = self.placements.named(pool.region, placed) if placed else None
        if wanted.get("NetworkInterfaces"):
            wanted["NetworkInterfaces"] = [{**wanted["NetworkInterfaces"][0], "SubnetId": subnet}]
            wanted.pop("SubnetId", None)
        else:
            wanted["SubnetId"] = subnet
        if wanted.get("UserData"):
            wanted["UserData"] = base64.b64decode(str(wanted["UserData"]))  # boto3 encodes it
        specifications = [one for one in data.get("TagSpecifications") or () if one["ResourceType"] in ("instance", "volume")]
        specifications += [{"ResourceType": "instance", "Tags": list(tags)}] if tags else []
        if specifications:
            wanted["TagSpecifications"] = _merged(specifications)
        if pool.market == SPOT:
            wanted["InstanceMarketOptions"] = {"MarketType": SPOT}
        fixed = {"ImageId": image, "InstanceType": pool.instance_type, "MinCount": 1, "MaxCount": 1}
        [made] = client.run_instances(**{**wanted, **fixed})["Instances"]
        instance = self._backend(pool.region).get_instance(made["InstanceId"])
        instance.launch_time = self._now().replace(tzinfo=None, microsecond=0)
        if pool.market == SPOT and not asks:
            request = SpotRequest(f"sir-{secrets.token_hex(4)}", pool.region, data, pool, None, self._now(), ())
            request.state, request.code, request.instance_id = "active", "fulfilled", str(instance.id)
            self._requests[request.id] = request
        if group is not None:
            group.instances.append(str(instance.id))
        if fleet_id:
            instance.add_tags({"aws:ec2:fleet-id": fleet_id})
        self._launched(instance.id, pool)
        if self._hold is not None:
            self._hold.started = True
        return str(instance.id)

    def _obstacle(self, pool: Pool, cap: float, not_offered: str) -> Refusal | None:
        """Why there is no machine of this pool, or None."""
        kind, zone = pool.instance_type, pool.zone
        if zone not in _zones(pool.region, kind):
            message = f"Your requested instance type ({kind}) is not supported in your requested Availability Zone ({zone})."
            return Refusal(not_offered, message)
        if refusal := self._over_quota(pool):
            return refusal
        if pool.market == SPOT and (price := self._market.price(pool, self._now())) > cap:
            message = f"Your Spot request price of {cap} is lower than the minimum required fulfillment price of {price}."
            return Refusal("SpotMaxPriceTooLow", message)
        if self._room(pool, 1) < 1:
            message = f"We currently do not have sufficient {kind} capacity in the Availability Zone you requested ({zone})."
            if pool.market == SPOT:
                message = "There is no Spot capacity available that matches your request."
            return Refusal("InsufficientInstanceCapacity", message, 500)
        return None

    def _over_quota(self, pool: Pool) -> Refusal | None:
        limit, held = self.quota(_quota_of(pool), pool.region), self._held(pool)
        if held + _vcpus(pool.instance_type) <= limit:
            return None
        if pool.market == SPOT:
            return Refusal("MaxSpotInstanceCountExceeded", "Max spot instance count exceeded")
        message = (
            f"You have requested more vCPU capacity than your current vCPU limit of {limit:.0f} allows for the instance bucket "
            "that the specified instance type belongs to."
        )
        return Refusal("VcpuLimitExceeded", message)

    def _held(self, pool: Pool) -> int:
        """vCPUs that run on the quota of a pool."""
        held = 0
        for instance in self.running(pool.region):
            of_spot = SPOT if instance.lifecycle == SPOT else ON_DEMAND
            other = Pool(instance.instance_type, instance.placement.zone, of_spot)
            held += _vcpus(other.instance_type) if _quota_of(other) == _quota_of(pool) else 0
        return held

    def ec2_terminate_instances(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """By the cloud's clock."""
        ids = asked["InstanceIds"]
        asked_at = self._now()
        self.asked_to_end |= {name: asked_at for name in ids if name not in self.asked_to_end}
        done = self._client(region).terminate_instances(InstanceIds=ids)["TerminatingInstances"]
        for name in ids:
            at = self.asked_to_end[name]
            self._backend(region).get_instance(name)._reason = f"User initiated ({at:%Y-%m-%d %H:%M:%S} GMT)"
        return {"TerminatingInstances": done}

    # -- placement groups, and security groups that are in use --------------------------------------------------------

    def ec2_create_placement_group(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.placements.create(region, asked)

    def ec2_describe_placement_groups(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.placements.describe(region, asked)

    def ec2_delete_placement_group(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.placements.delete(region, asked)

    def ec2_delete_security_group(self, region: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Not while a machine has it."""
        for instance in self._backend(region).all_instances():
            groups = {group.id for nic in instance.nics.values() for group in nic.group_set}
            if asked["GroupId"] in groups and instance.state != "terminated":
                raise Refusal("DependencyViolation", f"resource {asked['GroupId']} has a dependent object")
        self._client(region).delete_security_group(GroupId=asked["GroupId"])
        return {"Return": True, "GroupId": asked["GroupId"]}

    def _is_alive(self, region: str, instance_id: str) -> bool:
        return any(one.id == instance_id for one in self.running(region))

    def running(self, region: str) -> list[Any]:
        """moto's instances that run in a region."""
        return [one for one in self._backend(region).all_instances() if one.state == "running"]

    def _quota(self, code: str, region: str) -> dict[str, Any]:
        return {
            "ServiceCode": "ec2",
            "ServiceName": "Amazon Elastic Compute Cloud (Amazon EC2)",
            "QuotaArn": f"arn:aws:servicequotas:{region}:{ACCOUNT}:ec2/{code}",
            "QuotaCode": code,
            "QuotaName": QUOTAS[code][0],
            "Value": self.quota(code, region),
            "Unit": "None",
            "Adjustable": True,
            "GlobalQuota": False,
        }

    def _pools(self, region: str, data: Mapping[str, Any], market: str) -> Iterator[Pool]:
        """Where this could run: the zone of its subnet or placement, or else every zone that offers the type."""
        kind = data["InstanceType"]
        subnet = data.get("SubnetId") or next((one.get("SubnetId") for one in data.get("NetworkInterfaces") or ()), None)
        zone = data.get("AvailabilityZone") or (data.get("Placement") or {}).get("AvailabilityZone")
        if subnet:
            zones = [self._backend(region).get_subnet(one.strip()).availability_zone for one in subnet.split(",")]
        else:
            zones = [zone] if zone else sorted(_zones(region, kind))
        yield from (Pool(kind, one, market) for one in zones)

    def _subnet(self, pool: Pool, data: Mapping[str, Any]) -> str:
        inner = next((one.get("SubnetId") for one in data.get("NetworkInterfaces") or ()), None)
        named = [one.strip() for one in (data.get("SubnetId") or inner or "").split(",") if one]
        for subnet in self._backend(pool.region).describe_subnets():
            if subnet.availability_zone == pool.zone and (subnet.id in named or (not named and subnet.default_for_az)):
                return str(subnet.id)
        raise Refusal("MissingInput", f"No default subnet in {pool.zone}")

    def _template(self, region: str, named: Mapping[str, Any]) -> dict[str, Any]:
        backend = self._backend(region)
        templates = backend.launch_templates.values()
        key, attribute = ("LaunchTemplateId", "id") if named.get("LaunchTemplateId") else ("LaunchTemplateName", "name")
        template = next((one for one in templates if getattr(one, attribute) == named[key]), None)
        if template is None:
            code = f"Invalid{key}.NotFoundException"
            raise Refusal(code, f"The specified launch template, with template {attribute} {named[key]}, does not exist.")
        version = named.get("Version") or "$Default"
        number = {"$Default": template.default_version_number, "$Latest": template.latest_version_number}.get(version, version)
        return dict(template.get_version(number).data)

    def _image(self, region: str) -> str:
        """One image stands for all: moto's own thirteen hundred take a second to load, in each region."""
        client = self._client(region)
        found = client.describe_images(Owners=["self"])["Images"]
        if found:
            return str(found[0]["ImageId"])
        return str(client.register_image(Name="ubuntu", Architecture="x86_64", RootDeviceName="/dev/sda1")["ImageId"])

    def _backend(self, region: str) -> Any:
        return get_backend("ec2")[ACCOUNT][region]

    def _client(self, region: str) -> Any:
        """Speaks with moto itself."""
        if region not in self._clients:
            keys = {"aws_access_key_id": "moto", "aws_secret_access_key": "moto"}
            config = Config(retries={"total_max_attempts": 1})
            self._clients[region] = boto3.client("ec2", region_name=region, endpoint_url=self._moto, config=config, **keys)
        return self._clients[region]


def _traffic_products(wanted: Mapping[str, str]) -> list[str]:
    """In steps by amount, the dearest first or last, as AWS has them."""
    usd = TRAFFIC_DOLLARS_PER_GB.get(wanted["transferType"])
    if usd is None:
        return []
    steps = {"B": {"beginRange": "10240", "usd": usd / 2}, "A": {"beginRange": "0", "usd": usd}}
    dimensions = {
        name: {"unit": "GB", "beginRange": one["beginRange"], "pricePerUnit": {"USD": str(one["usd"])}}
        for name, one in steps.items()
    }
    term = {"priceDimensions": dimensions, "effectiveDate": "2025-06-01T00:00:00Z"}
    return [json.dumps({"product": {"attributes": dict(wanted)}, "terms": {"OnDemand": {"A.B": term}}})]


_MODELS = {"servicequotas": "service-quotas"}


def _snake(action: str) -> str:
    """``GetAWSDefaultServiceQuota``: ``get_aws_default_service_quota``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", action).lower()


def _moment(text: str) -> datetime:
    moment: datetime = parse_timestamp(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _error(service: str, refusal: Refusal) -> Answer:
    if service == "ec2":
        inner = f"<Errors><Error><Code>{refusal.code}</Code><Message>{refusal.message}</Message></Error></Errors>"
        body = f"<Response>{inner}<RequestID>{secrets.token_hex(8)}</RequestID></Response>"
        return Answer(refusal.status, {"Content-Type": "text/xml"}, body.encode())
    body = json.dumps({"__type": refusal.code, "message": refusal.message})
    return Answer(refusal.status, {"Content-Type": "application/x-amz-json-1.1"}, body.encode())


def _zones(region: str, kind: str) -> list[str]:
    offered = INSTANCE_TYPE_OFFERINGS["availability-zone"].get(region, [])
    return [str(one["Location"]) for one in offered if one["InstanceType"] == kind]


def _vcpus(kind: str) -> int:
    return int(INSTANCE_TYPES[kind]["VCpuInfo"]["DefaultVCpus"])


def _quota_of(pool: Pool) -> str:
    for code, (_, families, market) in QUOTAS.items():
        if market == pool.market and pool.instance_type.startswith(families):
            return code
    return ""


def _tags(specifications: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, str]]:
    return [tag for one in specifications or () if one["ResourceType"] == kind for tag in one["Tags"]]


def _merged(specifications: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One for each resource; later tags win."""
    found: dict[str, dict[str, str]] = {}
    for one in specifications:
        found.setdefault(one["ResourceType"], {}).update({tag["Key"]: tag["Value"] for tag in one["Tags"]})
    return [
        {"ResourceType": kind, "Tags": [{"Key": key, "Value": value} for key, value in tags.items()]}
        for kind, tags in found.items()
    ]


def _shown(request: SpotRequest, now: datetime) -> dict[str, Any]:
    is_late = request.updated is not None and now < request.updated
    state, code = ("active", "fulfilled") if is_late else (request.state, request.code)
    updated = request.created if is_late or request.updated is None else request.updated
    return {
        "SpotInstanceRequestId": request.id,
        "State": state,
        "Status": {"Code": code, "Message": code, "UpdateTime": updated},
        "Type": "one-time",
        "CreateTime": request.created,
        "InstanceId": request.instance_id,
        "LaunchedAvailabilityZone": request.pool.zone if request.pool else None,
        "SpotPrice": None if request.max_price is None else str(request.max_price),
        "Tags": list(request.tags),
    }


def _passes(shown: Mapping[str, Any], filters: Sequence[Mapping[str, Any]]) -> bool:
    tags = {tag["Key"]: tag["Value"] for tag in shown["Tags"]}
    known = {
        "state": shown["State"],
        "spot-instance-request-id": shown["SpotInstanceRequestId"],
        "instance-id": shown["InstanceId"],
    }
    known |= {f"tag:{key}": value for key, value in tags.items()}
    return all(known.get(one["Name"]) in one["Values"] for one in filters)
