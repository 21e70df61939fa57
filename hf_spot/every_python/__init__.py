"""What every Python of a launch runs first: `hf-spot launch` puts this folder, with its ``sitecustomize``, on PYTHONPATH."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parent)


def python_path(environ: Mapping[str, str]) -> str:
    """Return the value of PYTHONPATH that lets every Python find this folder first, and then what it finds in ``environ``."""
    before = [one for one in environ.get("PYTHONPATH", "").split(os.pathsep) if one and one != FOLDER]
    return os.pathsep.join([FOLDER, *before])
