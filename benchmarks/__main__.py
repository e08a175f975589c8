"""Every benchmark in turn, each in a process of its own, with its default options: `python -m benchmarks`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SHARED = {"__init__", "__main__", "harness"}


def main() -> None:
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _SHARED)
    failed = [name for name in names if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
