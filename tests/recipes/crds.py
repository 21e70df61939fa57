"""Check what ``hf-spot recipe jobset`` and ``trainjob`` print against the definitions of these resources.

``python -m tests.recipes.crds FILE...`` reads the definitions from files. They are not in this repository, for they have two
megabytes; JobSet and Kubeflow Trainer publish theirs, under the Apache License 2.0::

    git clone https://github.com/kubernetes-sigs/jobset
    git clone https://github.com/kubeflow/trainer
    python -m tests.recipes.crds jobset/config/components/crd/bases/*.yaml trainer/manifests/base/crds/*.yaml
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_spot.cli import main as hf_spot

RECIPES = (
    ("jobset", "--nodes", "2:8", "--gpus", "8"),
    ("jobset", "--nodes", "4", "--queue", "team", "--priority-class", "high"),
    ("trainjob", "--nodes", "2:8", "--gpus", "8"),
    ("trainjob", "--nodes", "4", "--queue", "team", "--priority-class", "high"),
)


def definitions(paths: Iterable[Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """The schema of each kind: (apiVersion, kind) to a JSON schema that takes no key which Kubernetes would drop."""
    found = {}
    for path in paths:
        for document in yaml.safe_load_all(path.read_text()):
            if document and document["kind"] == "CustomResourceDefinition":
                spec = document["spec"]
                for version in spec["versions"]:
                    schema = version["schema"]["openAPIV3Schema"]
                    schema["properties"]["metadata"] = {"x-kubernetes-preserve-unknown-fields": True}  # the API server's own
                    found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = strict(schema)
    return found


def strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as a JSON schema: unknown keys are errors, numbers may be text where both are meant."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string") is True:
        return {"type": ["integer", "string"]}
    is_open = made.get("x-kubernetes-preserve-unknown-fields") is True or "additionalProperties" in made
    if isinstance(made.get("properties"), dict) and not is_open:
        made["additionalProperties"] = False
    return made


def printed(argv: Sequence[str]) -> list[dict[str, Any]]:
    """What a recipe prints, document by document."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = hf_spot(["recipe", *argv])
    if code:
        raise SystemExit(code)
    return list(yaml.safe_load_all(out.getvalue()))


def main(paths: Sequence[str]) -> int:
    known = definitions(map(Path, paths))
    problems = checked = 0
    for argv in RECIPES:
        for document in printed(argv):
            kind = document["apiVersion"], document["kind"]
            if kind not in known:
                print(f"{' '.join(argv)}: no schema of {' '.join(kind)} in these files")
                problems += 1
                continue
            checked += 1
            for error in importlib.import_module("jsonschema").Draft202012Validator(known[kind]).iter_errors(document):
                print(f"{' '.join(argv)}: {kind[1]}.{'.'.join(map(str, error.absolute_path))}: {error.message}")
                problems += 1
    print(f"{checked} documents checked, {problems} problems")
    return 1 if problems or not checked else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
