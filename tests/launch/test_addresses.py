"""Waiting for machine 0's port, as the agents of the other machines do."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hf_spot.launch.addresses import wait_for_listener
from hf_spot.launch.agent import _machine_0
from tests.waiting import PATIENCE_S


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_who_comes_first_waits_until_machine_0_listens_and_does_not_take_its_port() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for_listener, "127.0.0.1", port, PATIENCE_S)
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        with socket.create_server(("127.0.0.1", port)) as machine_0:
            assert waiting.result(PATIENCE_S)
            machine_0.accept()[0].close()
    assert wait_for_listener("localhost.invalid", port, 0.05) is False


def test_a_machine_0_that_never_listens_is_left_to_torch() -> None:
    began_s = time.monotonic()
    assert wait_for_listener("127.0.0.1", free_port(), 0.1) is False
    assert time.monotonic() - began_s >= 0.1


IP = ["--main_process_ip", "10.0.0.1"]


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ([*IP, "--main_process_port", "1234", "--machine_rank", "1"], ("10.0.0.1", 1234)),
        (["--main-process-ip=fd00::2", "--main-process-port=1234", "--machine-rank=2"], ("fd00::2", 1234)),
        (["--main_process_port", "0", *IP, "--machine_rank", "1", "--main_process_port", "99"], ("10.0.0.1", 99)),
        ([*IP, "--main_process_port", "1234", "--machine_rank", "0"], None),
        ([*IP, "--main_process_port", "1234"], None),
        ([*IP, "--main_process_port", "0", "--machine_rank", "1"], None),
        (["--machine_rank"], None),
        ([], None),
    ],
)
def test_where_machine_0_is_stands_in_the_options_before_the_script(options: list[str], place: tuple[str, int] | None) -> None:
    script = ["-m", "hf_spot.training.bootstrap", "train.py", "--machine_rank", "0", "--main_process_port", "7"]
    assert _machine_0(["agent.py", *options, *script]) == place
