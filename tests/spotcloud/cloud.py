"""A spot cloud on this machine: EC2's API, machines that are real, a market, and somebody who takes machines away.

moto and the market hold the state; one thread starts and ends machines, and everything else only tells it what to do.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from moto.backends import get_backend
from moto.moto_api._internal.models import moto_api_backend
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from tests.hosts import Hosts
from tests.proxy import Proxy
from tests.servers import SeaweedFS, aws_environment
from tests.spotcloud import guest
from tests.spotcloud.api import ACCOUNT, Api
from tests.spotcloud.machine import Machine
from tests.spotcloud.market import RECLAIMED, SPOT, Bill, Change, Market, Pool
from tests.waiting import PATIENCE_S

BY_USER = "Client.UserInitiatedShutdown"
BY_ITSELF = "Client.InstanceInitiatedShutdown"
CRASHED = "Server.InternalError"
_MESSAGES = {
    RECLAIMED: "Spot instance termination",
    BY_ITSELF: "Instance initiated shutdown",
    CRASHED: "Internal error on launch",
}
_TICK_S = 0.02
_EVALUATED_EVERY_S = 0.5


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(timezone.utc)


class SpotCloud:
    """``with SpotCloud(folder, s3=server) as cloud:`` starts it; nothing of it is left afterwards.

    Args:
        folder: gets a folder for each machine.
        s3: a server that machines with an instance profile may use; without one instances are entries in moto's tables, and
            nothing runs.
        market: what there is; default: everything that EC2 offers, at prices of its own.
        now: the cloud's clock, for prices, bill, launch times and weather. Processes and their notices are of real time.
        environment: variables that every unit on a machine has.
        say: is told what happens, line by line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        s3: SeaweedFS | None = None,
        market: Market | None = None,
        now: Callable[[], datetime] = utc_now,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.now, self.s3, self.say = now, s3, say
        self.market = market or Market(now() - timedelta(days=1))
        self.bill = Bill(self.market)
        self.machines: dict[str, Machine] = {}
        self._environment = environment or {}
        self._space = Hosts(0, folder)
        self._launches: queue.SimpleQueue[tuple[str, Pool]] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._deadlines: dict[str, float] = {}
        self._weather: list[Change] = []
        self._weather_began = now()
        self._stopping = threading.Event()
        self._broken: list[Exception] = []
        self._stack = contextlib.ExitStack()
        self._keeper = threading.Thread(target=self._keep, name="spotcloud", daemon=True)

    def __enter__(self) -> SpotCloud:
        with contextlib.ExitStack() as stack:
            moto_api_backend.reset()
            logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request otherwise
            server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
            server.start()
            stack.callback(server.stop)
            host, port = server.get_host_and_port()
            self.api = stack.enter_context(Api(f"http://{host}:{port}", self.market, self.now, self._on_launch))
            if self.s3 is not None:
                stack.enter_context(self._space)
                self._s3_proxy = stack.enter_context(Proxy(self.s3.endpoint, self._space.outside))
            self._keeper.start()
            stack.callback(self._stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if self.broken and error[0] is None:
            raise self.broken[0]

    @property
    def broken(self) -> list[Exception]:
        """What went wrong inside the cloud itself; raised when it is closed."""
        return [*self._broken, *self.api.broken]

    # -- for its users ------------------------------------------------------------------------------------------------

    def env(self) -> dict[str, str]:
        """AWS_* variables of somebody who may do everything, also with the S3 server."""
        if self.s3 is None:
            return aws_environment(self.api.endpoint, "AKUSER", "secret")
        return {**self.s3.env(), "AWS_ENDPOINT_URL": self.api.endpoint, "AWS_ENDPOINT_URL_S3": self.s3.endpoint}

    def client(self, service: str = "ec2", region: str = "us-east-1") -> Any:
        """A boto3 client that asks twice."""
        keys = {"aws_access_key_id": "AKUSER", "aws_secret_access_key": "secret"}
        config = Config(retries={"mode": "standard", "total_max_attempts": 2})
        made: Any = boto3.client
        return made(service, region_name=region, endpoint_url=self.api.endpoint, config=config, **keys)

    def make_instance_profile(self, name: str) -> str:
        """A role that may use the S3 server."""
        iam = self.client("iam")
        iam.create_instance_profile(InstanceProfileName=name)
        iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        return name

    def instance(self, instance_id: str) -> Any:
        """moto's."""
        return self._backend(self.bill.stays[instance_id].pool.region).get_instance(instance_id)

    def running(self) -> list[str]:
        """Ids of instances that are billed now."""
        return [name for name, stay in list(self.bill.stays.items()) if stay.ended is None]

    # -- what is done to machines -------------------------------------------------------------------------------------

    def reclaim(self, pool: Pool, notice_s: float | None = None) -> list[str]:
        """The pool has no capacity any more, and who runs there is taken: after a notice, or at once. Their ids."""
        self.market.close(pool.instance_type, pool.zone, pool.market)
        ids = [name for name in self.running() if self.bill.stays[name].pool == pool]
        for name in ids:
            self.take(name) if notice_s is None else self.give_notice(name, notice_s)
        return ids

    def give_notice(self, instance_id: str, notice_s: float) -> None:
        """The metadata service announces the end, and then the machine is taken."""
        self._tell(f"{instance_id}: will be taken in {notice_s:g} s, says its metadata service")
        if instance_id in self.machines:
            self.machines[instance_id].imds.interrupt(notice_s)
        self._deadlines[instance_id] = time.monotonic() + notice_s

    def take(self, instance_id: str) -> None:
        """Kills the machine, at once or earlier than announced; returns when that is done."""
        self._have_done(lambda: self._end(instance_id, RECLAIMED))

    def play(self, changes: Sequence[Change]) -> None:
        """From now on the market and the machines have this weather."""
        self._weather_began = self.now()
        self._weather = list(changes)

    # -- the thread that keeps the machines ---------------------------------------------------------------------------

    def _on_launch(self, instance_id: str, pool: Pool) -> None:
        mapped = self._backend(pool.region).get_instance(instance_id).block_device_mapping.values()
        self.bill.began(instance_id, pool, self.now(), sum(int(one.size or 0) for one in mapped))
        self._launches.put((instance_id, pool))

    def _have_done(self, order: Callable[[], None]) -> None:
        done = threading.Event()

        def carry_out() -> None:
            try:
                order()
            finally:
                done.set()

        self._orders.put(carry_out)
        assert done.wait(PATIENCE_S), "the thread that keeps the machines is stuck"

    def _keep(self) -> None:
        evaluated = 0.0
        while not self._stopping.wait(_TICK_S):
            try:
                while not self._launches.empty():
                    self._boot(*self._launches.get())
                while not self._orders.empty():
                    self._orders.get()()
                while self._weather and (self.now() - self._weather_began).total_seconds() >= self._weather[0].at_s:
                    self._change(self._weather.pop(0))
                for name in [name for name, at in list(self._deadlines.items()) if time.monotonic() >= at]:
                    self._end(name, RECLAIMED)
                for name in self.running():
                    self._look_after(name)
                if time.monotonic() - evaluated > _EVALUATED_EVERY_S:
                    evaluated = time.monotonic()
                    self.api.evaluate()
            except Exception as error:  # goes to whoever closes the cloud
                self._broken.append(error)
                self._tell(f"the cloud is broken: {error!r}")

    def _boot(self, instance_id: str, pool: Pool) -> None:
        self._tell(f"{instance_id}: starts in {pool}, ${self.market.price(pool, self.now()):.4f}/h")
        if self.s3 is None:
            return
        instance = self.instance(instance_id)
        role = next(
            (
                one.iam_instance_profile.name
                for one in self._backend(pool.region).iam_instance_profile_associations.values()
                if one.instance.id == instance_id
            ),
            None,
        )
        environment = {**self._environment, "AWS_ENDPOINT_URL_S3": self._s3_proxy.endpoint}
        words = " ".join(f'"{name}={value}"' for name, value in environment.items())
        files = {guest.SYSTEM_CONF: f"[Manager]\nDefaultEnvironment={words}\n"}
        user_data = b64decode(str(instance.user_data)) if instance.user_data else b""
        self.machines[instance_id] = Machine(self._space, self._metadata(instance, pool, role), user_data, files)

    def _metadata(self, instance: Any, pool: Pool, role: str | None) -> dict[str, str]:
        document = {
            "accountId": ACCOUNT,
            "architecture": "x86_64",
            "availabilityZone": pool.zone,
            "imageId": instance.image_id,
            "instanceId": instance.id,
            "instanceType": pool.instance_type,
            "region": pool.region,
            "pendingTime": self.now().strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        said = {
            "/latest/dynamic/instance-identity/document": json.dumps(document),
            "ami-id": instance.image_id,
            "instance-id": instance.id,
            "instance-life-cycle": pool.market,
            "instance-type": pool.instance_type,
            "placement/availability-zone": pool.zone,
            "placement/region": pool.region,
        }
        if role is not None and self.s3 is not None:
            given = {
                "Code": "Success",
                "Type": "AWS-HMAC",
                "LastUpdated": utc_now().strftime("%Y-%m-%dT%H:%M:%SZ"),
                "Expiration": (utc_now() + timedelta(hours=6)).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "AccessKeyId": self.s3.access_key,
                "SecretAccessKey": self.s3.secret_key,
                "Token": None,  # the S3 server's keys are no session's
            }
            said |= {"iam/security-credentials": role, f"iam/security-credentials/{role}": json.dumps(given)}
        return said

    def _look_after(self, instance_id: str) -> None:
        machine = self.machines.get(instance_id)
        if self.instance(instance_id).state != "running":
            self._end(instance_id, BY_USER)
        elif machine is not None and (by_itself := machine.shut_itself_down()) is not None:
            self._end(instance_id, BY_ITSELF if by_itself else CRASHED)

    def _end(self, instance_id: str, reason: str) -> None:
        if self.bill.stays[instance_id].ended is not None:
            return
        self._deadlines.pop(instance_id, None)
        machine = self.machines.get(instance_id)
        at = self.api.asked_to_end.get(instance_id, self.now()) if reason == BY_USER else self.now()
        if machine is not None:
            if reason == BY_USER:
                machine.shut_down()  # EC2 presses the button first
            machine.kill()
        instance = self.instance(instance_id)
        if reason != BY_USER:
            stops = reason == BY_ITSELF and instance.instance_initiated_shutdown_behavior == "stop"
            backend = self._backend(self.bill.stays[instance_id].pool.region)
            (backend.stop_instances if stops else backend.terminate_instances)([instance_id])
            instance.state_reason.code, instance.state_reason.message = reason, f"{reason}: {_MESSAGES[reason]}"
            instance._reason = reason if reason == RECLAIMED else ""
        self.api.ended(instance_id, reason, at)
        self.bill.ended(instance_id, at, reason)
        self._tell(f"{instance_id}: is {instance.state}: {reason}")

    def _change(self, change: Change) -> None:
        pool, names = change.pool, (change.pool.instance_type, change.pool.zone, change.pool.market)
        if change.kind == "price":
            self.market.set_price(pool, change.price, self.now())
        elif change.kind == "open":
            self.market.open(*names)
        else:
            self.market.close(*names)
        taken = [name for name in self.running() if self.bill.stays[name].pool == pool] if change.kind == "reclaim" else []
        for name in taken:
            if change.notice_s is None:
                self._end(name, RECLAIMED)
            else:
                self.give_notice(name, change.notice_s)

    def _stop(self) -> None:
        self._stopping.set()
        self._keeper.join()
        for machine in self.machines.values():
            machine.kill()

    def _backend(self, region: str) -> Any:
        return get_backend("ec2")[ACCOUNT][region]

    def _tell(self, line: str) -> None:
        self.say(f"cloud: {line}")


def spot(instance_type: str, zone: str) -> Pool:
    """A spot pool."""
    return Pool(instance_type, zone, SPOT)
