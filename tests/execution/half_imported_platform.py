"""A program whose model reports to the default platform while another thread is importing that."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import esper

reached, go_on, heard = threading.Event(), threading.Event(), threading.Event()


class Held(importlib.abc.MetaPathFinder):
    """Holds up a module that `esper.platform` imports half-way."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """As the import system calls it; nothing is found here."""
        if fullname == "esper.services.parts":
            reached.set()
            assert go_on.wait(100)


def run_until(done: Callable[[], object]) -> None:
    end = time.monotonic() + 100
    while not done():
        assert time.monotonic() < end
        model(torch.zeros(1, 2))


model = esper.wrap(nn.Sequential(nn.Linear(2, 2)))
sys.meta_path.insert(0, Held())
importing = threading.Thread(target=importlib.import_module, args=["esper.platform"])
importing.start()
assert reached.wait(100)
assert not hasattr(sys.modules["esper.platform"], "opened_default_platform")
run_until(lambda: model.get_model_stats()["layers"]["0"]["avg_latency_μs"])  # a signal was due, and a sample with it
go_on.set()
importing.join()

from esper.platform import default_platform  # noqa: E402  # not before

default_platform().oona.subscribe("telemetry.seed.health", lambda _: heard.set())
run_until(heard.is_set)
print("heard")
