"""``hf-spot``, and ``python -m hf_spot``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run one command, and return its exit code."""
    if sys.argv[1:2] == ["launch"]:
        from hf_spot.launch import early

        early.listen(sys.argv[2:])  # before anything that takes time
        try:
            return _run()
        finally:
            early.ignore()
    return _run()


def _run() -> int:
    from hf_spot import cli

    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
