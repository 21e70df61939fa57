from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")  # thirteen hundred images, in each region


@pytest.fixture(scope="session")
def account() -> Iterator[object]:
    from tests.cloud.aws import Aws, Clock

    made = Aws(Clock())
    yield made
    made.close()


@pytest.fixture
def aws(account: object) -> object:
    from tests.cloud.aws import Aws, Clock

    assert isinstance(account, Aws)
    account.clock = Clock()
    account.reset()
    return account
