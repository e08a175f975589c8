"""A C++ compiler that fails on demand. Compile workers that start while `CXX` names it use it; it is a real process."""

from __future__ import annotations

import contextlib
import stat
from pathlib import Path
from typing import Literal

__all__ = ["Mood", "MoodyCompiler"]

Mood = Literal["good", "deadly", "deadly once", "dying", "dying in mid-link", "hanging"]
"""What becomes of the compilations of kernels:

- good: they succeed;
- deadly: the process that wants one dies, as if memory had run out; "deadly once" does so the first time only;
- dying: the first time, the compiler dies and leaves an empty file; "dying in mid-link": so does whoever called it;
- hanging: they end when the mood is another one.
"""

# Only what Inductor compiles for a graph is concerned, and not its questions about the compiler and the machine.
_SCRIPT = r"""#!/bin/sh
last= output=
for each; do
    if [ "$last" = -o ]; then output=$each; fi
    last=$each
done
case $output in
    *.main.so) ;;
    *) exec g++ "$@" ;;
esac
echo "$output" >> "$0.outputs"
echo $$ >> "$0.pids"
read -r mood < "$0.mood"
case $mood in
    deadly) kill -KILL $PPID; sleep 300 ;;
    "deadly once") echo good > "$0.mood"; kill -KILL $PPID; sleep 300 ;;
    dying) echo good > "$0.mood"; : > "$output"; kill -KILL $$ ;;
    "dying in mid-link") echo good > "$0.mood"; : > "$output"; kill -KILL $PPID; sleep 300 ;;
    hanging) while grep -q hanging "$0.mood"; do sleep 0.1; done ;;
esac
exec g++ "$@"
"""


class MoodyCompiler:
    """The compiler in `folder`. Call :meth:`install` before all else, in one process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "g++"

    def install(self) -> None:
        """Make it, a good one at first. What it compiled in earlier runs is removed, so that it is needed again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(_SCRIPT)
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)
        for output in self.outputs:
            with contextlib.suppress(FileNotFoundError):
                output.unlink()
        for kind in ("outputs", "pids"):
            self._file(kind).write_text("")
        self.mood: Mood = "good"

    @property
    def mood(self) -> str:
        return self._file("mood").read_text().strip()

    @mood.setter
    def mood(self, mood: Mood) -> None:
        self._file("mood").write_text(f"{mood}\n")

    @property
    def outputs(self) -> list[Path]:
        """The libraries that it was asked for, in order."""
        file = self._file("outputs")
        return [Path(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def pids(self) -> list[int]:
        """The processes in which it ran."""
        return [int(line) for line in self._file("pids").read_text().split()]

    def _file(self, kind: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{kind}")
