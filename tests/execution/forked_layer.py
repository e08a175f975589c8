"""A program that forks while another of its threads changes a layer's seeds, and says what the child could do."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch
from pydantic import BaseModel

from esper.execution.kasmina_layer import KasminaLayer
from tests.execution.kernel_sources import FolderOfArtifacts, make_artifact

CHILD_SECONDS = 20.0
X = torch.ones(1, 8)


class SlowSink:
    """Takes its time over the first report until `go` is set."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()

    def publish(self, topic: str, payload: BaseModel) -> None:
        del topic, payload
        if not self.entered.is_set():
            self.entered.set()
            self.go.wait(60)


def main() -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not live on in a child
    first, second = make_artifact(0), make_artifact(1)
    source, sink = FolderOfArtifacts(first, second), SlowSink()
    layer = KasminaLayer(0, 2, 8, 8, source=source, sink=sink)
    dormant = layer(X)
    source.open.clear()
    called_off = layer.request_kernel(0, first.id)
    assert source.asked.wait(20)
    unloading = threading.Thread(target=layer.unload_kernel, args=(0,))
    unloading.start()
    assert sink.entered.wait(20)  # the other thread reports, in the middle of the change

    child = os.fork()
    if child == 0:
        os._exit(_in_child(layer, source, second.id, dormant))
    print(f"child: {end_of(child)}")
    sink.go.set()
    source.open.set()
    unloading.join(20)
    print(f"called off: {called_off.result(20) is False}")
    loaded = layer.request_kernel(1, second.id).result(20)
    print(f"parent: {loaded and not torch.equal(layer(X), dormant)}")


def _in_child(layer: KasminaLayer, source: FolderOfArtifacts, kernel: str, dormant: torch.Tensor) -> int:
    layer.set_alpha(1, 0.5)
    if not torch.equal(layer(X), dormant):
        return 2
    source.open.set()
    if not layer.request_kernel(1, kernel).result(CHILD_SECONDS / 2):
        return 3
    return 4 if torch.equal(layer(X), dormant) else 0


def end_of(child: int) -> str:
    """How a child ended, in time or by force."""
    deadline = time.monotonic() + CHILD_SECONDS
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            return str(os.waitstatus_to_exitcode(status))
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


if __name__ == "__main__":
    main()
