"""report.html: one file without any outside reference, so that it opens in a plant without internet access."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from rich import filesize

from trunkline.server.reporting.plots import PAINT, Predictions, drawings, house_style, svg, thin
from trunkline.server.reporting.summary import (
    Report,
    after_gate,
    buffered_in_words,
    cohorts_of,
    compared,
    difference,
    duration,
    figure,
    in_rounds,
    interval,
    metric,
    outcome,
    pace_of,
    percent,
    refusals_of,
    sentence,
    traffic,
    value,
)
from trunkline.server.reporting.task_conflicts import sentences

MOST_ROUNDS = 300  # rows of the rounds table; report.json has all
CANDIDATES = ("local", "federated", "shared", "finetuned", "fused", "ensemble")  # in the order they are shown


def page(report: Report, predictions: Mapping[tuple[str, str], Predictions]) -> str:
    """The whole page of one report.

    Args:
        predictions: (site, task) -> test rows to draw; empty if rows may not be shown.
    """
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    house = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    house.filters |= {
        "figure": figure, "value": value, "metric": metric, "difference": difference, "interval": interval, "outcome": outcome,
        "duration": duration, "in_rounds": in_rounds, "bytes": lambda count: filesize.decimal(round(count)),
        "gated_outcome": lambda row: outcome(row, after_gate(row)),
        "gated_difference": lambda row: difference(row, after_gate(row)),
        "gated_interval": lambda row: interval(row, after_gate(row)),
    }  # fmt: skip
    rounds = report["rounds"]
    step = math.ceil(len(rounds) / MOST_ROUNDS) or 1
    with house_style():
        curves, drawn, pace = _curves(report), _drawn(report, predictions), _pace(report)
    return house.get_template("report.html").render(
        report=report,
        run=report["run"],
        sentence=sentence(report),
        gated_sentence=sentence(report, "gated") if compared(report) else "",
        outcomes=[outcome(row) for row in report["sites"]],
        gated_outcomes=[outcome(row, after_gate(row)) for row in report["sites"]],
        traffic=traffic(report),
        refusals=refusals_of(report),
        forest=_forest(report["sites"]),
        curves=curves,
        predictions=drawn,
        candidates=_candidates(report),
        conflicts=_heat(report),
        cohorts=cohorts_of(report),
        buffered=report.get("buffered"),
        buffered_words=buffered_in_words(report),
        pace=pace,
        rounds=[record for index, record in enumerate(rounds) if index % step == 0 or index == len(rounds) - 1],
        version=report.get("trunkline", "?"),
        cohort=report.get("cohort", []),
        done=max((record["round"] for record in rounds), default=0),
    )


def _forest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The positions of each difference and its interval on a common axis, in percent of its width.

    The axis is in percent of the local baseline's value, so that units compare, with the better side on the right. It ends at
    four times the third quartile, so that one noisy task does not flatten the others.
    """
    entries = []
    for row in rows:
        if row["local"] is None or row["federated"] is None or percent(row, 1.0) is None:
            continue
        turn = -1.0 if row["better"] == "lower" else 1.0
        middle = turn * (percent(row, row["federated"] - row["local"]) or 0.0)
        ends = sorted(turn * (percent(row, end) or 0.0) for end in row["interval"] or ())
        reached = row.get("gated")
        gated = None if reached is None else turn * (percent(row, reached - row["local"]) or 0.0)
        entries.append((row, middle, ends, gated))
    reach = [max(abs(value) for value in (middle, *ends)) for _, middle, ends, _ in entries]
    most = 4.0 * float(np.quantile(reach, 0.75)) if reach else 0.0
    values = [
        0.0,
        *(
            min(max(value, -most), most)
            for _, middle, ends, gated in entries
            for value in (middle, *ends, gated or 0.0)
        ),
    ]
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
                "outcome": outcome(row),
                "middle": place(middle),
                "ends": [place(end) for end in ends],
                # most of the time the chosen model is the federated one, with the same dot
                "gated": None if gated is None or row["chosen"] == "federated" else place(gated),
                "chosen": row["chosen"],
                "beyond": [value for value in (middle, *ends) if not low <= value <= high],
                "text": f"{figure(middle, 2, sign=True)} %"
                + (f" [{figure(ends[0], 2, sign=True)}, {figure(ends[1], 2, sign=True)}]" if ends else ""),
            }
            for row, middle, ends, gated in entries
        ],
    }


def _curves(report: Report) -> list[dict[str, Any]]:
    """A figure for each site and task: the validation metric by round, federated and local."""
    figures = []
    for row in report["sites"]:
        lines = {}
        for model in ("federated", "local"):
            values = [
                (record["round"], value)
                for record in report["rounds"]
                if (value := record.get("curves", {}).get(row["site"], {}).get(f"{row['task']}.{model}")) is not None
            ]
            if values:
                lines[model] = np.asarray(thin(values), dtype=float)
        if not lines:
            continue

        def draw(axes: Axes, lines: dict[str, NDArray[np.float64]] = lines, row: Mapping[str, Any] = row) -> None:
            for model, line in lines.items():  # (rounds, 2)
                axes.plot(
                    line[:, 0], line[:, 1], color=PAINT[model], linestyle="-" if model == "federated" else (0, (4, 2)),
                    linewidth=1.6, marker="o" if len(line) < 3 else None, markersize=3.5,
                )  # fmt: skip
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.set_xlabel("round")
            axes.set_ylabel(metric(row))

        last = {model: float(line[-1, 1]) for model, line in lines.items()}
        figures.append({**row, "svg": svg(f"curve/{row['site']}/{row['task']}", draw), "last": last})
    return figures


def _pace(report: Report) -> dict[str, Any]:
    """The loss of a buffered run against time; empty for any other run."""
    line = np.asarray(thin(pace_of(report)), dtype=float) if report.get("buffered") else np.zeros((0, 2))  # (steps, 2)
    if not len(line):
        return {}
    unit, scale = next(
        ((name, size) for name, size in (("h", 3600.0), ("min", 60.0)) if line[-1, 0] >= 2 * size), ("s", 1.0)
    )

    def draw(axes: Axes) -> None:
        axes.plot(
            line[:, 0] / scale, line[:, 1], color=PAINT["federated"], linewidth=1.6,
            marker="o" if len(line) < 3 else None, markersize=3.5,
        )  # fmt: skip
        axes.set_xlabel(unit)
        axes.set_ylabel("validation loss")

    virtual = report["rounds"][-1].get("virtual_seconds") is not None
    return {"svg": svg("pace", draw, width=420, height=210), "virtual": virtual, "last": float(line[-1, 1])}


def _drawn(report: Report, predictions: Mapping[tuple[str, str], Predictions]) -> list[dict[str, Any]]:
    """The figures of every site and task with predictions, in the report's order."""
    order = {(row["site"], row["task"]): index for index, row in enumerate(report["sites"])}
    figures = []
    for site, task in sorted(predictions, key=lambda key: (order.get(key, len(order)), key)):
        for drawing in drawings(predictions[site, task]):
            name = f"{task}, {drawing.name}" if drawing.name else task
            figure = svg(f"predictions/{site}/{name}", drawing.draw, height=230)
            figures.append({"site": site, "task": name, "words": drawing.words, "svg": figure})
    return figures


def _candidates(report: Report) -> dict[str, Any]:
    """The candidates of the gates on the test rows: their names, and the rows that have any."""
    rows = [row for row in report["sites"] if row.get("candidates")]
    available = {name for row in rows for name in row["candidates"]}
    usual = [name for name in CANDIDATES if name in available]
    return {"names": [*usual, *sorted(available - set(usual))], "rows": rows}


def _heat(report: Report) -> list[dict[str, Any]]:
    """The conflict matrices as cells: the cosine as text, its side (good or bad), and the strength of its colour."""
    entries = []
    for entry in report.get("conflicts", []):
        cells = [
            [
                {
                    "text": "" if first == second or cosine is None else f"{cosine:+.2f}",
                    "side": "good" if (cosine or 0.0) > 0 else "bad",
                    "strength": 0 if first == second or cosine is None else round(90 * min(abs(cosine), 1.0) ** 0.7),
                }
                for second, cosine in enumerate(line)
            ]
            for first, line in enumerate(entry["cosines"])
        ]
        entries.append({**entry, "cells": cells, "words": sentences(entry)})
    return entries
