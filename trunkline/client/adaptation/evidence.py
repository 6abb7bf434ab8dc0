"""The evidence card of an adaptation: what the labels brought, how sure that is, and which group to label next.

Figures come from rows the adapted model never saw: the site's test rows where they carry labels, otherwise groups that
were held out while choosing. One dictionary, three views: evidence.json, a page, a table in the terminal.
"""

import copy
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trunkline import __version__
from trunkline.client.adaptation.adapt import HONEST, Adapted, CandidateBuilder
from trunkline.client.adaptation.choice import label_of
from trunkline.client.adaptation.model_file import MODEL, write_model
from trunkline.client.adaptation.probe import embeddings
from trunkline.client.data import WindowSet
from trunkline.client.model_selection.evaluation import Scored, paired_bootstrap
from trunkline.client.training.device_dataset import DeviceDataset, device
from trunkline.client.training.loop import outputs_of
from trunkline.errors import StorageError
from trunkline.models.labels import known
from trunkline.models.tasks.task import Task
from trunkline.models.trunk import TrunkModel
from trunkline.protocol.arrays import seed_of
from trunkline.runtime.storage import read_private, write_private
from trunkline.security.encryption import find_seal_of

SIZES = (1, 2, 5, 10, 20, 50, 100, 200)  # labelled groups of the learning curve
NEXT = 5  # groups named to be labelled next
SCORED = 4000  # test samples a point of the curve is scored on; the final figures use all of them
PER_GROUP = 40  # samples a group's place in the embedding is the mean of
EVIDENCE, PAGE = "evidence.json", "evidence.html"
Evidence = dict[str, Any]
Outputs = dict[str, Tensor]


def collect(adapted: Adapted, *, curve: bool = True) -> Evidence:
    """Everything the card says, as plain values.

    Args:
        curve: False leaves the learning curve out, which costs as much as all the rest.
    """
    workshop, choice = adapted.workshop, adapted.choice
    models = {"adapted": adapted.model}
    if adapted.fit.as_is:
        models["as_is"] = workshop.as_is(workshop.labelled)
    models["scratch"] = workshop.make("scratch", workshop.labelled)
    card, verdict = adapted.card, adapted.verdict
    return {
        "trunkline": __version__,
        "site": adapted.site.config.name,
        "release": {
            **{key: getattr(card, key) for key in ("run", "key", "rounds", "strategy", "sites")},
            "digest": card.lineage.digest if card.lineage is not None else None,
            "verified": verdict is not None and verdict.right,
            "signer": verdict.signer if verdict is not None and verdict.right else None,
        },
        "labelled_groups": len(workshop.labelled),
        "choice": {"name": choice.name, "share": choice.share, "why": choice.reason, "held_out_loss": choice.losses},
        "notes": list(adapted.fit.notes),
        "tasks": _gains(adapted, models),
        "curve": _curve(adapted, models) if curve else [],
        "label_next": label_next(workshop),
    }


def settled(task: Task, model: TrunkModel, workshop: CandidateBuilder) -> Task:
    """A copy of `task` that has seen what `model` gives for the training samples, where its kind wants that."""
    task = copy.copy(task)
    if task.fits_outputs:
        train = outputs_of(model, workshop.resident, {task.name: task})[task.name]
        task.fit_outputs(train, workshop.samples.labels[task.name])
    return task


def _gains(adapted: Adapted, models: dict[str, TrunkModel]) -> list[dict[str, Any]]:
    """One row a task: each model's figure and the adapted one's gain over the others, with its interval."""
    workshop, choice = adapted.workshop, adapted.choice
    test = adapted.site.test
    rows = []
    resident = DeviceDataset.of(test, device()) if len(test) else None
    outputs = {
        candidate: outputs_of(model, resident, workshop.tasks) if resident else {}
        for candidate, model in models.items()
    }
    for name, task in workshop.tasks.items():
        labels, groups, on = (test.labels[name], test.groups, "test rows")
        outputs_by_model = {candidate: result[name] for candidate, result in outputs.items()} if resident else {}
        if not known(labels).any():
            labels, groups = workshop.samples.labels[name][choice.rows], workshop.groups[choice.rows].astype(np.int32)
            outputs_by_model = {"adapted": choice.outputs[name]} if choice.outputs else {}
            if outputs_by_model:
                outputs_by_model["as_is" if adapted.fit.as_is else "scratch"] = choice.reference[name]
            on = "held-out groups"
        scored = {}
        for candidate, output in outputs_by_model.items():
            calibrated = settled(task, models[candidate], workshop)
            scored[candidate] = Scored(calibrated, calibrated.predict(output))
        seed = seed_of(workshop.seed, "evidence", name)
        gains = {
            candidate: {
                "difference": _minus(scored["adapted"], second, labels),
                "interval": paired_bootstrap(scored["adapted"], second, labels, groups, seed),
            }
            for candidate, second in scored.items()
            if candidate != "adapted"
        }
        rows.append(
            {
                **task.card.model_dump(),
                "on": on if scored else "nothing: no test row has a label, and too few groups to hold one out",
                "groups": len(np.unique(groups[known(labels)])) if scored else 0,
                "figures": {
                    candidate: result.task.score(result.prediction, labels) for candidate, result in scored.items()
                },
                "gains": gains,
            }
        )
    return rows


def _minus(first: Scored, second: Scored, labels: NDArray[np.float32]) -> float | None:
    score, other_score = (result.task.score(result.prediction, labels) for result in (first, second))
    return None if score is None or other_score is None else score - other_score


def _curve(adapted: Adapted, models: dict[str, TrunkModel]) -> list[dict[str, Any]]:
    """Figures over the number of labelled groups: fewer labels are the first groups of one drawn order.

    Below the number at hand, "adapted" is what the prior would have taken for so few groups, or the kind chosen here
    from 5 groups on. Without labelled test rows a quarter of the groups is kept apart to be scored on.
    """
    workshop, choice = adapted.workshop, adapted.choice
    groups = workshop.labelled
    scored: WindowSet = adapted.site.test.spread(SCORED)
    full = True  # whether the last point may use every group
    if not any(known(label).any() for label in scored.labels.values()):
        if len(groups) <= HONEST:
            return []
        kept, groups = groups[: len(groups) // 4 or 1], groups[len(groups) // 4 or 1 :]
        scored, full = workshop.samples.subset(np.isin(workshop.groups, kept)).spread(SCORED), False
    resident = DeviceDataset.of(scored, device())
    points = []
    for size in [*(size_before for size_before in SIZES if size_before < len(groups)), len(groups)]:
        labelled_groups = groups[:size]
        name, share = workshop.prior(size) if size < 5 else (choice.name, choice.share)
        if name == "interpolated" and size < len(groups):
            share = workshop.prior(size)[1]
        last = full and size == len(groups)
        models_of_point = {"adapted": models["adapted"] if last else workshop.build(name, share, labelled_groups)}
        if adapted.fit.as_is:
            models_of_point["as_is"] = models["as_is"] if last else workshop.as_is(labelled_groups)
        models_of_point["scratch"] = models["scratch"] if last else workshop.make("scratch", labelled_groups)
        point: dict[str, Any] = {
            "groups": size,
            "adapted_by": choice.label if last else label_of(name, share),
            "tasks": {},
        }
        outputs = {
            candidate: outputs_of(model, resident, workshop.tasks) for candidate, model in models_of_point.items()
        }
        for task in workshop.tasks.values():
            values = {}
            for candidate, model in models_of_point.items():
                calibrated = settled(task, model, workshop)
                values[candidate] = calibrated.score(
                    calibrated.predict(outputs[candidate][task.name]), scored.labels[task.name]
                )
            point["tasks"][task.name] = values
        points.append(point)
    return points


def label_next(workshop: CandidateBuilder) -> list[dict[str, Any]]:
    """Unlabelled groups in the order in which a label would tell most, by k-centre greedy on the trunk's embedding.

    Sener and Savarese 2018, arXiv:1708.00489: each time the group farthest from everything that is labelled or named.
    Distances are in units of the median one between labelled groups and their nearest, or of the first where there is one.
    """
    train = workshop.data.train
    names = np.array(train.group_names)
    labelled = set(workshop.samples.groups.tolist())
    unlabelled = sorted(set(train.groups.tolist()) - labelled)
    if not unlabelled:
        return []
    places = {group: _place(workshop, train, group) for group in [*sorted(labelled), *unlabelled]}
    left = np.stack([places[group] for group in unlabelled])
    labelled_places = np.stack([places[group] for group in sorted(labelled)])
    distance = np.linalg.norm(left[:, None] - labelled_places[None], axis=2).min(axis=1)
    unit = float(np.median(distance)) or 1.0
    chosen = []
    for _ in range(min(NEXT, len(unlabelled))):
        farthest = int(distance.argmax())
        chosen.append({"group": str(names[unlabelled[farthest]]), "distance": float(distance[farthest]) / unit})
        distance = np.minimum(distance, np.linalg.norm(left - left[farthest], axis=1))
    return chosen


def _place(workshop: CandidateBuilder, train: WindowSet, group: int) -> NDArray[np.float64]:
    samples = train.subset(train.groups == group).spread(PER_GROUP)
    model = workshop.released()
    mean: NDArray[np.float64] = (
        embeddings(model, DeviceDataset.of(samples, device())).double().mean(dim=0).cpu().numpy()
    )
    return mean


# --- views -------------------------------------------------------------------------------------------------------


def write(adapted: Adapted, evidence: Evidence, out: Path) -> None:
    """evidence.json, evidence.html and the model in `out`; below a sealed state all three are encrypted, see `read`.

    Raises:
        StorageError: the folder cannot be written. TrustError: the state is sealed and its key is not here.
    """
    for name, text in ((EVIDENCE, json.dumps(evidence, indent=1, allow_nan=False) + "\n"), (PAGE, page(evidence))):
        write_private(out / name, text.encode(), *find_seal_of(out / name), mode=0o644)
    site, workshop = adapted.site, adapted.workshop
    about = {key: evidence[key] for key in ("site", "choice", "release")}
    tasks = {name: settled(task, adapted.model, workshop) for name, task in workshop.tasks.items()}
    write_model(
        out / MODEL, adapted.model, adapted.card.trunk, tasks, site.scaler, site.config.data.window,
        site.category_names, adapted.card.seed, about,
    )  # fmt: skip


def read(folder: Path) -> Evidence:
    """The evidence that `write` put in `folder`.

    Raises:
        StorageError: there is none, or it is damaged. TrustError: it is encrypted and its key is not here.
    """
    path = folder / EVIDENCE
    try:
        evidence: Evidence = json.loads(read_private(path, *find_seal_of(path)))
    except FileNotFoundError:
        raise StorageError(f"{path}: no such file. `trunkline adapt` writes it; --from names another folder.") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: damaged ({type(error).__name__}: {error}). Adapt again.") from None
    return evidence


def sealed(folder: Path) -> bool:
    """Whether what `write` puts there is encrypted."""
    return find_seal_of(folder / PAGE)[0] is not None


def render(evidence: Evidence, console: Console) -> None:
    """The card in a terminal: the choice, each task's figures, the learning curve, what to label next."""
    choice = evidence["choice"]
    console.print(
        f"\n[bold]{evidence['site']}[/bold]: {evidence['labelled_groups']} labelled groups, from run "
        f"{evidence['release']['run']!r} of {len(evidence['release']['sites'])} sites", highlight=False,
    )  # fmt: skip
    console.print(f"Use: [bold]{label_of(choice['name'], choice['share'])}[/bold]. {choice['why']}", highlight=False)
    for note in evidence["notes"]:
        console.print(f"! {note}", style="yellow", highlight=False, markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("task", "metric", "adapted", "as is", "scratch", "gain over as is (95 %)"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for row in evidence["tasks"]:
        figures = row["figures"]
        gain = row["gains"].get("as_is") or row["gains"].get("scratch") or {"difference": None, "interval": None}
        cells = [figure(figures.get(candidate)) for candidate in ("adapted", "as_is", "scratch")]
        table.add_row(row["task"], f"{row['metric']} {row['unit']}".strip(), *cells, spread(gain))
    console.print(table)
    if evidence["curve"]:
        lead = evidence["tasks"][0]["task"]
        table = Table(box=None, padding=(0, 2, 0, 0), title=f"{lead} over labelled groups", title_justify="left")
        for heading in ("groups", "adapted", "as is", "scratch", "by"):
            table.add_column(heading, justify="left" if heading == "by" else "right")
        for point in evidence["curve"]:
            values = point["tasks"][lead]
            cells = [figure(values.get(candidate)) for candidate in ("adapted", "as_is", "scratch")]
            table.add_row(str(point["groups"]), *cells, point["adapted_by"])
        console.print(table)
    console.print(next_line(evidence), highlight=False, markup=False)


def next_line(evidence: Evidence) -> str:
    groups = evidence["label_next"]
    if not groups:
        return "Label next: every group that trains has labels; new groups would add most."
    return (
        "Label next: " + ", ".join(group["group"] for group in groups) + " (least like what is labelled, first first)."
    )


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def spread(gain: dict[str, Any]) -> str:
    if gain["difference"] is None:
        return "-"
    interval = gain["interval"]
    return f"{gain['difference']:+.3g}" + (
        f" [{interval[0]:+.3g}, {interval[1]:+.3g}]" if interval else " (no interval)"
    )


def page(evidence: Evidence) -> str:
    """One file without outside references."""
    choice = evidence["choice"]
    parts = [
        f"<h1>{html.escape(evidence['site'])}: adapted from {html.escape(evidence['release']['run'])}</h1>",
        f"<p><b>Use: {html.escape(label_of(choice['name'], choice['share']))}.</b> {html.escape(choice['why'])}</p>",
        *(f"<p class=note>{html.escape(note)}</p>" for note in evidence["notes"]),
        "<table><tr><th>task<th>metric<th>adapted<th>as is<th>scratch<th>gain over as is (95 %)<th>over scratch<th>on</tr>",
    ]
    for row in evidence["tasks"]:
        cells = [figure(row["figures"].get(candidate)) for candidate in ("adapted", "as_is", "scratch")]
        gains = [spread(row["gains"].get(candidate, {"difference": None})) for candidate in ("as_is", "scratch")]
        about = [
            row["task"],
            f"{row['metric']} {row['unit']}".strip(),
            *cells,
            *gains,
            f"{row['on']}, {row['groups']} groups",
        ]
        parts.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in about) + "</tr>")
    parts.append("</table>")
    parts += [f"<figure>{_plot(evidence, row)}</figure>" for row in evidence["tasks"] if len(evidence["curve"]) > 1]
    parts.append(f"<p>{html.escape(next_line(evidence))}</p>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(evidence['site'])}: evidence</title><style>body{{font:15px/1.5 system-ui,sans-serif;"
        "max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}table{border-collapse:collapse}"
        "td,th{padding:.2rem .9rem .2rem 0;text-align:left;border-bottom:1px solid #8884}.note{opacity:.75}"
        "figure{display:inline-block;margin:1rem 1rem 0 0}svg{background:#fff}</style>" + "\n".join(parts) + "</html>\n"
    )


def _plot(evidence: Evidence, row: dict[str, Any]) -> str:
    """The learning curve of one task as inline SVG."""
    import matplotlib as mpl  # a second of import, and only the page draws
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": row["task"], "font.size": 8.5, "text.parse_math": False}
    ):
        drawing = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = drawing.add_subplot()
        for candidate, style in (("as_is", "--"), ("scratch", ":"), ("adapted", "-")):
            points = [(point["groups"], point["tasks"][row["task"]].get(candidate)) for point in evidence["curve"]]
            points = [(groups, value) for groups, value in points if value is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), style, marker="o", markersize=3, label=candidate.replace("_", " ")
                )
        axes.set_xscale("log")
        ticks = [point["groups"] for point in evidence["curve"]]
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.set(xlabel="labelled groups", ylabel=f"{row['metric']} {row['unit']}".strip(), title=row["task"])
        axes.legend(frameon=False)
        file = io.StringIO()
        drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


__all__ = ("EVIDENCE", "MODEL", "collect", "label_next", "page", "read", "render", "sealed", "write")
