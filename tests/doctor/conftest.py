from __future__ import annotations

from tests.cloud.conftest import account, aws

__all__ = ["account", "aws"]
