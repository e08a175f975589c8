"""Tokens and their scopes, what is open without any, and how often one may ask."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest

from esper.configs import ConfigError, EsperConfig, UrzaConfig
from esper.services.urza import UrzaStore
from esper.services.urza.app import create_app
from esper.services.urza.server import run_server
from tests.services.shelf import blueprint
from tests.services.urza_server import RunningUrza, assert_problem, http_client, raw_connection, settings
from tests.services.urza_server_calls import claim, submit

TOKENS = {
    "reader": ("reader-0123456789abcdef", ["read"]),
    "submitter": ("submitter-0123456789abcdef", ["submit"]),
    "worker": ("worker-0123456789abcdef", ["worker"]),
    "everything": ("everything-0123456789abcdef", ["read", "submit", "worker"]),
}
ID = "0" * 64
TARGET = f"kernels/{ID}/attachments/t"
ROUTES = (
    ("GET", "/metrics", "read"),
    ("GET", "/openapi.json", "read"),
    ("GET", "/api/v1/blueprints", "read"),
    ("GET", f"/api/v1/blueprints/{ID}", "read"),
    ("GET", f"/api/v1/blueprints/{ID}/document", "read"),
    ("GET", f"/api/v1/kernels/{ID}", "read"),
    ("GET", f"/api/v1/kernels/{ID}/content", "read"),
    ("GET", f"/api/v1/{TARGET}", "read"),
    ("POST", "/api/v1/kernels/query", "read"),
    ("POST", "/api/v1/blueprints", "submit"),
    ("POST", f"/api/v1/blueprints/{ID}/recompile", "submit"),
    ("DELETE", f"/api/v1/blueprints/{ID}", "submit"),
    ("POST", "/internal/v1/blueprints/claim", "worker"),
    ("POST", f"/internal/v1/blueprints/{ID}/renew", "worker"),
    ("POST", f"/internal/v1/blueprints/{ID}/release", "worker"),
    ("PUT", f"/internal/v1/blueprints/{ID}/status", "worker"),
    ("POST", "/internal/v1/kernels", "worker"),
    ("PUT", f"/internal/v1/{TARGET}", "worker"),
    ("PUT", f"/internal/v1/kernels/{ID}/status", "worker"),
    ("GET", "/internal/v1/database/stats", "worker"),
    ("GET", "/internal/v1/blueprints/next-lease-end", "worker"),
)


def tokens() -> list[dict[str, object]]:
    return [{"name": name, "token": token, "scopes": scopes} for name, (token, scopes) in TOKENS.items()]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUrza]:
    with (
        UrzaStore.in_folder(tmp_path_factory.mktemp("store")) as store,
        RunningUrza(store, settings(tokens=tokens())) as running,
    ):
        yield running


class TestScopes:
    def test_the_routes_above_are_all_there_are(self, store: UrzaStore) -> None:
        """So that a route which is added is thought about here, too."""
        paths = create_app(store, settings()).openapi()["paths"]
        described = {
            (method.upper(), path, "worker" if path.startswith("/internal") else None)
            for path, operations in paths.items()
            for method in operations
            if not path.startswith("/health")
        }
        here = {method for method, _, _ in described}
        assert here == {method for method, _, _ in ROUTES}
        assert len(described) == len(ROUTES) - 1, "/openapi.json does not describe itself"

    @pytest.mark.parametrize(("method", "path", "needed"), ROUTES)
    def test_each_route_for_each_token(self, guarded: RunningUrza, method: str, path: str, needed: str) -> None:
        for name, (token, scopes) in TOKENS.items():
            with guarded.client(token) as client:
                response = client.request(method, path)
                if needed in scopes:
                    assert response.status_code not in (401, 403), f"{name}: {response.text}"
                    assert response.status_code < 500
                else:
                    detail = assert_problem(response, 403, "forbidden", needed)
                    assert name in detail
                    assert token not in response.text

    @pytest.mark.parametrize(("method", "path", "needed"), ROUTES)
    def test_each_route_without_a_token(self, guarded: RunningUrza, method: str, path: str, needed: str) -> None:
        with guarded.client() as client:
            response = client.request(method, path)
            assert_problem(response, 401, "unauthorised", "Bearer")
            assert response.headers["www-authenticate"].startswith("Bearer")

    @pytest.mark.parametrize(
        "path", ["/nothing", "/api", "/internal", "//internal/v1/database/stats", "/API/v1/kernels/x"]
    )
    def test_what_is_not_there_is_not_told_to_strangers(self, guarded: RunningUrza, path: str) -> None:
        with guarded.client() as client:
            assert_problem(client.get(f"{guarded.url}{path}"), 401, "unauthorised")

    def test_health_is_open(self, guarded: RunningUrza) -> None:
        with guarded.client() as client:
            for path in ("/health", "/health/live", "/health/ready"):
                assert client.get(path).status_code == 200

    READER = TOKENS["reader"][0]

    @pytest.mark.parametrize(
        "header",
        [
            "",
            "Bearer",
            f"Basic {READER}",
            f"Bearer{READER}",
            f"Bearer {READER}x",
            f"Bearer {READER[:-1]}",
            f"Bearer {READER.upper()}",
            f"Bearer {READER} {READER}",
            f"Bearer {READER},{READER}",
            "Bearer ü",
            READER,
        ],
    )
    def test_what_is_no_token_of_ours(self, guarded: RunningUrza, header: str) -> None:
        with guarded.client() as client:
            response = client.get("/api/v1/blueprints", headers={b"Authorization": header.encode()})
            assert_problem(response, 401, "unauthorised")

    def test_two_tokens_are_none(self, guarded: RunningUrza) -> None:
        headers = [("Authorization", f"Bearer {self.READER}"), ("Authorization", f"Bearer {TOKENS['worker'][0]}")]
        with guarded.client() as client:
            assert_problem(client.get("/api/v1/blueprints", headers=headers), 401, "unauthorised")

    @pytest.mark.parametrize("header", [f"bearer {READER}", f"BEARER  {READER}"])
    def test_the_scheme_is_written_as_one_likes(self, guarded: RunningUrza, header: str) -> None:
        with guarded.client() as client:
            assert client.get("/api/v1/blueprints", headers={"Authorization": header}).status_code == 200

    def test_a_refused_body_is_not_read(self, guarded: RunningUrza) -> None:
        with raw_connection(guarded.port) as connection:
            connection.sendall(
                b"POST /api/v1/blueprints HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100000000\r\n\r\n"
            )
            assert connection.recv(65536).startswith(b"HTTP/1.1 401 "), "answered before the body came"

    def test_tokens_stand_in_no_log(self, guarded: RunningUrza, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        token = TOKENS["everything"][0]
        with guarded.client(token) as client:
            submit(client, blueprint(1))
            claim(client)
        with guarded.client("wrong-" + token) as client:
            claim(client)
        text = "\n".join(f"{each.getMessage()} {each.__dict__}" for each in caplog.records if "urza" in each.name)
        assert "caller=everything" in text
        assert token not in text


class TestExposure:
    def refused(self, store: UrzaStore, config: EsperConfig) -> str:
        with pytest.raises(ConfigError) as caught:
            run_server(config, store)
        with pytest.raises(ConfigError):
            create_app(store, config)
        return str(caught.value)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "urza.example", "", "127.0.0.1.example", "[::1]"])
    def test_a_public_address_needs_tokens(self, store: UrzaStore, host: str) -> None:
        config = EsperConfig(environment="development", urza=UrzaConfig(host=host, port=0))
        assert "set urza.tokens" in self.refused(store, config)

    def test_production_needs_tokens(self, store: UrzaStore) -> None:
        config = EsperConfig(environment="production", urza=UrzaConfig(port=0))
        assert "production" in self.refused(store, config)

    def test_with_tokens_any_address_will_do(self, store: UrzaStore) -> None:
        config = EsperConfig(
            environment="production",
            urza=UrzaConfig.model_validate({"host": "0.0.0.0", "port": 0, "tokens": tokens()}),
        )
        with RunningUrza(store, config) as urza, http_client() as client:
            assert client.get(f"http://127.0.0.1:{urza.port}/health").status_code == 200
            assert_problem(client.get(f"http://127.0.0.1:{urza.port}/metrics"), 401, "unauthorised")

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3:99", "[::1]:80", "LOCALHOST:1"])
    def test_without_tokens_local_names_are_served(self, urza: RunningUrza, host: str) -> None:
        with urza.client() as client:
            assert client.get("/api/v1/blueprints", headers={"Host": host}).status_code == 200

    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "192.0.2.1", "[::]:80"]
    )
    def test_without_tokens_other_names_are_not(self, urza: RunningUrza, host: str) -> None:
        """A web page whose name was pointed at this machine would come with such a name."""
        with urza.client() as client:
            assert_problem(client.get("/api/v1/blueprints", headers={"Host": host}), 403, "forbidden")

    def test_without_tokens_web_pages_are_not_served(self, urza: RunningUrza) -> None:
        with urza.client() as client:
            response = client.post("/internal/v1/blueprints/claim", headers={"Origin": "http://localhost"})
            assert_problem(response, 403, "forbidden", "Origin")


class TestRate:
    def test_who_asks_too_often_is_told_when_to_come_back(self, store: UrzaStore) -> None:
        config = settings(rate_per_second=0.1, rate_burst=3)
        with RunningUrza(store, config) as urza, urza.client() as client:
            answers = [client.get("/health/live") for _ in range(5)]
            assert [each.status_code for each in answers] == [200, 200, 200, 429, 429]
            assert_problem(answers[3], 429, "rate-limited", "try again in")
            assert 8 <= int(answers[3].headers["retry-after"]) <= 10

    def test_the_bucket_fills_again(self, store: UrzaStore) -> None:
        with RunningUrza(store, settings(rate_per_second=20, rate_burst=1)) as urza, urza.client() as client:
            while client.get("/health/live").status_code == 200:
                pass
            time.sleep(0.2)
            assert client.get("/health/live").status_code == 200

    def test_tokens_have_buckets_of_their_own_and_guesses_share_one(self, store: UrzaStore) -> None:
        config = settings(rate_per_second=0.01, rate_burst=2, tokens=tokens())
        with RunningUrza(store, config) as urza:
            with urza.client() as client:
                guesses = [
                    client.get("/metrics", headers={"Authorization": f"Bearer guess-{n}"}).status_code for n in range(4)
                ]
            assert guesses == [401, 401, 429, 429]
            for name in ("reader", "everything"):
                with urza.client(TOKENS[name][0]) as client:
                    assert [client.get("/metrics").status_code for _ in range(3)] == [200, 200, 429]

    def test_zero_is_no_limit(self, urza: RunningUrza) -> None:
        with urza.client() as client:
            assert {client.get("/health/live").status_code for _ in range(300)} == {200}
