"""Many at once: workers that claim, submitters that race, a long queue, clocks that disagree."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, update

from esper.services.urza import UrzaStore
from esper.services.urza.storage.models import BlueprintRow
from tests.services.programs import Program
from tests.services.shelf import blueprint, fill
from tests.services.urza_server import RunningUrza
from tests.services.urza_server_calls import claim, submit

# claims again and again, ending each claim at once, until 1,000 were handed out to all workers together
CLAIM = """
import sys
import httpx

url, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(rounds):
        claimed = client.post("/internal/v1/blueprints/claim", json={"worker": name, "lease_seconds": 600})
        if claimed.status_code == 204:
            continue
        assert claimed.status_code == 200, claimed.text
        held = claimed.json()
        print(held["blueprint_id"], held["token"], held["attempt"])
"""


@pytest.mark.slow
def test_two_workers_that_claim_a_thousand_times_at_once_never_hold_the_same(any_urza: RunningUrza) -> None:
    ids = fill(any_urza.store, 1000)
    workers = [Worker(any_urza.url, name) for name in ("first", "second")]
    for each in workers:
        each.begin()
    claims = [each.claims() for each in workers]
    assert all(claims), "a worker got nothing: this was no race"
    together = claims[0] + claims[1]
    assert sorted(each for each, _, _ in together) == ids, "each is handed out once"
    assert len({token for _, token, _ in together}) == 1000
    assert {attempt for _, _, attempt in together} == {"1"}


class Worker:
    """A process that claims when told to."""

    def __init__(self, url: str, name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, url, name, "1000"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def begin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def claims(self) -> list[tuple[str, ...]]:
        output, _ = self._process.communicate(timeout=120)
        assert self._process.returncode == 0
        return [tuple(line.split()) for line in output.splitlines()]


def at_once(count: int, call: Callable[[int], Any]) -> list[Any]:
    """`call(0)` to `call(count - 1)` on threads that begin together."""
    barrier = threading.Barrier(count)

    def run(number: int) -> Any:
        barrier.wait()
        return call(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_two_workers_that_race_for_one_blueprint_get_it_once(any_urza: RunningUrza) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(any_urza.client()) for _ in range(8)]
        for seed in range(10):
            submit(clients[0], blueprint(seed))
            answers = at_once(8, lambda number: claim(clients[number], worker=f"w{number}"))
            assert sorted(each.status_code for each in answers) == [200] + [204] * 7


def test_a_submission_that_races_with_itself_is_stored_and_announced_once(any_store: UrzaStore) -> None:
    heard: list[str] = []
    with RunningUrza(any_store, on_submit=heard.append) as urza, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(urza.client()) for _ in range(8)]
        for seed in range(10):
            answers = at_once(8, lambda number: submit(clients[number], blueprint(seed), f"name-{seed}"))  # noqa: B023
            assert sorted(each.status_code for each in answers) == [200] * 7 + [201]
            assert {each.json()["id"] for each in answers} == {blueprint(seed).id}
        deadline = time.monotonic() + 10
        while len(heard) < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert heard == [blueprint(seed).id for seed in range(10)]
    assert [each.names for each in any_store.blueprints.list()] == [(f"name-{seed}",) for seed in reversed(range(10))]


def test_a_name_that_is_raced_for_goes_to_one(any_urza: RunningUrza) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(any_urza.client()) for _ in range(8)]
        answers = at_once(8, lambda number: submit(clients[number], blueprint(number), "wanted"))
        assert sorted(each.status_code for each in answers) == [201] + [409] * 7
        assert len(clients[0].get("/api/v1/blueprints").json()["items"]) == 1


def test_blueprints_of_one_moment_are_each_on_one_page(any_urza: RunningUrza) -> None:
    ids = fill(any_urza.store, 10)
    with any_urza.store.database.writing() as session:
        session.execute(update(BlueprintRow).values(submitted_at=1.0e9 + 0.1))
    seen: list[str] = []
    cursor: str | None = None
    with any_urza.client() as client:
        for _ in ids:
            params: dict[str, Any] = {"limit": 3} | ({} if cursor is None else {"cursor": cursor})
            page = client.get("/api/v1/blueprints", params=params).json()
            seen += [each["id"] for each in page["items"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
    assert seen == ids[::-1]


class TestLongQueue:
    @pytest.fixture
    def queued(self, any_urza: RunningUrza) -> list[str]:
        return fill(any_urza.store, 10_000)

    def test_it_is_listed_page_by_page(self, any_urza: RunningUrza, queued: list[str]) -> None:
        seen: list[str] = []
        with any_urza.client() as client:
            cursor = None
            while True:
                params: dict[str, Any] = {"limit": 1000} | ({} if cursor is None else {"cursor": cursor})
                page = client.get("/api/v1/blueprints", params=params).json()
                seen += [each["id"] for each in page["items"]]
                cursor = page["next_cursor"]
                if cursor is None:
                    break
        assert seen == queued[::-1]

    def test_claims_follow_the_order_of_submission_and_look_at_few_rows(
        self, any_urza: RunningUrza, queued: list[str]
    ) -> None:
        store = any_urza.store
        with any_urza.client() as client:
            assert [claim(client).json()["blueprint_id"] for _ in range(50)] == queued[:50]
            page = client.get("/api/v1/blueprints", params={"limit": 1}).json()
            assert [each["id"] for each in page["items"]] == queued[-1:]
        if store.database.is_sqlite:
            lost_leases, waiting, first_page, next_page = explained(store)
            by_status = "SEARCH blueprints USING INDEX ix_blueprints_status_submitted_at (status=?)"
            assert lost_leases == waiting == by_status
            assert first_page == "SCAN blueprints USING INDEX ix_blueprints_submitted_at", "in order, up to the limit"
            assert next_page == "SEARCH blueprints USING INDEX ix_blueprints_submitted_at (submitted_at<?)"


def explained(store: UrzaStore) -> list[str]:
    """How SQLite answers the questions of a claim and of two pages, asked anew."""
    asked: list[tuple[str, Any]] = []
    engine = store.database._engine  # to see the statements as they are sent

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT blueprints."):
            asked.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    store.blueprints.claim("w")
    first = store.blueprints.page(limit=10)
    store.blueprints.page(limit=10, cursor=first.next_cursor)
    event.remove(engine, "before_cursor_execute", note)
    with store.database.reading() as session:
        connection = session.connection()
        plans = [connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {each}", given).first() for each, given in asked]
        return [each[3] for each in plans if each is not None]


SKEWED = """
import sys, time, datetime
real = time.time
time.time = lambda: real() + float(sys.argv[2])
import httpx
claimed = httpx.post(sys.argv[1] + "/internal/v1/blueprints/claim", json={"worker": sys.argv[2], "lease_seconds": 5},
                     trust_env=False, timeout=60)
print(claimed.status_code, claimed.text)
"""


def test_leases_are_counted_on_urzas_clock(any_urza: RunningUrza) -> None:
    """Workers whose clocks are hours off neither lose their leases early nor take others'."""
    with any_urza.client() as client:
        submit(client, blueprint(1))
        ahead = Program(SKEWED, any_urza.url, 7200).finish()[0]
        assert ahead.startswith("200 ")
        behind = Program(SKEWED, any_urza.url, -7200).finish()[0]
        assert behind.startswith("204")
        record = client.get(f"/api/v1/blueprints/{blueprint(1).id}").json()
        ends = datetime.fromisoformat(record["lease_expires_at"])
        assert abs(ends - datetime.now(UTC)) < timedelta(seconds=10)


def test_keep_alive_connections_are_reused(urza: RunningUrza) -> None:
    with urza.client() as client:
        ports = set()
        for _ in range(20):
            with client.stream("GET", "/health/live") as response:
                ports.add(response.extensions["network_stream"].get_extra_info("client_addr"))
                response.read()
        assert len(ports) == 1
