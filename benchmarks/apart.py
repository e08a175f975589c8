"""A measurement in a process of its own, with its own folder of compiled code: what ran before cannot speed it up.

`apart("benchmarks.module:function", cache, **arguments)` starts `python -m benchmarks.apart`, which calls the function
there. Arguments and result travel as JSON files.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Failed", "Failures", "apart"]


@dataclass(frozen=True)
class Failed:
    """A measurement that raised or whose process died; `str()` is the last line of the reason."""

    reason: str

    def __str__(self) -> str:
        return f"failed: {self.reason}"


class Failures:
    """Collects what failed, so that a benchmark can go on, write what it has, and end with an error."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def note(self, case: str, result: Any) -> Any:
        """`result` as it is; remembered if it is a failure."""
        if isinstance(result, Failed):
            self._reasons[case] = result.reason
        return result

    def finish(self) -> None:
        """End the program with an error that names the failed cases, if there are any."""
        if self._reasons:
            raise SystemExit("\n".join(["failed:", *(f"- {case}: {why}" for case, why in self._reasons.items())]))


def apart(function: str, cache: Path, *, threads: int = 1, timeout: float = 1200.0, **arguments: Any) -> Any:
    """What `function` ("module:name") returns for `arguments` in a new process, or :class:`Failed`.

    `cache` is Inductor's cache folder in there. What the process prints to stderr is seen.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "task.json", Path(folder) / "result.json"
        task.write_text(json.dumps({"function": function, "arguments": arguments, "threads": threads}))
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "benchmarks.apart", str(task), str(result)]
        try:
            code = subprocess.run(command, env=environment, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            answer: dict[str, Any] = {"error": f"no result after {timeout:g} s"}
        else:
            unanswered = {"error": f"the process ended with status {code}"}
            answer = json.loads(result.read_text()) if result.exists() else unanswered
    state = f"failed, {answer['error']}," if "error" in answer else "done"
    described = ", ".join(str(value) for value in arguments.values() if isinstance(value, str | int) and value != "")
    print(f"{function.partition(':')[2]}({described}): {state} in {time.perf_counter() - started:.1f} s", flush=True)
    return Failed(answer["error"]) if "error" in answer else answer["result"]


def _child(task: Path, result: Path) -> None:
    import torch

    work = json.loads(task.read_text())
    torch.set_num_threads(work["threads"])
    module, _, name = work["function"].partition(":")
    try:
        answer = {"result": getattr(importlib.import_module(module), name)(**work["arguments"])}
    except Exception as error:  # noqa: BLE001  # the process that asked reports it, and ends with an error
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        answer = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
    result.write_text(json.dumps(answer))


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]))
