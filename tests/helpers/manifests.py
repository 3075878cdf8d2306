"""The files in cluster/, read for tests: documents, pods, entrypoints."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from manifpt.config import parse
from tests.helpers.cluster import ROOT

CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
KUBERNETES = "1.33"  # whose core types; Pod Security and CronJob are the same since 1.25


def documents(path: Path) -> list[dict[str, Any]]:
    """All of a YAML file's."""
    with path.open(encoding="utf-8") as file:
        return [document for document in yaml.safe_load_all(file) if document]


def manifests() -> list[tuple[str, dict[str, Any]]]:
    """What `kubectl apply` takes, with the file's name."""
    paths = [path for path in sorted(KUBERAY.glob("*.yaml")) if path.name != "values.yaml"]
    return [(path.name, document) for path in paths for document in documents(path)]


def helm_templates() -> list[dict[str, Any]]:
    """Pod templates as the chart makes them of values.yaml."""
    (values,) = documents(KUBERAY / "values.yaml")
    groups = [values["head"], values["worker"], *values["additionalWorkerGroups"].values()]
    return [_helm_template(values, group) for group in groups]


def _helm_template(values: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    image = group.get("image", values["image"])
    container = {
        "name": "ray",
        "image": f"{image['repository']}:{image['tag']}",
        "imagePullPolicy": image["pullPolicy"],
        "env": values["common"]["containerEnv"],
        **{name: group[name] for name in ("resources", "securityContext", "volumeMounts")},
    }
    spec = {
        "containers": [container], "securityContext": group["podSecurityContext"],
        **{k: group[k] for k in ("serviceAccountName", "restartPolicy", "volumes", "tolerations") if k in group},
    }  # fmt: skip
    return {"metadata": {"labels": group["labels"]}, "spec": spec}


def pod_templates(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod template in a document, however deep."""
    if isinstance(node, dict):
        if "containers" in node.get("spec", {}):
            yield node
        for value in node.values():
            yield from pod_templates(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_templates(value)


def commands(document: dict[str, Any]) -> list[list[str]]:
    """The `python /app/jobs/...` of a document: a RayJob's entrypoint, or what a container submits."""
    spec = document["spec"]
    if document["kind"] == "CronJob":
        containers = [one for template in pod_templates(document) for one in template["spec"]["containers"]]
        return [list(container["args"]) for container in containers]
    job = spec.get("jobTemplate", spec)
    return [shlex.split(job["entrypoint"])] if "entrypoint" in job else []


def settings_of(command: Sequence[str]) -> Any:
    """What a job makes of its flags, parsed by its own settings; raises as the job would."""
    python, script, *arguments = command
    assert python == "python"
    path = ROOT / Path(script).relative_to("/app")  # where the image holds the code
    specification = importlib.util.spec_from_file_location(f"job_{path.stem}", path)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    (kind,) = [value for name, value in vars(module).items() if name.endswith("Config") and name != "BaseConfig"]
    return parse(kind, arguments, path.name)
