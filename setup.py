"""Everything is in setup.cfg, but for the project's addresses: those of the repository that this checkout came from."""

from __future__ import annotations

import re
import subprocess
from email.parser import Parser
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent


def project_urls() -> dict[str, str]:
    """Return the addresses for the package's metadata; empty if this checkout was not cloned from a web server.

    An unpacked source archive has those that it was built with.
    """
    if (HERE / "PKG-INFO").exists():
        told = Parser().parsestr((HERE / "PKG-INFO").read_text(encoding="utf-8")).get_all("Project-URL", [])
        return dict(line.split(", ", 1) for line in told)
    if not (HERE / ".git").exists():
        return {}
    try:
        asked = subprocess.run(["git", "remote", "get-url", "origin"], cwd=HERE, capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return {}
    # https://user:token@host/owner/name.git, ssh://git@host/owner/name, git@host:owner/name.git: without what is secret
    found = re.fullmatch(
        r"(?:(?:https|ssh)://)?(?:[^@/]+@)?([\w-]+(?:\.[\w-]+)+)[:/]([\w.~/-]+?)(?:\.git)?/?", asked.stdout.strip()
    )
    if found is None:
        return {}
    home = f"https://{found[1]}/{found[2]}"
    return {
        "Source": home,
        "Documentation": f"{home}#readme",
        "Issues": f"{home}/issues",
        "Changelog": f"{home}/blob/main/CHANGELOG.md",
    }


setup(project_urls=project_urls())
