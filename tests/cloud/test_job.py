"""The job file: what is wrong with one is said with line, key and repair, before anything is asked of a cloud."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from hf_spot.cloud.example import example, keys
from hf_spot.cloud.job import ANY, DEFAULT_IMAGE, DEFAULT_LADDER, ON_DEMAND, PREFERRED, SPOT, Job, Rung, load, parse
from hf_spot.errors import ConfigError

WHOLE = """\
name: llama
store: s3://bucket/runs/llama
run: hf-spot launch --multi_gpu train.py
region: us-east-1
max_spend: 150
instance_profile: hf-spot
"""
LINES = len(WHOLE.splitlines())


def test_the_smallest_file_has_the_default_ladder() -> None:
    job = parse(WHOLE)
    assert job.ladder == DEFAULT_LADDER
    assert job.site("eu-west-1").image_id == DEFAULT_IMAGE
    assert (job.site("eu-west-1").subnets, job.site("eu-west-1").security_groups) == ((), ())


def test_the_default_ladder_ends_on_demand_and_begins_near_on_the_spot_market() -> None:
    assert [(rung.market, rung.regions) for rung in DEFAULT_LADDER] == [
        (SPOT, PREFERRED),
        (SPOT, ANY),
        (SPOT, ANY),
        (ON_DEMAND, PREFERRED),
    ]


def test_a_file_says_everything_that_a_job_can_say(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        WHOLE
        + """\
setup: |
  git clone https://example.com/it
requirements: ["hf_spot==0.1.0", trl]
image_id: {us-east-1: ami-0123456789abcdef0, us-west-2: "resolve:ssm:/my/image"}
key_name: mine
security_groups: {us-east-1: [sg-12345678], us-west-2: default}
subnets: {us-east-1: [subnet-1, subnet-2], us-west-2: [subnet-3]}
disk_gb: 500
tags: {team: nlp}
strategy: capacity-optimized
hours: 20
deadline: 2030-01-31T18:00:00+01:00
on_finish: stay
machines: 2:8
placement: region
ladder:
- {market: spot, instance_types: [p4d.24xlarge], regions: [us-west-2, us-east-1], max_price: 12}
- instance_types: [g5.48xlarge]
  market: on-demand
  regions: any
"""
    )
    job = load(path)
    assert {field.name for field in dataclasses.fields(Job)} == {
        line.partition(":")[0] for line in path.read_text().splitlines() if line[0].isalpha()
    }
    assert job.ladder == (
        Rung(("p4d.24xlarge",), SPOT, ("us-west-2", "us-east-1"), 12.0),
        Rung(("g5.48xlarge",), ON_DEMAND, ANY),
    )
    assert job.deadline == datetime(2030, 1, 31, 17, tzinfo=timezone.utc)
    assert job.site("us-east-1").subnets == ("subnet-1", "subnet-2")
    assert job.site("us-west-2").security_groups == ()
    assert job.site("us-west-2").image_id == "resolve:ssm:/my/image"
    assert job.regions_of(job.ladder[1], ["eu-west-1", "us-west-2", "us-east-1"]) == ("us-east-1", "us-west-2")
    assert job.named_regions() == ("us-east-1", "us-west-2")


@pytest.mark.parametrize(
    ("value", "least", "most"), [("3", 3, 3), ("1", 1, 1), ("2:8", 2, 8), ("3:3", 3, 3), ("'2:8'", 2, 8), ("12:59", 12, 59)]
)
def test_machines_are_a_number_or_a_range_and_never_one_to_the_base_of_60(value: str, least: int, most: int) -> None:
    job = parse(WHOLE + f"machines: {value}\n")
    assert (job.size.least, job.size.most, job.size.is_fleet) == (least, most, most > 1)


@pytest.mark.parametrize("option", ["--num_machines 3", "--num-machines=3", "--machine_rank 0", "--main_process_ip 10.0.0.1"])
def test_a_fleets_machines_are_counted_once(option: str) -> None:
    counted = WHOLE.replace("--multi_gpu", option)
    assert parse(counted).size.most == 1
    with pytest.raises(ConfigError, match=r"job.yaml:3: run: --.*`machines: 3` says how many(.|\n)*remove --"):
        parse(counted + "machines: 3\n")


def test_any_region_is_every_one_of_the_account_and_the_preferred_one_comes_first() -> None:
    job = parse(WHOLE)
    assert job.regions_of(DEFAULT_LADDER[1], ["ap-south-1", "us-east-1"]) == ("us-east-1", "ap-south-1")
    assert job.regions_of(DEFAULT_LADDER[0], ["ap-south-1", "us-east-1"]) == ("us-east-1",)


@pytest.mark.parametrize(
    ("added", "line", "words"),
    [
        ("laddr: []", 1, ["laddr", "did you mean ladder?"]),
        ("colour: red", 1, ["colour", "max_spend"]),
        ("name: other", 1, ["name appears twice"]),
        ("ladder: []", 1, ["ladder: has no rung", "omit it for the default ladder"]),
        ("ladder: spot", 1, ["ladder: is not a list of rungs"]),
        ("ladder: {market: spot}", 1, ["ladder: is not a list of rungs"]),
        ("ladder:\n- market: spot", 2, ["ladder[0]", "instance_types is missing"]),
        ("ladder:\n- instance_types: [p4d.24xlarge]\n  regoins: any", 3, ["ladder[0].regoins", "did you mean regions?"]),
        ("ladder:\n- instance_types: [p4d]", 2, ["ladder[0].instance_types[0]: 'p4d'", "p4d.24xlarge"]),
        ("ladder:\n- instance_types: []", 2, ["ladder[0].instance_types: names no"]),
        ("ladder:\n- instance_types: p4d.24xlarge", 2, ["ladder[0].instance_types", "is not a list", "[p4d.24xlarge]"]),
        ("ladder:\n- instance_types: [p4d.24xlarge, p4d.24xlarge]", 2, ["p4d.24xlarge appears twice"]),
        ("ladder:\n- instance_types: [p4d.24xlarge]\n  market: sport", 3, ["ladder[0].market: 'sport'", "mean spot?"]),
        ("ladder:\n- instance_types: [p4d.24xlarge]\n  max_price: 0", 3, ["max_price: 0 must be"]),
        (
            "ladder:\n- instance_types: [p4d.24xlarge]\n  regions: [us-east-1a]",
            3,
            ["'us-east-1a' is not a region", "without the zone"],
        ),
        ("ladder:\n- instance_types: [p4d.24xlarge]\n  regions: []", 3, ["names no region", "any"]),
        ("ladder:\n- p4d.24xlarge", 2, ["ladder[0]: 'p4d.24xlarge' is not a rung"]),
        ("disk_gb: 200 GB", 1, ["disk_gb: '200 GB'"]),
        ("disk_gb: 7", 1, ["disk_gb: 7", "from 8"]),
        ("tags: {aws:team: nlp}", 1, ["aws:team", "is a reserved key"]),
        ("tags: {team: 1}", 1, ["tags.team", '"1"']),
        ("image_id: ubuntu", 1, ["image_id: 'ubuntu'", "ami-…"]),
        ("image_id: ami-12345678", 1, ["one region only", "us-east-1: ami-12345678"]),
        ("image_id: {us-west-2: ami-12345678}", 1, ["image_id: has no value for us-east-1", "ladder[0]"]),
        ("security_groups: [web]", 1, ["security_groups[0]: 'web'", "sg-…"]),
        ("security_groups: [sg-12345678]", 1, ["one region only"]),
        ("subnets: []", 1, ["subnets: is empty", "default"]),
        ("strategy: lowest-price", 1, ["strategy", "price-capacity-optimized"]),
        ("on_finish: stop", 1, ["on_finish: 'stop'"]),
        ("machines: 0", 1, ["machines: 0: at least one machine", "machines: 2:8"]),
        ("machines: 0:2", 1, ["machines: '0:2': at least one machine"]),
        ("machines: 8:2", 1, ["machines: '8:2': the first number must not be above the second", "machines: 2:8"]),
        ("machines: many", 1, ["machines: 'many' is neither a number nor a range such as 2:8"]),
        ('machines: "3"', 1, ["machines: '3' is neither", "machines: 3"]),
        ("machines: 2.5", 1, ["machines: 2.5 is neither"]),
        ("machines: true", 1, ["machines: True is neither"]),
        ("machines: [2, 8]", 1, ["machines: [2, 8] is neither"]),
        ("placement: zones", 1, ["placement: 'zones'", "did you mean zone?"]),
        ("hours: -1", 1, ["hours: -1"]),
        ("hours: .inf", 1, ["hours: inf"]),
        ("deadline: tomorrow", 1, ["deadline", "2030-01-31T18:00:00Z"]),
        ("deadline: 2030-01-31", 1, ["deadline", "time zone"]),
        ("requirements: hf_spot", 1, ["requirements", "[hf_spot]"]),
        ("setup: [a, b]", 1, ["setup"]),
        ("? [a]\n: b", 1, ["not a text key"]),
        ("setup: [", 2, ["not YAML"]),
        ("\ttabs: no", 1, ["not YAML"]),
    ],
)
def test_what_is_wrong_is_said_with_its_line_its_key_and_a_repair(added: str, line: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(WHOLE + added + "\n", "job.yaml")
    said = str(caught.value)
    assert said.startswith(f"job.yaml:{LINES + line}: ")
    assert all(word in said for word in words), said
    assert "Try:" in said


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_spend", "0", ["max_spend: 0 must be", "150"]),
        ("max_spend", "yes", ["max_spend: True"]),
        ("max_spend", "$20", ["max_spend: '$20'"]),
        ("region", "us_east_1", ["'us_east_1' is not a region"]),
        ("region", "us-east-1b", ["us-east-1, without the zone"]),
        ("name", "my run", ["'my run' is not a valid name"]),
        ("store", "runs/llama", ["store: 'runs/llama'", "every machine"]),
        ("run", "python train.py", ["hf-spot launch train.py"]),
        ("run", "hf-spot launch --store s3://other train.py", ["names the store again", "s3://bucket/runs/llama"]),
        ("run", "''", ["run: '' is not text"]),
    ],
)
def test_a_value_that_cannot_be_is_refused(key: str, value: str, words: list[str]) -> None:
    lines = [f"{key}: {value}" if line.startswith(f"{key}:") else line for line in WHOLE.splitlines()]
    with pytest.raises(ConfigError) as caught:
        parse("\n".join(lines), "job.yaml")
    said = str(caught.value)
    assert said.startswith(f"job.yaml:{1 + [line.partition(':')[0] for line in lines].index(key)}: ")
    assert all(word in said for word in words), said


@pytest.mark.parametrize("key", ["name", "store", "run", "region", "max_spend"])
def test_what_is_missing_is_said_with_an_example(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is missing\n.*{key}: "):
        parse("\n".join(line for line in WHOLE.splitlines() if not line.startswith(key)))


def test_a_bucket_needs_a_role_and_a_shared_directory_does_not() -> None:
    without = WHOLE.replace("instance_profile: hf-spot\n", "")
    with pytest.raises(ConfigError, match=r"without a role(.|\n)*hf-spot doctor iam --store s3://bucket/runs/llama"):
        parse(without)
    assert parse(without.replace("s3://bucket", "/mnt/efs")).instance_profile is None


@pytest.mark.parametrize("text", ["", "- a\n- b", "just words", "&a [*a]", "deadline: 2030-99-99T00:00:00Z", "name: \x01"])
def test_a_file_that_is_no_job_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^job\.yaml"):
        parse(text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml can't be read: No such file"):
        load(tmp_path / "gone.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "binary")


def test_a_job_made_in_python_is_checked_like_a_file() -> None:
    with pytest.raises(ConfigError, match=r"^max_spend: -1 must be"):
        dataclasses.replace(parse(WHOLE), max_spend=-1)
    soon = datetime(2030, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    assert dataclasses.replace(parse(WHOLE), deadline=soon).deadline == datetime(2029, 12, 31, 22, tzinfo=timezone.utc)


def test_the_example_has_every_key_and_its_default() -> None:
    text = example()
    job = parse(text)
    assert (job.name, job.max_spend) == ("my-run", 150.0)
    required, optional, of_a_rung = keys()
    assert required | optional == {one.name for one in dataclasses.fields(Job)}
    assert of_a_rung == {one.name for one in dataclasses.fields(Rung)}
    whole = text.partition("# The keys of a rung")[0].replace("\n# ", "\n").replace("Optional:", "")
    full = parse(whole.replace("resolve:ssm:…", DEFAULT_IMAGE))
    shown_default = {"requirements", "image_id", "security_groups", "subnets", "disk_gb", "strategy", "on_finish", "ladder"}
    assert {name: getattr(full, name) for name in shown_default} == {name: getattr(job, name) for name in shown_default}
    assert all(getattr(full, name) for name in required | optional)


@pytest.mark.parametrize(
    ("typed", "meant"), [("us-east1", "us-east-1"), ("eu_west_1", "eu-west-1"), ("us-east-1a", "us-east-1")]
)
def test_a_mistyped_region_is_recognised(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(example().replace("us-east-1 ", f"{typed} "))
    assert meant in raised.value.hint
