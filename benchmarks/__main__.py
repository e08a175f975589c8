"""Every benchmark in turn, each in a process of its own, with its default options: `python -m benchmarks`.

All but `on_gpu`, which runs some of them on another device.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> None:
    sources = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("[!_]*.py")}
    names = sorted(name for name, source in sources.items() if "\ndef main(" in source and name != "on_gpu")
    failed = [name for name in names if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
