"""When warm spares are kept, and which may be used."""

from __future__ import annotations

import pytest

from hf_spot.errors import ConfigError
from hf_spot.policy.warm import AUTO, ON, check, differing, has_room, same_command, wait_s

BEFORE = {"HF_SPOT_LAUNCH": "1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "a", "OMP_NUM_THREADS": "1", "HF_HOME": "models"}


@pytest.mark.parametrize(
    ("changed", "read", "named"),
    [
        ({"HF_SPOT_LAUNCH": "2", "MASTER_PORT": "2", "TORCHELASTIC_RUN_ID": "b", "RANK": "1"}, (), []),
        ({"HF_SPOT_LAUNCH": "2"}, ("HF_SPOT_LAUNCH",), []),
        ({"MASTER_PORT": "2", "RANK": "1"}, ("RANK", "WORLD_SIZE"), ["RANK"]),
        ({"TORCHELASTIC_RUN_ID": "b"}, ("TORCHELASTIC_RUN_ID",), ["TORCHELASTIC_RUN_ID"]),
        ({"OMP_NUM_THREADS": "2", "HF_HOME": "others"}, (), ["HF_HOME", "OMP_NUM_THREADS"]),
        ({"LD_PRELOAD": "x.so", "LOCAL_RANK": "1"}, (), ["LD_PRELOAD", "LOCAL_RANK"]),
    ],
)
def test_only_what_each_launch_sets_may_change_and_no_import_may_have_read_it(
    changed: dict[str, str], read: tuple[str, ...], named: list[str]
) -> None:
    assert differing(BEFORE, {**BEFORE, **changed}, read) == named


@pytest.mark.parametrize(("read", "named"), [((), []), (("LOCAL_RANK",), ["LOCAL_RANK"])])
def test_a_process_of_several_may_be_alone_now(read: tuple[str, ...], named: list[str]) -> None:
    of_several = {"RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    assert differing({**BEFORE, **of_several}, {**BEFORE, "ACCELERATE_USE_CPU": "False"}, read) == named


def test_torchruns_option_for_output_makes_no_other_command() -> None:
    alone = ["python", "-m", "train", "-u"]
    assert same_command(["python", "-u", "-m", "train", "-u"], alone) and same_command(alone, alone)
    assert not same_command(alone, ["python", "-m", "train"]) and not same_command(alone, ["python", "-m", "train", "-u", "-u"])


def test_a_variable_that_is_gone_has_changed() -> None:
    assert differing(BEFORE, {name: value for name, value in BEFORE.items() if name != "HF_HOME"}, ()) == ["HF_HOME"]


@pytest.mark.parametrize(
    ("mode", "ranks", "available_gb", "are_there", "has"),
    [
        (AUTO, 1, 4.0, False, True),
        (AUTO, 1, 2.0, False, False),
        (AUTO, 8, 5.0, False, False),
        (AUTO, 8, 8.0, False, True),
        (AUTO, 8, 2.0, True, True),
        (AUTO, 8, 0.5, True, False),
        (ON, 8, 0.1, False, True),
    ],
)
def test_spares_leave_memory_for_the_training(mode: str, ranks: int, available_gb: float, are_there: bool, has: bool) -> None:
    assert has_room(mode, ranks, int(available_gb * 1e9), 16 * 10**9, are_there=are_there) is has


def test_a_short_training_starts_none_and_a_machine_that_waits_does_early() -> None:
    assert wait_s(ON, is_idle=False) == 0.0 < wait_s(AUTO, is_idle=True) < 10 < wait_s(AUTO, is_idle=False)


def test_another_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="--warm-spares maybe"):
        check("maybe")
