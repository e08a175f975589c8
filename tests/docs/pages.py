"""The pages that people read, taken apart: code blocks, links, headings, names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BLOCK_END", "PAGES", "ROOT", "Block", "Page"]

ROOT = Path(__file__).parent.parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK_END = "\x1e"
"""What a page's program prints after each of its blocks."""

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)")
_NO_RUN = re.compile(r"<!-- no-run: (?P<reason>.*?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced code block; `line` is the line of its opening fence, counted from 1."""

    language: str
    line: int
    text: str
    is_run: bool


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self) -> list[Block]:
        """Every fenced code block, in order."""
        found: list[Block] = []
        opened: tuple[str, int, bool] | None = None
        body: list[str] = []
        before = ""
        for number, line in enumerate(self.text.splitlines(), 1):
            fence = _FENCE.match(line)
            if opened is None and fence is not None:
                assert not fence["indent"], f"{self.name}:{number}: indented code is not run; put it at the margin"
                opened, body = (fence["language"], number, _NO_RUN.search(before) is None), []
            elif opened is not None and line.strip() == "```":
                found.append(Block(opened[0], opened[1], "\n".join(body), opened[2]))
                opened = None
            elif opened is not None:
                body.append(line)
            before = line if line.strip() else before
        assert opened is None, f"{self.name}:{opened[1]}: this code block is never closed"
        return found

    def program(self) -> str:
        """The page's Python blocks as one program, in which each line has the number that it has in the page."""
        lines = [""] * len(self.text.splitlines())
        for block in self.blocks():
            if block.language == "python" and block.is_run:
                code = block.text.split("\n")
                lines[block.line : block.line + len(code)] = code
                lines[block.line + len(code)] = f"print({BLOCK_END!r}, end='', flush=True)"
        return "\n".join(lines) + "\n"

    def expected_outputs(self) -> list[str | None]:
        """For each Python block that is run, the `output` block that follows it, if one does."""
        outputs: list[str | None] = []
        for block in self.blocks():
            if block.language == "python" and block.is_run:
                outputs.append(None)
            elif block.language == "output":
                assert outputs, f"{self.name}:{block.line}: there is no code before this output"
                assert outputs[-1] is None, f"{self.name}:{block.line}: the code before has an output already"
                outputs[-1] = block.text + "\n"
        return outputs

    def prose(self) -> str:
        """The text without its code blocks."""
        lines, inside = [], False
        for line in self.text.splitlines():
            if _FENCE.match(line):
                inside = not inside
            elif not inside:
                lines.append(line)
        return "\n".join(lines)

    def inline_code(self) -> set[str]:
        """What stands between single backticks in the text."""
        return set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", self.prose()))

    def links(self) -> Iterator[tuple[str, str]]:
        """File and fragment of every relative link and picture; the file is "" within the page."""
        for target in re.findall(r"\]\(([^)\s]+)\)", self.prose()):
            if not re.match(r"[a-z]+:", target):
                file, _, fragment = target.partition("#")
                yield file, fragment

    def fragments(self) -> set[str]:
        """The fragment of every heading, as MkDocs and code hosts make it."""
        headings = re.findall(r"^#+ +(.*?) *$", self.prose(), re.MULTILINE)
        return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", each).strip().lower()) for each in headings}

    def references(self) -> set[str]:
        """Full names that the page documents (`::: name`) or links to (`[text][name]`)."""
        documented = re.findall(r"^::: (\S+)", self.prose(), re.MULTILINE)
        return {*documented, *re.findall(r"\]\[([\w.]+)\]", self.prose())}
