"""Which tasks of a site help each other and which pull its trunk apart, from the cosines its rounds reported."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PULL = 0.05  # a mean cosine nearer to 0 than this is neither help nor harm
STEADY = 2 / 3  # share of the rounds that must say the same before a task is named


def conflicts_of(rounds: Sequence[Mapping[str, Mapping[str, float | None]]]) -> list[dict[str, Any]]:
    """One entry a site with two or more tasks whose gradients were compared.

    Args:
        rounds: site -> metric -> value, one a round. A cosine is called `conflict.<task>.<task>`; above 0 a step for the
            one task helps the other too.

    Returns:
        `site`, `rounds` that reported, `tasks`, `cosines` (a matrix over the tasks, None where nothing was measured) as
        the mean over the rounds, and `split`: the tasks whose mean cosine with the others is below -PULL and was below 0
        in most rounds, worst first. Those may do better in a run of their own.
    """
    found: dict[str, list[dict[tuple[str, str], float]]] = {}
    for one in rounds:
        for site, metrics in one.items():
            pairs: dict[tuple[str, str], float] = {}
            for name, value in metrics.items():
                if name.startswith("conflict.") and value is not None and np.isfinite(value):
                    _, first, second = name.split(".")
                    pairs[first, second] = value
            if pairs:
                found.setdefault(site, []).append(pairs)
    return [_entry(site, found[site]) for site in sorted(found)]


def _entry(site: str, seen: list[dict[tuple[str, str], float]]) -> dict[str, Any]:
    tasks = sorted({task for pairs in seen for pair in pairs for task in pair})
    place = {task: at for at, task in enumerate(tasks)}
    each = np.full((len(seen), len(tasks), len(tasks)), np.nan)
    for at, pairs in enumerate(seen):
        for (one, other), value in pairs.items():
            each[at, place[one], place[other]] = each[at, place[other], place[one]] = value
    mean, rows = _mean(each, 0), _mean(each, 2)  # (tasks, tasks), (rounds, tasks)
    against, measured = _mean(mean, 1), ~np.isnan(rows)
    steady = (rows < 0.0).sum(axis=0) >= STEADY * np.maximum(measured.sum(axis=0), 1)
    worst = [task for task in np.argsort(against, kind="stable").tolist() if against[task] < -PULL and steady[task]]
    # with two tasks each is the other's only company: which of them leaves is the reader's choice
    return {
        "site": site,
        "rounds": len(seen),
        "tasks": tasks,
        "cosines": [[None if np.isnan(value) else float(value) for value in row] for row in mean],
        "split": [tasks[task] for task in worst],
    }


def _mean(values: np.ndarray[Any, np.dtype[np.float64]], axis: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The mean of what is there along one axis; NaN where nothing is, without a warning."""
    there = ~np.isnan(values)
    count = there.sum(axis=axis)
    total = np.where(there, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def sentences(entry: Mapping[str, Any]) -> list[str]:
    """One site's matrix in words: the pairs that help and that fight, and what might be split off."""
    tasks, cosines = entry["tasks"], entry["cosines"]
    pairs = [
        (cosines[one][other], tasks[one], tasks[other])
        for one in range(len(tasks))
        for other in range(one + 1, len(tasks))
        if cosines[one][other] is not None
    ]
    lines = []
    for title, some in (
        ("help each other", sorted((pair for pair in pairs if pair[0] > PULL), reverse=True)),
        ("pull against each other", sorted(pair for pair in pairs if pair[0] < -PULL)),
    ):
        if some:
            named = ", ".join(f"{one} and {other} ({value:+.2f})" for value, one, other in some[:4])
            lines.append(f"{title}: {named}" + (f" and {len(some) - 4} more pairs" if len(some) > 4 else ""))
    if not lines:
        lines.append("the tasks neither help nor hinder each other")
    if entry["split"]:
        if len(tasks) == 2:
            lines.append("try one of the two in a run of its own")
        else:
            lines.append(f"try without {entry['split'][0]}: it pulls against the others in most rounds")
    return lines
