"""The worth-it report: site by task, what federation changed against the same network trained alone.

`build_report` makes the one dictionary every view is made from (report.json, the contract for other tools);
`write_report` puts it on disk with a self-contained page, `print_report` shows it in a terminal. No figure is worked
out here that a site could not know of itself: intervals are made at the site and only judged here.
"""

import io
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import jinja2
import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from rich import box, filesize
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trunkline import __version__
from trunkline.config import RunConfig
from trunkline.errors import DataError, StorageError
from trunkline.exchange import TaskRow
from trunkline.storage import write_atomic

Outcome = Literal["helps", "same", "hurts", "unknown"]
Report = dict[str, Any]

WIDE = 118  # terminal columns from which every column of the table fits beside a site name of 20 letters
NARROW = 64  # what the stacked columns need; a site name that does not fit beside them gets a line of its own
MOST_POINTS = 400  # of a scatter or a curve; more cannot be told apart on a page and cost megabytes
MOST_CLASSES = 12  # of a confusion matrix; the rarer ones are counted together
MOST_ROUNDS = 300  # rows of the rounds table on the page; report.json has all


@dataclass(frozen=True)
class Refusal:
    """One reply that was set aside, and why, in words."""

    site: str
    cause: str


@dataclass(frozen=True)
class RoundRecord:
    """What one round cost and brought.

    Args:
        round: from 1.
        sites: whose updates were averaged.
        refused: whose were set aside.
        seconds: wall time from the first message to the new trunk.
        bytes_up: of all replies together; bytes_down: of all messages to sites together.
        train_loss: weighted mean over `sites`; None when no site reported one.
        metrics: site -> metric name -> this round's value (`exchange.metric_names`): the learning curves.
    """

    round: int
    sites: list[str]
    refused: list[Refusal]
    seconds: float
    bytes_up: int
    bytes_down: int
    train_loss: float | None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Predictions:
    """Test rows of one site and task. They exist only where rows may be seen: in a simulation or at the plant itself.

    Shape:
        truth, federated, local, groups: (n,). Regression: values in `unit`. Binary: truth 0 or 1 and a score that
        grows with the chance of 1. Multiclass: class names or numbers. Rows without a label (NaN) are left out.

    Raises:
        DataError: the arrays differ in length or are not one-dimensional.
    """

    truth: NDArray[Any]
    federated: NDArray[Any]
    local: NDArray[Any] | None
    unit: str
    kind: str
    groups: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        for name in ("federated", "local", "groups"):
            found = getattr(self, name)
            if found is not None and (found.shape != self.truth.shape or found.ndim != 1):
                raise DataError(
                    f"Predictions.{name} should have one value a test row. "
                    f"Found shape {found.shape} beside truth {self.truth.shape}; pass one row a window, scores as (n,)."
                )


def build_report(
    *,
    run: RunConfig,
    rows: Sequence[tuple[str, TaskRow]],
    rounds: Sequence[RoundRecord],
    trunk_parameters: int,
    seconds: float,
) -> Report:
    """The report as plain values, ready for JSON: sites by name, their tasks in the order given, rounds in order.

    A number that is not finite (a site's curve may diverge) becomes None, which JSON can say and NaN it cannot.
    """
    sites = [
        {"site": site, **row.model_dump(mode="json", exclude={"n_groups"}), "verdict": verdict(row)}
        for site, row in sorted(rows, key=lambda pair: pair[0])
    ]
    report: Report = {
        "trunkline": __version__,
        "run": {
            "name": run.name,
            "strategy": run.strategy.name,
            "backbone": run.trunk.backbone,
            "rounds": run.rounds,
            "seed": run.seed,
            "trunk_parameters": trunk_parameters,
            "seconds": seconds,
        },
        "cohort": sorted({site for site, _ in rows}.union(*(one.sites for one in rounds))),
        "sites": sites,
        "rounds": [
            {
                "round": one.round,
                "sites": list(one.sites),
                "refused": [{"site": refusal.site, "cause": refusal.cause} for refusal in one.refused],
                "seconds": one.seconds,
                "bytes_up": one.bytes_up,
                "bytes_down": one.bytes_down,
                "train_loss": one.train_loss,
                "curves": one.metrics,
            }
            for one in rounds
        ],
    }
    plain: Report = _plain(report)
    return plain


def verdict(row: TaskRow) -> str:
    """In plain words whether federation was worth it for this site and task.

    Only the 95 % interval of federated minus local decides: while it contains 0, the test groups cannot tell the two
    apart, however large the difference looks.
    """
    return _verdict(row.model_dump())


def write_report(report: Report, out: Path, predictions: Mapping[tuple[str, str], Predictions] | None = None) -> None:
    """Write `out`/report.json and `out`/report.html; equal arguments give equal bytes.

    Args:
        predictions: (site, task) -> test rows, drawn into the page only; report.json never holds a row.

    Raises:
        StorageError: the folder cannot be written.
    """
    text = json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(out / "report.json", f"{text}\n".encode())
    write_atomic(out / "report.html", _page(report, predictions or {}).encode())


def read_report(out: Path) -> Report:
    """The report in `out`/report.json.

    Raises:
        StorageError: there is none, or it is not a report.
    """
    path = out / "report.json"
    try:
        report = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StorageError(
            f"{path}: no such file. A run writes it when it ends; "
            "`trunkline simulate --resume` goes on with one that stopped."
        ) from None
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path}: cannot be read as a report ({error}). Run again with --resume to write it anew."
        ) from None
    if not isinstance(report, dict) or (missing := {"run", "sites", "rounds"} - report.keys()):
        what = f"it has no `{min(missing)}`" if isinstance(report, dict) else "it is not a table"
        raise StorageError(f"{path}: not a worth-it report: {what}. Give the output folder of a run.")
    return report


def print_report(report: Report, console: Console) -> None:
    """The table and the summary, in whatever width `console` has; no site name is ever cut."""
    run, rows = report["run"], report["sites"]
    console.print(Text(f"{_shown(run['name'])}: is federation worth it?", style="bold"))
    names = {row["site"] for row in rows}
    wide = console.width >= WIDE
    if max(map(len, names), default=0) <= (20 if wide else console.width - NARROW):
        console.print(_table(rows, wide=wide, with_site=True))
    else:
        for name in sorted(names):
            console.print(Text(_shown(name), style="bold"), soft_wrap=True)
            console.print(_table([row for row in rows if row["site"] == name], wide=wide, with_site=False))
    if not wide:
        console.print(Text("* the one to use, chosen on validation data", style="dim"))
    console.print()
    for line in _summary(report):
        console.print(Text(_shown(line)))


# --- words and numbers -------------------------------------------------------------------------------------------


def _outcome(row: Mapping[str, Any]) -> Outcome:
    if row["local"] is None or row["federated"] is None or row["interval"] is None:
        return "unknown"
    low, high = sorted(row["interval"])
    if low <= 0.0 <= high:
        return "same"
    return "helps" if (high < 0.0) == (row["better"] == "lower") else "hurts"


def _verdict(row: Mapping[str, Any]) -> str:
    if row["federated"] is None:
        return "not measured: no test labels"
    if row["local"] is None:
        return "no baseline"
    outcome = _outcome(row)
    if outcome == "unknown":
        return "cannot tell: too few test groups"
    if outcome == "same":
        return "no clear difference"
    percent = _percent(row, row["federated"] - row["local"])
    size = f"{_figure(abs(row['federated'] - row['local']))} {row['unit']}".rstrip()
    if percent is not None:
        size = f"{_figure(abs(percent), digits=2)} %"
    if outcome == "hurts":
        return f"train alone: federation is worse by {size}"
    return f"federation helps: {size} " + ("lower error" if row["better"] == "lower" else f"higher {row['metric']}")


def _percent(row: Mapping[str, Any], value: float) -> float | None:
    """`value` in percent of what training alone reaches; None where that is 0."""
    return 100.0 * value / abs(row["local"]) if abs(row["local"]) > 1e-12 else None


def _digits(row: Mapping[str, Any]) -> int:
    """Decimals that show four digits of the row's larger value, for all figures of the row: they are to be compared."""
    scale = max(abs(row["local"] or 0.0), abs(row["federated"] or 0.0))
    return min(max(3 - math.floor(math.log10(scale)), 0), 9) if scale > 0 else 3


def _value(row: Mapping[str, Any], who: str) -> str:
    return "-" if row[who] is None else f"{row[who]:,.{_digits(row)}f}"


def _difference(row: Mapping[str, Any]) -> str:
    if row["local"] is None or row["federated"] is None:
        return "-"
    value = row["federated"] - row["local"]
    percent = _percent(row, value)
    return f"{value:+,.{_digits(row)}f}" + (f" ({_figure(percent, 2, sign=True)} %)" if percent is not None else "")


def _interval(row: Mapping[str, Any]) -> str:
    if row["interval"] is None:
        return "no interval"
    low, high = row["interval"]
    return f"[{low:+,.{_digits(row)}f}, {high:+,.{_digits(row)}f}]"


def _figure(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """A number that stands alone, with so many significant digits; a large one is written out."""
    if value is None:
        return "-"
    if abs(value) >= 10 ** (digits - 1) - 0.5:
        return f"{value:{'+' if sign else ''},.0f}"
    return f"{value:{'+' if sign else ''}.{digits}g}"


def _metric(row: Mapping[str, Any]) -> str:
    return f"{row['metric']} ({row['unit']})" if row["unit"] else str(row["metric"])


def _shown(text: object) -> str:
    """`text` without control characters: a site's own words must not steer the reader's terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in str(text))


def _plain(value: Any) -> Any:
    """`value` as JSON has it: lists and tables of text, whole numbers and finite numbers; None for the rest."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _sentence(report: Report) -> str:
    """The whole report in one sentence."""
    found = [_outcome(row) for row in report["sites"]]
    compared = len(found) - found.count("unknown")
    if not compared:
        return "Nothing could be compared: no site-task has both a baseline and enough test groups."
    helps, same, hurts = (found.count(which) or "none" for which in ("helps", "same", "hurts"))
    text = f"Federation clearly helps in {helps} of {compared} site-tasks, makes no clear difference in {same}, hurts in {hurts}."
    return text + (f" {found.count('unknown')} more could not be compared." if compared < len(found) else "")


def _traffic(report: Report) -> tuple[str, str]:
    """Bytes up and down a site and round; a refused reply was sent too."""
    exchanges = sum(len(one["sites"]) + len(one["refused"]) for one in report["rounds"])
    return tuple(  # type: ignore[return-value]
        filesize.decimal(round(sum(one[way] for one in report["rounds"]) / max(exchanges, 1)))
        for way in ("bytes_up", "bytes_down")
    )


def _refusals(report: Report) -> list[dict[str, Any]]:
    """One entry a site and cause, with the rounds it happened in, in order of first appearance."""
    found: dict[tuple[str, str], list[int]] = {}
    for one in report["rounds"]:
        for refusal in one["refused"]:
            found.setdefault((refusal["site"], refusal["cause"]), []).append(one["round"])
    return [{"site": site, "cause": cause, "rounds": rounds} for (site, cause), rounds in found.items()]


def _in_rounds(rounds: Sequence[int]) -> str:
    if len(rounds) == 1:
        return f"round {rounds[0]}"
    return f"{len(rounds)} rounds, {rounds[0]} to {rounds[-1]}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "an unknown time"
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _summary(report: Report) -> list[str]:
    run, (up, down) = report["run"], _traffic(report)
    done = max((one["round"] for one in report["rounds"]), default=0)
    lines = [
        _sentence(report),
        f"{done} of {run['rounds']} rounds with {run['strategy']} in {_duration(run['seconds'])}; "
        f"trunk of {run['trunk_parameters']:,} parameters; {up} up and {down} down a site and round.",
    ]
    refusals = _refusals(report)
    if not refusals:
        return [*lines, "No reply was refused."]
    return lines + [f"Refused: {one['site']} ({_in_rounds(one['rounds'])}): {one['cause']}" for one in refusals]


# --- the terminal ------------------------------------------------------------------------------------------------

STYLES: dict[Outcome, str] = {"helps": "green", "hurts": "red", "same": "", "unknown": "dim"}


def _table(rows: Sequence[Mapping[str, Any]], *, wide: bool, with_site: bool) -> Table:
    """Two lines a site and task. A narrow terminal stacks the two values and marks the chosen one with a star."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    if with_site:
        table.add_column("site", no_wrap=True)
    table.add_column("task" if wide else "task\nmetric (unit)", overflow="fold", min_width=12)
    if wide:
        table.add_column("metric (unit)", overflow="fold", min_width=8)
        table.add_column("n test", justify="right", no_wrap=True)
        table.add_column("local", justify="right", no_wrap=True)
        table.add_column("federated", justify="right", no_wrap=True)
    else:
        table.add_column("local\nfederated", justify="right", no_wrap=True)
    table.add_column("difference\n[95 % interval]", no_wrap=True)
    if wide:
        table.add_column("use", no_wrap=True)
    table.add_column("verdict", min_width=14)
    before = None
    for row in rows:
        if before not in (None, row["site"]):
            table.add_section()
        style = STYLES[_outcome(row)]
        task, metric = Text(_shown(row["task"])), Text(_shown(_metric(row)), style="dim")
        change = Text(_difference(row), style=style) + Text("\n") + Text(_interval(row), style="dim")
        end = Text(_shown(row["verdict"]), style=style)
        cells = [Text(_shown(row["site"]) if row["site"] != before else "")] if with_site else []
        if wide:
            values = [Text(_value(row, who)) for who in ("local", "federated")]
            cells += [task, metric, Text(f"{row['n_test']:,}"), *values, change, Text(row["chosen"]), end]
        else:
            mark = {
                who: "*" if row["chosen"] == who and row[who] is not None else " " for who in ("local", "federated")
            }
            stacked = Text("\n".join(_value(row, who) + mark[who] for who in mark))
            cells += [task + Text("\n") + metric, stacked, change, end]
        table.add_row(*cells)
        before = row["site"]
    return table


# --- the page ----------------------------------------------------------------------------------------------------


def _page(report: Report, predictions: Mapping[tuple[str, str], Predictions]) -> str:
    """report.html: one file without a single outside reference, so that it opens in a plant without internet."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    house = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    house.filters |= {
        "figure": _figure, "value": _value, "metric": _metric, "difference": _difference, "interval": _interval, "outcome": _outcome,
        "duration": _duration, "in_rounds": _in_rounds, "bytes": lambda count: filesize.decimal(round(count)),
    }  # fmt: skip
    rounds = report["rounds"]
    step = math.ceil(len(rounds) / MOST_ROUNDS) or 1
    with mpl.rc_context():
        mpl.rcdefaults()  # a user's own matplotlibrc must not change the bytes
        # text stays text: small, selectable, in the page's font. A unit like `$` is no formula.
        mpl.rcParams.update({"svg.fonttype": "none", "text.parse_math": False, "font.size": 8.5})
        curves, drawn = _curves(report), _drawn(report, predictions)
    return house.get_template("report.html").render(
        report=report,
        run=report["run"],
        sentence=_sentence(report),
        outcomes=[_outcome(row) for row in report["sites"]],
        traffic=_traffic(report),
        refusals=_refusals(report),
        forest=_forest(report["sites"]),
        curves=curves,
        predictions=drawn,
        rounds=[one for at, one in enumerate(rounds) if at % step == 0 or at == len(rounds) - 1],
        version=report.get("trunkline", "?"),
        cohort=report.get("cohort", []),
        done=max((one["round"] for one in rounds), default=0),
    )


def _forest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where each difference and its interval lie on one common axis, all in percent of its width.

    Different units share the axis as percent of what training alone reaches, turned so that right is better. The axis
    ends at four times the reach of most: one noisy task must not flatten the others.
    """
    found = []
    for row in rows:
        if row["local"] is None or row["federated"] is None or _percent(row, 1.0) is None:
            continue
        turn = -1.0 if row["better"] == "lower" else 1.0
        middle = turn * (_percent(row, row["federated"] - row["local"]) or 0.0)
        ends = sorted(turn * (_percent(row, end) or 0.0) for end in row["interval"] or ())
        found.append((row, middle, ends))
    reach = [max(abs(value) for value in (middle, *ends)) for _, middle, ends in found]
    most = 4.0 * float(np.quantile(reach, 0.75)) if reach else 0.0
    values = [0.0, *(min(max(value, -most), most) for _, middle, ends in found for value in (middle, *ends))]
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 1.0
    low, high = low - pad, high + pad

    def place(value: float) -> float:
        return round(100.0 * (min(max(value, low), high) - low) / (high - low), 2)

    return {
        "zero": place(0.0),
        "ticks": [
            (place(tick), f"{tick:+g} %" if tick else "0")
            for tick in MaxNLocator(5).tick_values(low, high)
            if low <= tick <= high
        ],
        "rows": [
            {
                "site": row["site"],
                "task": row["task"],
                "outcome": _outcome(row),
                "middle": place(middle),
                "ends": [place(end) for end in ends],
                "beyond": [value for value in (middle, *ends) if not low <= value <= high],
                "text": f"{_figure(middle, 2, sign=True)} %"
                + (f" [{_figure(ends[0], 2, sign=True)}, {_figure(ends[1], 2, sign=True)}]" if ends else ""),
            }
            for row, middle, ends in found
        ],
    }


def _curves(report: Report) -> list[dict[str, Any]]:
    """A figure a site and task: the validation metric by round, federated against alone."""
    figures = []
    for row in report["sites"]:
        lines = {}
        for who in ("federated", "local"):
            values = [
                (one["round"], value)
                for one in report["rounds"]
                if (value := one.get("curves", {}).get(row["site"], {}).get(f"{row['task']}.{who}")) is not None
            ]
            if values:
                lines[who] = np.asarray(_thin(values), dtype=float)
        if not lines:
            continue

        def draw(axes: Axes, lines: dict[str, NDArray[np.float64]] = lines, row: Mapping[str, Any] = row) -> None:
            for who, line in lines.items():  # (rounds, 2)
                axes.plot(
                    line[:, 0], line[:, 1], color=PAINT[who], linestyle="-" if who == "federated" else (0, (4, 2)),
                    linewidth=1.6, marker="o" if len(line) < 3 else None, markersize=3.5,
                )  # fmt: skip
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.set_xlabel("round")
            axes.set_ylabel(_metric(row))

        last = {who: float(line[-1, 1]) for who, line in lines.items()}
        figures.append({**row, "svg": _svg(f"curve/{row['site']}/{row['task']}", draw), "last": last})
    return figures


def _drawn(report: Report, predictions: Mapping[tuple[str, str], Predictions]) -> list[dict[str, Any]]:
    """A figure a site and task with predictions, in the report's order."""
    order = {(row["site"], row["task"]): at for at, row in enumerate(report["sites"])}
    figures = []
    for site, task in sorted(predictions, key=lambda key: (order.get(key, len(order)), key)):
        one = _labelled(predictions[site, task])
        if not len(one.truth):
            continue
        draw, words = DRAWINGS.get(one.kind, _scatter)(one)
        figures.append(
            {"site": site, "task": task, "words": words, "svg": _svg(f"predictions/{site}/{task}", draw, height=230)}
        )
    return figures


def _labelled(one: Predictions) -> Predictions:
    """Only the rows with a label and finite predictions."""
    kept = np.ones(len(one.truth), dtype=bool)
    for array in (one.truth, one.federated, one.local):
        if array is not None and array.dtype.kind == "f":
            kept &= np.isfinite(array)
    local = None if one.local is None else one.local[kept]
    return Predictions(one.truth[kept], one.federated[kept], local, one.unit, one.kind)


Drawing = tuple[Callable[[Axes], None], str]


def _scatter(one: Predictions) -> Drawing:
    """Predicted against true; on the line is right."""
    shown = np.asarray(_thin(np.argsort(one.truth, kind="stable")))  # spread over the range, not the first rows

    def draw(axes: Axes) -> None:
        both = [one.truth, one.federated] + ([] if one.local is None else [one.local])
        low, high = min(float(each[shown].min()) for each in both), max(float(each[shown].max()) for each in both)
        pad = 0.04 * (high - low) or 1.0
        limits = (low - pad, high + pad)
        if one.local is not None:
            axes.plot(one.truth[shown], one.local[shown], "o", color="none", markersize=3.2,
                      markeredgecolor=PAINT["local"], markeredgewidth=0.7, alpha=0.55)  # fmt: skip
        axes.plot(one.truth[shown], one.federated[shown], "o", color=PAINT["federated"], markersize=3,
                  markeredgewidth=0, alpha=0.7)  # fmt: skip
        axes.plot(limits, limits, color=PAINT["ink"], linewidth=0.9)
        axes.set(xlim=limits, ylim=limits, xlabel=f"true ({one.unit})" if one.unit else "true", ylabel="predicted")
        axes.xaxis.set_major_locator(MaxNLocator(5))

    return draw, f"{len(one.truth):,} test rows" + (f", {len(shown)} shown" if len(shown) < len(one.truth) else "")


def _roc(one: Predictions) -> Drawing:
    """Share of true alarms against share of false ones; with one class only, how the scores spread."""
    positive = one.truth.astype(float) > 0.5
    if positive.all() or not positive.any():
        return _histogram(one), f"{len(positive):,} test rows, all {'positive' if positive.all() else 'negative'}"
    lines = {}
    for who, score in (("local", one.local), ("federated", one.federated)):
        if score is not None:
            lines[who] = _roc_curve(positive, score.astype(float))

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=PAINT["muted"], linewidth=0.8)
        for who, line in lines.items():
            line = np.asarray(_thin(line))
            axes.plot(line[:, 0], line[:, 1], color=PAINT[who], linewidth=1.6,
                      linestyle="-" if who == "federated" else (0, (4, 2)))  # fmt: skip
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="false alarms (share)", ylabel="found (share)")

    areas = {who: float(np.trapezoid(line[:, 1], line[:, 0])) for who, line in lines.items()}
    alone = f", {areas['local']:.3f} alone" if "local" in areas else ""
    return draw, f"ROC area {areas['federated']:.3f} federated{alone}; {len(positive):,} test rows"


def _roc_curve(positive: NDArray[np.bool_], score: NDArray[np.float64]) -> NDArray[np.float64]:
    """(thresholds + 1, 2): false and true positive rate from (0, 0) to (1, 1); rows of equal score are one step."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)  # the last row of each distinct score
    hits, misses = np.cumsum(positive[order])[last], np.cumsum(~positive[order])[last]
    return np.vstack([[0.0, 0.0], np.stack([misses / misses[-1], hits / hits[-1]], axis=1)])


def _histogram(one: Predictions) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        axes.hist(one.federated.astype(float), bins=20, color=PAINT["federated"], alpha=0.7)
        if one.local is not None:
            axes.hist(one.local.astype(float), bins=20, histtype="step", color=PAINT["local"], linewidth=1.4)
        axes.set(xlabel="score", ylabel="test rows")

    return draw


def _confusion(one: Predictions) -> Drawing:
    """Of each true class, the share predicted as each class (federated)."""
    names, counts = np.unique(np.concatenate([one.truth, one.federated]), return_counts=True)
    kept = names
    if len(names) > MOST_CLASSES:
        kept = np.sort(names[np.argsort(-counts, kind="stable")[: MOST_CLASSES - 1]])
    labels = [_class_name(name) for name in kept] + (["other"] if len(kept) < len(names) else [])
    matrix = np.zeros((len(labels), len(labels)))
    np.add.at(matrix, (_place_in(kept, one.truth), _place_in(kept, one.federated)), 1.0)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1.0)

    def draw(axes: Axes) -> None:
        for row in range(len(labels)):
            for column in range(len(labels)):
                value = float(share[row, column])
                if matrix[row, column]:
                    cell = Rectangle((column - 0.5, row - 0.5), 1, 1, linewidth=0)
                    cell.set(color=PAINT["federated"], alpha=0.06 + 0.64 * value)
                    axes.add_patch(cell)
                    if len(labels) <= 8:
                        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=PAINT["ink"])
        ticks = range(len(labels))
        end = len(labels) - 0.5
        axes.set(xlim=(-0.5, end), ylim=(end, -0.5), xlabel="predicted", ylabel="true (% of row)")
        longest = max(map(len, labels))
        upright = longest * len(labels) >= 34
        left, bottom = 0.09 + 0.018 * longest, 0.09 + (0.022 * longest if upright else 0.05)
        axes.set_position((left, bottom, 0.97 - left, 0.97 - bottom))
        axes.set_xticks(ticks, labels, rotation=90 if upright else 0)
        axes.set_yticks(ticks, labels)
        axes.grid(visible=False)

    right = 100.0 * float(np.mean(one.truth == one.federated))
    alone = "" if one.local is None else f", {100.0 * float(np.mean(one.truth == one.local)):.0f} % alone"
    return draw, f"{right:.0f} % right federated{alone}; {len(one.truth):,} test rows"


def _place_in(kept: NDArray[Any], values: NDArray[Any]) -> NDArray[np.intp]:
    """Index of each value in the sorted `kept`; one past the end for what is not there."""
    at = np.minimum(np.searchsorted(kept, values), len(kept) - 1)
    return np.where(kept[at] == values, at, len(kept))


def _class_name(name: Any) -> str:
    text = f"{name:g}" if isinstance(name, float | np.floating) else str(name)
    return text if len(text) <= 12 else f"{text[:11]}…"


DRAWINGS: dict[str, Callable[[Predictions], Drawing]] = {
    "regression": _scatter,
    "binary": _roc,
    "multiclass": _confusion,
}


def _thin(values: Any) -> Any:
    """At most MOST_POINTS of `values`, evenly spread, first and last included."""
    if len(values) <= MOST_POINTS:
        return values
    return [values[at] for at in np.linspace(0, len(values) - 1, MOST_POINTS).round().astype(int)]


# Matplotlib wants a colour, the page has two themes: each stands-in below is replaced by the theme's own.
PAINT = {"ink": "#010101", "muted": "#020202", "grid": "#030303", "federated": "#040404", "local": "#050505"}


def _svg(name: str, draw: Callable[[Axes], None], width: int = 260, height: int = 175) -> Markup:
    """One figure as inline SVG of so many points, without ids or references that could meet another figure's."""
    figure = Figure(figsize=(width / 72, height / 72))
    left, bottom = 44, 32
    axes = figure.add_axes((left / width, bottom / height, (width - left - 8) / width, (height - bottom - 8) / height))
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.grid(color=PAINT["grid"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(PAINT["muted"])
    draw(axes)
    axes.tick_params(color=PAINT["muted"], labelcolor=PAINT["muted"], labelsize=8, length=2.5)
    axes.xaxis.label.set_color(PAINT["muted"])
    axes.yaxis.label.set_color(PAINT["muted"])
    mpl.rcParams["svg.hashsalt"] = name  # ids from the name: unique on the page, and the same in every run
    file = io.StringIO()
    with warnings.catch_warnings():
        # matplotlib's own font lacks a letter (a unit in Chinese): the browser draws the text, and it has one
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", _lean, text)
    return Markup(re.sub(r">\s+<", "><", text).strip())


def _lean(tag: re.Match[str]) -> str:
    """One SVG tag without namespaces, unused ids, fixed sizes, foreign fonts and digits nobody can see."""
    text = tag[0]
    if text.startswith("<svg"):
        box_ = re.search(r'viewBox="[^"]*"', text)
        return f'<svg {box_[0] if box_ else ""} aria-hidden="true">'
    text = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text).replace("xlink:href", "href")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"(\.\d\d)\d+", r"\1", text)
    for part, stand_in in PAINT.items():
        text = text.replace(stand_in, f"var(--{part})")
    return text
