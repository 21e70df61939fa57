"""What a script imports before it does anything of its own."""

from __future__ import annotations

import pytest

from hf_spot.policy.first_imports import first_imports, imports_torch

SCRIPT = '''
"""A docstring."""
from __future__ import annotations
import os, logging
os.environ["A"] = "b"
os.environ.setdefault("B", "c")
try:
    import unsloth
except ImportError:
    unsloth = None
SIZES = [1, -2, {"three": (4,)}]
def size(of: torch.Tensor, plus=1): return of.numel() + plus
if TYPE_CHECKING:
    import numpy
import torch.nn as nn
from transformers import Trainer
logger = logging.getLogger(__name__)
import datasets
'''


def test_imports_and_constant_variables_count_up_to_the_first_statement_of_another_kind() -> None:
    found = first_imports(SCRIPT)
    assert [one.modules for one in found] == [("os", "logging"), (), (), ("unsloth",), ("torch",), ("transformers",)]
    assert [one.source for one in found[1:3]] == ["os.environ['A'] = 'b'", "os.environ.setdefault('B', 'c')"]
    assert imports_torch(found) and not imports_torch(found[:4])


@pytest.mark.parametrize(
    "before",
    [
        "import warnings\nwarnings.filterwarnings('ignore')",
        "import sys\nsys.path.insert(0, 'src')",
        "import os\nos.environ['A'] = os.getcwd()",
        "import os as sys, sys as os\nos.environ['A'] = 'b'",
        "from os import *",
        "print('begins')",
        "sizes = list(range(3))",
        "def size(of=make()): pass",
        "@decorated\ndef size(): pass",
        "def size(of: nn.Linear): pass",
        "class Size: pass",
        "for one in (): pass",
        "if __name__ == '__main__': pass",
        "with open('x'): pass",
        "try:\n    import a\nexcept RuntimeError:\n    pass",
        "try:\n    import a\n    a.begin()\nexcept ImportError:\n    pass",
        "try:\n    import a\nfinally:\n    pass",
    ],
)
def test_no_import_behind_code_of_the_script_counts(before: str) -> None:
    assert not imports_torch(first_imports(f"{before}\nimport torch"))
    assert imports_torch(first_imports(f"import torch\n{before}"))


def test_an_import_of_the_scripts_own_package_is_named_as_such() -> None:
    assert [one.modules for one in first_imports("from . import model\nfrom .data import rows")] == [("",), ("",)]


def test_a_script_that_is_no_python_has_no_imports() -> None:
    assert first_imports("import torch\nno python") == [] == first_imports("a\0b")
