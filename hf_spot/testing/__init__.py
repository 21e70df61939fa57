"""Fakes shared by the tests, the demo and users: real servers and real stores that can inject faults.

``python -m hf_spot.testing --interrupt-after 5`` runs one of the servers and prints the variables that point to it.
"""

from hf_spot.storage.faulty import FaultyStore
from hf_spot.testing.alibaba import FakeAlibaba
from hf_spot.testing.aws import FakeIMDS
from hf_spot.testing.azure import FakeAzure
from hf_spot.testing.contract import check_source
from hf_spot.testing.gcp import FakeGCP
from hf_spot.testing.server import FakeService, Request

__all__ = ["FakeAlibaba", "FakeAzure", "FakeGCP", "FakeIMDS", "FakeService", "FaultyStore", "Request", "check_source"]
