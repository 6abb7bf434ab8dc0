"""Figures of the page as inline SVG: what a site predicted and what was true, one way of drawing a task kind."""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from trunkline.errors import DataError

MOST_POINTS = 400  # of a scatter or a curve; more cannot be told apart on a page and cost megabytes
MOST_CLASSES = 12  # of a confusion matrix; the rarer ones are counted together
MOST_LABELS = 12  # bars of a multilabel task: half of them the best ranked labels, half the worst
STRETCH = 160  # rows of a forecast that are drawn; more of them and the band cannot be seen


@dataclass(frozen=True)
class Predictions:
    """Test rows of one site and task. They exist only where rows may be seen: in a simulation or at the plant itself.

    Shape:
        The first axis is the test row everywhere; NaN in `truth` where a row has no label.
        regression: truth, federated and local (n,), in `unit`. binary: truth (n,) of 0 and 1, and scores (n,) that grow
        with the chance of 1. multiclass, ordinal: truth (n,) of classes or their places in `names`; classes (n,) or
        probabilities (n, classes). multilabel: (n, labels), of `names`. forecast: truth (n, H), predictions (n, H, Q).
        anomaly: truth (n,) of 0 and 1, and scores (n,), each with its threshold.

    Args:
        groups: (n,) which machine or stretch of time a row belongs to; order: (n,) its time within that.
        names: of classes or labels. quantiles, horizons: of a forecast. thresholds: "federated", "local" -> where an
            anomaly is called.

    Raises:
        DataError: an array has another number of rows than `truth`, or another number of axes than its kind has.
    """

    truth: NDArray[Any]
    federated: NDArray[Any]
    local: NDArray[Any] | None
    unit: str
    kind: str
    groups: NDArray[Any] | None = None
    order: NDArray[Any] | None = None
    names: tuple[str, ...] = ()
    quantiles: tuple[float, ...] = ()
    horizons: tuple[int, ...] = ()
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        deep = {"multilabel": (2,), "forecast": (3,), "multiclass": (1, 2), "ordinal": (1, 2)}.get(self.kind, (1,))
        for name, axes in (("federated", deep), ("local", deep), ("groups", (1,)), ("order", (1,))):
            found = getattr(self, name)
            if found is not None and (found.shape[:1] != self.truth.shape[:1] or found.ndim not in axes):
                raise DataError(
                    f"Predictions.{name} of kind {self.kind!r} should have one entry a test row, in {axes[-1]} axes. "
                    f"Found shape {found.shape} beside truth {self.truth.shape}; pass what the task's `predict` gave."
                )

    @classmethod
    def kept(
        cls, tensors: Mapping[str, NDArray[Any]], about: Mapping[str, Any], *, unit: str, kind: str
    ) -> "Predictions":
        """Out of what a site keeps of its evaluation: arrays by name, and `about` the task and each model's state of it."""
        task, states = about.get("task", {}), about.get("states", {})
        truth, groups, order = tensors["truth"], tensors.get("groups"), tensors.get("order")
        if kind == "forecast":
            truth = truth[:, : tensors["federated"].shape[1]]  # behind the values to come lie the naive forecasts
        if kind == "anomaly" and truth.ndim == 2:
            truth = truth[:, 0]  # the row's own flag; behind it, what its window and its stretch of time are
        classes = states.get("federated", {}).get("classes", ())
        thresholds = {who: state.get("threshold") for who, state in states.items()}
        return cls(
            truth=truth,
            federated=tensors["federated"],
            local=tensors.get("local"),
            unit=str(task.get("unit", "")) if kind == "forecast" else unit,  # its metrics have units of their own
            kind=kind,
            groups=groups,
            order=order,
            names=tuple(map(str, task.get("targets", ()) if kind == "multilabel" else classes)),
            quantiles=tuple(task.get("quantiles", ())),
            horizons=tuple(task.get("horizons", ())),
            thresholds={who: one for who, one in thresholds.items() if isinstance(one, float)},
        )

    def labelled(self) -> "Predictions":
        """Only the rows with a label and finite predictions."""
        kept = np.ones(len(self.truth), dtype=bool)
        for array, any_will_do in ((self.truth, True), (self.federated, False), (self.local, False)):
            if array is not None and array.dtype.kind == "f":
                there = np.isfinite(array).reshape(len(array), -1)
                kept &= there.any(axis=1) if any_will_do else there.all(axis=1)

        def some(array: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if array is None else array[kept]

        return replace(
            self,
            truth=self.truth[kept],
            federated=self.federated[kept],
            local=some(self.local),
            groups=some(self.groups),
            order=some(self.order),
        )


@dataclass(frozen=True)
class Drawing:
    """One figure of a task: what it is called beside the task's name, a line about it, and how it is drawn."""

    name: str
    words: str
    draw: Callable[[Axes], None]


def drawings(predictions: Predictions) -> list[Drawing]:
    """The figures of one site and task; none where no row can be shown."""
    one = predictions.labelled()
    return DRAWINGS.get(one.kind, _scatter)(one) if len(one.truth) else []


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib as it is installed: a user's own matplotlibrc must not change the bytes."""
    with mpl.rc_context():
        mpl.rcdefaults()
        # text stays text: small, selectable, in the page's font. A unit like `$` is no formula.
        mpl.rcParams.update({"svg.fonttype": "none", "text.parse_math": False, "font.size": 8.5})
        yield


def _scatter(one: Predictions) -> list[Drawing]:
    """Predicted against true; on the line is right."""
    shown = np.asarray(thin(np.argsort(one.truth, kind="stable")))  # spread over the range, not the first rows

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

    words = f"{len(one.truth):,} test rows" + (f", {len(shown)} shown" if len(shown) < len(one.truth) else "")
    return [Drawing("", words, draw)]


def _roc(one: Predictions) -> list[Drawing]:
    """Share of true alarms against share of false ones; with one class only, how the scores spread."""
    positive = one.truth.astype(float) > 0.5
    if positive.all() or not positive.any():
        words = f"{len(positive):,} test rows, all {'positive' if positive.all() else 'negative'}"
        return [Drawing("", words, _histogram(one))]
    lines = {}
    for who, score in (("local", one.local), ("federated", one.federated)):
        if score is not None:
            lines[who] = _roc_curve(positive, score.astype(float))

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=PAINT["muted"], linewidth=0.8)
        for who, line in lines.items():
            line = np.asarray(thin(line))
            axes.plot(line[:, 0], line[:, 1], color=PAINT[who], linewidth=1.6,
                      linestyle="-" if who == "federated" else (0, (4, 2)))  # fmt: skip
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="false alarms (share)", ylabel="found (share)")

    areas = {who: float(np.trapezoid(line[:, 1], line[:, 0])) for who, line in lines.items()}
    alone = f", {areas['local']:.3f} alone" if "local" in areas else ""
    return [Drawing("", f"ROC area {areas['federated']:.3f} federated{alone}; {len(positive):,} test rows", draw)]


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


def _confusion(one: Predictions) -> list[Drawing]:
    """Of each true class, the share predicted as each class (federated)."""
    truth, federated = one.truth, _likeliest(one.federated)
    local = None if one.local is None else _likeliest(one.local)
    names, counts = np.unique(np.concatenate([truth, federated]), return_counts=True)
    kept = names
    if len(names) > MOST_CLASSES:
        kept = np.sort(names[np.argsort(-counts, kind="stable")[: MOST_CLASSES - 1]])
    labels = [_class_name(name, one.names) for name in kept] + (["other"] if len(kept) < len(names) else [])
    matrix = np.zeros((len(labels), len(labels)))
    np.add.at(matrix, (_place_in(kept, truth), _place_in(kept, federated)), 1.0)
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

    words = f"{100.0 * float(np.mean(truth == federated)):.0f} % right federated"
    words += "" if local is None else f", {100.0 * float(np.mean(truth == local)):.0f} % alone"
    if one.kind == "ordinal" and truth.dtype.kind in "fi":
        words += f"; off by {float(np.abs(truth - federated).mean()):.2f} grades on average"
    return [Drawing("", f"{words}; {len(truth):,} test rows", draw)]


def _likeliest(prediction: NDArray[Any]) -> NDArray[Any]:
    """Class probabilities (n, classes) -> the likeliest class (n,); classes as they are."""
    return prediction.argmax(axis=1) if prediction.ndim == 2 else prediction


def _place_in(kept: NDArray[Any], values: NDArray[Any]) -> NDArray[np.intp]:
    """Index of each value in the sorted `kept`; one past the end for what is not there."""
    at = np.minimum(np.searchsorted(kept, values), len(kept) - 1)
    return np.where(kept[at] == values, at, len(kept))


def _class_name(name: Any, names: tuple[str, ...] = ()) -> str:
    number = isinstance(name, int | float | np.integer | np.floating)
    text = f"{name:g}" if isinstance(name, float | np.floating) else str(name)
    if number and names and 0 <= int(name) < len(names):
        text = names[int(name)]
    return text if len(text) <= 12 else f"{text[:11]}…"


def _labels(one: Predictions) -> list[Drawing]:
    """How well each of many labels is ranked: the best and the worst, federated against alone."""
    truth = one.truth > 0.5
    there = [label for label in range(truth.shape[1]) if truth[:, label].any() and not truth[:, label].all()]
    if not there:
        return []
    found = {
        who: np.array([average_precision(truth[:, label], score[:, label]) for label in there])
        for who, score in (("federated", one.federated), ("local", one.local))
        if score is not None
    }
    order = np.argsort(-found["federated"], kind="stable")
    half = MOST_LABELS // 2
    shown = order if len(order) <= MOST_LABELS else np.concatenate([order[:half], order[-half:]])
    names = [_class_name(one.names[there[at]] if one.names else there[at]) for at in shown]

    def draw(axes: Axes) -> None:
        place = np.arange(len(shown), dtype=float)
        axes.barh(place, found["federated"][shown], height=0.62, color=PAINT["federated"], alpha=0.75, linewidth=0)
        if "local" in found:
            axes.plot(found["local"][shown], place, "o", color="none", markersize=4.5, markeredgecolor=PAINT["local"],
                      markeredgewidth=1.2)  # fmt: skip
        axes.set(xlim=(0, 1.02), ylim=(len(shown) - 0.4, -0.6), xlabel="average precision")
        left = 0.06 + 0.018 * max(map(len, names))
        axes.set_position((left, 0.16, 0.97 - left, 0.81))
        axes.set_yticks(place, names)
        axes.grid(visible=False, axis="y")

    some = (
        f"the {half} best and {half} worst of {len(there)} labels"
        if len(shown) < len(there)
        else f"{len(there)} labels"
    )
    alone = f", {found['local'].mean():.3f} alone" if "local" in found else ""
    words = f"mean average precision {found['federated'].mean():.3f} federated{alone}; {some}; {len(truth):,} test rows"
    return [Drawing("", words, draw)]


def average_precision(positive: NDArray[np.bool_], score: NDArray[Any]) -> float:
    """Precision at each positive row, going down the scores, averaged; rows of equal score are one step."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)
    hits, called = np.cumsum(positive[order])[last], np.flatnonzero(last) + 1
    return float((np.diff(hits, prepend=0) * hits / called).sum() / hits[-1])


def _future(one: Predictions) -> list[Drawing]:
    """A stretch of what came, with the band that was said beforehand; and whether the quantiles keep their word."""
    levels = np.array(one.quantiles or np.linspace(0.0, 1.0, one.federated.shape[2] + 2)[1:-1])
    middle, far = int(np.argmin(np.abs(levels - 0.5))), one.truth.shape[1] // 2
    ahead = f"{one.horizons[far]} rows ahead" if one.horizons else f"horizon {far + 1}"
    order = np.argsort(one.order, kind="stable") if one.order is not None else np.arange(len(one.truth))
    if one.groups is not None:  # the machine with most rows
        names, count = np.unique(one.groups, return_counts=True)
        order = order[one.groups[order] == names[np.argmax(count)]]
    stretch = order[max(0, (len(order) - STRETCH) // 2) :][:STRETCH]
    truth = one.truth[stretch, far]

    def draw(axes: Axes) -> None:
        x = np.arange(len(stretch))
        if len(levels) > 1:
            low, high = one.federated[stretch, far, 0], one.federated[stretch, far, -1]
            axes.fill_between(x, low, high, color=PAINT["federated"], alpha=0.22, linewidth=0)
        if one.local is not None:
            axes.plot(x, one.local[stretch, far, middle], color=PAINT["local"], linewidth=1.0, linestyle=(0, (4, 2)))
        axes.plot(x, one.federated[stretch, far, middle], color=PAINT["federated"], linewidth=1.3)
        axes.plot(x, truth, color=PAINT["ink"], linewidth=1.0)
        axes.set(xlabel=f"rows, one machine ({ahead})", ylabel=one.unit or "value")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    found = {
        who: _below(one.truth, each)
        for who, each in (("federated", one.federated), ("local", one.local))
        if each is not None
    }

    def reliability(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=PAINT["ink"], linewidth=0.9)
        for who, share in found.items():
            axes.plot(levels, share, marker="o", color=PAINT[who], linewidth=1.4, markersize=4,
                      linestyle="-" if who == "federated" else (0, (4, 2)))  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="said: stays below with this chance", ylabel="was below (share)")

    words = f"truth dark, {ahead}; {len(one.truth):,} test rows"
    if len(levels) < 2:
        return [Drawing("", words, draw)]
    said, kept = 100 * (levels[-1] - levels[0]), 100 * (found["federated"][-1] - found["federated"][0])
    words += f"; the {said:.0f} % band holds {kept:.0f} %"
    return [Drawing("", words, draw), Drawing("reliability", "on the line, quantiles keep their word", reliability)]


def _below(truth: NDArray[Any], prediction: NDArray[Any]) -> NDArray[np.float64]:
    """(n, H), (n, H, Q) -> (Q,): the share of values that lie at or below each quantile."""
    there = ~np.isnan(truth)
    share: NDArray[np.float64] = (truth[..., None] <= prediction)[there].mean(axis=0)
    return share


def _alarms(one: Predictions) -> list[Drawing]:
    """Score over time, in units of the threshold, with what was really wrong shaded."""
    truth = one.truth > 0.5
    order = np.argsort(one.order, kind="stable") if one.order is not None else np.arange(len(truth))
    if one.groups is not None:  # the stretch with most true alarms, or else the longest
        place = np.unique(one.groups, return_inverse=True)[1]
        flagged, rows = np.bincount(place, weights=truth), np.bincount(place)
        order = order[place[order] == int(np.lexsort((rows, flagged))[-1])]
    lines = {}
    for who, score in (("local", one.local), ("federated", one.federated)):
        if score is not None:
            scale = one.thresholds.get(who) or float(np.quantile(score, 0.99)) or 1.0
            lines[who] = np.maximum(score.astype(float) / abs(scale), 1e-3)
    cuts = np.array_split(order, min(MOST_POINTS, len(order)))

    def draw(axes: Axes) -> None:
        x = np.linspace(0, len(order), len(cuts), endpoint=False)
        width = len(order) / len(cuts)
        for start in x[np.array([truth[cut].any() for cut in cuts])]:
            axes.axvspan(start - width / 2, start + width / 2, color=PAINT["bad"], alpha=0.2, linewidth=0)
        axes.axhline(1.0, color=PAINT["ink"], linewidth=0.9)
        for who, line in lines.items():
            highest = [float(line[cut].max()) for cut in cuts]  # a thinned peak would be a lost alarm
            axes.plot(x, highest, color=PAINT[who], linewidth=1.2 if who == "federated" else 0.9,
                      linestyle="-" if who == "federated" else (0, (4, 2)))  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.set(xlabel="rows, one stretch of time", ylabel="score / threshold")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    called = lines["federated"] > 1.0
    hits, wrong = int((called & truth).sum()), int(truth.sum())
    words = f"shaded: truly wrong; {hits:,} of {wrong:,} such rows called, {int((called & ~truth).sum()):,} false; {len(truth):,} test rows"
    return [Drawing("", words, draw)]


DRAWINGS: dict[str, Callable[[Predictions], list[Drawing]]] = {
    "regression": _scatter,
    "binary": _roc,
    "multiclass": _confusion,
    "ordinal": _confusion,
    "multilabel": _labels,
    "forecast": _future,
    "anomaly": _alarms,
}


def thin(values: Any) -> Any:
    """At most MOST_POINTS of `values`, evenly spread, first and last included."""
    if len(values) <= MOST_POINTS:
        return values
    return [values[at] for at in np.linspace(0, len(values) - 1, MOST_POINTS).round().astype(int)]


# Matplotlib wants a colour, the page has two themes: each stands-in below is replaced by the theme's own.
PAINT = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "federated": "#040404",
    "local": "#050505",
    "bad": "#060606",
}


def svg(name: str, draw: Callable[[Axes], None], width: int = 260, height: int = 175) -> Markup:
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
