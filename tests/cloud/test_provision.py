"""`hf-spot provision` against a moto server: which machine it gets, what it leaves behind, and what it refuses."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hf_spot.cloud import orders
from hf_spot.cloud.ec2 import Cloud
from hf_spot.cloud.ec2_errors import explain
from hf_spot.cloud.job import ANY, ON_DEMAND, SPOT, Job, Rung
from hf_spot.cloud.machine_records import MachineRecords
from hf_spot.cloud.provision import Provisioner
from hf_spot.cloud.status import status, terminate
from hf_spot.errors import CloudError, ConfigError, NoAnswer, NoCapacity, SpotError, StoreUnavailable
from hf_spot.run.run import Run
from tests.cloud.aws import REGIONS, Aws

P4D, P4DE, G5 = "p4d.24xlarge", "p4de.24xlarge", "g5.48xlarge"
LADDER = (
    Rung((P4D, P4DE), SPOT),
    Rung((P4D, P4DE), SPOT, ANY),
    Rung((G5,), SPOT, ANY),
    Rung((P4D,), ON_DEMAND),
)
RECLAIMED, GUEST = "Server.SpotInstanceTermination", "Client.InstanceInitiatedShutdown"


class Desk:
    """A job, its run, and someone who provisions it."""

    def __init__(self, aws: Aws, folder: Path) -> None:
        self.aws = aws
        self.folder = folder
        self.said: list[dict[str, Any]] = []
        self.job = Job(
            name="llama",
            store=str(folder / "run"),
            run="hf-spot launch train.py",
            region="us-east-1",
            max_spend=500,
            image_id={region: aws.image(region) for region in REGIONS},
            tags={"team": "nlp"},
            ladder=LADDER,
        )
        self.training = Run(self.job.store)
        self.training.journal._now = aws.clock.now

    def change(self, **values: Any) -> None:
        self.job = dataclasses.replace(self.job, **values)

    def run(self) -> Run:
        run = Run(self.job.store)
        run.journal._now = self.aws.clock.now
        return run

    def provisioner(self, **options: Any) -> Provisioner:
        clock = self.aws.clock
        return Provisioner(
            self.job,
            self.run(),
            Cloud(self.aws.session()),
            now=clock.now,
            sleep=clock.sleep,
            say=lambda text, event: self.said.append({"text": text, **event}),
            **options,
        )

    def records(self) -> MachineRecords:
        return MachineRecords(self.run(), Cloud(self.aws.session()), now=self.aws.clock.now)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.said if event["event"] == kind]

    # -- what the training would write --------------------------------------------------------------------------------

    def claim(self) -> None:
        self.training.journal.claim({})

    def commit(self, step: int, *, max_steps: int = 100) -> None:
        data = {"step": step, "stage": 1, "reason": "schedule", "complete": step == max_steps, "max_steps": max_steps}
        self.training.journal.append("commit", {**data, "files": [], "prefix": f"e0001/checkpoint-{step}"})


@pytest.fixture
def desk(aws: Aws, tmp_path: Path) -> Desk:
    return Desk(aws, tmp_path)


def only(found: list[Any]) -> Any:
    assert len(found) == 1
    return found[0]


# -- one machine ------------------------------------------------------------------------------------------------------


def test_the_first_rung_with_capacity_gives_the_cheapest_pool_and_the_machine_is_closed(desk: Desk) -> None:
    desk.aws.spot[P4D, "us-east-1c"] = 7.5
    machine = desk.provisioner().provision()
    assert machine is not None
    assert (machine.instance_type, machine.zone, machine.market, machine.rung) == (P4D, "us-east-1c", SPOT, 0)
    assert (machine.usd_per_hour, machine.on_demand_usd_per_hour) == (7.5, 22.0)
    assert machine.price_source == "EC2 DescribeSpotPriceHistory" and machine.price_time is not None
    instance = only(desk.aws.instances("running"))
    tags = {tag["key"]: tag["value"] for tag in instance.get_tags()}
    assert tags == {"hf-spot:run": desk.job.store, "hf-spot:rung": "0", "Name": "hf-spot llama", "team": "nlp"}
    data = only(desk.aws.templates)["LaunchTemplateData"]
    assert data["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 2, "HttpEndpoint": "enabled"}
    assert data["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
    assert data["InstanceInitiatedShutdownBehavior"] == "terminate"
    order = only(desk.aws.orders)
    assert order["Type"] == "instant" and order["SpotOptions"]["AllocationStrategy"] == "price-capacity-optimized"
    script = base64.b64decode(data["UserData"]).decode()
    assert "hf-spot launch train.py" in script
    # $500 at $12/h, the dearest pool that was asked for.
    assert f"shutdown -h +{int(500 / 12 * 60)} " in script
    assert desk.aws.client().describe_launch_templates()["LaunchTemplates"] == []


def test_the_journal_says_which_machine_and_what_it_costs(desk: Desk) -> None:
    machine = desk.provisioner().provision()
    entries = [entry for entry in Run(desk.job.store).events() if entry.kind == "machine"]
    assert [entry.data["event"] for entry in entries] == ["asked", "started"]
    assert entries[1].data["machine"] == machine.to_data() if machine else False


def test_a_second_call_finds_the_first_ones_machine(desk: Desk) -> None:
    first = desk.provisioner().provision()
    second = desk.provisioner().provision()
    assert first == second
    assert len(desk.aws.instances("running")) == 1
    assert only(desk.events("found"))["machine"]["instance_id"] == first.instance_id if first else False


def test_capacity_optimized_is_asked_for_on_request(desk: Desk) -> None:
    desk.change(strategy="capacity-optimized")
    desk.provisioner().provision()
    assert only(desk.aws.orders)["SpotOptions"]["AllocationStrategy"] == "capacity-optimized"


def test_without_capacity_the_ladder_goes_to_another_region_then_another_type_then_on_demand(desk: Desk) -> None:
    refused = {("us-east-1", P4D), ("us-east-1", P4DE)}
    desk.aws.refuse = lambda kind, zone, market: (
        "InsufficientInstanceCapacity" if market == SPOT and (zone[:-1], kind) in refused else ""
    )
    found = []
    for more in ((), [(r, k) for r in REGIONS for k in (P4D, P4DE)], [(r, G5) for r in REGIONS]):
        refused.update(more)
        machine = desk.provisioner().provision()
        assert machine is not None
        found.append((machine.rung, machine.market, machine.instance_type, machine.region == "us-east-1"))
        terminate(desk.records(), Cloud(desk.aws.session()))
    assert found[0][:3] == (1, SPOT, P4D) and not found[0][3]
    assert found[1][:3] == (2, SPOT, G5)
    assert found[2] == (3, ON_DEMAND, P4D, True)


def test_a_likely_region_comes_before_a_cheaper_unlikely_one(desk: Desk) -> None:
    desk.change(ladder=(Rung((P4D, P4DE, G5), SPOT, ANY),))
    desk.aws.spot = {(G5, "us-west-2a"): 4.0, (G5, "eu-west-1a"): 6.0}
    desk.aws.scores = {"us-west-2": 2, "eu-west-1": 9}
    machine = desk.provisioner().provision()
    assert machine is not None and machine.region == "eu-west-1"


def test_pools_that_a_fleet_did_not_really_try_are_asked_for_again(desk: Desk) -> None:
    desk.aws.tried = 3
    desk.aws.refuse = lambda kind, zone, market: "" if kind == P4DE else "InsufficientInstanceCapacity"
    machine = desk.provisioner().provision()
    assert machine is not None and (machine.rung, machine.instance_type) == (0, P4DE)
    asked = [len(order["LaunchTemplateConfigs"][0]["Overrides"]) for order in desk.aws.orders]
    assert len(asked) > 1 and asked == sorted(asked, reverse=True)
    assert len({order["ClientToken"] for order in desk.aws.orders}) == len(asked)


def test_when_no_rung_has_a_machine_the_error_says_why_for_each(desk: Desk) -> None:
    desk.aws.refuse = lambda kind, zone, market: (
        "MaxSpotInstanceCountExceeded"
        if kind == G5
        else "VcpuLimitExceeded"
        if market == ON_DEMAND
        else "UnfulfillableCapacity"
    )
    with pytest.raises(NoCapacity) as caught:
        desk.provisioner().provision()
    said = str(caught.value)
    assert caught.value.exit_code == 75
    assert "rung 0: no capacity for p4d.24xlarge spot in us-east-1" in said
    assert "rung 2:" in said and "spot quota" in said
    assert "rung 3:" in said and "on-demand quota" in said
    assert desk.aws.instances("running", "pending") == []
    entries = [entry.data["event"] for entry in Run(desk.job.store).events()]
    assert entries == ["asked", "refused"]


def test_where_no_zone_has_a_price_nobody_is_asked(desk: Desk) -> None:
    desk.aws.spot = {}
    desk.change(ladder=LADDER[:3])
    with pytest.raises(NoCapacity, match="no price and therefore no capacity"):
        desk.provisioner().provision()
    assert desk.aws.orders == []


def test_a_pool_above_the_rungs_price_is_left_out_and_the_rest_is_capped(desk: Desk) -> None:
    desk.change(ladder=(Rung((P4D, P4DE), SPOT, max_price=10),))
    machine = desk.provisioner().provision()
    assert machine is not None and machine.instance_type == P4D
    overrides = only(desk.aws.orders)["LaunchTemplateConfigs"][0]["Overrides"]
    assert {one["InstanceType"] for one in overrides} == {P4D}
    assert {one["MaxPrice"] for one in overrides} == {"10.0000"}


# -- money ------------------------------------------------------------------------------------------------------------


def test_on_demand_does_not_start_above_the_budget_and_the_error_says_what_it_would_cost(desk: Desk) -> None:
    desk.change(ladder=LADDER[3:], max_spend=100, hours=20)
    with pytest.raises(CloudError, match=r"\$22\.00/h: 20\.0 h cost \$440\.00, and \$100\.00 of the budget is left") as caught:
        desk.provisioner().provision()
    assert caught.value.hint == "raise max_spend"
    assert desk.aws.orders == [] and desk.aws.instances("running") == []


def test_on_demand_starts_when_what_is_left_of_the_training_is_affordable(desk: Desk) -> None:
    desk.change(ladder=LADDER[3:], max_spend=100, hours=20)
    desk.claim()
    desk.aws.clock.time += timedelta(hours=10)
    desk.commit(90)  # the last tenth takes a bit more than an hour
    machine = desk.provisioner().provision()
    assert machine is not None and machine.market == ON_DEMAND
    assert "SpotOptions" not in only(desk.aws.orders)


def test_what_was_spent_before_is_not_there_any_more(desk: Desk) -> None:
    desk.change(max_spend=50)
    desk.provisioner().provision()
    desk.aws.clock.time += timedelta(hours=5)
    desk.aws.end(only(desk.aws.instances("running")), RECLAIMED)
    desk.change(ladder=LADDER[:1])
    with pytest.raises(CloudError, match=r"p4d.24xlarge spot in us-east-1a costs \$9\.00/h: 1\.0 h cost \$9\.00, and \$5\.00"):
        desk.provisioner().provision()
    assert desk.records().refresh().machines[0].cost_usd == pytest.approx(45)


def test_a_machine_of_seconds_costs_a_minute(desk: Desk) -> None:
    desk.provisioner().provision()
    desk.aws.clock.time += timedelta(seconds=5)
    desk.aws.end(only(desk.aws.instances("running")), "Client.UserInitiatedShutdown")
    provisioner = desk.provisioner()
    provisioner.provision()
    assert provisioner.records.ledger.machines[0].cost_usd == pytest.approx(9 / 60, rel=0.01)


def test_a_first_hour_that_ec2_cut_short_costs_nothing(desk: Desk) -> None:
    desk.provisioner().provision()
    desk.aws.clock.time += timedelta(minutes=59)
    desk.aws.end(only(desk.aws.instances("running")), RECLAIMED)
    provisioner = desk.provisioner()
    provisioner.provision()
    assert provisioner.records.ledger.machines[0].cost_usd == 0
    assert provisioner.planner.left_usd() == pytest.approx(500 - 9 / 60), "the machine that runs now costs a minute at least"


# -- bad input --------------------------------------------------------------------------------------------------------


def open_to_the_world(desk: Desk) -> None:
    client = desk.aws.client()
    group = client.describe_security_groups(GroupNames=["default"])["SecurityGroups"][0]["GroupId"]
    client.authorize_security_group_ingress(GroupId=group, IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="0.0.0.0/0")


def no_quota(desk: Desk) -> None:
    desk.aws.quotas = {"L-7212CCBC": 0, "L-3819A6DF": 0, "L-417A185B": 64}


BAD: dict[str, tuple[Callable[[Desk], object], list[str]]] = {
    "unknown region": (
        lambda desk: desk.change(region="us-east-3", image_id="resolve:ssm:/x"),
        ["'us-east-3' is not a region that this account can use", "did you mean us-east-1?"],
    ),
    "AMI missing": (
        lambda desk: desk.change(image_id=dict.fromkeys(REGIONS, "ami-12345678")),
        ["InvalidAMIID.NotFound", "in us-east-1", "resolve:ssm:"],
    ),
    "AMI parameter missing": (lambda desk: desk.change(image_id="resolve:ssm:/no/such"), ["ParameterNotFound", "us-east-1"]),
    "key missing": (lambda desk: desk.change(key_name="lost"), ["InvalidKeyPair.NotFound", "describe-key-pairs"]),
    "group missing": (
        lambda desk: desk.change(security_groups=dict.fromkeys(REGIONS, ("sg-0123456789",))),
        ["InvalidGroup.NotFound", "describe-security-groups"],
    ),
    "subnet missing": (
        lambda desk: desk.change(subnets=dict.fromkeys(REGIONS, ("subnet-0123456789",))),
        ["InvalidSubnetID.NotFound", "describe-subnets"],
    ),
    "open to the world": (open_to_the_world, ["is open to the internet (port 22, 0.0.0.0/0)", "revoke-security-group"]),
    "quota 0": (no_quota, ["quotas block every rung", "needs 96 vCPUs", "request-service-quota-increase", "L-7212CCBC"]),
    "deadline past": (
        lambda desk: desk.change(deadline=desk.aws.clock.time - timedelta(days=1)),
        ["deadline:", "is in the past"],
    ),
    "setup too long": (lambda desk: desk.change(setup="x" * 17000), ["bytes of user data", "16384"]),
    "no PassRole": (
        lambda desk: desk.aws.fail.update(CreateFleet=["UnauthorizedOperation"]),
        ["your credentials do not allow this", "allow ec2:CreateFleet on"],
    ),
    "no service-linked role": (
        lambda desk: desk.aws.fail.update(CreateFleet=["AuthFailure.ServiceLinkedRoleCreationNotPermitted"]),
        ["aws iam create-service-linked-role --aws-service-name spot.amazonaws.com"],
    ),
    "spot price too low": (
        lambda desk: desk.change(ladder=(Rung((P4D,), SPOT, max_price=1),)),
        ["no capacity available on any rung of the ladder", "above max_price $1.0"],
    ),
    "expired": (lambda desk: desk.aws.fail.update(DescribeRegions=["ExpiredToken"]), ["session has expired"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_clearly_and_costs_nothing(desk: Desk, case: str) -> None:
    prepare, words = BAD[case]
    prepare(desk)
    with pytest.raises(SpotError) as caught:
        desk.provisioner().provision()
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert desk.aws.instances("running", "pending") == []
    assert desk.aws.client().describe_launch_templates()["LaunchTemplates"] == []


def test_a_refusal_that_another_pool_would_not_change_is_an_error_at_once(desk: Desk) -> None:
    desk.aws.refuse = lambda kind, zone, market: "InvalidParameterValue"
    with pytest.raises(CloudError, match=r"^p4d\.24xlarge in subnet-\w+: canned: InvalidParameterValue") as caught:
        desk.provisioner().provision()
    assert not isinstance(caught.value, NoCapacity)
    assert len(desk.aws.orders) == 1


def test_without_credentials_the_error_names_the_ways_to_get_some(desk: Desk) -> None:
    with pytest.raises(CloudError, match=r"no AWS credentials were found(.|\n)*hop limit") as caught:
        Cloud(desk.aws.session(credentials=False)).image("us-east-1", "ami-12345678")
    assert caught.value.code == "NoCredentialsError"


def test_a_signed_journal_needs_its_key_on_the_machines(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPOT_JOURNAL_KEY", "k" * 64)
    with pytest.raises(ConfigError, match=r"is set here but not on the machines(.|\n)*aws ssm get-parameter"):
        desk.provisioner().provision()
    desk.change(run="export HF_SPOT_JOURNAL_KEY=$(secret)\nhf-spot launch train.py")
    assert desk.provisioner().provision() is not None


def test_a_quota_that_blocks_one_rung_only_skips_it(desk: Desk) -> None:
    desk.aws.quotas = {"L-7212CCBC": 0}
    machine = desk.provisioner().provision()
    assert machine is not None and (machine.rung, machine.instance_type) == (2, G5)
    assert {one["LaunchTemplateConfigs"][0]["Overrides"][0]["InstanceType"] for one in desk.aws.orders} == {G5}


def test_unknown_quotas_and_scores_and_full_prices_stop_nobody(desk: Desk) -> None:
    denied = ["AccessDeniedException"] * 50
    desk.aws.fail.update(ListAWSDefaultServiceQuotas=[*denied], GetSpotPlacementScores=[*denied], GetProducts=[*denied])
    machine = desk.provisioner().provision()
    assert machine is not None and machine.on_demand_usd_per_hour is None
    assert "the quotas can't be read" in only(desk.events("note"))["text"]


def test_a_region_that_throttles_is_passed_over(desk: Desk) -> None:
    desk.aws.fail.update(CreateFleet=["RequestLimitExceeded"])
    machine = desk.provisioner().provision()
    assert machine is not None and machine.rung == 1


# -- dying and starting again -----------------------------------------------------------------------------------------


def test_a_machine_that_nobody_could_write_down_is_found_by_its_tags(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MachineRecords, "started", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            desk.provisioner().provision()
    machine = desk.provisioner().provision()
    assert machine is not None
    assert machine.instance_id == only(desk.aws.instances("running")).id
    assert machine.usd_per_hour == 9.0
    assert [one.instance_id for one in desk.records().refresh().machines] == [machine.instance_id]


def test_while_somebody_walks_the_ladder_nobody_else_does(desk: Desk) -> None:
    first, second = desk.records(), desk.records()
    token = first.start_walk(fresh=True)
    assert token
    assert second.start_walk(fresh=True) is None
    desk.aws.clock.time += timedelta(seconds=301)
    assert second.start_walk(fresh=True) == token  # the same orders, should the first have sent them
    assert first.start_walk(fresh=True) is None


def test_the_walk_of_a_dead_process_is_taken_over_at_once(desk: Desk) -> None:
    first, second = desk.records(), desk.records()
    first._me = f"{first._me.rsplit(' ', 2)[0]} 1 0.0"
    token = first.start_walk(fresh=True)
    assert second.start_walk(fresh=True) == token


def test_two_who_ask_at_the_same_time_get_one_machine(desk: Desk) -> None:
    other = desk.records()
    token = other.start_walk(fresh=True)
    assert token

    def started_meanwhile() -> None:
        if not other.ledger.machines:
            provisioner = desk.provisioner()
            provisioner.check()
            provisioner.records.refresh()
            provisioner._walk(token)
            other.refresh()

    desk.aws.clock.on_sleep = started_meanwhile
    machine = desk.provisioner().provision()
    assert machine == other.ledger.machines[0]
    assert len(desk.aws.instances("running")) == 1


# -- the legacy ways --------------------------------------------------------------------------------------------------


def test_a_legacy_spot_request_is_tagged_and_closed_as_soon_as_there_is_an_instance(desk: Desk) -> None:
    machine = desk.provisioner(api="spot-request").provision()
    instance = only(desk.aws.instances("running"))
    assert machine is not None and machine.instance_id == instance.id
    assert {tag["key"] for tag in instance.get_tags()} >= {"hf-spot:run", "hf-spot:rung", "team"}
    assert ("ModifyInstanceMetadataOptions", "us-east-1") in desk.aws.calls
    assert instance.metadata_options.http_tokens == "required"
    assert desk.provisioner(api="spot-request").provision() == machine


def test_an_instance_that_a_legacy_request_got_and_nobody_tagged_is_found(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(orders, "_secure", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            desk.provisioner(api="spot-request").provision()
    lost = only(desk.aws.instances("running"))
    for tag in lost.get_tags():  # moto gives an instance its request's tags; EC2 does not
        desk.aws.client().delete_tags(Resources=[lost.id], Tags=[{"Key": tag["key"]}])
    machine = desk.provisioner(api="spot-request").provision()
    assert machine is not None and machine.instance_id == only(desk.aws.instances("running")).id == lost.id


def test_an_instance_that_cannot_be_closed_does_not_stay(desk: Desk) -> None:
    desk.aws.fail.update(ModifyInstanceMetadataOptions=["UnauthorizedOperation"])
    with pytest.raises(CloudError, match="ModifyInstanceMetadataOptions"):
        desk.provisioner(api="spot-request").provision()
    assert desk.aws.instances("running", "pending") == []


def test_a_legacy_spot_fleet_is_cancelled_once_it_has_its_machine(desk: Desk) -> None:
    machine = desk.provisioner(api="spot-fleet").provision()
    assert machine is not None and machine.instance_id == only(desk.aws.instances("running")).id
    assert ("CancelSpotFleetRequests", "us-east-1") in desk.aws.calls
    assert desk.aws.client().describe_launch_templates()["LaunchTemplates"] == []


# -- watching ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_machine_is_replaced_until_the_run_is_finished(desk: Desk) -> None:
    def life() -> None:
        running = desk.aws.instances("running")
        if len(desk.aws.clock.slept) == 1:
            desk.claim()
            desk.aws.clock.time += timedelta(minutes=100)
            desk.commit(50)
            desk.training.record("preempted", {})
            desk.aws.refuse = lambda kind, zone, market: "" if kind == G5 else "InsufficientInstanceCapacity"
            desk.aws.end(only(running), RECLAIMED)
        elif len(desk.aws.clock.slept) == 3:
            desk.claim()
            desk.aws.clock.time += timedelta(minutes=200)
            desk.commit(100)
            desk.training.record("finished", {})
            desk.aws.end(only(running), GUEST)

    desk.aws.clock.on_sleep = life
    desk.provisioner().watch()
    machines = desk.records().refresh().machines
    assert [(one.rung, one.instance_type, one.reason) for one in machines] == [(0, P4D, RECLAIMED), (2, G5, GUEST)]
    assert machines[0].cost_usd == pytest.approx(9.0 * 100 / 60, rel=0.02)
    assert machines[1].cost_usd == pytest.approx(5.0 * 200 / 60, rel=0.02)
    assert only(desk.events("finished"))["step"] == 100
    assert only(desk.events("spent"))["usd"] == pytest.approx(sum(one.cost_usd or 0 for one in machines))
    assert desk.aws.instances("running", "pending") == []


def test_without_capacity_the_watch_waits_longer_each_time_and_then_gets_its_machine(desk: Desk) -> None:
    desk.change(ladder=LADDER[:1])
    desk.aws.refuse = lambda kind, zone, market: "InsufficientInstanceCapacity"

    def life() -> None:
        if len(desk.aws.clock.slept) == 3:
            desk.aws.refuse = lambda kind, zone, market: ""
        if desk.aws.instances("running"):
            desk.claim()
            desk.training.record("finished", {})
            desk.aws.end(only(desk.aws.instances("running")), GUEST)

    desk.aws.clock.on_sleep = life
    desk.provisioner().watch()
    assert desk.aws.clock.slept[:3] == [60.0, 120.0, 240.0]
    assert len(desk.events("no-capacity")) == 3


def test_a_watch_that_is_started_again_goes_on_with_the_machine_that_runs(desk: Desk) -> None:
    class Killed(BaseException):
        pass

    def killed() -> None:
        raise Killed

    desk.aws.clock.on_sleep = killed
    with pytest.raises(Killed):
        desk.provisioner().watch()

    def life() -> None:
        desk.claim()
        desk.training.record("finished", {})
        for one in desk.aws.instances("running"):
            desk.aws.end(one, GUEST)

    desk.aws.clock.on_sleep = life
    desk.provisioner().watch()
    assert len(desk.records().refresh().machines) == 1


def test_at_the_end_of_the_budget_the_machine_is_ended_and_the_error_says_how_to_go_on(desk: Desk) -> None:
    desk.change(max_spend=12, ladder=LADDER[:1])
    began = desk.aws.clock.time
    desk.aws.clock.on_sleep = lambda: setattr(desk.aws.clock, "time", desk.aws.clock.time + timedelta(minutes=2))
    with pytest.raises(CloudError, match=r"budget of \$12\.00 is spent: \$11\.\d\d, step 0(.|\n)*raise max_spend"):
        desk.provisioner().watch()
    assert desk.aws.instances("running", "pending") == []
    assert desk.aws.clock.time - began == pytest.approx(timedelta(hours=12 / 9), rel=0.1)
    assert desk.records().spent_usd() <= 12


def test_a_price_that_rises_ends_the_budget_sooner(desk: Desk) -> None:
    desk.change(max_spend=12, ladder=LADDER[:1])
    began = desk.aws.clock.time
    desk.aws.clock.on_sleep = lambda: desk.aws.spot.update({P4D: 24.0})
    with pytest.raises(CloudError, match="is spent"):
        desk.provisioner().watch()
    assert desk.aws.clock.time - began < timedelta(minutes=40)


def test_a_deadline_that_cannot_be_met_starts_nothing(desk: Desk) -> None:
    desk.change(deadline=desk.aws.clock.time + timedelta(hours=5), hours=8)
    with pytest.raises(CloudError, match=r"deadline .* can't be met: about 8\.0 h of training remain"):
        desk.provisioner().watch()
    assert desk.aws.orders == []


def test_at_the_deadline_the_machine_is_ended(desk: Desk) -> None:
    desk.change(deadline=desk.aws.clock.time + timedelta(hours=2), hours=1)
    desk.aws.clock.on_sleep = lambda: setattr(desk.aws.clock, "time", desk.aws.clock.time + timedelta(minutes=20))
    with pytest.raises(CloudError, match="can't be met"):
        desk.provisioner().watch()
    assert desk.aws.instances("running", "pending") == []
    assert len(desk.records().refresh().machines) == 1


def test_a_training_that_failed_is_not_tried_on_another_machine(desk: Desk) -> None:
    def life() -> None:
        desk.claim()
        desk.training.record("failed", {})
        desk.aws.end(only(desk.aws.instances("running")), GUEST)

    desk.aws.clock.on_sleep = life
    with pytest.raises(CloudError, match=r"failed; another machine would not help; the log is .*/logs/i-\w+\.log"):
        desk.provisioner().watch()
    assert len(desk.records().refresh().machines) == 1


def test_a_setup_that_fails_twice_is_not_paid_for_a_third_time(desk: Desk) -> None:
    desk.aws.clock.on_sleep = lambda: [desk.aws.end(one, GUEST) for one in desk.aws.instances("running")]
    with pytest.raises(CloudError, match="2 machines in a row shut down by themselves without a commit"):
        desk.provisioner().watch()
    assert len(desk.records().refresh().machines) == 2
    # A person who has repaired it may try again.
    desk.aws.clock.on_sleep = lambda: None
    assert desk.provisioner().provision() is not None


def test_terminate_ends_the_machine_and_the_watch(desk: Desk) -> None:
    ended: list[Any] = []
    desk.aws.clock.on_sleep = lambda: ended.extend(terminate(desk.records(), Cloud(desk.aws.session())))
    desk.provisioner().watch()
    assert [one.reason for one in ended] == ["Client.UserInitiatedShutdown"]
    assert desk.aws.instances("running", "pending") == []
    assert len(desk.events("stopped")) == 1
    assert terminate(desk.records(), Cloud(desk.aws.session())) == []


def test_a_machine_that_was_ended_in_the_console_is_replaced(desk: Desk) -> None:
    def life() -> None:
        running = only(desk.aws.instances("running"))
        if len(desk.aws.clock.slept) == 1:
            desk.aws.client().terminate_instances(InstanceIds=[running.id])
        else:
            desk.claim()
            desk.training.record("finished", {})
            desk.aws.end(running, GUEST)

    desk.aws.clock.on_sleep = life
    desk.provisioner().watch()
    assert len(desk.records().refresh().machines) == 2


def test_trouble_of_the_cloud_is_waited_out(desk: Desk) -> None:
    def life() -> None:
        if len(desk.aws.clock.slept) == 1:
            desk.aws.fail.update(DescribeInstances=["RequestLimitExceeded"])
        if len(desk.aws.clock.slept) == 3:
            desk.claim()
            desk.training.record("finished", {})
            desk.aws.end(only(desk.aws.instances("running")), GUEST)

    desk.aws.clock.on_sleep = life
    desk.provisioner().watch()
    assert "the service is throttling" in only(desk.events("trouble"))["error"]


def test_a_finished_machine_that_does_not_go_is_ended(desk: Desk) -> None:
    def life() -> None:
        if desk.training.state().ended is None:
            desk.claim()
            desk.training.record("finished", {})

    desk.aws.clock.on_sleep = life
    desk.provisioner().watch()
    assert desk.aws.instances("running", "pending") == []


def test_a_machine_that_is_to_stay_stays(desk: Desk) -> None:
    desk.change(on_finish="stay")

    def life() -> None:
        desk.claim()
        desk.training.record("finished", {})

    desk.aws.clock.on_sleep = life
    desk.provisioner().watch()
    assert len(desk.aws.instances("running")) == 1
    assert "hf-spot terminate" in only(desk.events("stays"))["text"]


def test_a_finished_run_needs_no_machine(desk: Desk) -> None:
    desk.claim()
    desk.training.record("finished", {})
    assert desk.provisioner().provision() is None
    assert desk.aws.orders == []


def test_status_tells_of_machines_money_and_steps(desk: Desk) -> None:
    machine = desk.provisioner().provision()
    assert machine is not None
    desk.claim()
    desk.aws.clock.time += timedelta(hours=2)
    desk.commit(25)
    known = status(desk.records(), Cloud(desk.aws.session()))
    assert (known["step"], known["max_steps"], known["ended"]) == (25, 100, None)
    assert known["spent_usd"] == pytest.approx(18, rel=0.01)
    assert known["hours_left"] == pytest.approx(6, rel=0.01)
    assert [(one["instance_id"], one["state"]) for one in known["machines"]] == [(machine.instance_id, "running")]


def test_a_machine_that_ec2_has_forgotten_is_charged_until_its_last_word(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.provisioner().provision()
    desk.claim()
    desk.aws.clock.time += timedelta(hours=2)
    desk.commit(25)
    desk.aws.clock.time += timedelta(hours=9)
    records = desk.records()
    records.refresh()
    records.reconcile([], REGIONS)
    assert records.ledger.machines[0].cost_usd == pytest.approx(18, rel=0.01)


def test_a_job_file_that_is_wrong_never_reaches_the_cloud(desk: Desk) -> None:
    with pytest.raises(ConfigError):
        desk.change(ladder=())
    assert desk.aws.calls == []


# -- a service that does not answer -----------------------------------------------------------------------------------


class Away:
    """EC2 or a store that can't be reached for some requests, from one on."""

    def __init__(self, real: Callable[..., Any], error: SpotError, times: int, first: int = 1) -> None:
        self.real, self.error, self.left, self.first, self.asked = real, error, times, first, 0

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.asked += 1
        if self.asked >= self.first and self.left:
            self.left -= 1
            raise self.error
        return self.real(*args, **more)


def test_ec2_that_does_not_answer_at_first_is_awaited_for_five_minutes(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    away = Away(Cloud.regions, explain("ConnectionError"), 3)
    monkeypatch.setattr(Cloud, "regions", lambda *args: away(*args))
    began = desk.aws.clock.now()
    assert desk.provisioner().provision() is not None
    assert timedelta(seconds=7) <= desk.aws.clock.now() - began < timedelta(minutes=2)
    away.left = 10**6
    for order in (Provisioner.provision, Provisioner.provision_several, Provisioner.watch):
        with pytest.raises(NoAnswer) as told:
            order(desk.provisioner())
        assert told.value.exit_code == 75
    away.error, asked = explain("UnauthorizedOperation"), away.asked
    with pytest.raises(CloudError) as refused:
        desk.provisioner().provision()
    assert refused.value.exit_code == 2 and away.asked == asked + 1


@pytest.mark.parametrize("error", [explain("RequestLimitExceeded"), StoreUnavailable("no route")])
def test_what_does_not_answer_after_the_check_lets_a_scheduler_start_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, error: SpotError
) -> None:
    monkeypatch.setattr(MachineRecords, "refresh", Away(MachineRecords.refresh, error, 1))
    with pytest.raises(NoAnswer) as told:
        desk.provisioner().provision()
    assert told.value.exit_code == 75 and not desk.aws.instances("running")
