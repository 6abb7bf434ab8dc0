"""Remaining life on C-MAPSS: federated against alone, over seeds, as `trunkline simulate` runs it on Ray.

    python benchmarks/cmapss.py --data DIR [--seeds 0 1] [--plants 4 16] [--out FILE.json]

RMSE of `rul` in cycles at the last window of every published test engine, test RUL capped at 125 (and uncapped), no age
input; the trunk alone lent, and by small plants their stem too. Settings were chosen on validation engines; this script
reads the test set.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from trunkline.config.run import read_run
from trunkline.simulations.factories import write_sites
from trunkline.simulations.folders import prepare, site_folders
from trunkline.simulations.simulate import simulate

EXAMPLES = Path(__file__).parents[1] / "examples"


def one_run(sites: Path, out: Path, run_file: Path, seed: int) -> list[dict[str, Any]]:
    prepare(out, resume=False, overwrite=True)
    report = simulate(read_run(run_file, {"seed": seed}), site_folders(sites), out, workers=2)
    print(f"  seed {seed}: {report['run']['seconds']:.0f} s", flush=True)
    return [row for row in report["sites"] if row["task"] == "rul"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--plants", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for plants in options.plants:
        run_file = EXAMPLES / ("cmapss.toml" if plants == 4 else "cmapss-small-plants.toml")
        with tempfile.TemporaryDirectory() as folder:
            sites = Path(folder) / "sites"
            write_sites("cmapss", sites, data=options.data, plants=plants, groups=None if plants == 4 else 10)
            print(f"{plants} plants, {run_file.name}")
            runs = [one_run(sites, Path(folder) / "out", run_file, seed) for seed in options.seeds]
        table = {}
        for rows in zip(*runs, strict=True):
            raw = [row["more"]["rmse_uncapped"] for row in rows]
            table[rows[0]["site"]] = {
                "local": mean(row["local"] for row in rows), "federated": mean(row["federated"] for row in rows),
                "local_uncapped": mean(one["local"] for one in raw), "federated_uncapped": mean(one["federated"] for one in raw),
            }  # fmt: skip
        print(f"{'site':10}{'local':>8}{'federated':>11}{'ratio':>8}{'uncapped':>18}")
        for site, row in table.items():
            print(
                f"{site:10}{row['local']:8.2f}{row['federated']:11.2f}{row['federated'] / row['local']:8.3f}{row['local_uncapped']:9.2f}{row['federated_uncapped']:9.2f}"
            )
        local, federated = (mean(row[who] for row in table.values()) for who in ("local", "federated"))
        better = sum(row["federated"] < row["local"] for row in table.values())
        worst = {who: max(row[who] for row in table.values()) for who in ("local", "federated")}
        print(
            f"{'mean':10}{local:8.2f}{federated:11.2f}{federated / local:8.3f}   better at {better} of {len(table)}; worst {worst['local']:.2f} -> {worst['federated']:.2f}"
        )
        results[str(plants)] = {
            "sites": table,
            "mean": {"local": local, "federated": federated},
            "better": better,
            "seeds": options.seeds,
        }
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
