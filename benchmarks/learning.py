"""What federation brings on every real data set at hand: data set x strategy x seed, beside alone, pooled and trees.

    python benchmarks/learning.py run  --data DIR --out FOLDER [--sets cmapss ...] [--seeds 0 1 2] [--processes 2]
    python benchmarks/learning.py page --out FOLDER            writes the tables of docs/results.md to FOLDER/results.md

Every run is one process with one torch thread, the deployed apps over loopback. The settings in examples/ were chosen
on validation rows; this script reads the test rows. A finished run is kept in FOLDER and not repeated.

Opponents, on the same splits: `trivial` (what the training labels alone say), `trees` (gradient boosting on window
statistics, with training and validation rows, library defaults; isolation forest for anomalies; extremely randomised
trees where a row has many labels), `local` (the same network alone).
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Study:
    """One data set: how its sites are written, its run file, and the algorithms compared."""

    run: str
    factory: str = ""
    wish: dict[str, Any] = field(default_factory=dict)
    strategies: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> settings over the run file
    edit: tuple[tuple[str, str], ...] = ()  # replacements in every site.toml
    seeds: tuple[int, ...] = (0, 1, 2)
    trees: bool = True


AVG = {"strategy": {"name": "fedavg"}}
BODY = {"strategy": {"name": "fedper"}, "lend": ["trunk"]}
REP = {"strategy": {"name": "fedrep"}}
POOL = {"strategy": {"name": "central"}}
LOCAL = {"strategy": {"name": "local"}}
AGAIN = {"refit": True, "report.baseline": True}
ALIKE = {"federated": {}, "fedavg": AVG, "trunk_only": BODY, "fedrep": REP, "central": POOL}
APART = {"federated": {}, "fedrep": REP}  # other sensors or classes: nothing but the trunk can travel
STUDIES = {
    "cmapss": Study(
        "cmapss.toml", strategies={"federated": {}, "refit": AGAIN, "fedavg": AVG, "fedrep": REP, "central": POOL}
    ),
    "cmapss-age": Study(
        "cmapss.toml", "cmapss", strategies={"federated": {}}, edit=(("window =", "age = true\nwindow ="),)
    ),
    "cmapss-windows": Study(  # every test window instead of each engine's last: for `failing` and its calibration
        "cmapss.toml",
        "cmapss",
        strategies={"federated": {}},
        edit=(('test_at = "last"', 'test_at = "all"'),),
    ),
    "cmapss-16": Study(
        "cmapss-small-plants.toml",
        "cmapss",
        {"plants": 16, "groups": 10},
        {
            "federated": {},
            "fedavg": AVG,
            "trunk_only": {**BODY, "training.private_rate": 0.03},
            "refit": AGAIN,
        },
    ),
    "hydraulic": Study(
        "hydraulic.toml",
        strategies={"federated": {}, "lent_norms": {"trunk.norm": "group"}, "central": POOL},
        seeds=(0, 1, 2, 3, 4),
    ),
    "hydraulic-rig": Study(
        "hydraulic-rig.toml", "hydraulic", {"plants": 1}, {"federated": LOCAL}, seeds=(0, 1, 2, 3, 4)
    ),
    "alarms": Study("alarms.toml", strategies=ALIKE),
    "flowmeters": Study(  # four times five folds: one row of 87 is more than a point
        "flowmeters.toml", strategies=APART, seeds=tuple(range(20))
    ),
    "cwru": Study("cwru.toml", strategies=ALIKE),
    "ai4i2020": Study("ai4i2020.toml", strategies=ALIKE),
    "skab": Study("skab.toml", strategies=ALIKE),
    "steel_energy": Study("steel-energy.toml", strategies=ALIKE),
    "garments": Study("garments.toml", strategies=APART),
    "tep": Study("tep.toml", strategies=APART),
    "steel_plates": Study("steel-plates.toml", strategies=ALIKE),
}


def sites_of(name: str, study: Study, data: Path, seed: int, into: Path) -> list[Path]:
    from trunkline.simulations.factories import write_sites

    wish: dict[str, Any] = {"plants": None, "groups": None, **study.wish}
    folders = write_sites(study.factory or name, into, data=data, seed=seed, **wish)
    for folder in folders:
        path = folder / "site.toml"
        text = path.read_text()
        for old, new in study.edit:
            text = text.replace(old, new, 1)
        path.write_text(text)
    return folders


def one_run(name: str, strategy: str, seed: int, data: Path, out: Path) -> dict[str, Any]:
    """The report of one run, kept in `out`/runs."""
    import tempfile

    import torch

    torch.set_num_threads(1)
    kept = out / "runs" / f"{name}.{strategy}.{seed}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    study = STUDIES[name]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        sites = sites_of(name, study, data, seed, Path(folder) / "sites")
        if strategy == "opponents":
            result = {"sites": opponents(sites, Path(folder) / "state", study.trees)}
        else:
            report = federate(study, strategy, seed, sites, Path(folder) / "out")
            result = {"sites": report["sites"], "run": report["run"], "conflicts": report.get("conflicts")}
            result["pooled_micro_f1"] = pooled_micro_f1(Path(folder) / "out")
    result["seconds"] = time.monotonic() - started
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(result, indent=1))
    return result


def federate(study: Study, strategy: str, seed: int, sites: list[Path], out: Path) -> dict[str, Any]:
    """One run with the deployed apps, in this process."""
    from flwr.app import Context, RecordDict

    from trunkline.client.app import app as client_app
    from trunkline.config.run import read_run
    from trunkline.flower.grid import LoopbackGrid
    from trunkline.server.app import app as server_app
    from trunkline.server.reporting.report import read_report
    from trunkline.simulations.central import run_central

    settings = {"seed": seed, **study.strategies[strategy]}
    settings.setdefault("cohort.min_sites", len(sites))
    if strategy != "federated":  # what these are compared with is the run file's own run, which has both
        settings.setdefault("report.baseline", False)
    run = read_run(EXAMPLES / study.run, settings)
    states = [out / "state" / site.name for site in sites]
    if strategy == "central":
        return run_central(sites, states, run, lambda event: None)
    grid = LoopbackGrid(
        client_app, [{"site": str(site), "state": str(state)} for site, state in zip(sites, states, strict=True)]
    )
    config: dict[str, Any] = {"run-toml": run.model_dump_json(), "out": str(out), "resume": 0}
    server_app(grid=grid, context=Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config))
    return read_report(out)


def pooled_micro_f1(out: Path) -> dict[str, float]:
    """Micro-F1 over the rows and labels of all sites together, model by model; empty without a multilabel task."""
    import numpy as np
    from safetensors import safe_open

    counts: dict[str, Any] = defaultdict(lambda: np.zeros(3))
    for path in sorted((out / "state").glob("*/evaluation/*/*.safetensors")):
        with safe_open(path, "numpy") as file:
            about = json.loads(file.metadata()["about"])
            if about["task"]["kind"] != "multilabel":
                continue
            truth, chosen = file.get_tensor("truth"), about["chosen"]
            for who, state in about["states"].items():  # other candidates are kept only where they were chosen
                called, there = file.get_tensor(who) > np.array(state["thresholds"]), truth > 0.5
                one = np.array([(called & there).sum(), called.sum(), there.sum()])
                if who in ("local", "federated"):
                    counts[who] += one
                if who == chosen:
                    counts["gated"] += one
    return {who: float(2 * hit / (called + there)) for who, (hit, called, there) in counts.items() if called + there}


# --- opponents -------------------------------------------------------------------------------------------------------


def opponents(sites: list[Path], states: Path, trees: bool) -> list[dict[str, Any]]:
    """`trivial` and `trees` for each site and task, by the task's own metrics."""
    from trunkline.client.data import open_data

    rows = []
    for site in sites:
        data = open_data(site, states / site.name)
        inputs = {part: features(getattr(data, part)) for part in ("train", "validation", "test")}
        for name, task in data.tasks.items():
            labels = {part: getattr(data, part).labels[name] for part in inputs}
            measured = {}
            for who, guess in (("trivial", trivial), ("trees", boosted)):
                if who == "trees" and not trees:
                    continue
                made = guess(task, labels, inputs)
                if made is not None:
                    validation, test = made
                    task.calibrate(validation, labels["validation"])
                    measured[who] = task.measure(test, labels["test"])
            rows.append(
                {
                    "site": data.config.name,
                    "task": name,
                    "kind": task.kind,
                    **task.card.model_dump(),
                    "measured": measured,
                }
            )
    return rows


def features(windows: Any) -> Any:
    """(n, features): statistics of each window, or the row with its codes."""
    import numpy as np
    import torch

    from trunkline.client.training.device_dataset import DeviceDataset

    data = DeviceDataset.of(windows, torch.device("cpu"))
    if windows.window is None:
        return np.concatenate([tensor.numpy() for tensor in data.batch(torch.arange(len(windows)))], axis=1)
    blocks = []
    for index in torch.arange(len(windows)).split(4096):
        x = data.batch(index)[0].numpy().astype(np.float64)  # (b, channels, time)
        time_axis = np.linspace(-1.0, 1.0, x.shape[2])
        slope = (np.nan_to_num(x) * time_axis).mean(axis=2)
        tail = x[:, :, -max(1, x.shape[2] // 6) :].mean(axis=2)
        blocks.append(np.concatenate([x.mean(2), x.std(2), x.min(2), x.max(2), slope, tail, x[:, :, -1]], axis=1))
    return np.concatenate(blocks).astype(np.float32)


def trivial(task: Any, labels: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """What can be said without looking at a single input."""
    import numpy as np

    train = labels["train"]
    sizes = [len(labels["validation"]), len(labels["test"])]
    if task.kind == "anomaly":
        return None
    if task.kind == "forecast":  # the value one season ago
        count = len(task.config.horizons)
        naive = [labels[part][:, count : 2 * count] for part in ("validation", "test")]
        middle = float(np.nanmedian(train[:, :count]))
        return [
            np.repeat(np.nan_to_num(one, nan=middle)[:, :, None], len(task.config.quantiles), axis=2) for one in naive
        ]
    if task.kind == "multilabel":
        return [np.repeat(np.nanmean(train, axis=0)[None].astype(np.float32), size, axis=0) for size in sizes]
    present = train[~np.isnan(train)]
    if task.kind == "regression":
        cap = task.config.cap or np.inf
        return [np.full(size, np.minimum(present, cap).mean(), np.float32) for size in sizes]
    if task.kind == "binary":
        return [np.full(size, present.mean(), np.float32) for size in sizes]
    share = np.bincount(present.astype(int), minlength=len(task.classes)) / len(present)
    return [np.repeat(share[None].astype(np.float32), size, axis=0) for size in sizes]


def boosted(task: Any, labels: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """Trees on the same rows; training and validation rows together, because they need no rows to stop by."""
    import numpy as np
    from sklearn.ensemble import (
        ExtraTreesClassifier,
        HistGradientBoostingClassifier,
        HistGradientBoostingRegressor,
        IsolationForest,
    )

    asked = [inputs["validation"], inputs["test"]]
    if task.kind == "anomaly":
        flags = labels["train"][:, 0] if labels["train"].ndim == 2 else labels["train"]
        forest = IsolationForest(random_state=0).fit(np.nan_to_num(inputs["train"][~(flags == 1)]))
        return [-forest.score_samples(np.nan_to_num(one)).astype(np.float32) for one in asked]
    x = np.concatenate([inputs["train"], inputs["validation"]])
    y = np.concatenate([labels["train"], labels["validation"]])
    if task.kind == "forecast":
        count, made = len(task.config.horizons), []
        for place in range(count):
            there = ~np.isnan(y[:, place])
            one = HistGradientBoostingRegressor(random_state=0).fit(x[there], y[there, place])
            made.append([one.predict(part) for part in asked])
        shape = (1, 1, len(task.config.quantiles))
        return [np.tile(np.stack([one[part] for one in made], axis=1)[:, :, None], shape) for part in range(2)]
    if task.kind == "multilabel":
        forest = ExtraTreesClassifier(300, min_samples_leaf=3, n_jobs=1, random_state=0).fit(x, np.nan_to_num(y))
        some = []
        for part in asked:
            chances = forest.predict_proba(part)
            columns = [
                one[:, list(known).index(1)] if 1 in known else np.zeros(len(part))
                for one, known in zip(chances, forest.classes_, strict=True)
            ]
            some.append(np.stack(columns, axis=1).astype(np.float32))
        return some
    there = ~np.isnan(y)
    if task.kind == "regression":
        cap = task.config.cap or np.inf
        one = HistGradientBoostingRegressor(random_state=0).fit(x[there], np.minimum(y[there], cap))
        return [one.predict(part).astype(np.float32) for part in asked]
    one = HistGradientBoostingClassifier(random_state=0).fit(x[there], y[there].astype(int))
    if task.kind == "binary":
        return [one.predict_proba(part)[:, -1].astype(np.float32) for part in asked]
    made = []
    for part in asked:
        full = np.zeros((len(part), len(task.classes)), np.float32)
        full[:, one.classes_] = one.predict_proba(part)
        made.append(full)
    return made


# --- tables ----------------------------------------------------------------------------------------------------------


def page(out: Path) -> str:
    """Markdown tables over everything in `out`/runs: mean over plants and seeds, a line a task."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted((out / "runs").glob("*.json")):
        name, strategy, _ = path.stem.rsplit(".", 2)
        found[name][strategy].append(json.loads(path.read_text()))
    text = []
    for name in [one for one in STUDIES if one in found]:
        text += [f"### {name}", "", *_table(found[name]), ""]
    return "\n".join(text)


def _table(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    main = runs.get("federated", [])
    if not main:
        return ["(not run)"]
    tasks = {row["task"]: row for row in main[0]["sites"]}
    others = [one for one in runs if one not in ("federated", "opponents")]
    head = [
        "task",
        "metric",
        "trivial",
        "trees",
        "local",
        *others,
        "federated",
        "after the gate",
        "plants better / worse than local",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for task, about in tasks.items():
        cells = [task, f"{about['metric']} ({about['unit']}), {about['better']} is better"]
        for who in ("trivial", "trees"):
            values = [
                row["measured"][who][row["metric"]]
                for one in runs.get("opponents", [])
                for row in one["sites"]
                if row["task"] == task and who in row["measured"]
            ]
            cells.append(_mean(values))
        cells.append(_mean([row["local"] for one in main for row in one["sites"] if row["task"] == task]))
        cells += [
            _mean([row["federated"] for one in runs[other] for row in one["sites"] if row["task"] == task])
            for other in others
        ]
        cells.append(_mean([row["federated"] for one in main for row in one["sites"] if row["task"] == task]))
        cells.append(_mean([row["gated"] for one in main for row in one["sites"] if row["task"] == task]))
        cells.append(_count(main, task, about["better"]))
        lines.append(f"| {' | '.join(cells)} |")
    seconds = mean(one["seconds"] for one in main)
    lines.append("")
    lines.append(
        f"{len(main)} seeds, {len({row['site'] for row in main[0]['sites']})} plants; {seconds:.0f} s a run on one core, with the local twin."
    )
    return lines


def _mean(values: list[float | None]) -> str:
    there = [one for one in values if one is not None]
    return f"{mean(there):.4g}" if there else "-"


def _count(runs: list[dict[str, Any]], task: str, better: str) -> str:
    """How many plants are better and worse after the gate than alone, by the mean over seeds."""
    values: dict[str, list[float]] = defaultdict(list)
    for one in runs:
        for row in one["sites"]:
            if row["task"] == task and row["gated"] is not None and row["local"] is not None:
                values[row["site"]].append((row["gated"] - row["local"]) * (-1 if better == "lower" else 1))
    gains = [mean(one) for one in values.values()]
    return f"{sum(one > 1e-9 for one in gains)} / {sum(one < -1e-9 for one in gains)} of {len(gains)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "page"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--strategies", nargs="+", help="of those a set compares; default: all, and `opponents`")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.what == "run":
        if options.data is None:
            parser.error("run needs --data")
        jobs = [
            (name, strategy, seed)
            for name in options.sets
            for strategy in (*STUDIES[name].strategies, "opponents")
            for seed in (options.seeds or STUDIES[name].seeds)
            if not options.strategies or strategy in options.strategies
        ]
        failed = False
        with ProcessPoolExecutor(options.processes) as pool:
            futures = {pool.submit(one_run, *job, options.data, options.out): job for job in jobs}
            for done, future in enumerate(as_completed(futures), start=1):
                job = futures[future]
                try:
                    print(
                        f"{done}/{len(jobs)} {job[0]} {job[1]} seed {job[2]}: {future.result()['seconds']:.0f} s",
                        flush=True,
                    )
                except Exception as error:  # one run that fails must not cost the others
                    failed = True
                    print(f"{done}/{len(jobs)} {job[0]} {job[1]} seed {job[2]}: FAILED {error!r}", flush=True)
        if failed:
            sys.exit(1)
    text = page(options.out)
    (options.out / "results.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
