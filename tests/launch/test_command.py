"""The command line of ``hf-spot launch``: what it makes of its options, and one clear error before anything starts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_spot.cli import main
from hf_spot.errors import ConfigError
from hf_spot.launch.command import Machines, Reading, likely_store
from hf_spot.launch.options import parse
from tests.servers import CannedS3, Rclone, SeaweedFS

BOOTSTRAP = [sys.executable, "-m", "hf_spot.training.bootstrap"]


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    return str(path)


def test_one_process_runs_under_the_bootstrap_alone(script: str) -> None:
    command = parse(["--store", "s3://b/r", "--num_processes", "1", "--mixed-precision", "bf16", script, "--store", "x"], {})
    assert command.argv == [*BOOTSTRAP, script, "--store", "x"]
    assert command.store == "s3://b/r"
    assert command.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_several_processes_run_under_accelerate_with_its_own_options_only(script: str) -> None:
    options = ["--notice", "imds", "--multi_gpu", "--max_restarts=5", "--num-processes", "4", "--save_total_limit", "7"]
    command = parse(["--store", "s3://b/r", *options, script, "-m"], {})
    launcher = [sys.executable, "-m", "hf_spot.launch.agent", "--multi_gpu", "--num-processes", "4"]
    assert command.argv == [*launcher, *BOOTSTRAP[1:], script, "-m"]
    assert (command.max_restarts, command.arguments.keep_checkpoints, command.arguments.notice) == (5, 7, "imds")


ZERO = ["--machine_rank", "1", "--use_deepspeed", "--num_processes", "4"]
TWO = ["--store", "s3://b/r", "--num_machines", "2"]
MANY = ["--store", "s3://b/r", "--num_machines", "2:8"]
AT = ["--main_process_ip", "127.0.0.1", "--main_process_port", "29500"]


def test_the_machines_are_known_and_gloo_listens_where_they_reach_it(script: str) -> None:
    command = parse([*TWO, *AT, "--machine_rank", "1", "--multi_gpu", "--num_processes", "4", script], {})
    assert command.machines == Machines(2, 1, "127.0.0.1")
    assert command.environ["GLOO_SOCKET_IFNAME"] == "lo"
    chosen = {"GLOO_SOCKET_IFNAME": "ib0"}
    kept = parse([*TWO, *AT, "--machine_rank", "1", "--multi_gpu", "--num_processes", "4", script], chosen)
    assert kept.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_a_name_that_stands_for_the_loopback_of_this_machine_alone_is_refused_unless_gloo_is_told_where_to_listen(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_spot.launch.options.interface_to", lambda address: "lo")  # as Debian's /etc/hosts has it
    argv = [*TWO, "--machine_rank", "0", "--main_process_port", "29500", "--multi_gpu", "--num_processes", "2"]
    with pytest.raises(ConfigError, match="--main_process_ip node-a") as caught:
        parse([*argv, "--main_process_ip", "node-a", script], {})
    assert "export GLOO_SOCKET_IFNAME=" in caught.value.hint
    parse([*argv, "--main_process_ip", "node-a", script], {"GLOO_SOCKET_IFNAME": "ib0"})
    for here in ("localhost", "127.0.0.1", "::1"):
        assert parse([*argv, "--main_process_ip", here, script], {}).environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_the_store_may_come_from_the_environment(script: str) -> None:
    assert parse([script], {"HF_SPOT_STORE": "s3://b/r"}).store == "s3://b/r"


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["SCRIPT"], "--store"),
        (["--store", "s3://b/r"], "training_script"),
        (["--store", "s3://b/r", "no/such.py"], "no/such.py"),
        (["--store", "s3://b/r", "--no-such-option", "SCRIPT"], "--no-such-option"),
        (["--store", "s3://b/r", "--max-restarts", "-1", "SCRIPT"], "-1"),
        (["--store", "s3://b/r", "--notice", "smoke", "SCRIPT"], "smoke"),
        (["--store", "s3://b/r", "--grace-s", "soon", "SCRIPT"], "soon"),
        (["--store", "s3://b/r", "--no_python", "SCRIPT"], "--no_python"),
        ([*TWO, "--machine_rank", "1", "SCRIPT"], "--num_machines 2"),
        (["--store", "s3://b/r", "--num_machines", "8:2", "SCRIPT"], "8:2"),
        (["--store", "s3://b/r", "--num_machines", "two", "SCRIPT"], "two"),
        (["--store", "s3://b/r", "--num_machines", "0", "SCRIPT"], "'0'"),
        ([*TWO, "--num_processes", "3", "SCRIPT"], "--num_processes 3"),
        ([*MANY, "--num_processes", "0", "SCRIPT"], "--num_processes 0"),
        ([*MANY, "--cpu", "SCRIPT"], "--num_machines 2:8"),
        ([*MANY, *ZERO, "SCRIPT"], "DeepSpeed"),
        ([*TWO, *AT, "--machine_rank", "1", "--multi_gpu", "--interface", "eth0", "SCRIPT"], "--interface"),
        ([*TWO, "--machine_rank", "0", "--multi_gpu", "SCRIPT"], "--main_process_ip"),
        ([*TWO, *AT, "--machine_rank", "2", "--multi_gpu", "SCRIPT"], "--machine_rank 2"),
        ([*TWO, *AT, "--machine_rank", "1", "--num_processes", "4", "SCRIPT"], "--multi_gpu"),
        ([*TWO, *AT, "--machine_rank", "1", "--multi_gpu", "--num_processes", "3", "SCRIPT"], "--num_processes 3"),
        ([*TWO, *AT, *ZERO, "SCRIPT"], "--deepspeed_multinode_launcher pdsh"),
        ([*TWO, *AT, *ZERO, "--deepspeed_multinode_launcher", "openmpi", "SCRIPT"], "--deepspeed_multinode_launcher openmpi"),
        (["--store", "s3://b/r", "--peer-timeout-s", "1", "SCRIPT"], "peer_timeout_s=1"),
        (["--store", "s3://b/r", "--tpu", "SCRIPT"], "TPU"),
        (["--store", "s3://b/r", "--config_file", "/no/such.yaml", "SCRIPT"], "/no/such.yaml"),
        (["--store", "s3://b/r", "--multi_gpu", "--num_processes", "1", "SCRIPT"], "multi_gpu"),
    ],
)
def test_what_can_not_be_used_is_named(argv: list[str], word: str, script: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([script if one == "SCRIPT" else one for one in argv], {})
    assert word in str(caught.value)
    assert caught.value.hint


def test_machines_that_come_and_go_need_one_option(script: str) -> None:
    command = parse([*MANY, script, "--of_the_script"], {})
    assert command.machines == Machines(8, least=2, processes=1)
    argv = command.argv_among(Machines(3, 1, "10.0.0.7", least=2, processes=1), 29512)
    told = ["--num_machines", "3", "--num_processes", "3", "--machine_rank", "1"]
    told += ["--main_process_ip", "10.0.0.7", "--main_process_port", "29512"]
    assert argv[1:3] == ["-m", "hf_spot.launch.agent"]
    assert argv[3:] == ["--multi_gpu", *told, "-m", "hf_spot.training.bootstrap", script, "--of_the_script"]
    # accelerate starts one process alone in another way
    alone = command.argv_among(Machines(1, 0, "", least=1, processes=1), 29512)
    assert alone[3:7] == ["--num_machines", "1", "--num_processes", "1"]


@pytest.mark.parametrize(
    ("argv", "machines"),
    [
        ([*TWO, "--num_processes", "4"], Machines(2, least=2, processes=2)),  # a number means exactly so many: 4 in all
        ([*MANY, "--num_processes", "4"], Machines(8, least=2, processes=4)),  # of each machine
        ([*MANY, "--interface", "eth1"], Machines(8, least=2, processes=1, interface="eth1")),
        ([*MANY, "--use_fsdp"], Machines(8, least=2, processes=1)),
        (["--store", "s3://b/r", "--num_machines", "1:1", "--num_processes", "1"], Machines()),
    ],
)
def test_machines_meet_in_the_run_unless_their_ranks_are_given(argv: list[str], machines: Machines, script: str) -> None:
    assert parse([*argv, script], {}).machines == machines


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--num_machines", "2:8", "--machine_rank", "3"], "--machine_rank has no effect"),
        (["--cpu", "--num_processes", "2"], "--num_processes 2 has no effect"),
        (["--num_processes", "3"], "--num_processes 3 has no effect"),
        (["--multi_gpu", "--num_processes", "3"], None),
        (["--num_processes", "1"], None),
        ([], None),
    ],
)
def test_an_option_that_has_no_effect_is_named(options: list[str], named: str | None, script: str) -> None:
    told = [one for one in parse(["--store", "s3://b/r", *options, script], {}).remarks if "has no effect" in one]
    assert [one[: len(named or "")] for one in told] == ([named] if named else [])


def test_deepspeed_on_several_machines_is_started_on_each(script: str) -> None:
    standard = ["--deepspeed_multinode_launcher", "standard"]
    assert parse([*TWO, *AT, *ZERO, *standard, script], {}).machines.count == 2


@pytest.fixture(autouse=True)
def readers_are_forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those of the options, unless the test is marked ``fresh_python``."""
    if request.node.get_closest_marker("fresh_python"):
        yield
        return
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with request.getfixturevalue("zygote").forking():
        yield


def refused(capsys: pytest.CaptureFixture[str], script: str, store: str) -> str:
    """What is printed when this store is refused: one error, and the script has not begun."""
    assert main(["launch", "--store", store, "--num_processes", "1", script]) == 2
    printed = capsys.readouterr().err
    assert printed.count("hf-spot: error:") == 1
    assert "\n  Try: " in printed
    assert "Traceback" not in printed
    assert not (Path(script).parent / "ran").exists()
    return printed


def test_a_wrong_bucket_is_refused_before_training(s3_url: str, script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no-such-bucket" in refused(capsys, script, "s3://no-such-bucket/run")


@pytest.mark.parametrize(("identity", "permission"), [("reader", "s3:PutObject"), ("writer", "s3:ListBucket")])
def test_a_denied_permission_is_named_before_training(
    seaweedfs: SeaweedFS,
    s3_url: str,
    script: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    identity: str,
    permission: str,
) -> None:
    for name, value in seaweedfs.env_of(identity).items():
        monkeypatch.setenv(name, value)
    assert permission in refused(capsys, script, s3_url)


def test_an_expired_token_is_refused_before_training(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with CannedS3(400, "ExpiredToken") as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        assert "expired" in refused(capsys, script, "s3://tests/run").lower()


def test_a_store_that_does_not_fence_is_refused_before_training(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Rclone() as server:
        server.make_bucket("tests")
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        assert "create-if-absent" in refused(capsys, script, "s3://tests/run")


@pytest.mark.parametrize("store", ["http://example.com/run", "s3://", "s3:/b/r", "gs://b/r", "/proc/nobody/can/write"])
def test_a_bad_url_is_refused_before_training(store: str, script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, script, store)


@pytest.mark.fresh_python
def test_the_help_shows_our_options_before_those_of_accelerate(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["launch", "--help"])
    assert end.value.code == 0
    text = capfd.readouterr().out
    assert 0 < text.index("--store") < text.index("--mixed_precision")


@pytest.mark.fresh_python
def test_what_is_read_in_a_process_of_its_own_is_what_would_be_read_here(script: str) -> None:
    argv = ["--store", "s3://b/ö", *AT, "--num_machines", "2", "--machine_rank", "1", "--multi_gpu", "--num_processes", "4"]
    argv += ["--grace-s", "30", "--save_total_limit", "7", script, "--name", "\udcff", ""]
    assert Reading(argv).result() == parse(argv)


def test_a_command_line_that_can_not_be_used_is_told_in_the_same_words(script: str) -> None:
    argv = ["--store", "s3://b/r", "--max-restarts", "-1", script]
    with pytest.raises(ConfigError) as here:
        parse(argv)
    with pytest.raises(ConfigError) as there:
        Reading(argv).result()
    assert (str(there.value), there.value.hint) == (str(here.value), here.value.hint)


@pytest.mark.fresh_python
def test_a_reader_that_dies_has_said_why_and_its_code_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_spot.launch.command._OPTIONS", "no.such.module")
    with pytest.raises(SystemExit) as end:
        Reading([]).result()
    assert end.value.code == 1


@pytest.mark.parametrize(
    ("argv", "store"),
    [
        (["--store", "s3://b/r", "train.py"], "s3://b/r"),
        (["--num_processes", "1", "--store=s3://b/r", "train.py", "--store", "its own"], "s3://b/r"),
        (["train.py", "--store", "its own"], None),
        (["-m", "package.train", "--store", "its own"], None),
        (["--mixed_precision", "bf16", "train.py"], "s3://from/environment"),
        (["--store"], None),
    ],
)
def test_the_run_is_known_before_the_options_unless_there_is_a_doubt(argv: list[str], store: str | None) -> None:
    assert likely_store(argv, {"HF_SPOT_STORE": "s3://from/environment"}) == store
