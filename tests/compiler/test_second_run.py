"""A second run of the same program: it compiles no variant, and the report says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.services.valkey_server import ValkeyProcess

PROGRAM = """
import json, tempfile
from pathlib import Path
import psutil
import torch
import esper
from esper import Blueprint
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder, KernelShelf(Path(folder)) as shelf:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    compiled = torch.compile(model, backend="esper")
    x = torch.randn(3, 8)
    compiled(x).sum().backward()
    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming"))
    assert model.request_kernel("0", 0, kernel.id, trainable=True).result(200), model.kasmina_layers["0"].seed_errors
    difference = (compiled(x) - model(x)).abs().max().item()
    commands = [child.cmdline() for child in psutil.Process().children()]
    workers = sum("esper.compiler.worker_process" in command for command in commands)
    report = model.compile_report().to_dict()
    print(json.dumps({**report, "difference": difference, "worker processes": workers}))
"""


def run_program(folder: Path, **variables: str) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), **variables}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr
    report: dict[str, Any] = json.loads(process.stdout)
    assert report["difference"] < 1e-5
    return report


def origins(report: dict[str, Any]) -> dict[str, str]:
    return {
        "dormant" if variant["plan"] == "dormant" else "active": variant["origin"]
        for variant in report["graphs"][0]["variants"]
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_run_takes_its_variants_from_the_store_unless_they_are_damaged(tmp_path: Path) -> None:
    dumps = tmp_path / "dumps"
    with ValkeyProcess() as remote:
        inductors = {
            "TORCHINDUCTOR_REDIS_URL": remote.url,
            "TORCHINDUCTOR_FX_GRAPH_REMOTE_CACHE": "1",
            "TORCHINDUCTOR_AUTOGRAD_REMOTE_CACHE": "1",
        }
        first = run_program(tmp_path, ESPER_DEBUG_DIR=str(dumps), **inductors)
        with remote.client() as client:
            shared = list(client.scan_iter("pt2:fx-graph*"))
    assert len(shared) == 2, "one by this process, and one by the compile worker"
    assert origins(first) == {"dormant": "host compile", "active": "worker"}
    assert (first["workers"]["done"], first["store"]["misses"], first["store"]["writes"]) == (1, 1, 1)
    assert first["worker processes"] > 0
    assert list(dumps.glob("*/graph_0/000/00_inline_kernels.after.py")), "the worker dumps too"

    second = run_program(tmp_path)
    assert origins(second) == {"dormant": "host compile", "active": "store"}
    assert (second["workers"]["done"], second["store"]["hits"], second["store"]["writes"]) == (0, 1, 0)
    assert second["worker processes"] == 0, "a warm start needs none"

    libraries = sorted((tmp_path / "cache").rglob("*.main.so"), key=lambda path: path.stat().st_mtime)
    for library, kept in zip(libraries[-2:], (5000, 0), strict=True):  # the variant's, which were made last
        library.write_bytes(library.read_bytes()[:kept])
    assert origins(run_program(tmp_path)) == {"dormant": "host compile", "active": "worker"}

    (stored,) = (tmp_path / "cache" / "esper").iterdir()
    content = stored.read_bytes()
    stored.write_bytes(content[: len(content) // 2])
    third = run_program(tmp_path)
    assert origins(third) == {"dormant": "host compile", "active": "worker"}
    assert (third["store"]["unusable"], third["store"]["writes"]) == (1, 1)
    assert stored.exists()
