"""How `explain()` and `compile_report()` show themselves where their value is the last line of a notebook's cell."""

from __future__ import annotations

from html.parser import HTMLParser

import torch
from torch import nn

import esper
from tests.models import mlp


class Cells(HTMLParser):
    """The texts of a table's cells, in order, and whether every tag that was opened was closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        if tag in ("td", "th"):
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] in (["td"], ["th"]):
            self.texts[-1] += data


class Branching(nn.Module):
    """Cannot be traced whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.first(x) if x.sum() > 0 else self.second(x)
        return y


def test_an_explanation_is_a_table() -> None:
    explanation = esper.wrap(Branching(), "first", mode="fx").explain()
    assert repr(explanation) == str(explanation)
    cells = Cells(explanation._repr_html_())
    assert not cells.open
    assert cells.texts[:3] == ["layer", "seeds", "runs in"]
    assert cells.texts[3:5] == ["first", "yes"]
    second = cells.texts.index("second")
    assert cells.texts[second : second + 3] == ["second", "no", "not selected"]
    assert any(reason in " ".join(cells.texts) for reason in explanation.untraced.values())


def test_a_compile_report_is_a_table(fresh_dynamo: None) -> None:
    model = esper.wrap(mlp(8, 6, 4))
    assert (
        model.compile_report()._repr_html_().startswith("<p>no graph was compiled with backend=&quot;esper&quot;</p>")
    )
    torch.compile(model, backend="esper", options={"inner": "eager"})(torch.randn(2, 8))
    report = model.compile_report()
    assert repr(report) == str(report)
    cells = Cells(report._repr_html_())
    assert not cells.open
    assert cells.texts[:6] == ["in force", "plan", "origin", "seconds", "KiB", "note"]
    assert cells.texts[6:9] == ["*", "dormant", "host compile"]
