"""Downloads: conditional requests and ranges."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from esper.artifacts import Artifact
from esper.services.urza import UrzaStore
from tests.services.shelf import blueprint
from tests.services.urza_server import RunningUrza, assert_problem
from tests.services.urza_server_calls import add_kernel


@pytest.fixture
def client(urza: RunningUrza) -> Iterator[httpx.Client]:
    with urza.client() as client:
        yield client


@pytest.fixture
def artifact(client: httpx.Client) -> Artifact:
    return add_kernel(client, blueprint(1, width=64))


def get(client: httpx.Client, artifact: Artifact, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.get(f"/api/v1/kernels/{artifact.id}/content", headers=names)


@pytest.mark.parametrize("tags", ['"{id}"', '"other", "{id}"', 'W/"{id}"', "*"])
def test_what_the_client_has_is_not_sent_again(client: httpx.Client, artifact: Artifact, tags: str) -> None:
    known = get(client, artifact, If_None_Match=tags.replace("{id}", artifact.id))
    assert (known.status_code, known.content) == (304, b"")
    assert known.headers["etag"] == f'"{artifact.id}"'
    assert "immutable" in known.headers["cache-control"]
    assert known.headers["esper-signature"] == get(client, artifact).headers["esper-signature"]


@pytest.mark.parametrize("tags", ['"other"', '"{id}', "{id}", ""])
def test_other_tags_are_answered_with_the_content(client: httpx.Client, artifact: Artifact, tags: str) -> None:
    assert get(client, artifact, If_None_Match=tags.replace("{id}", artifact.id)).content == artifact.data


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=10-19", slice(10, 20)),
        ("bytes=100-", slice(100, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=5-99999999", slice(5, None)),
        ("bytes=-99999999", slice(None)),
        ("bytes=0-", slice(None)),
    ],
)
def test_a_range(client: httpx.Client, artifact: Artifact, asked: str, part: slice) -> None:
    response = get(client, artifact, Range=asked)
    expected = artifact.data[part]
    start = range(len(artifact.data))[part].start
    assert response.status_code == 206
    assert response.content == expected
    assert response.headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/{len(artifact.data)}"
    assert response.headers["etag"] == f'"{artifact.id}"'


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=99999999-999999999", "bytes=-0"])
def test_a_range_behind_the_end(client: httpx.Client, artifact: Artifact, asked: str) -> None:
    response = get(client, artifact, Range=asked)
    assert_problem(response, 416, "range-not-satisfiable", str(len(artifact.data)))
    assert response.headers["content-range"] == f"bytes */{len(artifact.data)}"


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=0-1,5-6",
        "bytes=9-3",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "lines=0-1",
        "0-1",
        f"bytes=0-{'9' * 40}",
        "bytes=٣-٤",
    ],
)
def test_what_is_not_one_range_is_answered_with_everything(
    client: httpx.Client, artifact: Artifact, asked: str
) -> None:
    response = client.get(f"/api/v1/kernels/{artifact.id}/content", headers={b"Range": asked.encode()})
    assert (response.status_code, response.content) == (200, artifact.data)
    assert response.headers["accept-ranges"] == "bytes"


def test_a_download_is_resumed_if_it_is_still_the_same(client: httpx.Client, artifact: Artifact) -> None:
    rest = get(client, artifact, Range="bytes=50-", If_Range=f'"{artifact.id}"')
    assert (rest.status_code, rest.content) == (206, artifact.data[50:])
    for tag in ('"other"', f'W/"{artifact.id}"', "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert get(client, artifact, Range="bytes=50-", If_Range=tag).content == artifact.data


def test_a_damaged_blob_is_an_error_and_not_sent(client: httpx.Client, store: UrzaStore, artifact: Artifact) -> None:
    store.blobs.remove(artifact.id)
    detail = assert_problem(get(client, artifact), 500, "store-corrupt")
    assert "/" not in detail, "folders of the server are not told"
