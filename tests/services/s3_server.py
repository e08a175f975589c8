"""A real S3 interface on the loopback address, by moto's server, for blobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import boto3  # type: ignore[import-untyped]  # boto3 ships no types
from moto.server import ThreadedMotoServer

__all__ = ["BUCKET", "s3_server"]

BUCKET = "kernels"
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[Mapping[str, str]]:
    """With an empty bucket; environment variables under which `ESPER_STORE__URL` and s3fs find it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        client = boto3.client(
            "s3", endpoint_url=url, region_name=_CREDENTIALS["AWS_DEFAULT_REGION"],
            aws_access_key_id="test", aws_secret_access_key="test",
        )  # fmt: skip
        client.create_bucket(Bucket=BUCKET)
        yield {**_CREDENTIALS, "AWS_ENDPOINT_URL": url, "ESPER_STORE__URL": f"s3://{BUCKET}/blobs"}
    finally:
        server.stop()
