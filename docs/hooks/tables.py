"""Tables that the pages do not own: benchmark results, the operator table, families and limits.

A page holds each between two comments, ``<!-- table: name arguments -->`` and ``<!-- end of table -->``. What stands
between is written by ``python docs/hooks/tables.py``, so the pages can be read as they are; as an MkDocs hook this
file writes it again for the site, which is never out of date.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_HALF_UP, ROUND_UP, Decimal
from pathlib import Path
from typing import Any

__all__ = ["filled", "main", "on_files", "on_page_markdown"]

DOCS = Path(__file__).parent.parent
RESULTS = DOCS.parent / "benchmarks" / "results"
_IMAGES_IN_REPOSITORY, _IMAGES_ON_SITE = "../benchmarks/results/", "images/benchmarks/"
_BLOCK = re.compile(r"(?P<begin><!-- table: (?P<call>[^>]*?) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL)

Row = Sequence[object]


def filled(markdown: str) -> str:
    """`markdown` with every table written anew."""

    def fill(match: re.Match[str]) -> str:
        name, *arguments = match["call"].split()
        return f"{match['begin']}\n{TABLES[name](*arguments).strip()}\n\n{match['end']}"

    return _BLOCK.sub(fill, markdown)


def on_page_markdown(markdown: str, **_: object) -> str:
    """MkDocs: the page's text before it is rendered."""
    return filled(markdown).replace(_IMAGES_IN_REPOSITORY, _IMAGES_ON_SITE)


def on_files(files: Any, config: Any) -> Any:
    """MkDocs: the plots lie with the results, outside of the pages' folder."""
    from mkdocs.structure.files import File

    for picture in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"{_IMAGES_ON_SITE}{picture.name}", abs_src_path=str(picture)))
    return files


def main() -> None:
    """Write the tables into the pages."""
    for page in sorted(DOCS.rglob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"written: {page.relative_to(DOCS.parent)}")


def _table(columns: Iterable[str], rows: Iterable[Row]) -> str:
    columns = list(columns)
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _left_table(columns: Iterable[str], rows: Iterable[Row]) -> str:
    return _table(columns, rows).replace("---:", "---")


# ---- what the library says of itself -------------------------------------------------------------------------------


def operators() -> str:
    """The operator table."""
    from esper.artifacts import OPERATORS

    rows = []
    for operator in OPERATORS.values():
        fewest, most = operator.inputs
        attributes = ", ".join(f"`{name}`: {each.wanted}" for name, each in operator.attributes.items())
        target = operator.target
        module = (target.__module__ or "torch").replace("torch._C._nn", "torch.nn.functional")
        function = target.__name__
        if module == "torch._C._linalg":
            module, function = "torch.linalg", function.removeprefix("linalg_")
        if operator.name == "log_sigmoid":
            function = "logsigmoid"
        inputs = str(fewest) if fewest == most else f"{fewest} to {most}"
        rows.append((f"`{operator.name}`", f"`{module}.{function}`", inputs, attributes))
    return _left_table(("operator", "computes", "inputs", "attributes"), rows)


def families() -> str:
    """The named families, by their constructors."""
    from esper.artifacts import Blueprint
    from esper.artifacts.families import FAMILIES

    rows = []
    for name in FAMILIES:
        constructor = getattr(Blueprint, name)
        parameters = inspect.signature(constructor).parameters.values()
        own = [
            each for each in parameters if each.name not in ("in_features", "out_features", "start", "seed", "dtype")
        ]
        options = ", ".join(
            f"`{each.name}`" + ("" if each.default is each.empty else f" (`{json.dumps(each.default)}`)")
            for each in own
        )
        meaning = inspect.getdoc(constructor).splitlines()[0].replace("``", "`")
        rows.append((f"`{name}`", meaning, options))
    return _left_table(("family", "computes", "its own options (defaults)"), rows)


def options() -> str:
    """What the options that several families share can be."""
    from esper.artifacts.families import ACTIVATIONS, NORMS, STARTS
    from esper.artifacts.graph import DTYPES

    shared = {"activation": ACTIVATIONS, "norm": NORMS, "start": STARTS, "dtype": DTYPES}
    rows = [(f"`{name}`", ", ".join(f"`{each}`" for each in values)) for name, values in shared.items()]
    return "Every family also takes `start`, `seed` and `dtype`.\n\n" + _left_table(("option", "one of"), rows)


def limits() -> str:
    """The limits and their defaults."""
    from esper.artifacts import Limits

    return _left_table(
        ("limit", "default"), ((f"`{each.name}`", f"{each.default:,}") for each in dataclasses.fields(Limits))
    )


# ---- results of benchmarks -----------------------------------------------------------------------------------------


def results(name: str) -> str:
    """The committed results of one benchmark, on every device that it ran on."""
    found = [path for path in (RESULTS / f"{name}.json", *sorted(RESULTS.glob(f"{name}-*.json"))) if path.exists()]
    if not found:
        return f"No results are committed; `python -m benchmarks.{name}` measures and writes them."
    return "\n\n".join(_one_result(name, path) for path in found)


def _one_result(name: str, path: Path) -> str:
    document = json.loads(path.read_text(encoding="utf-8"))
    body = RENDERERS.get(name, _plain)(document)
    parts = [_machine(document.get("machine", document)), *body]
    if path.with_suffix(".png").exists():
        parts.append(f"![{name}: plot of these results]({_IMAGES_IN_REPOSITORY}{path.stem}.png)")
    return "\n\n".join(parts)


def _machine(about: dict[str, Any]) -> str:
    where = [about["processor"]]
    if "cores" in about:
        where.append(f"{about['cores']} cores")
    if "threads" in about:
        where.append(f"torch on {about['threads']} thread" + ("s" if about["threads"] != 1 else ""))
    if about.get("device", "cpu") != "cpu":
        where.append(about["device"])
    where += [f"torch {about['torch']}", f"Python {about['python']}"]
    return f"Measured on {about['date'][:10]}: {', '.join(where)}, by `{about['command']}`."


def _exact(value: object) -> str:
    return _rounded(value, ROUND_HALF_UP)


def _against_us(value: object) -> str:
    """A figure of ours, of which less is better: rounded up."""
    return _rounded(value, ROUND_UP)


def _rounded(value: object, how: str) -> str:
    if not isinstance(value, float):
        return str(value)
    places = Decimal("0.1") if abs(value) >= 100 else Decimal("0.01") if abs(value) >= 10 else Decimal("0.001")
    return str(Decimal(repr(value)).quantize(places, rounding=how))


def _plain(document: dict[str, Any]) -> list[str]:
    table = _table(document["columns"], ([_exact(cell) for cell in row] for row in document["rows"]))
    return [table, *_sections(document)]


def _ratios(document: dict[str, Any], ours: str, theirs: str, goal: Callable[[str], float | None]) -> list[str]:
    """Rows `(case, their time, our time, ratio)`, with the middle half of the rounds' ratios and the goal."""
    rows: list[Row] = []
    for case, their_time, our_time, ratio in document["rows"]:
        rounds = document["details"][case]
        low, _, high = statistics.quantiles(
            (a / b for a, b in zip(rounds[ours], rounds[theirs], strict=True)), n=4, method="inclusive"
        )
        row = [case, _exact(their_time), _against_us(our_time), _against_us(ratio)]
        row.append(f"{_exact(low)} to {_against_us(high)}")
        wanted = goal(case)
        if wanted is not None:
            met = "met" if ratio <= wanted else "within noise" if low <= wanted else "missed"
            row += [f"{wanted:.2f}", met]
        rows.append(row)
    columns = [*document["columns"], "middle half of rounds"]
    if rows and len(rows[0]) > len(columns):
        columns += ["goal", "verdict"]
    return [_table(columns, rows)]


def _dormant_overhead(document: dict[str, Any]) -> list[str]:
    rows: list[Row] = []
    for case, plain, *ours in document["rows"]:
        row, rounds = [case, _exact(plain)], document["details"][case]
        for mode, (time, ratio) in zip(("module", "fx"), zip(ours[::2], ours[1::2], strict=True), strict=True):
            goal = 0.75 if mode == "fx" and case.startswith("MLP 10-20-5") and ", eager" in case else 1.0
            met = (
                "met"
                if ratio <= goal
                else "within noise"
                if _quarter(rounds[mode], rounds["plain"]) <= goal
                else "missed"
            )
            row += [_against_us(time), _against_us(ratio), f"{goal:.2f}: {met}"]
        rows.append(row)
    case, plain, *columns = document["columns"]
    return [_table((case, plain, *columns[:2], "goal", *columns[2:], "goal"), rows)]


def _kernel_execution(document: dict[str, Any]) -> list[str]:
    rows = document["rows"]
    faster = sum(row[-1] < 1.0 for row in rows)
    summary = f"The attachment is faster in {faster} of {len(rows)} cases; the median ratio over all cases is "
    median = statistics.median(row[-1] for row in rows)
    return [f"{summary}{_against_us(median)}.", *_ratios(document, "attachment", "graph", lambda _: None)]


_FLAT = 1.05


def _seed_scaling(document: dict[str, Any]) -> list[str]:
    rows = document["rows"]
    verdicts = []
    for column in (1, 2):
        change = rows[-1][column] / rows[0][column]
        verdict = "met" if change <= _FLAT else "missed"
        verdicts.append(
            f"{document['columns'][column]}: {_against_us(rows[0][column])} with {rows[0][0]:,} seed and "
            f"{_against_us(rows[-1][column])} with {rows[-1][0]:,}, so flat is {verdict}"
        )
    return [*_plain(document), "; ".join(verdicts).capitalize() + "."]


def _kernel_cache(document: dict[str, Any]) -> list[str]:
    hits = []
    for hit in document["hits"]:
        shown = _exact if hit["what"].startswith("peer:") else _against_us
        hits.append((hit["what"], *(shown(hit[key]) for key in ("median_us", "p99_us", "worst_us"))))
    fetch = next(hit for hit in document["hits"] if hit["what"] == "fetch")
    verdict = "met" if fetch["median_us"] < document["goal_us"] else "missed"
    misses = [
        (
            _exact(miss["size_mb"]),
            _against_us(miss["cache_ms"]),
            _exact(miss["torch_load_ms"]),
            _against_us(miss["ratio"]),
        )
        for miss in document["misses"]
    ]
    points = document["working_set"]["points"]
    patterns = list(dict.fromkeys(point["pattern"] for point in points))
    cliff: dict[int, list[str]] = {}
    for point in points:
        row = cliff.setdefault(point["kernels"], [str(point["kernels"])])
        row += [f"{100 * point['hit_rate']:.1f} %", _against_us(point["mean_us"])]
    return [
        f"A hit takes {_against_us(fetch['median_us'])} µs in the median; the goal, under {document['goal_us']:g} µs, "
        f"is {verdict}.",
        _table(("a hit, µs", "median", "99 %", "worst"), hits),
        _table(("a miss: artifact, MiB", "`KernelCache`, ms", "`torch.load`, nothing checked, ms", "ratio"), misses),
        f"The working set, in a cache of {document['working_set']['capacity']} kernels:",
        _table(
            ("kernels in use", *(text for each in patterns for text in (f"{each}: hits", "µs a request"))),
            cliff.values(),
        ),
    ]


def _verdict(figure: float, goal: float) -> str:
    return "met" if figure <= goal else "missed"


def _hot_swap(document: dict[str, Any]) -> list[str]:
    """Every way to swap, the verdicts on ours, and the median steps."""
    goals = document["details"]["goals"]
    rows, verdicts = [], []
    for row in document["rows"]:
        case, *figures = row
        model, _, way = case.rpartition(": ")
        ours = way == "Esper"
        rows.append((case, *((_against_us if ours else _exact)(figure) for figure in figures)))
        if not ours:
            continue
        named = dict(zip(document["columns"], row, strict=True))
        worst, idle = named["worst / median"], named["idle / plain"]
        lost = max(0.0, named["seconds lost"] - named["control: seconds lost"])
        judged = ((worst, goals["worst"]), (lost, goals["lost"]))
        verdict = [text for figure, goal in judged for text in (_against_us(figure), _verdict(figure, goal))]
        if idle == "":
            verdicts.append((model, *verdict, "not measured", "missed"))
            continue
        rounds = document["details"]["models"][document["details"]["cases"][case]]["idle"]
        low = _quarter(rounds["esper"], rounds["plain"])
        met = "met" if idle <= goals["idle"] else "within noise" if low <= goals["idle"] else "missed"
        verdicts.append((model, *verdict, _against_us(idle), met))
    worst, lost, idle = (f"{goals[name]:g}" for name in ("worst", "lost", "idle"))
    columns = (
        "Esper", f"worst / median, goal {worst}", "", f"seconds lost beyond the control, goal {lost}", "",
        f"idle / plain, goal {idle}", "",
    )  # fmt: skip
    return [_table(document["columns"], rows), _table(columns, verdicts), *_sections(document)]


def _quarter(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The lower end of the middle half of the rounds' ratios."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive")[0]


def _sections(document: dict[str, Any]) -> list[str]:
    parts = []
    for section in document.get("sections", ()):
        rows = ([_exact(cell) for cell in row] for row in section["rows"])
        parts += [f"{section['title']}:", _table(section["columns"], rows)]
    return parts


def _compile_time(document: dict[str, Any]) -> list[str]:
    """First steps, cold starts, second processes and kernels, each with what became of its goal."""
    goals, details = document["details"]["goals"], document["details"]
    goal = goals["ratio"]
    rows = [
        (case, _exact(plain), _against_us(ours), _against_us(ratio), f"{goal:g}", _verdict(ratio, goal))
        for case, plain, ours, ratio in document["rows"]
    ]
    starts, processes, depths = (_sections({"sections": [each]}) for each in document["sections"])
    verdicts = [
        "failed" if "failed" in each else _verdict(each["first"] / each["trace"], goals["first"])
        for each in details["starts"].values()
    ]
    second = next(row for row in document["sections"][1]["rows"] if row[0] == "second")
    failed = "failed" in details["processes"]["second"]
    compiled = "failed" if failed else _verdict(second[1] + second[2], goals["compilations"])
    return [
        _table((*document["columns"], "goal", "verdict"), rows),
        *starts,
        f"The goal, a first step at most {goals['first']:g} of Dynamo's trace and a step: {', '.join(verdicts)}.",
        *processes,
        f"The goal, nothing compiled by or for the second process: {compiled}.",
        *depths,
    ]


def _active_overhead(document: dict[str, Any]) -> list[str]:
    goals = document["details"]["goals"]

    def goal(case: str) -> float:
        alone = document["details"][case]["seeds"] == 1  # then there is nothing to batch
        return float(goals["one by one" if alone else document["details"][case]["batching"]])

    return _ratios(document, "esper", "hand", goal)


RENDERERS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "active_overhead": _active_overhead,
    "compile_time": _compile_time,
    "dormant_overhead": _dormant_overhead,
    "hot_swap": _hot_swap,
    "kernel_cache": _kernel_cache,
    "kernel_execution": _kernel_execution,
    "seed_scaling": _seed_scaling,
}

TABLES: dict[str, Callable[..., str]] = {
    "families": families,
    "limits": limits,
    "operators": operators,
    "options": options,
    "results": results,
}

if __name__ == "__main__":
    sys.exit(main())
