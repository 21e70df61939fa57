"""Run ``hf-spot`` as ``python -m hf_spot``."""

from __future__ import annotations

from hf_spot.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
