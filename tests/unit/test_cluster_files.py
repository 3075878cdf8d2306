"""The files in cluster/ against what reads them: Ray, Kubernetes, KubeRay, and this project's own jobs."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from manifpt.cluster import _IDLE_WORKERS_LIVE
from tests.helpers.cluster import ROOT
from tests.helpers.manifests import (
    CLUSTER,
    KUBERNETES,
    commands,
    documents,
    helm_templates,
    manifests,
    pod_templates,
    settings_of,
)

SCHEMA = yaml.safe_load((ROOT / "tests" / "schemas" / "kuberay.yaml").read_text())
(AWS,) = documents(CLUSTER / "aws.yaml")
CUSTOM = [(name, document) for name, document in manifests() if document["apiVersion"].startswith("ray.io/")]
JOBS = [(name, command) for name, document in manifests() if "spec" in document for command in commands(document)]
FILES = [path for path in CLUSTER.rglob("*") if path.is_file() and not path.name.startswith("requirements-")]


def templates() -> list[dict[str, Any]]:
    """All pods of all files."""
    return [template for _, document in manifests() for template in pod_templates(document)] + helm_templates()


def clusters() -> Iterator[dict[str, Any]]:
    """All RayCluster specs."""
    for _, document in CUSTOM:
        spec = document["spec"].get("jobTemplate", document["spec"])
        yield spec.get("rayClusterSpec", spec)


class TestAws:
    def test_ray_accepts_it(self) -> None:
        validate_config(prepare_config(copy.deepcopy(AWS)))

    def test_a_typo_is_refused(self) -> None:
        with pytest.raises(jsonschema.ValidationError, match="max_worker"):
            validate_config({**AWS, "max_worker": 3})

    def test_no_node_has_a_key_an_open_disk_or_the_old_metadata_service(self) -> None:
        for node in (group["node_config"] for group in AWS["available_node_types"].values()):
            assert node["IamInstanceProfile"]["Name"] in ("manifpt-head", "manifpt-worker")
            assert node["MetadataOptions"]["HttpTokens"] == "required"
            assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
            assert node["SecurityGroupIds"]  # else Ray makes one that lets the world try ssh
            assert "UserData" not in node

    def test_workers_are_spot_nodes_that_come_from_nothing_and_go(self) -> None:
        workers = {name: group for name, group in AWS["available_node_types"].items() if name != AWS["head_node_type"]}
        assert {bool(group["resources"].get("GPU")) for group in workers.values()} == {False, True}
        for group in workers.values():
            assert group["min_workers"] == 0
            assert group["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert AWS["max_workers"] == sum(group["max_workers"] for group in workers.values())
        assert 0 < AWS["idle_timeout_minutes"] <= 10
        assert AWS["provider"]["cache_stopped_nodes"] is False

    def test_the_head_starts_as_the_readme_starts_one(self) -> None:
        """Same ports, dashboard on loopback: what the integration test sees listening is true here too."""
        block = (CLUSTER / "README.md").read_text().split("## One machine")[1].split("ray start")[1].split("ray job")[0]
        documented = set(re.findall(r"--\S+=\S+", block))
        started = set(re.findall(r"--\S+=\S+", AWS["head_start_ray_commands"][-1]))
        assert started - documented == {"--autoscaling-config=~/ray_bootstrap_config.yaml"}
        assert documented <= started
        worker = set(re.findall(r"--\S+-port=\S+", AWS["worker_start_ray_commands"][-1]))
        assert worker <= documented
        assert "--env RAY_AUTH_MODE=token" in AWS["docker"]["run_options"]


class TestKubernetes:
    @pytest.mark.parametrize(("name", "document"), CUSTOM, ids=[name for name, _ in CUSTOM])
    def test_kuberay_accepts_it(self, name: str, document: dict[str, Any]) -> None:
        jsonschema.validate(document, SCHEMA)

    def test_a_typo_is_refused(self) -> None:
        document = copy.deepcopy(CUSTOM[0][1])
        document["spec"]["backofLimit"] = 1
        with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
            jsonschema.validate(document, SCHEMA)

    def test_kubernetes_accepts_the_rest(self) -> None:
        core = [document for _, document in manifests() if not document["apiVersion"].startswith("ray.io/")]
        assert {"CronJob", "Namespace", "NetworkPolicy", "ServiceAccount"} == {document["kind"] for document in core}
        for document in core:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)

    def test_kubernetes_accepts_every_pod(self) -> None:
        for template in templates():
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
            template["spec"]["runAsNonRoot"] = True  # at the wrong place
            with pytest.raises(kubernetes_validate.ValidationError, match="runAsNonRoot"):
                kubernetes_validate.validate(pod, KUBERNETES, strict=True)

    def test_no_pod_has_more_rights_than_it_needs(self) -> None:
        """Pod Security "restricted", and a root file system that can't be written."""
        assert len(templates()) > 10
        for template in templates():
            spec = template["spec"]
            user = spec["securityContext"]
            assert (user["runAsNonRoot"], user["runAsUser"], user["seccompProfile"]) == (
                True,
                1000,
                {"type": "RuntimeDefault"},
            )
            for container in spec["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert container["resources"]["limits"]
            assert {name for volume in spec["volumes"] for name in volume} == {"name", "emptyDir"}
            assert template["metadata"]["labels"] == {"app.kubernetes.io/part-of": "manifpt"}  # the network policy's

    def test_only_heads_may_speak_to_kubernetes(self) -> None:
        accounts = {d["metadata"]["name"]: d for _, d in manifests() if d["kind"] == "ServiceAccount"}
        assert accounts["manifpt-worker"]["automountServiceAccountToken"] is False
        for template in templates():
            is_head = any(one["name"] == "ray-head" for one in template["spec"]["containers"])
            assert not is_head or template["spec"]["serviceAccountName"] == "manifpt-head"
        names = [template["spec"]["serviceAccountName"] for template in templates()]
        assert set(names) == set(accounts)

    def test_clusters_ask_for_a_token_and_grow_from_nothing(self) -> None:
        for cluster in clusters():
            assert cluster["authOptions"] == {"mode": "token"}
            assert cluster["rayVersion"] == ray.__version__
            assert cluster["autoscalerOptions"]["version"] == "v2"
            assert {group["groupName"] for group in cluster["workerGroupSpecs"]} == {"decode", "gpu"}
        (standing,) = [document["spec"] for _, document in CUSTOM if document["kind"] == "RayCluster"]
        assert [group["minReplicas"] for group in standing["workerGroupSpecs"]] == [0, 0]

    def test_the_charts_values_say_what_the_manifest_says(self) -> None:
        """The chart takes what it knows and is silent about the rest, so that a slip would not be seen."""
        (standing,) = [document["spec"] for _, document in CUSTOM if document["kind"] == "RayCluster"]
        (values,) = documents(CLUSTER / "kuberay" / "values.yaml")
        head, workers = (
            values["head"],
            {values["worker"]["groupName"]: values["worker"], **values["additionalWorkerGroups"]},
        )
        assert head["rayVersion"] == standing["rayVersion"]
        assert head["rayStartParams"] == standing["headGroupSpec"]["rayStartParams"]
        assert head["autoscalerOptions"] == {**standing["autoscalerOptions"], "env": values["common"]["containerEnv"]}
        for group in standing["workerGroupSpecs"]:
            chart = workers.pop(group["groupName"])
            assert {name: chart[name] for name in ("replicas", "minReplicas", "maxReplicas")} == {
                name: group[name] for name in ("replicas", "minReplicas", "maxReplicas")
            }
            assert chart["resources"] == group["template"]["spec"]["containers"][0]["resources"]
        assert not workers

    def test_jobs_end_and_take_their_cluster_along(self) -> None:
        jobs = [d["spec"].get("jobTemplate", d["spec"]) for _, d in CUSTOM if d["kind"] != "RayCluster"]
        assert len(jobs) == 3
        for job in jobs:
            assert job["shutdownAfterJobFinishes"] is True
            assert 0 < job["ttlSecondsAfterFinished"] <= 3600
            assert 0 < job["activeDeadlineSeconds"] <= 86400
            assert job["backoffLimit"] >= 0

    def test_the_network_policy_lets_nobody_in_by_default(self) -> None:
        (policy,) = [document["spec"] for _, document in manifests() if document["kind"] == "NetworkPolicy"]
        assert policy["podSelector"] == {}
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert all(rule.get("from") for rule in policy["ingress"])
        assert all("ports" in rule for rule in policy["ingress"] if "namespaceSelector" in rule["from"][0])


class TestCommands:
    def test_every_kind_of_run_has_one(self) -> None:
        assert {Path(command[1]).stem for _, command in JOBS} == {"compute_artifacts", "train_attributor", "scan"}

    @pytest.mark.parametrize(("name", "command"), JOBS, ids=[name for name, _ in JOBS])
    def test_an_entrypoint_names_a_job_and_flags_that_exist(self, name: str, command: list[str]) -> None:
        assert settings_of(command).output.startswith("s3://REPLACE-OUTPUT-BUCKET/REPLACE-OUTPUT-PREFIX/")

    def test_a_flag_that_does_not_exist_is_noticed(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            settings_of([*JOBS[0][1], "--outputt", "x"])
        assert "outputt" in capsys.readouterr().err

    def test_the_readme_names_every_file_that_is_there(self) -> None:
        text = (CLUSTER / "README.md").read_text()
        ours = [*CLUSTER.glob("*.*"), *(CLUSTER / "kuberay").iterdir()]
        assert [path.name for path in ours if path.suffix in (".yaml", ".json") and path.name not in text] == []


class TestSecrets:
    @pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
    def test_no_file_holds_a_key_an_open_address_or_a_floating_tag(self, path: Path) -> None:
        text = path.read_text()
        assert not re.search(r"AKIA[0-9A-Z]{16}|PRIVATE KEY-----|(?i:password|secret_access_key)\s*[:=]", text)
        assert "0.0.0.0" not in text
        assert not re.search(r":latest\b", text)

    def test_an_environment_variable_of_a_secret_comes_from_a_secret(self) -> None:
        containers = [one for template in templates() for one in template["spec"]["containers"]]
        secret = [v for one in containers for v in one.get("env", []) if re.search("TOKEN|SECRET|KEY|PASS", v["name"])]
        assert secret
        for variable in secret:
            assert set(variable) == {"name", "valueFrom"}
            assert set(variable["valueFrom"]) == {"secretKeyRef"}

    def test_workers_of_the_image_outlive_a_shard(self) -> None:
        name, value = _IDLE_WORKERS_LIVE
        assert f"{name}={value} " in (CLUSTER / "Dockerfile").read_text()

    def test_a_login_shell_finds_ray_too(self) -> None:
        """Ray's launcher runs every command in one, and Debian's sets a PATH of its own."""
        text = (CLUSTER / "Dockerfile").read_text()
        line = re.search(r'(echo "export PATH=\S+") >/etc/profile\.d/\w+\.sh', text)
        assert line is not None
        shell = f'PATH=/usr/bin; eval "$({line[1]})"; echo "$PATH"'
        found = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, text=True, check=True).stdout
        assert found.strip() == "/opt/manifpt/bin:/usr/bin"

    def test_images_are_named_by_digest(self) -> None:
        images = [one["image"] for template in templates() for one in template["spec"]["containers"]]
        assert all(
            re.search(r"/manifpt:0\.1\.0-(cpu|cuda)@sha256:", image) for image in [*images, AWS["docker"]["image"]]
        )
        assert re.search(
            r"^ARG BASE=\S+:\d\S*@sha256:[0-9a-f]{64}$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE
        )
