from __future__ import annotations

import boto3
import pytest
from botocore.exceptions import ClientError
from botocore.stub import Stubber

from manifpt.storage_s3 import _region_of


def asked(status: int, headers: dict[str, str]) -> str | None:
    """What `_region_of` finds in an answer."""
    client = boto3.client("s3", region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s")
    meta = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    with Stubber(client) as stubber:
        if status == 200:
            stubber.add_response("head_bucket", {"ResponseMetadata": meta}, {"Bucket": "images"})
        else:
            stubber.add_client_error("head_bucket", str(status), http_status_code=status, response_meta=meta)
        return _region_of(client, "images")


@pytest.mark.parametrize("status", [200, 403])
def test_a_bucket_tells_its_region_even_to_a_role_that_may_list_a_prefix_alone(status: int) -> None:
    assert asked(status, {"x-amz-bucket-region": "eu-central-1"}) == "eu-central-1"


def test_a_service_that_names_no_region_leaves_the_session_its_own() -> None:
    assert asked(403, {}) is None


def test_a_bucket_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ClientError, match="404"):
        asked(404, {"x-amz-bucket-region": "eu-central-1"})
