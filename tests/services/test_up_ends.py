"""`esper up` ends: and with it what it has started, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # psutil ships no types
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_urza_valkey_and_workers_end_with_it(tmp_path: Path, ending: signal.Signals) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ESPER_")}
    command = [sys.executable, "-m", "esper.cli", "up", "--port", "0", "--json"]
    with (
        open(tmp_path / "log", "wb") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**environment, "ESPER_PLATFORM__ROOT": str(tmp_path / "data")},
        ) as up,
    ):
        assert up.stdout is not None
        text = ""
        while not text.rstrip().endswith("}") or text.count("{") != text.count("}"):
            line = up.stdout.readline().decode()
            assert line, (tmp_path / "log").read_text()
            text += line
        assert set(json.loads(text)["environment"]) == {"ESPER_URZA__URL", "ESPER_REDIS__URL"}
        started = psutil.Process(up.pid).children(recursive=True)
        while len(started) < 5:  # the worker comes last; two are small processes that watch
            time.sleep(0.1)
            started = psutil.Process(up.pid).children(recursive=True)
        names = " ".join(" ".join(each.cmdline()) for each in started)
        assert "valkey" in names
        assert "esper.cli urza" in names
        assert "tezzeret.fleet" in names
        up.send_signal(ending)
        up.wait(60)
    gone, alive = psutil.wait_procs(started, timeout=60)
    for each in alive:
        each.kill()
    assert not alive, [each.cmdline() for each in alive]
    assert len(gone) == len(started)
