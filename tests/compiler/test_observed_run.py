"""What can be seen of a compiled model's run: its report, and the dumps of its passes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import esper
from esper import Blueprint
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


def load(model: esper.MorphableModel, kernel: str) -> None:
    assert model.request_kernel("0", 0, kernel).result(60), model.kasmina_layers["0"].seed_errors


def test_the_report_follows_the_plan(shelf: KernelShelf, fresh_dynamo: None) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    assert model.compile_report().graphs == ()
    compiled = torch.compile(model, backend="esper", options={"inner": "aot_eager"})
    x = torch.randn(3, 8)
    compiled(x)
    (graph,) = model.compile_report().graphs
    assert graph.inner == "aot_eager"
    assert graph.sites == tuple(model.kasmina_layers)
    assert [(each.plan, each.origin, each.in_force) for each in graph.variants] == [("dormant", "host compile", True)]

    artifact = shelf.put(Blueprint.bottleneck(8, 6, rank=2, seed=11))
    load(model, artifact.id)
    compiled(x)
    (graph,) = model.compile_report().graphs
    assert {(each.plan, each.origin, each.in_force) for each in graph.variants} == {
        ("dormant", "host compile", False),
        (f"0[{artifact.graph.digest[:12]}]", "in process", True),
    }
    assert all(each.seconds is not None for each in graph.variants)

    model.unload_kernel("0", 0)
    compiled(x)
    assert [each.plan for each in model.compile_report().graphs[0].variants if each.in_force] == ["dormant"]


def test_a_run_with_dumps_shows_the_passes_of_its_variants(
    shelf: KernelShelf, fresh_dynamo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPER_DEBUG_DIR", str(tmp_path))
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    load(model, shelf.put(Blueprint.bottleneck(8, 6, rank=2, seed=12)).id)
    torch.compile(model, backend="esper", options={"inner": "aot_eager"})(torch.randn(3, 8))
    (graph,) = model.compile_report().graphs
    folder = tmp_path / str(os.getpid()) / graph.name.replace(" ", "_") / "001"  # after the dormant graph
    assert "esper.site" in (folder / "00_inline_kernels.before.py").read_text()
    assert "lerp" in (folder / "00_inline_kernels.after.py").read_text()
    assert "inline_kernels" in (folder / "timings.txt").read_text()
