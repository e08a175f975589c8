"""`esper watch`: the layers of a model that runs elsewhere, by number and name."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

import esper
from esper import EsperConfig, Platform
from tests.models import mlp
from tests.services.valkey_server import ValkeyProcess
from tests.test_cli import CommandLine

pytestmark = pytest.mark.xdist_group("valkey")


@pytest.mark.slow
def test_layers_are_shown_by_number_and_name(tmp_path: Path) -> None:
    with ValkeyProcess() as valkey:
        config = EsperConfig.model_validate(
            {
                "redis": {"url": valkey.url},
                "urza": {"url": "http://127.0.0.1:1"},
                "platform": {"root": tmp_path / "there"},
            }
        )
        with Platform.connect(config) as platform:
            model = esper.wrap(mlp(8, 6, 4), platform=platform)
            stop = threading.Event()

            def train() -> None:
                while not stop.is_set():
                    model(torch.randn(2, 8))

            thread = threading.Thread(target=train)
            thread.start()
            line = CommandLine(tmp_path / "here")
            try:
                board = line.run("watch", "--seconds", "3", ESPER_REDIS__URL=valkey.url)
                raw = line.run("watch", "--seconds", "2", "--json", ESPER_REDIS__URL=valkey.url)
            finally:
                stop.set()
                thread.join()
    rows = [words for words in map(str.split, board.splitlines()) if words[1:3] in (["0", "0"], ["1", "2"])]
    assert [words[1:6] for words in rows[-2:]] == [["0", "0", "0", "of", "4"], ["1", "2", "0", "of", "4"]]
    payload = json.loads(raw.splitlines()[0])["payload"]
    assert (payload["layer_id"], payload["layer_name"]) in [(0, "0"), (1, "2")]
