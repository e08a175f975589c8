"""The report of what the compiler did: a table for people, dictionaries for programs."""

from __future__ import annotations

import dataclasses
import json

import pytest
from expecttest import assert_expected_inline

from esper.compiler.report import CompileReport, GraphReport, VariantReport, WorkerCounters
from esper.compiler.variant_store import StoreStatistics

DORMANT = VariantReport("dormant", "host compile", 3.214, None, "", in_force=False)
SEED = VariantReport("blocks.2.fc1[3fa9c1d2e4b5]", "worker", 1.93, 331_776, "", in_force=True)
STORED = VariantReport("blocks.0.fc1[0b1c2d3e4f50]", "store", 0.071, 330_000, "", in_force=False)
HERE = VariantReport(
    "head[aa00bb11cc22]",
    "in process",
    2.5,
    None,
    "the graph cannot be given to a compile worker: it calls the operator demo::scale, which only this process has",
    in_force=True,
)
FAILED = VariantReport("head[aa00bb11cc22, dd33ee44ff55, 0123456789ab]", "uncompiled", None, None, "no g++", False)
REPORT = CompileReport(
    (
        GraphReport(
            "graph 0", ("blocks.0.fc1", "blocks.0.fc2", "blocks.2.fc1"), "inductor", (DORMANT, SEED, STORED), 2
        ),
        GraphReport("graph 1", ("head",), "inductor", (HERE, FAILED), 0),
        GraphReport("graph 2", (), "aot_eager", (), 1),
    ),
    WorkerCounters(done=3, crashes=1, restarts=1),
    StoreStatistics(hits=1, misses=2, writes=2),
)


def test_the_report_is_a_table() -> None:
    assert_expected_inline(
        str(REPORT),
        """\
graph 0, inner compiler inductor, 3 sites: blocks.0.fc1, blocks.0.fc2, blocks.2.fc1
  plan                                          origin          seconds        KiB
  dormant                                       host compile       3.21
* blocks.2.fc1[3fa9c1d2e4b5]                    worker             1.93        324
  blocks.0.fc1[0b1c2d3e4f50]                    store              0.07        322
  2 variants being compiled

graph 1, inner compiler inductor, 1 site: head
  plan                                          origin          seconds        KiB
* head[aa00bb11cc22]                            in process         2.50
      the graph cannot be given to a compile worker: it calls the operator demo::scale, which only
      this process has
  head[aa00bb11cc22, dd33ee44ff55,              uncompiled
  0123456789ab]
      no g++

graph 2, inner compiler aot_eager, 0 sites
  1 variant being compiled

workers: done 3, failed 0, crashes 1, restarts 1, timeouts 0
store:   hits 1, misses 2, unusable 0, writes 2, failed writes 0, evicted 0""",
    )


def test_a_report_of_nothing_says_so() -> None:
    assert str(CompileReport(())) == 'no graph was compiled with backend="esper"'
    assert str(CompileReport((), store=StoreStatistics())).startswith("no graph was compiled")


def test_a_report_of_large_graphs_keeps_to_the_width_and_names_everything_once() -> None:
    sites = tuple(f"model.layers.{layer}.self_attention.query_projection" for layer in range(96))
    plan = "; ".join(f"{site}[0123456789ab]" for site in sites)
    reason = "the compile worker died twice on it, " * 20
    graph = GraphReport("graph 0", sites, "inductor", (VariantReport(plan, "uncompiled", None, None, reason, True),), 0)
    lines = str(CompileReport((graph,))).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) < 40
    assert "96 sites" in lines[0]
    assert any("and 84 more" in line for line in lines)
    assert any("..." in line for line in lines)
    assert "\n".join(lines).count("twice") == 20, "a reason is never cut"


def test_the_report_is_json_and_complete() -> None:
    read = json.loads(json.dumps(REPORT.to_dict()))
    assert read == REPORT.to_dict()
    assert [graph["name"] for graph in read["graphs"]] == ["graph 0", "graph 1", "graph 2"]
    assert read["graphs"][0]["sites"] == ["blocks.0.fc1", "blocks.0.fc2", "blocks.2.fc1"]
    assert read["graphs"][0]["waiting"] == 2
    assert VariantReport(**read["graphs"][0]["variants"][1]) == SEED
    assert VariantReport(**read["graphs"][1]["variants"][0]) == HERE
    assert WorkerCounters(**read["workers"]) == REPORT.workers
    assert StoreStatistics(**read["store"]) == REPORT.store
    assert CompileReport(()).to_dict() == {"graphs": [], "workers": None, "store": None}


def test_a_report_is_a_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        REPORT.graphs = ()  # type: ignore[misc]  # that it is refused is the point
    assert dataclasses.replace(REPORT) == REPORT
