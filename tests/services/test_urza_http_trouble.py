"""Urza when what it stands on fails: the answers say so, without the particulars of the server, and nothing is lost."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from esper.services.urza import UrzaStore
from tests.services.postgres import Postgres
from tests.services.programs import Program
from tests.services.shelf import add_kernel, blueprint
from tests.services.urza_server import SERVE, RunningUrza, assert_problem, http_client, locked, settings
from tests.services.urza_server_calls import claim, submit


def test_a_locked_database_holds_up_writers_only(folder: Path, store: UrzaStore) -> None:
    with RunningUrza(store) as urza, urza.client() as client, locked(folder) as release:
        finished: list[int] = []
        writers = [
            threading.Thread(target=lambda: finished.append(claim(client).status_code), daemon=True) for _ in range(20)
        ]
        for each in writers:
            each.start()
        time.sleep(1)
        assert client.get("/api/v1/blueprints").status_code == 200
        assert client.get("/health").json()["ready"] is True
        assert finished == [], "readers waited behind writers"
        release()
        for each in writers:
            each.join(60)
        assert finished == [204] * 20


def test_a_database_that_stays_locked_is_told_as_such(folder: Path) -> None:
    UrzaStore.in_folder(folder).close()
    with (
        UrzaStore(f"sqlite:///{folder / 'esper.db'}", folder / "blobs", busy_seconds=0.2) as store,
        RunningUrza(store) as urza,
        urza.client() as client,
        locked(folder) as release,
    ):
        response = submit(client, blueprint(1))
        detail = assert_problem(response, 503, "store-busy", "try again")
        assert response.headers["retry-after"] == "1"
        assert str(folder) not in detail
        release()
        assert submit(client, blueprint(1)).status_code == 201


def test_a_request_that_takes_too_long_is_given_up(folder: Path, store: UrzaStore) -> None:
    with (
        RunningUrza(store, settings(request_timeout=0.3)) as urza,
        urza.client() as client,
        locked(folder) as release,
    ):
        response = claim(client)
        assert_problem(response, 503, "timeout", "0.3 s")
        assert response.headers["retry-after"] == "1"
        assert client.get("/api/v1/blueprints").status_code == 200
        release()
        assert claim(client).status_code == 204


def test_a_database_that_is_gone(folder: Path, store: UrzaStore) -> None:
    with RunningUrza(store) as urza, urza.client() as client:
        assert client.get("/health/ready").status_code == 200
        store.close()
        (folder / "esper.db").write_bytes(b"no database any more" * 1000)
        for suffix in ("-wal", "-shm"):
            (folder / f"esper.db{suffix}").unlink(missing_ok=True)
        for path in ("/health", "/health/ready"):
            health = client.get(path)
            assert health.status_code == 503
            assert (health.json()["live"], health.json()["ready"]) == (True, False)
            assert health.json()["detail"]
        assert client.get("/health/live").status_code == 200
        assert_problem(client.get("/api/v1/blueprints"), 500, "store-corrupt")
        metrics = client.get("/metrics")
        assert metrics.status_code == 200
        assert "esper_urza_store_up 0.0" in metrics.text


def test_a_postgresql_that_cannot_be_reached(postgres: Postgres, folder: Path) -> None:
    url = make_url(postgres.new_database())
    with (
        UrzaStore(url, folder / "blobs", busy_seconds=2) as store,
        RunningUrza(store) as urza,
        urza.client() as client,
    ):
        assert submit(client, blueprint(1)).status_code == 201
        other = url.set(drivername="postgresql", database="postgres").render_as_string(hide_password=False)
        with psycopg.connect(other, autocommit=True) as connection:
            connection.execute(f'ALTER DATABASE "{url.database}" ALLOW_CONNECTIONS false')
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (url.database,)
            )
            detail = assert_problem(submit(client, blueprint(2)), 503, "store-busy")
            assert str(url.database) not in detail
            assert client.get("/health").status_code == 503
            connection.execute(f'ALTER DATABASE "{url.database}" ALLOW_CONNECTIONS true')
        assert submit(client, blueprint(2)).status_code == 201
        assert client.get("/health").status_code == 200


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits as on POSIX")
def test_a_full_disk_refuses_what_does_not_fit_and_serves_the_rest(folder: Path) -> None:
    with UrzaStore.in_folder(folder) as store:
        artifact, _ = add_kernel(store, blueprint(0), "mine")
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + SERVE.replace(
        "    run_server", "    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n    run_server"
    )
    program = Program(limited, folder)
    url = program.read_line().rpartition(" ")[2]
    with http_client(url) as client:
        detail = assert_problem(submit(client, blueprint(1)), 507, "store-full", "nothing was stored")
        assert str(folder) not in detail
        assert client.get(f"/api/v1/kernels/{artifact.id}/content").content == artifact.data
        assert client.get("/health/live").status_code == 200
    program.process.send_signal(signal.SIGTERM)
    assert program.finish() == ["closed"]
    with UrzaStore.in_folder(folder) as store:
        assert [each.id for each in store.blueprints.list()] == [blueprint(0).id]
        assert not [path for path in folder.rglob(".*") if path.is_file()], "unfinished files were left"


def test_what_nobody_foresaw_is_told_without_particulars(
    store: UrzaStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the password is swordfish")

    monkeypatch.setattr(store.database, "reading", fail)
    with RunningUrza(store) as urza, urza.client() as client:
        response = client.get("/api/v1/blueprints", headers={"X-Request-ID": "find-me"})
        detail = assert_problem(response, 500, "service-error")
        assert "swordfish" not in detail
        logged = [each for each in caplog.records if "find-me" in each.getMessage() and each.exc_info]
        assert "swordfish" in logged[0].getMessage()
