"""Short programs that end in the middle of something: `python -m tests.ending_programs KIND`. Run by test_ends.py."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import torch
from torch import nn

import esper
from esper.artifacts import build_artifact
from esper.execution.sources import FetchedKernel

_FEATURES = 512  # enough for torch to be at work on a kernel while the process ends
_KERNEL = build_artifact(esper.Blueprint.affine(_FEATURES, _FEATURES, start="kaiming"))


class Source:
    """Has one kernel; the fetch of any other hangs."""

    def resolve(self, reference: str) -> str:
        return reference

    def fetch(self, artifact_id: str) -> FetchedKernel:
        if artifact_id != _KERNEL.id:
            threading.Event().wait()
        return FetchedKernel(_KERNEL.data, None)

    def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
        return None

    def trust(self) -> None:
        return None


class Sink:
    """Keeps nothing."""

    def publish(self, topic: str, payload: object) -> None:
        pass


def _model() -> esper.MorphableModel:
    platform = SimpleNamespace(kernel_source=Source(), oona=Sink())
    host = nn.Sequential(nn.Linear(_FEATURES, _FEATURES), nn.Linear(_FEATURES, _FEATURES))
    return esper.wrap(host, platform=platform)  # type: ignore[arg-type]  # all of a platform that wrap reads


def _ranks(rank: int) -> None:
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    store = torch.distributed.FileStore(sys.argv[2], 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    main("requests")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(kind: str) -> None:
    model, x = _model(), torch.randn(4, _FEATURES)
    compiled = kind.startswith("compiled")
    run = torch.compile(model, backend="esper") if compiled else model
    run(x).sum().backward()
    if kind in ("loaded", "compiled-loaded"):
        assert model.request_kernel("0", 0, _KERNEL.id).result(600)
        for _ in range(200):
            run(x).sum().backward()
    if kind in ("requests", "compiled-request", "exits", "raises"):
        for seed in range(1 if compiled else 4):
            model.request_kernel("0", seed, _KERNEL.id, trainable=True)
    if kind == "hangs":
        model.request_kernel("0", 0, "d" * 64)
    print("done", flush=True)
    if kind == "exits":
        sys.exit(3)
    if kind == "raises":
        raise RuntimeError("on purpose")


if __name__ == "__main__":
    if sys.argv[1].startswith("rank"):
        _ranks(int(sys.argv[1].removeprefix("rank")))
    else:
        main(sys.argv[1])
