"""report.html: one file without a single outside reference, so that it opens in a plant without internet."""

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
        predictions: (site, task) -> test rows to draw; empty where rows may not be seen.
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
        if row["local"] is None or row["federated"] is None or percent(row, 1.0) is None:
            continue
        turn = -1.0 if row["better"] == "lower" else 1.0
        middle = turn * (percent(row, row["federated"] - row["local"]) or 0.0)
        ends = sorted(turn * (percent(row, end) or 0.0) for end in row["interval"] or ())
        reached = row.get("gated")
        gated = None if reached is None else turn * (percent(row, reached - row["local"]) or 0.0)
        found.append((row, middle, ends, gated))
    reach = [max(abs(value) for value in (middle, *ends)) for _, middle, ends, _ in found]
    most = 4.0 * float(np.quantile(reach, 0.75)) if reach else 0.0
    values = [
        0.0,
        *(min(max(value, -most), most) for _, middle, ends, gated in found for value in (middle, *ends, gated or 0.0)),
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
                # as it came and as chosen are the same dot most of the time
                "gated": None if gated is None or row["chosen"] == "federated" else place(gated),
                "chosen": row["chosen"],
                "beyond": [value for value in (middle, *ends) if not low <= value <= high],
                "text": f"{figure(middle, 2, sign=True)} %"
                + (f" [{figure(ends[0], 2, sign=True)}, {figure(ends[1], 2, sign=True)}]" if ends else ""),
            }
            for row, middle, ends, gated in found
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
                lines[who] = np.asarray(thin(values), dtype=float)
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
            axes.set_ylabel(metric(row))

        last = {who: float(line[-1, 1]) for who, line in lines.items()}
        figures.append({**row, "svg": svg(f"curve/{row['site']}/{row['task']}", draw), "last": last})
    return figures


def _pace(report: Report) -> dict[str, Any]:
    """The loss of a buffered run against time; nothing for any other."""
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
    order = {(row["site"], row["task"]): at for at, row in enumerate(report["sites"])}
    figures = []
    for site, task in sorted(predictions, key=lambda key: (order.get(key, len(order)), key)):
        for one in drawings(predictions[site, task]):
            name = f"{task}, {one.name}" if one.name else task
            drawn = svg(f"predictions/{site}/{name}", one.draw, height=230)
            figures.append({"site": site, "task": name, "words": one.words, "svg": drawn})
    return figures


def _candidates(report: Report) -> dict[str, Any]:
    """Every candidate of every gate on the test rows: which names there are, and the rows that have any."""
    rows = [row for row in report["sites"] if row.get("candidates")]
    found = {name for row in rows for name in row["candidates"]}
    usual = [name for name in CANDIDATES if name in found]
    return {"names": [*usual, *sorted(found - set(usual))], "rows": rows}


def _heat(report: Report) -> list[dict[str, Any]]:
    """The conflict matrices as cells: a cosine in words, whether it helps or hurts, and how strong its colour is."""
    entries = []
    for entry in report.get("conflicts", []):
        cells = [
            [
                {
                    "text": "" if one == other or cosine is None else f"{cosine:+.2f}",
                    "side": "good" if (cosine or 0.0) > 0 else "bad",
                    "strength": 0 if one == other or cosine is None else round(90 * min(abs(cosine), 1.0) ** 0.7),
                }
                for other, cosine in enumerate(line)
            ]
            for one, line in enumerate(entry["cosines"])
        ]
        entries.append({**entry, "cells": cells, "words": sentences(entry)})
    return entries
