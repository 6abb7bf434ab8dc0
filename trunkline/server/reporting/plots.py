"""Figures of the page as inline SVG: predicted and true values, with one drawing for each task kind."""

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

MOST_POINTS = 400  # of a scatter or a curve; more cannot be distinguished on a page and cost megabytes
MOST_CLASSES = 12  # of a confusion matrix; the rarer ones are counted together
MOST_LABELS = 12  # bars of a multilabel task: half of them the best ranked labels, half the worst
STRETCH = 160  # rows of a forecast that are drawn; with more rows the band cannot be seen


@dataclass(frozen=True)
class Predictions:
    """Test rows of one site and task. They exist only where rows may be shown: in a simulation or at the plant itself.

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
            array = getattr(self, name)
            if array is not None and (array.shape[:1] != self.truth.shape[:1] or array.ndim not in axes):
                raise DataError(
                    f"Predictions.{name} of kind {self.kind!r} should have one entry a test row, in {axes[-1]} axes. "
                    f"Found shape {array.shape} beside truth {self.truth.shape}; pass what the task's `predict` gave."
                )

    @classmethod
    def from_stored(
        cls, tensors: Mapping[str, NDArray[Any]], about: Mapping[str, Any], *, unit: str, kind: str
    ) -> "Predictions":
        """From the files of a site's evaluation: arrays by name, and `about` with the task and each model's state."""
        task, states = about.get("task", {}), about.get("states", {})
        truth, groups, order = tensors["truth"], tensors.get("groups"), tensors.get("order")
        if kind == "forecast":
            truth = truth[:, : tensors["federated"].shape[1]]  # the naive forecasts follow the true values
        if kind == "anomaly" and truth.ndim == 2:
            truth = truth[:, 0]  # the row's own flag; those of its window and its stretch of time follow
        classes = states.get("federated", {}).get("classes", ())
        thresholds = {model: state.get("threshold") for model, state in states.items()}
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
            thresholds={model: threshold for model, threshold in thresholds.items() if isinstance(threshold, float)},
        )

    def labelled(self) -> "Predictions":
        """Only the rows with a label and finite predictions."""
        kept = np.ones(len(self.truth), dtype=bool)
        for array, needs_one in ((self.truth, True), (self.federated, False), (self.local, False)):
            if array is not None and array.dtype.kind == "f":
                is_finite = np.isfinite(array).reshape(len(array), -1)
                kept &= is_finite.any(axis=1) if needs_one else is_finite.all(axis=1)

        def select(array: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if array is None else array[kept]

        return replace(
            self,
            truth=self.truth[kept],
            federated=self.federated[kept],
            local=select(self.local),
            groups=select(self.groups),
            order=select(self.order),
        )


@dataclass(frozen=True)
class Drawing:
    """One figure of a task: its name beside the task's, a caption, and the function that draws it."""

    name: str
    words: str
    draw: Callable[[Axes], None]


def drawings(predictions: Predictions) -> list[Drawing]:
    """The figures of one site and task; none if no row can be shown."""
    shown = predictions.labelled()
    return DRAWINGS.get(shown.kind, _scatter)(shown) if len(shown.truth) else []


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib as it is installed: a user's own matplotlibrc must not change the bytes."""
    with mpl.rc_context():
        mpl.rcdefaults()
        # text stays text: small, selectable, in the page's font; a unit such as `$` is not a formula
        mpl.rcParams.update({"svg.fonttype": "none", "text.parse_math": False, "font.size": 8.5})
        yield


def _scatter(predictions: Predictions) -> list[Drawing]:
    """Predicted against true values; a point on the line is right."""
    shown = np.asarray(thin(np.argsort(predictions.truth, kind="stable")))  # spread over the range, not the first rows

    def draw(axes: Axes) -> None:
        series = [predictions.truth, predictions.federated] + ([] if predictions.local is None else [predictions.local])
        low, high = (
            min(float(values[shown].min()) for values in series),
            max(float(values[shown].max()) for values in series),
        )
        pad = 0.04 * (high - low) or 1.0
        limits = (low - pad, high + pad)
        if predictions.local is not None:
            axes.plot(predictions.truth[shown], predictions.local[shown], "o", color="none", markersize=3.2,
                      markeredgecolor=PAINT["local"], markeredgewidth=0.7, alpha=0.55)  # fmt: skip
        axes.plot(predictions.truth[shown], predictions.federated[shown], "o", color=PAINT["federated"], markersize=3,
                  markeredgewidth=0, alpha=0.7)  # fmt: skip
        axes.plot(limits, limits, color=PAINT["ink"], linewidth=0.9)
        axes.set(
            xlim=limits,
            ylim=limits,
            xlabel=f"true ({predictions.unit})" if predictions.unit else "true",
            ylabel="predicted",
        )
        axes.xaxis.set_major_locator(MaxNLocator(5))

    words = f"{len(predictions.truth):,} test rows" + (
        f", {len(shown)} shown" if len(shown) < len(predictions.truth) else ""
    )
    return [Drawing("", words, draw)]


def _roc(predictions: Predictions) -> list[Drawing]:
    """ROC curve; with one class only, a histogram of the scores."""
    positive = predictions.truth.astype(float) > 0.5
    if positive.all() or not positive.any():
        words = f"{len(positive):,} test rows, all {'positive' if positive.all() else 'negative'}"
        return [Drawing("", words, _histogram(predictions))]
    lines = {}
    for model, score in (("local", predictions.local), ("federated", predictions.federated)):
        if score is not None:
            lines[model] = _roc_curve(positive, score.astype(float))

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=PAINT["muted"], linewidth=0.8)
        for model, line in lines.items():
            line = np.asarray(thin(line))
            axes.plot(line[:, 0], line[:, 1], color=PAINT[model], linewidth=1.6,
                      linestyle="-" if model == "federated" else (0, (4, 2)))  # fmt: skip
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="false alarms (share)", ylabel="detected (share)")

    areas = {model: float(np.trapezoid(line[:, 1], line[:, 0])) for model, line in lines.items()}
    alone = f", {areas['local']:.3f} alone" if "local" in areas else ""
    return [Drawing("", f"ROC area {areas['federated']:.3f} federated{alone}; {len(positive):,} test rows", draw)]


def _roc_curve(positive: NDArray[np.bool_], score: NDArray[np.float64]) -> NDArray[np.float64]:
    """(thresholds + 1, 2): false and true positive rate from (0, 0) to (1, 1); rows of equal score are one step."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)  # the last row of each distinct score
    hits, misses = np.cumsum(positive[order])[last], np.cumsum(~positive[order])[last]
    return np.vstack([[0.0, 0.0], np.stack([misses / misses[-1], hits / hits[-1]], axis=1)])


def _histogram(predictions: Predictions) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        axes.hist(predictions.federated.astype(float), bins=20, color=PAINT["federated"], alpha=0.7)
        if predictions.local is not None:
            axes.hist(predictions.local.astype(float), bins=20, histtype="step", color=PAINT["local"], linewidth=1.4)
        axes.set(xlabel="score", ylabel="test rows")

    return draw


def _confusion(predictions: Predictions) -> list[Drawing]:
    """Of each true class, the share predicted as each class (federated)."""
    truth, federated = predictions.truth, _likeliest(predictions.federated)
    local = None if predictions.local is None else _likeliest(predictions.local)
    names, counts = np.unique(np.concatenate([truth, federated]), return_counts=True)
    kept = names
    if len(names) > MOST_CLASSES:
        kept = np.sort(names[np.argsort(-counts, kind="stable")[: MOST_CLASSES - 1]])
    labels = [_class_name(name, predictions.names) for name in kept] + (["other"] if len(kept) < len(names) else [])
    matrix = np.zeros((len(labels), len(labels)))
    np.add.at(matrix, (_index_in(kept, truth), _index_in(kept, federated)), 1.0)
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
    if predictions.kind == "ordinal" and truth.dtype.kind in "fi":
        words += f"; off by {float(np.abs(truth - federated).mean()):.2f} grades on average"
    return [Drawing("", f"{words}; {len(truth):,} test rows", draw)]


def _likeliest(prediction: NDArray[Any]) -> NDArray[Any]:
    """Class probabilities (n, classes) -> the likeliest class (n,); classes (n,) unchanged."""
    return prediction.argmax(axis=1) if prediction.ndim == 2 else prediction


def _index_in(kept: NDArray[Any], values: NDArray[Any]) -> NDArray[np.intp]:
    """Index of each value in the sorted `kept`; one past the end for other values."""
    index = np.minimum(np.searchsorted(kept, values), len(kept) - 1)
    return np.where(kept[index] == values, index, len(kept))


def _class_name(name: Any, names: tuple[str, ...] = ()) -> str:
    is_number = isinstance(name, int | float | np.integer | np.floating)
    text = f"{name:g}" if isinstance(name, float | np.floating) else str(name)
    if is_number and names and 0 <= int(name) < len(names):
        text = names[int(name)]
    return text if len(text) <= 12 else f"{text[:11]}…"


def _labels(predictions: Predictions) -> list[Drawing]:
    """Average precision of the best and the worst labels, federated and local."""
    truth = predictions.truth > 0.5
    scorable = [label for label in range(truth.shape[1]) if truth[:, label].any() and not truth[:, label].all()]
    if not scorable:
        return []
    precision = {
        model: np.array([average_precision(truth[:, label], score[:, label]) for label in scorable])
        for model, score in (("federated", predictions.federated), ("local", predictions.local))
        if score is not None
    }
    order = np.argsort(-precision["federated"], kind="stable")
    half = MOST_LABELS // 2
    shown = order if len(order) <= MOST_LABELS else np.concatenate([order[:half], order[-half:]])
    names = [
        _class_name(predictions.names[scorable[index]] if predictions.names else scorable[index]) for index in shown
    ]

    def draw(axes: Axes) -> None:
        position = np.arange(len(shown), dtype=float)
        axes.barh(
            position, precision["federated"][shown], height=0.62, color=PAINT["federated"], alpha=0.75, linewidth=0
        )
        if "local" in precision:
            axes.plot(precision["local"][shown], position, "o", color="none", markersize=4.5, markeredgecolor=PAINT["local"],
                      markeredgewidth=1.2)  # fmt: skip
        axes.set(xlim=(0, 1.02), ylim=(len(shown) - 0.4, -0.6), xlabel="average precision")
        left = 0.06 + 0.018 * max(map(len, names))
        axes.set_position((left, 0.16, 0.97 - left, 0.81))
        axes.set_yticks(position, names)
        axes.grid(visible=False, axis="y")

    scope = (
        f"the {half} best and {half} worst of {len(scorable)} labels"
        if len(shown) < len(scorable)
        else f"{len(scorable)} labels"
    )
    alone = f", {precision['local'].mean():.3f} alone" if "local" in precision else ""
    words = f"mean average precision {precision['federated'].mean():.3f} federated{alone}; {scope}; {len(truth):,} test rows"
    return [Drawing("", words, draw)]


def average_precision(positive: NDArray[np.bool_], score: NDArray[Any]) -> float:
    """Precision at each positive row, going down the scores, averaged; rows of equal score are one step."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)
    hits, called = np.cumsum(positive[order])[last], np.flatnonzero(last) + 1
    return float((np.diff(hits, prepend=0) * hits / called).sum() / hits[-1])


def _future(predictions: Predictions) -> list[Drawing]:
    """True values of one stretch with the forecast band, and the reliability of the quantiles."""
    levels = np.array(predictions.quantiles or np.linspace(0.0, 1.0, predictions.federated.shape[2] + 2)[1:-1])
    middle, far = int(np.argmin(np.abs(levels - 0.5))), predictions.truth.shape[1] // 2
    ahead = f"{predictions.horizons[far]} rows ahead" if predictions.horizons else f"horizon {far + 1}"
    order = (
        np.argsort(predictions.order, kind="stable")
        if predictions.order is not None
        else np.arange(len(predictions.truth))
    )
    if predictions.groups is not None:  # the machine with most rows
        names, count = np.unique(predictions.groups, return_counts=True)
        order = order[predictions.groups[order] == names[np.argmax(count)]]
    stretch = order[max(0, (len(order) - STRETCH) // 2) :][:STRETCH]
    truth = predictions.truth[stretch, far]

    def draw(axes: Axes) -> None:
        x = np.arange(len(stretch))
        if len(levels) > 1:
            low, high = predictions.federated[stretch, far, 0], predictions.federated[stretch, far, -1]
            axes.fill_between(x, low, high, color=PAINT["federated"], alpha=0.22, linewidth=0)
        if predictions.local is not None:
            axes.plot(
                x, predictions.local[stretch, far, middle], color=PAINT["local"], linewidth=1.0, linestyle=(0, (4, 2))
            )
        axes.plot(x, predictions.federated[stretch, far, middle], color=PAINT["federated"], linewidth=1.3)
        axes.plot(x, truth, color=PAINT["ink"], linewidth=1.0)
        axes.set(xlabel=f"rows, one machine ({ahead})", ylabel=predictions.unit or "value")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    shares = {
        model: _below(predictions.truth, values)
        for model, values in (("federated", predictions.federated), ("local", predictions.local))
        if values is not None
    }

    def reliability(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=PAINT["ink"], linewidth=0.9)
        for model, share in shares.items():
            axes.plot(levels, share, marker="o", color=PAINT[model], linewidth=1.4, markersize=4,
                      linestyle="-" if model == "federated" else (0, (4, 2)))  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="forecast probability of staying below", ylabel="share below")

    words = f"truth dark, {ahead}; {len(predictions.truth):,} test rows"
    if len(levels) < 2:
        return [Drawing("", words, draw)]
    expected, kept = 100 * (levels[-1] - levels[0]), 100 * (shares["federated"][-1] - shares["federated"][0])
    words += f"; the {expected:.0f} % band holds {kept:.0f} %"
    return [Drawing("", words, draw), Drawing("reliability", "on the line, the quantiles are reliable", reliability)]


def _below(truth: NDArray[Any], prediction: NDArray[Any]) -> NDArray[np.float64]:
    """(n, H), (n, H, Q) -> (Q,): the share of values that lie at or below each quantile."""
    is_known = ~np.isnan(truth)
    share: NDArray[np.float64] = (truth[..., None] <= prediction)[is_known].mean(axis=0)
    return share


def _alarms(predictions: Predictions) -> list[Drawing]:
    """Score over time, in units of the threshold, with the true anomalies shaded."""
    truth = predictions.truth > 0.5
    order = np.argsort(predictions.order, kind="stable") if predictions.order is not None else np.arange(len(truth))
    if predictions.groups is not None:  # the stretch with most true alarms, or else the longest
        group = np.unique(predictions.groups, return_inverse=True)[1]
        flagged, rows = np.bincount(group, weights=truth), np.bincount(group)
        order = order[group[order] == int(np.lexsort((rows, flagged))[-1])]
    lines = {}
    for model, score in (("local", predictions.local), ("federated", predictions.federated)):
        if score is not None:
            scale = predictions.thresholds.get(model) or float(np.quantile(score, 0.99)) or 1.0
            lines[model] = np.maximum(score.astype(float) / abs(scale), 1e-3)
    cuts = np.array_split(order, min(MOST_POINTS, len(order)))

    def draw(axes: Axes) -> None:
        x = np.linspace(0, len(order), len(cuts), endpoint=False)
        width = len(order) / len(cuts)
        for start in x[np.array([truth[cut].any() for cut in cuts])]:
            axes.axvspan(start - width / 2, start + width / 2, color=PAINT["bad"], alpha=0.2, linewidth=0)
        axes.axhline(1.0, color=PAINT["ink"], linewidth=0.9)
        for model, line in lines.items():
            highest = [float(line[cut].max()) for cut in cuts]  # a peak that is left out would hide an alarm
            axes.plot(x, highest, color=PAINT[model], linewidth=1.2 if model == "federated" else 0.9,
                      linestyle="-" if model == "federated" else (0, (4, 2)))  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.set(xlabel="rows, one stretch of time", ylabel="score / threshold")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    called = lines["federated"] > 1.0
    hits, wrong = int((called & truth).sum()), int(truth.sum())
    words = f"shaded: true anomalies; {hits:,} of {wrong:,} such rows detected, {int((called & ~truth).sum()):,} false; {len(truth):,} test rows"
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
    return [values[index] for index in np.linspace(0, len(values) - 1, MOST_POINTS).round().astype(int)]


# Matplotlib needs a colour, and the page has two themes: each colour below is replaced by a variable of the theme.
PAINT = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "federated": "#040404",
    "local": "#050505",
    "bad": "#060606",
}


def svg(name: str, draw: Callable[[Axes], None], width: int = 260, height: int = 175) -> Markup:
    """One figure as inline SVG, `width` x `height` points, without ids or references that could clash on the page."""
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
        # matplotlib's font may lack a letter (a unit in Chinese); the browser draws the text with its own
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", _simplify_tag, text)
    return Markup(re.sub(r">\s+<", "><", text).strip())


def _simplify_tag(tag: re.Match[str]) -> str:
    """One SVG tag without namespaces, unused ids, fixed sizes, fonts and invisible digits."""
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
