"""What a simulated round costs beside the bare training loop, on the built-in factories.

    python benchmarks/simulate.py [--sites 16] [--rounds 6] [--workers 2] [--out FILE.json]

The bare loop does the same local training of the same sites in one process with one torch thread, and nothing else:
no messages, no vault, no checkpoint, no curves. Rounds after the first are compared, so that reading data and starting
Ray do not count; they are given apart.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from trunkline.config.run import parse_run
from trunkline.protocol.arrays import seed_of
from trunkline.protocol.messages import TrainRequest
from trunkline.server.reporting.report import read_report


def bare(folders: list[Path], states: Path, table: dict, rounds: int) -> float:
    """Seconds a round of training alone."""
    import torch

    from trunkline.client.site import open_site
    from trunkline.client.training.loop import train_site

    torch.set_num_threads(1)
    run = parse_run(dict(table), "benchmark")
    request = TrainRequest(
        run="bench", seed=run.seed, round=1, rounds=rounds, trunk=run.trunk, plan=run.training, lend=("trunk",)
    )
    sites = [open_site({"site": str(folder), "state": str(states / folder.name)}) for folder in folders]
    models = [site.model(request) for site in sites]
    seconds = []
    for round in range(rounds):
        start = time.perf_counter()
        for site, model in zip(sites, models, strict=True):
            seed = seed_of(run.seed, site.name, round)
            train_site(
                model, site.resident("train"), site.data.tasks, run.training, seed=seed, done=round, rounds=rounds
            )
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def simulated(folders: list[Path], out: Path, table: dict, workers: int) -> tuple[float, float]:
    """Seconds a round after the first, and seconds of everything else."""
    from trunkline.simulations.folders import prepare
    from trunkline.simulations.simulate import simulate

    prepare(out, resume=False, overwrite=True)
    start = time.perf_counter()
    simulate(parse_run(dict(table), "benchmark"), folders, out, workers=workers)
    whole = time.perf_counter() - start
    rounds = [one["seconds"] for one in read_report(out)["rounds"]]
    return median(rounds[1:]), whole - sum(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from trunkline.simulations.factories import write_sites

    table = {
        "name": "bench",
        "rounds": options.rounds,
        "training": {"steps": 10},
        "report": {"baseline": False},
        "cohort": {"min_sites": 1},
    }
    with tempfile.TemporaryDirectory() as folder:
        folders = sorted(write_sites("synthetic", Path(folder) / "sites", plants=options.sites, groups=20))
        alone = bare(folders, Path(folder) / "bare", table, options.rounds)
        one, _ = simulated(folders, Path(folder) / "one", table, 1)
        several, around = simulated(folders, Path(folder) / "several", table, options.workers)
    result = {
        "sites": options.sites, "bare_s_a_round": alone, "one_worker_to_bare": one / alone,
        f"{options.workers}_workers_to_bare": several / alone, "start_and_report_s": around,
    }  # fmt: skip
    for name, value in result.items():
        print(f"{name:24}{value:10.3f}" if isinstance(value, float) else f"{name:24}{value:10}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
