"""The IAM policies in cluster/: who may do what, by a tenth of IAM, as much of it as these two files use."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from typing import Any

import pytest

from tests.helpers.manifests import CLUSTER, documents

(AWS,) = documents(CLUSTER / "aws.yaml")
DATA, HEAD = "iam-policy.json", "iam-policy-head.json"
HERE, THERE = "arn:aws:s3:::REPLACE-INPUT-BUCKET", "arn:aws:s3:::REPLACE-OUTPUT-BUCKET"
INSTANCE = "arn:aws:ec2:REPLACE-REGION:REPLACE-ACCOUNT:instance/i-1"
IAM = "arn:aws:iam::REPLACE-ACCOUNT"


def statements(policy: str) -> list[dict[str, Any]]:
    return list(json.loads((CLUSTER / policy).read_text())["Statement"])


def several(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def allowed(policy: str, action: str, resource: str, context: dict[str, str] | None = None) -> bool:
    """Whether a policy allows a request, whose `context` are the condition keys that it has."""
    known = context or {}

    def matches(statement: dict[str, Any]) -> bool:
        wanted = [item for test in statement.get("Condition", {}).values() for item in test.items()]
        return (
            statement["Effect"] == "Allow"
            and any(fnmatchcase(action, one) for one in several(statement["Action"]))
            and any(fnmatchcase(resource, one) for one in several(statement["Resource"]))
            and all(key in known and any(fnmatchcase(known[key], one) for one in several(v)) for key, v in wanted)
        )

    return any(matches(statement) for statement in statements(policy))


@pytest.mark.parametrize(
    ("action", "resource", "prefix"),
    [
        ("s3:GetObject", f"{HERE}/REPLACE-INPUT-PREFIX/a.png", None),
        ("s3:ListBucket", HERE, "REPLACE-INPUT-PREFIX/reals/"),
        ("s3:GetObject", f"{THERE}/REPLACE-OUTPUT-PREFIX/run/plan.json", None),
        ("s3:PutObject", f"{THERE}/REPLACE-OUTPUT-PREFIX/run/commits/00000.json", None),
        ("s3:ListBucket", THERE, None),
        ("s3:DeleteObject", f"{THERE}/REPLACE-OUTPUT-PREFIX/scans/lease/00000001.json", None),
        ("s3:DeleteObject", f"{THERE}/REPLACE-OUTPUT-PREFIX/scans/inventory/00001.parquet", None),
        ("s3:DeleteObject", f"{THERE}/REPLACE-OUTPUT-PREFIX/attributor/checkpoints/a/state.safetensors", None),
    ],
)
def test_a_node_may(action: str, resource: str, prefix: str | None) -> None:
    assert allowed(DATA, action, resource, {"s3:prefix": prefix} if prefix else None)


@pytest.mark.parametrize(
    ("action", "resource", "prefix"),
    [
        ("s3:PutObject", f"{HERE}/REPLACE-INPUT-PREFIX/a.png", None),
        ("s3:DeleteObject", f"{HERE}/REPLACE-INPUT-PREFIX/a.png", None),
        ("s3:GetObject", f"{HERE}/another/a.png", None),
        ("s3:ListBucket", HERE, None),
        ("s3:ListBucket", HERE, "another/"),
        ("s3:DeleteObject", f"{THERE}/REPLACE-OUTPUT-PREFIX/run/commits/00000.json", None),
        ("s3:PutObject", f"{THERE}/another/plan.json", None),
        ("s3:PutBucketPolicy", THERE, None),
    ],
)
def test_a_node_may_not(action: str, resource: str, prefix: str | None) -> None:
    assert not allowed(DATA, action, resource, {"s3:prefix": prefix} if prefix else None)


WORKER = {
    "aws:RequestTag/ray-cluster-name": AWS["cluster_name"],
    "ec2:MetadataHttpTokens": "required",
    "ec2:InstanceProfile": f"{IAM}:instance-profile/manifpt-worker",
    "ec2:InstanceType": "c7i.4xlarge",
}


def test_the_head_launches_the_workers_of_aws_yaml() -> None:
    for name, group in AWS["available_node_types"].items():
        launch = WORKER | {"ec2:InstanceType": group["node_config"]["InstanceType"]}
        assert allowed(HEAD, "ec2:RunInstances", INSTANCE, launch) == (name != AWS["head_node_type"])


@pytest.mark.parametrize(
    "other",
    [
        {"ec2:InstanceType": "p5.48xlarge"},
        {"ec2:InstanceProfile": f"{IAM}:instance-profile/manifpt-head"},
        {"ec2:MetadataHttpTokens": "optional"},
        {"aws:RequestTag/ray-cluster-name": "another"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_the_head_launches_nothing_else(other: dict[str, str]) -> None:
    assert allowed(HEAD, "ec2:RunInstances", INSTANCE, WORKER)
    assert not allowed(HEAD, "ec2:RunInstances", INSTANCE, WORKER | other)


def test_the_head_ends_nodes_of_its_cluster_only() -> None:
    own = {"aws:ResourceTag/ray-cluster-name": AWS["cluster_name"]}
    assert allowed(HEAD, "ec2:TerminateInstances", INSTANCE, own)
    assert not allowed(HEAD, "ec2:TerminateInstances", INSTANCE, {"aws:ResourceTag/ray-cluster-name": "another"})
    assert not allowed(HEAD, "ec2:TerminateInstances", INSTANCE)


def test_the_head_passes_the_workers_role_only() -> None:
    to_ec2 = {"iam:PassedToService": "ec2.amazonaws.com"}
    assert allowed(HEAD, "iam:PassRole", f"{IAM}:role/manifpt-worker", to_ec2)
    assert not allowed(HEAD, "iam:PassRole", f"{IAM}:role/manifpt-head", to_ec2)
    assert not allowed(
        HEAD, "iam:PassRole", f"{IAM}:role/manifpt-worker", {"iam:PassedToService": "lambda.amazonaws.com"}
    )


@pytest.mark.parametrize("policy", [DATA, HEAD])
def test_nothing_is_allowed_everywhere_but_to_look(policy: str) -> None:
    for statement in statements(policy):
        actions = several(statement["Action"])
        assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"}
        assert not any("*" in action for action in actions)
        assert statement["Resource"] != "*" or all(":Describe" in action for action in actions)
