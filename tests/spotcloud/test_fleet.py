"""Several machines by one job: started together, kept in number, given back, counted and billed, on the local spot cloud."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hf_spot.cli import main
from hf_spot.cloud.ec2 import Cloud
from hf_spot.cloud.job import ON_DEMAND, SPOT, Rung, parse
from hf_spot.cloud.machine import network_key
from hf_spot.cloud.network import Networks
from hf_spot.cloud.permissions import policy
from hf_spot.cloud.provision import Provisioner
from hf_spot.cloud.rates import place_of, rates_for
from hf_spot.cloud.status import render_status, status, terminate
from hf_spot.economics.report import summarise
from hf_spot.economics.table import render_report
from hf_spot.errors import CloudError, ConfigError, NoCapacity, SpotError
from hf_spot.policy.membership import Size
from hf_spot.run.traffic import INTERNET
from hf_spot.storage.open import open_store
from hf_spot.storage.s3 import Place, S3Store
from tests.spotcloud.api import IMAGE
from tests.spotcloud.cloud import BY_ITSELF
from tests.spotcloud.fleet_story import KIND, LADDER, A, B, Stage, long_story
from tests.spotcloud.iam import Need, is_permitted
from tests.spotcloud.market import Pool
from tests.waiting import wait_for


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path) as made:
        yield made


def test_the_short_story(stage: Stage) -> None:
    balance = long_story(stage, seed=0, interruptions=5)
    assert balance.is_clean, balance
    assert balance.is_right_to_the_cent, balance
    assert balance.most_at_once <= 3
    markets = {stay.pool.market for stay in stage.cloud.bill.stays.values()}
    zones = {stay.pool.zone for stay in stage.cloud.bill.stays.values()}
    assert (markets, zones) == ({SPOT, ON_DEMAND}, {A, B})


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(3))
def test_the_long_story(stage: Stage, seed: int) -> None:
    """Fifteen interruptions, in hours of simulated time, whose prices move: so the bill is not all free first hours."""
    balance = long_story(stage, seed, interruptions=15)
    assert balance.is_clean, balance
    assert balance.is_right_to_the_cent, balance
    assert balance.most_at_once <= 3 and sum(balance.charged_usd.values()) > 20
    print(f"charged ${sum(balance.charged_usd.values()):.2f} and ${sum(balance.disks_charged_usd.values()):.2f} for disks")


# -- what several machines are given ----------------------------------------------------------------------------------


def only(found: Any) -> Any:
    [one] = found
    return one


def described(stage: Stage) -> list[Any]:
    """The machines that run, as EC2 describes them."""
    found = stage.cloud.client().describe_instances()["Reservations"]
    return [one for each in found for one in each["Instances"] if one["State"]["Name"] == "running"]


def test_machines_of_one_job_are_in_one_zone_and_reach_each_other_and_nobody_reaches_them(stage: Stage) -> None:
    stage.market.limit(2, KIND, A, SPOT)  # the cheapest zone has too few
    machines = stage.provisioner().provision_several()
    assert [(one.zone, one.market) for one in machines] == [(B, SPOT)] * 3
    running = described(stage)
    group = only({one["GroupId"] for each in running for card in each["NetworkInterfaces"] for one in card["Groups"]})
    rules = only(stage.cloud.client().describe_security_groups(GroupIds=[group])["SecurityGroups"])
    into = only(rules["IpPermissions"])
    assert (into["IpProtocol"], [one["GroupId"] for one in into["UserIdGroupPairs"]]) == ("-1", [group])
    assert (into["IpRanges"], into["Ipv6Ranges"], into["PrefixListIds"]) == ([], [], [])
    assert group in {one["GroupId"] for rule in rules["IpPermissionsEgress"] for one in rule["UserIdGroupPairs"]}  # for an EFA
    assert {tag["Key"] for tag in rules["Tags"]} >= {"hf-spot:run", "team"}
    assert stage.provisioner().provision_several() == machines  # nothing more, and no group more
    assert len(stage.cloud.bill.stays) == 3


def test_in_one_region_machines_are_taken_from_all_of_its_zones(tmp_path: Path) -> None:
    with Stage(tmp_path, placement="region") as stage:
        stage.market.close()
        stage.market.limit(2, KIND, A, SPOT)
        stage.market.limit(1, KIND, B, SPOT)
        machines = stage.provisioner().provision_several()
        assert sorted(one.zone for one in machines) == [A, A, B]


def template_of(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    call = Cloud.call

    def listen(self: Cloud, service: str, region: str | None, operation: str, **asked: Any) -> Any:
        if operation == "create_launch_template":
            made.append(asked["LaunchTemplateData"])
        return call(self, service, region, operation, **asked)

    monkeypatch.setattr(Cloud, "call", listen)
    return made


def test_a_placement_group_holds_all_and_is_gone_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stage(tmp_path, placement="cluster") as stage:
        made = template_of(stage, monkeypatch)
        stage.training.steps = 30
        stage.provisioner().watch()
        group = only({data["Placement"]["GroupName"] for data in made})
        assert stage.cloud.api.calls["CreatePlacementGroup"] == len(made)
        assert {one.zone for one in stage.machines()} == {A} and group.endswith(A)
        assert stage.balance().is_clean


def test_an_efa_is_the_only_interface_where_subnets_are_public_and_one_of_four_elsewhere(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = template_of(stage, monkeypatch)
    stage.provisioner().provision_several()
    one = only(made[-1]["NetworkInterfaces"])
    assert (one["InterfaceType"], one["DeviceIndex"], one["NetworkCardIndex"]) == ("efa", 0, 0)
    assert "SecurityGroupIds" not in made[-1] and len(one["Groups"]) == 1
    terminate(stage.records(), Cloud(stage.session))
    client = stage.cloud.client()
    for subnet in client.describe_subnets()["Subnets"]:
        client.modify_subnet_attribute(SubnetId=subnet["SubnetId"], MapPublicIpOnLaunch={"Value": False})
    stage.provisioner().provision_several()
    cards = [(card["DeviceIndex"], card["NetworkCardIndex"]) for card in made[-1]["NetworkInterfaces"]]
    assert cards == [(0, 0), (1, 1), (1, 2), (1, 3)]
    kinds = {one["ResourceType"] for one in made[-1]["TagSpecifications"]}
    assert kinds == {"instance", "volume", "network-interface"}


def test_every_machine_is_told_how_many_there_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stage(tmp_path, machines="2:4", max_spend=320) as stage:
        made = template_of(stage, monkeypatch)
        stage.provisioner().provision_several()
        script = base64.b64decode(made[-1]["UserData"]).decode()
        assert "HF_SPOT_NUM_MACHINES=2:4" in script
        prices = [float(one) for one in re.findall(r'"price_usd_per_hour": ([0-9.]+)', script)]
        assert (
            f"shutdown -h +{int(320 / 4 / (max(prices) + 200 * 0.08 / 730) * 60)} " in script
        )  # a quarter of the budget for each


# -- how many -----------------------------------------------------------------------------------------------------------


def test_what_spot_does_not_give_comes_from_the_last_rung_up_to_the_minimum_only(tmp_path: Path) -> None:
    with Stage(tmp_path, machines="3:6") as stage:
        stage.market.close(market=SPOT)
        stage.market.limit(2, KIND, A, SPOT)
        machines = stage.provisioner().provision_several()
        assert sorted((one.zone, one.market) for one in machines) == [(A, ON_DEMAND), (A, SPOT), (A, SPOT)]


def test_too_few_in_one_zone_are_no_machine(stage: Stage) -> None:
    stage.market.close()
    stage.market.limit(2, KIND, A, SPOT)
    stage.market.open(KIND, B, ON_DEMAND)
    stage.market.limit(2, KIND, B, ON_DEMAND)
    with pytest.raises(NoCapacity, match="2 of at least 3 machines could be had, and those that were new are ended"):
        stage.provisioner().provision_several()
    wait_for(lambda: not stage.cloud.running(), "for the end of what was started")


@pytest.mark.proof
def test_full_price_machines_are_given_back_for_spot_ones_and_dear_ones_when_the_budget_is_short(tmp_path: Path) -> None:
    with Stage(tmp_path, machines="2:4", max_spend=150) as stage:
        stage.training.steps = 240
        stage.market.close(market=SPOT)
        b = stage.market

        def price(usd: float) -> None:
            b.set_price(Pool(KIND, A), usd, stage.clock.now())

        stage.at_times(
            [(300, lambda: b.open(KIND, A, SPOT)), (900, lambda: price(120.0)), (1500, lambda: price(9.0))], more_s=30
        )
        stage.provisioner().watch()
        given = [(one["at"], one["why"]) for one in stage.events("given-back")]
        assert [why for _, why in given[:2]] == ["spot machines have taken the place of on-demand ones"] * 2
        assert any("the budget lasts for" in why for _, why in given)
        balance = stage.balance()
        assert balance.is_clean and balance.is_right_to_the_cent, balance
        assert sum(balance.charged_usd.values()) <= 150
        counts = [one for place, one in enumerate(stage.training.counts) if stage.training.counts[place - 1 : place] != [one]]
        assert counts == [2, 4, 2, 4]


def test_the_budget_counts_all_machines_and_ends_them(tmp_path: Path) -> None:
    with Stage(tmp_path, max_spend=30) as stage:
        stage.training.steps = 100_000
        stage.at_times([], more_s=120)
        with pytest.raises(CloudError, match=r"the budget of \$30\.00 is spent"):
            stage.provisioner().watch()
        balance = stage.balance()
        assert balance.is_clean and balance.is_right_to_the_cent, balance
        assert 27.5 < sum(balance.charged_usd.values()) < 29.9  # the last minutes, in which they save, are paid from the rest


def test_the_budget_for_an_hour_of_all_is_needed_to_begin(tmp_path: Path) -> None:
    with Stage(tmp_path, max_spend=20) as stage, pytest.raises(CloudError, match=r"3 for 1\.0 h cost \$24\.00, and \$20\.00"):
        stage.provisioner().provision_several()


def test_a_setup_that_fails_on_all_is_not_tried_for_ever(stage: Stage) -> None:
    stage.clock.on_sleep = lambda seconds: [stage.end(name, BY_ITSELF) for name in stage.cloud.running()]  # type: ignore[assignment]
    with pytest.raises(CloudError, match="machines in a row shut down by themselves without a commit"):
        stage.provisioner().watch()
    assert len(stage.cloud.bill.stays) == 3 and stage.balance().is_clean


@pytest.mark.proof
def test_newcomers_that_never_train_are_not_replaced_for_ever_while_the_others_train(tmp_path: Path) -> None:
    with Stage(tmp_path, machines="1:3") as stage:
        stage.market.limit(1, KIND, A, SPOT)
        stage.training.size = Size(1, 1)
        first: list[str] = []

        def sleep(seconds: float) -> None:
            stage.training.tick(seconds)
            stage.training.done += 1
            stage.training.commit()
            first.extend(stage.cloud.running()[:1] if not first else [])
            stage.market.open(KIND, A, SPOT)
            for name in stage.cloud.running():
                if name not in first and stage.training.run.state().ended is None:
                    stage.end(name, BY_ITSELF)

        stage.training.steps = 60
        stage.clock.on_sleep = sleep
        stage.provisioner().watch()
        assert len(stage.cloud.bill.stays) == 3  # the first, and two that failed


# -- what people see ------------------------------------------------------------------------------------------------------


def test_status_says_how_many_are_missing_and_why(stage: Stage) -> None:
    stage.provisioner().provision_several()
    stage.training.tick(0)
    known = status(stage.records(), Cloud(stage.session))
    assert (known["fleet"]["live"], known["fleet"]["missing"], known["fleet"]["usd_per_hour"]) == (3, 0, 24.0)
    stage.market.close()
    stage.cloud.take(stage.cloud.running()[0])
    provisioner = stage.provisioner()
    provisioner.check()
    provisioner.records.refresh()
    provisioner._look()
    provisioner._keep_several(provisioner._look(), fresh=False)
    known = status(stage.records(), Cloud(stage.session))
    assert known["fleet"]["missing"] == 1
    said = render_status(known)
    assert "2 of 3 machines, $16.0000/h" in said
    assert "1 missing: no capacity available on any rung of the ladder" in said
    assert len([line for line in said.splitlines() if "us-east-1a  $8.0000/h" in line]) == 3
    json.dumps(known)


def test_terminate_ends_all_and_the_watch(stage: Stage) -> None:
    gone: list[Any] = []
    stage.at_times([(60, lambda: gone.extend(terminate(stage.records(), Cloud(stage.session))))])
    stage.provisioner().watch()
    assert len(gone) == 3 and stage.events("stopped")
    assert stage.balance().is_clean
    assert "fleet" in status(stage.records(), Cloud(stage.session))


def test_a_dry_run_shows_what_all_cost_together_and_starts_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_spot.commands.machines._cloud", lambda: Cloud(stage.session))
    monkeypatch.setattr("hf_spot.commands.machines._now", stage.clock.now)
    job = stage.folder / "job.yaml"
    ladder = f"- {{instance_types: [{KIND}]}}\n- {{instance_types: [{KIND}], market: on-demand}}\n"
    head = f"name: x\nstore: {stage.job.store}\nrun: hf-spot launch t.py\nregion: us-east-1\nmax_spend: 900\n"
    job.write_text(f"{head}machines: 2:3\nladder:\n{ladder}")
    assert main(["provision", str(job), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"{KIND} in {A}: $8.0000/h" in said and "2:3 machines $16.00/h to $24.00/h" in said
    assert main(["provision", str(job), "--dry-run", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["machines"] == {"least": 2, "most": 3}
    assert main(["provision", str(job), "--json"]) == 0
    started = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["event"] for one in started].count("started") == 3
    assert main(["quotas", str(job)]) == 0
    assert "needs   96 vCPUs for each of 2:3 machines" in capsys.readouterr().out
    assert main(["status", stage.job.store]) == 0
    assert "3 of 2:3 machines" in capsys.readouterr().out
    assert main(["terminate", stage.job.store]) == 0
    assert capsys.readouterr().out.count("terminated: $") == 3


# -- bad input ----------------------------------------------------------------------------------------------------------


def two_subnets(stage: Stage) -> dict[str, Any]:
    found = stage.cloud.client().describe_subnets()["Subnets"]
    ids = tuple(one["SubnetId"] for one in found if one["AvailabilityZone"] in (A, B))
    return {"placement": "cluster", "subnets": {"us-east-1": ids}}


BAD: dict[str, tuple[Callable[[Stage], dict[str, Any]], list[str]]] = {
    "GPUs that differ": (
        lambda stage: {"ladder": (Rung((KIND, "g5.xlarge")), *LADDER)},
        [
            "ladder: machines that train together have as many GPUs each, and p4d.24xlarge has 8, g5.xlarge has 1",
            "remove the other",
        ],
    ),
    "a placement group with several zones": (
        two_subnets,
        [
            "subnets: a cluster placement group is in one zone, and these subnets are in us-east-1a, us-east-1b",
            "placement: region",
        ],
    ),
    "a type for no placement group": (
        lambda stage: {"placement": "cluster", "ladder": (Rung(("t3.micro",)),)},
        ["placement: t3.micro can't be in a cluster placement group", "placement: zone"],
    ),
    "more than the quotas": (
        lambda stage: (
            stage.cloud.api.quotas.update({("L-7212CCBC", "us-east-1"): 96.0, ("L-417A185B", "us-east-1"): 100.0}) or {}
        ),
        ["machines: 3 needs 3 machines in one region", "together allow 2 in us-east-1", "--desired-value 288"],
    ),
    "more than the budget": (
        lambda stage: {"max_spend": 5},
        ["p4d.24xlarge spot in us-east-1a costs $8.00/h", "raise max_spend"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_key_the_reason_and_the_next_command(stage: Stage, case: str) -> None:
    change, words = BAD[case]
    stage.job = dataclasses.replace(stage.job, **change(stage))
    with pytest.raises(SpotError) as caught:
        stage.provisioner().provision_several()
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert not stage.cloud.bill.stays


def test_apis_that_order_one_machine_are_refused(stage: Stage) -> None:
    made = Provisioner(
        stage.job, stage.run(), Cloud(stage.session), api="spot-fleet", now=stage.clock.now, sleep=print, say=print
    )  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="machines: 3: --api spot-fleet orders one machine at a time"):
        made.check()


def test_quotas_of_several_rungs_add_up(stage: Stage) -> None:
    stage.cloud.api.quotas.update({("L-7212CCBC", "us-east-1"): 192.0, ("L-417A185B", "us-east-1"): 96.0})
    assert sorted(one.market for one in stage.provisioner().provision_several()) == [ON_DEMAND, SPOT, SPOT]


# -- permissions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job",
    [{"placement": "cluster"}, pytest.param({"machines": 1}, marks=pytest.mark.proof)],
    ids=["several machines", "one machine"],
)
def test_the_policy_of_who_provisions_is_enough_and_no_more(
    tmp_path: Path, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stage(tmp_path, **job, key_name="mine", image_id=IMAGE, instance_profile="trains") as stage:
        stage.cloud.make_instance_profile("trains")
        stage.cloud.client().create_key_pair(KeyName="mine")
        stage.cloud.api.policy = policy(stage.job, {})
        stage.training.steps = 30
        stage.provisioner().watch()
        status(stage.records(), Cloud(stage.session))
        terminate(stage.records(), Cloud(stage.session))
        allowed = {action for one in stage.cloud.api.policy["Statement"] for action in one["Action"]}
        asked = {action.lower() for action in stage.cloud.api.permitted}
        # Nothing is left to terminate (the next test does it), and the account has had its first spot request.
        assert {one for one in allowed if one.lower() not in asked} <= {"ec2:TerminateInstances", "iam:CreateServiceLinkedRole"}
        stage.cloud.api.policy = None
        assert stage.balance().is_clean
        path = tmp_path / "job.yaml"
        path.write_text(f"name: x\nstore: {stage.job.store}\nrun: hf-spot launch t.py\nregion: us-east-1\nmax_spend: 9\n")
        assert main(["doctor", "iam", "--job", str(path)]) == 0
        assert "ec2:CreateFleet" in capsys.readouterr().out


def test_a_policy_lets_end_only_what_has_the_runs_tag_and_names_bucket_and_role(tmp_path: Path) -> None:
    head = "name: x\nstore: s3://bucket/runs/x\nrun: hf-spot launch t.py\nregion: us-east-1\nmax_spend: 9\n"
    made = policy(parse(f"{head}instance_profile: trains\nmachines: 2:8\n"), {})
    by_name = {one["Sid"]: one for one in made["Statement"]}
    own = {"StringEquals": {"aws:ResourceTag/hf-spot:run": "s3://bucket/runs/x"}}
    assert by_name["EndOwn"]["Condition"] == own == by_name["TagOwn"]["Condition"]
    ends = {one for name, each in by_name.items() for one in each["Action"] if re.search("Terminate|Delete|Authorize", one)}
    assert ends - {"s3:DeleteObject"} == set(by_name["EndOwn"]["Action"])
    assert by_name["GiveTheMachinesTheirRole"]["Resource"] == "arn:aws:iam::*:role/trains"
    assert by_name["Objects"]["Resource"] == "arn:aws:s3:::bucket/runs/x/*"


@pytest.mark.proof
def test_disks_are_in_the_bill_of_machines_that_ec2_took_back_for_nothing_too(tmp_path: Path) -> None:
    with Stage(tmp_path, disk_gb=16384) as stage:
        stage.training.steps = 120
        stage.at_times([(1800, lambda: stage.cloud.take(stage.cloud.running()[0]))])
        stage.provisioner().watch()
        balance = stage.balance()
        assert balance.is_right_to_the_cent, balance
        taken = next(one for one in stage.machines() if one.cost_usd == 0)
        assert taken.disk_usd == pytest.approx(16384 * 0.08 / 730 / 2, rel=0.02)
        assert status(stage.records(), Cloud(stage.session))["spent_usd"] == pytest.approx(
            sum(balance.charged_usd.values()) + sum(balance.disks_charged_usd.values()), abs=0.01
        )
        assert stage.events("spent")[0]["usd"] == pytest.approx(
            sum(balance.spent_usd.values()) + sum(balance.disk_usd.values())
        )


def test_a_newer_hf_spot_that_replaces_a_machine_installs_what_the_others_run(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = template_of(stage, monkeypatch)
    url = "https://example.com/wheels/hf_spot-0.1.0-py3-none-any.whl#sha256="
    monkeypatch.setenv("HF_SPOT_WHEEL", url + 64 * "a")
    stage.provisioner().provision_several()
    monkeypatch.setenv("HF_SPOT_WHEEL", url + 64 * "b")
    stage.cloud.take(stage.cloud.running()[0])
    stage.provisioner().provision_several()
    scripts = [base64.b64decode(data["UserData"]).decode() for data in made]
    assert len(scripts) > 1 and all(64 * "a" in script and 64 * "b" not in script for script in scripts)
    assert {one.wheel for one in stage.machines()} == {url + 64 * "a"}
    for name in stage.cloud.running():
        stage.cloud.take(name)
    stage.provisioner().provision_several()  # nobody trains: the newer one
    assert 64 * "b" in base64.b64decode(made[-1]["UserData"]).decode()


def test_groups_that_machines_still_use_stay_and_are_named(tmp_path: Path) -> None:
    with Stage(tmp_path, placement="cluster") as stage:
        stage.provisioner().provision_several()
        networks = Networks(Cloud(stage.session), stage.job.store, {})
        left = networks.remove(["us-east-1"])
        assert len(left) == 2 and left[0].startswith("sg-") and left[1].endswith(A)
        assert stage.provisioner().provision_several()
        terminate(stage.records(), Cloud(stage.session))
        assert networks.remove(["us-east-1"]) == []


@pytest.mark.proof
def test_machines_that_wait_in_vain_are_given_back_and_asked_for_again_after_a_pause(stage: Stage) -> None:
    stage.market.close()
    stage.market.limit(2, KIND, A, SPOT)
    stage.training.steps = 60
    stage.at_times([(3600, lambda: stage.market.open(KIND, A, SPOT))], more_s=150)
    stage.provisioner().watch()
    given = stage.events("given-back")
    assert {one["why"] for one in given} == {"2 of at least 3 machines have waited for others in vain"}
    starts = [one["at"] for one in stage.events("started")]
    for one in given:
        later = [at for at in starts if at > one["at"]]
        assert later and min(later) - one["at"] >= timedelta(seconds=60)
    assert given[0]["at"] - starts[0] >= timedelta(seconds=900)
    assert stage.balance().is_clean and stage.events("finished")


# -- the bill -------------------------------------------------------------------------------------------------------------


def billed(stage: Stage) -> dict[str, tuple[str, float, float]]:
    """By machine: how well its cost is known, its cost by the journal, and by the cloud."""
    charged = {name: stay.charged(stage.market, stage.clock.time) for name, stay in stage.cloud.bill.stays.items()}
    written = {one.instance_id: one for one in stage.machines() if one.ended is not None}
    return {name: (one.cost_bound, one.cost_usd or 0.0, charged[name]) for name, one in written.items()}


def look(stage: Stage) -> None:
    records = stage.records()
    records.refresh()
    records.reconcile(records.find_instances(["us-east-1"]), ["us-east-1"])


def test_a_machine_is_billed_until_its_end_however_late_somebody_looks(stage: Stage) -> None:
    taken, asked, itself = (one.instance_id for one in stage.provisioner().provision_several())
    stage.clock.time += timedelta(hours=2, seconds=7)
    stage.cloud.take(taken)
    stage.clock.time += timedelta(seconds=13)
    stage.cloud.client().terminate_instances(InstanceIds=[asked])
    stage._settle()
    stage.clock.time += timedelta(seconds=11)
    stage.end(itself, BY_ITSELF)
    stage.clock.time += timedelta(minutes=19)
    look(stage)
    bill = billed(stage)
    assert {name: bound for name, (bound, *_) in bill.items()} == {taken: "", asked: "", itself: "at most"}
    assert all(round(ours, 4) == round(theirs, 4) for name, (_, ours, theirs) in bill.items() if name != itself)
    _, ours, theirs = bill[itself]
    assert ours - theirs == pytest.approx(8 / 60, abs=1e-5)  # the status of its request comes a minute later
    known = status(stage.records(), Cloud(stage.session))
    assert known["spent_bound"] == "at most" and ", at most $48." in render_status(known)


def test_the_status_of_a_spot_request_that_comes_later_corrects_the_bill(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    name = stage.provisioner().provision_several()[0].instance_id
    stage.clock.time += timedelta(hours=1, seconds=10)
    stage.cloud.take(name)
    stage.clock.time += timedelta(seconds=30)
    with monkeypatch.context() as patch:
        patch.setattr(Cloud, "spot_statuses", lambda *_: {})
        look(stage)
    [(bound, ours, theirs)] = billed(stage).values()
    assert bound == "at most" and ours > theirs
    look(stage)
    [(bound, ours, theirs)] = billed(stage).values()
    assert bound == "" and round(ours, 4) == round(theirs, 4)
    number = stage.records().refresh().number
    look(stage)
    assert stage.records().refresh().number == number  # written once


def test_a_machine_that_ec2_has_forgotten_is_billed_by_its_spot_request(stage: Stage) -> None:
    taken, itself, _ = (one.instance_id for one in stage.provisioner().provision_several())
    stage.clock.time += timedelta(minutes=50)
    stage.cloud.take(taken)
    stage.end(itself, BY_ITSELF)
    stage.clock.time += timedelta(hours=9)
    records = stage.records()
    records.refresh()
    records.reconcile([one for one in records.find_instances(["us-east-1"]) if one.state == "running"], ["us-east-1"])
    bill = billed(stage)
    assert bill[taken] == ("", 0.0, 0.0)  # taken back in its first hour, for nothing
    bound, ours, theirs = bill[itself]
    assert bound == "at most" and 0 <= ours - theirs < 8 / 50


# -- traffic ----------------------------------------------------------------------------------------------------------------


def test_traffic_with_a_store_in_another_region_is_in_the_bill_and_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_spot.cloud.machine_records.place_of", lambda store: "us-west-2")
    with Stage(tmp_path) as stage:
        machines = stage.provisioner().provision_several()
        journal = stage.run().journal
        roster = [{"name": one.zone, "machine": {"instance_id": one.instance_id, "region": one.region}} for one in machines]
        journal.claim({"machines": 3, "roster": roster})
        files = [{"path": "model.safetensors", "size": 10**12, "blake3": "0" * 64}]
        commit = {"step": 1, "stage": 1, "reason": "schedule", "complete": False, "files": files, "prefix": "e/checkpoint-1"}
        journal.append("commit", {**commit, "sent_bytes": 4 * 10**11})
        known = status(stage.records(), Cloud(stage.session))
        assert known["traffic_usd"] == pytest.approx(10.0) and known["spent_usd"] > 10
        assert "$10.00 of it at most for traffic with the store" in render_status(known)
        stage.job = dataclasses.replace(stage.job, max_spend=9)
        with pytest.raises(CloudError, match=r"the budget of \$9\.00 is spent"):
            stage.provisioner().watch()
        told = [entry.data["traffic"] for entry in stage.run().events() if "traffic" in entry.data][-1]
        assert (told["store"], told["sent_bytes"], told["usd"]) == ("us-west-2", 4 * 10**11, pytest.approx(10.0))
        [rate] = told["rates"]
        assert (rate["source_place"], rate["target_place"], rate["usd_per_gb"]) == ("us-east-1", "us-west-2", 0.025)
        assert "Price List" in rate["source"] and rate["time"].startswith("2025-06-01")


def test_traffic_between_zones_is_what_machines_have_sent_to_others_at_most(tmp_path: Path) -> None:
    with Stage(tmp_path, placement="region") as stage:
        stage.market.limit(1, KIND, A, SPOT)
        stage.market.limit(2, KIND, B, SPOT)
        provisioner = stage.provisioner()
        machines = provisioner.provision_several()
        assert {one.zone for one in machines} == {A, B}
        for one in machines:
            stage.run().store.put(network_key(one.instance_id), json.dumps({"sent_bytes": 10**11}).encode())
        journal = stage.run().journal
        journal.claim({"machines": 3})
        commit = {"step": 1, "stage": 1, "reason": "schedule", "complete": False, "files": [], "prefix": "e/checkpoint-1"}
        journal.append("commit", {**commit, "sent_bytes": 5 * 10**10})
        stage.clock.time += timedelta(minutes=10)
        for one in machines:
            stage.cloud.take(one.instance_id)
        provisioner._look()
        told = [entry.data["traffic"] for entry in stage.run().events() if "traffic" in entry.data][-1]
        assert told["between_zones"] == {"us-east-1": 3 * 10**11 - 5 * 10**10}
        assert told["usd"] == pytest.approx(2 * 250 * 0.011)
        assert "at most 250.00 GB between zones: at most $5.50" in render_report(summarise(stage.run().events()), "s3://b/run")


def test_what_the_price_list_does_not_tell_has_aws_usual_price_and_its_source(stage: Stage) -> None:
    found = rates_for(Cloud(stage.session), [("us-east-1", INTERNET), ("us-east-1", "us-west-2"), ("us-east-1", "us-east-1")])
    assert [(one.target_place, one.usd_per_gb, "Price List" in one.source) for one in found] == [
        (INTERNET, 0.09, False),
        ("us-east-1", 0.011, True),
        ("us-west-2", 0.025, True),
    ]
    assert found[0].source.startswith("AWS's usual price, https://")


@pytest.mark.parametrize(
    ("url", "endpoint", "region", "expected"),
    [
        ("s3://bucket/run", "https://s3.us-east-1.amazonaws.com", "eu-west-1", "eu-west-1"),
        ("s3://bucket/run", "https://s3.cn-north-1.amazonaws.com.cn", "cn-north-1", "cn-north-1"),
        ("s3://bucket/run", "https://s3.us-east-1.amazonaws.com", None, ""),
        ("s3://bucket/run", "http://minio.local:9000", "us-east-1", ""),
        ("s3://bucket/run", "https://amazonaws.com.evil.example", "us-east-1", ""),
    ],
)
def test_only_aws_says_where_a_bucket_is(
    url: str, endpoint: str, region: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Store, "place", lambda self: Place(endpoint, "us-east-1", region, None))
    assert place_of(S3Store(url)) == expected


def test_a_folder_is_nowhere_and_other_clouds_are_the_internet(tmp_path: Path) -> None:
    assert place_of(open_store(str(tmp_path))) == ""
    assert [place_of(open_store(url)) for url in ("gs://bucket/run", "hf://buckets/me/run")] == [INTERNET] * 2


# -- conditions of the policy -------------------------------------------------------------------------------------------------


def test_a_policy_starts_nothing_without_the_runs_tag_and_ends_nothing_of_others(stage: Stage) -> None:
    stage.job = dataclasses.replace(stage.job, placement="cluster", instance_profile="trains")
    stage.cloud.make_instance_profile("trains")
    mine = policy(stage.job, {})
    other = policy(dataclasses.replace(stage.job, store="/another/run"), {})
    stage.cloud.api.policy = other
    with pytest.raises(CloudError, match=r"CreateSecurityGroup on .* with .*RequestTag/hf-spot:run"):
        stage.provisioner().provision_several()
    stage.cloud.api.policy = mine
    machines = stage.provisioner().provision_several()
    stage.cloud.api.policy = other
    with pytest.raises(CloudError, match=r"TerminateInstances on .*ResourceTag/hf-spot:run"):
        stage.provisioner()._cloud.terminate("us-east-1", [machines[0].instance_id])
    stage.cloud.api.policy = mine
    stage.provisioner()._cloud.terminate("us-east-1", [machines[0].instance_id], stop=True)


UNTAGGED = Need("ec2:RunInstances", "arn:aws:ec2:us-east-1:1:instance/i-1")
TAG, OWN = "aws:RequestTag/hf-spot:run", "aws:ResourceTag/hf-spot:run"


@pytest.mark.parametrize(
    ("need", "allowed"),
    [
        (Need("ec2:RunInstances", "arn:aws:ec2:us-east-1:1:instance/i-1", {TAG: "RUN"}), True),
        (Need("ec2:RunInstances", "arn:aws:ec2:us-east-1:1:instance/i-1", {TAG: "another"}), False),
        (UNTAGGED, False),
        (Need("ec2:RunInstances", "arn:aws:ec2:us-east-1:1:volume/v-1"), False),
        (Need("ec2:RunInstances", "arn:aws:ec2:us-east-1::image/ami-1"), True),
        (Need("ec2:CreateFleet", "arn:aws:ec2:us-east-1:1:fleet/f-1"), False),
        (Need("ec2:CreateFleet", "arn:aws:ec2:us-east-1:1:fleet/f-1", {TAG: "RUN"}), True),
        (Need("ec2:CreateLaunchTemplate", "arn:aws:ec2:us-east-1:1:launch-template/l-1"), False),
        (Need("ec2:CreateSecurityGroup", "arn:aws:ec2:us-east-1:1:security-group/s-1"), False),
        (Need("ec2:CreateSecurityGroup", "arn:aws:ec2:us-east-1:1:vpc/v-1"), True),
        (Need("ec2:TerminateInstances", "arn:aws:ec2:us-east-1:1:instance/i-1", {OWN: "another"}), False),
        (Need("ec2:TerminateInstances", "arn:aws:ec2:us-east-1:1:instance/i-1"), False),
        (Need("ec2:TerminateInstances", "arn:aws:ec2:us-east-1:1:instance/i-1", {OWN: "RUN"}), True),
        (Need("ec2:CreateTags", "arn:aws:ec2:us-east-1:1:instance/i-1"), False),
        (Need("ec2:CreateTags", "arn:aws:ec2:us-east-1:1:instance/i-1", {"ec2:CreateAction": "RunInstances"}), True),
        (Need("ec2:CreateTags", "arn:aws:ec2:us-east-1:1:instance/i-1", {"ec2:CreateAction": "CreateImage"}), False),
        (Need("iam:PassRole", "arn:aws:iam::1:role/trains", {"iam:PassedToService": "ec2.amazonaws.com"}), True),
        (Need("iam:PassRole", "arn:aws:iam::1:role/trains", {"iam:PassedToService": "lambda.amazonaws.com"}), False),
        (Need("iam:PassRole", "arn:aws:iam::1:role/admin", {"iam:PassedToService": "ec2.amazonaws.com"}), False),
        (Need("ec2:ModifyInstanceAttribute", "arn:aws:ec2:us-east-1:1:instance/i-1", {OWN: "RUN"}), False),
    ],
)
def test_what_a_policy_permits_depends_on_tags_resources_and_the_service(need: Need, allowed: bool) -> None:
    head = "name: x\nstore: s3://bucket/runs/x\nrun: hf-spot launch t.py\nregion: us-east-1\nmax_spend: 9\n"
    made = policy(parse(f"{head}instance_profile: trains\nmachines: 2:8\n"), {})
    context = {key: "s3://bucket/runs/x" if value == "RUN" else value for key, value in need.context.items()}
    assert is_permitted(made, dataclasses.replace(need, context=context)) is allowed
