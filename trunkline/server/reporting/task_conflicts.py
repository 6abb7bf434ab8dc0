"""Which tasks of a site help each other and which conflict, from the gradient cosines that its rounds reported."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PULL = 0.05  # a mean cosine closer to 0 than this counts as neither help nor conflict
STEADY = 2 / 3  # share of the rounds that must agree before a task is named


def conflicts_of(rounds: Sequence[Mapping[str, Mapping[str, float | None]]]) -> list[dict[str, Any]]:
    """One entry a site with two or more tasks whose gradients were compared.

    Args:
        rounds: site -> metric -> value, one a round. A cosine is called `conflict.<task>.<task>`; above 0 a step for the
            one task helps the other too.

    Returns:
        `site`, `rounds` that reported, `tasks`, `cosines` (tasks, tasks; the mean over the rounds, None where nothing was
        measured), and `split`: the tasks whose mean cosine with the others is below -PULL and was below 0
        in most rounds, worst first. Those may do better in a run of their own.
    """
    pairs_of_site: dict[str, list[dict[tuple[str, str], float]]] = {}
    for metrics_of_site in rounds:
        for site, metrics in metrics_of_site.items():
            pairs: dict[tuple[str, str], float] = {}
            for name, value in metrics.items():
                if name.startswith("conflict.") and value is not None and np.isfinite(value):
                    _, first, second = name.split(".")
                    pairs[first, second] = value
            if pairs:
                pairs_of_site.setdefault(site, []).append(pairs)
    return [_entry(site, pairs_of_site[site]) for site in sorted(pairs_of_site)]


def _entry(site: str, seen: list[dict[tuple[str, str], float]]) -> dict[str, Any]:
    tasks = sorted({task for pairs in seen for pair in pairs for task in pair})
    index_of = {task: index for index, task in enumerate(tasks)}
    cosines = np.full((len(seen), len(tasks), len(tasks)), np.nan)
    for index, pairs in enumerate(seen):
        for (first, second), value in pairs.items():
            cosines[index, index_of[first], index_of[second]] = cosines[index, index_of[second], index_of[first]] = (
                value
            )
    mean, rows = _mean(cosines, 0), _mean(cosines, 2)  # (tasks, tasks), (rounds, tasks)
    against, measured = _mean(mean, 1), ~np.isnan(rows)
    steady = (rows < 0.0).sum(axis=0) >= STEADY * np.maximum(measured.sum(axis=0), 1)
    worst = [task for task in np.argsort(against, kind="stable").tolist() if against[task] < -PULL and steady[task]]
    # with two tasks the reader chooses which of them gets a run of its own
    return {
        "site": site,
        "rounds": len(seen),
        "tasks": tasks,
        "cosines": [[None if np.isnan(value) else float(value) for value in row] for row in mean],
        "split": [tasks[task] for task in worst],
    }


def _mean(values: np.ndarray[Any, np.dtype[np.float64]], axis: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The mean of the values that are not NaN along one axis; NaN where there are none, without a warning."""
    measured = ~np.isnan(values)
    count = measured.sum(axis=axis)
    total = np.where(measured, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def sentences(entry: Mapping[str, Any]) -> list[str]:
    """One site's matrix as sentences: the pairs that help, the pairs that conflict, and the task to split off."""
    tasks, cosines = entry["tasks"], entry["cosines"]
    pairs = [
        (cosines[first][second], tasks[first], tasks[second])
        for first in range(len(tasks))
        for second in range(first + 1, len(tasks))
        if cosines[first][second] is not None
    ]
    lines = []
    for title, chosen in (
        ("help each other", sorted((pair for pair in pairs if pair[0] > PULL), reverse=True)),
        ("pull against each other", sorted(pair for pair in pairs if pair[0] < -PULL)),
    ):
        if chosen:
            named = ", ".join(f"{first} and {second} ({value:+.2f})" for value, first, second in chosen[:4])
            lines.append(f"{title}: {named}" + (f" and {len(chosen) - 4} more pairs" if len(chosen) > 4 else ""))
    if not lines:
        lines.append("the tasks neither help nor hinder each other")
    if entry["split"]:
        if len(tasks) == 2:
            lines.append("try one of the two in a run of its own")
        else:
            lines.append(f"try without {entry['split'][0]}: it pulls against the others in most rounds")
    return lines
