"""Run one federation with several strategies and compare the figures site by site.

trunkline sites synthetic --out sites
python examples/compare_strategies.py sites out/strategies
"""

import sys
from pathlib import Path

import trunkline as tl

STRATEGIES = ("fedper", "fedrep")
RUN = {"name": "compare", "rounds": 2, "training": {"steps": 4}}


def main(sites: Path, out: Path) -> None:
    results = {}
    for name in STRATEGIES:
        run = tl.read_run(RUN, {"strategy.name": name})
        results[name] = tl.simulate(run, sites, out / name, overwrite=True, progress=False)
    print(f"{'site':10}{'task':12}{'metric':10}{'alone':>10}", *(f"{name:>10}" for name in STRATEGIES), sep="")
    for rows in zip(*(result.rows for result in results.values()), strict=True):
        figures = [rows[0]["local"], *(row["federated"] for row in rows)]
        cells = (f"{figure:10.4g}" if figure is not None else f"{'-':>10}" for figure in figures)
        print(f"{rows[0]['site']:10}{rows[0]['task']:12}{rows[0]['metric']:10}", *cells, sep="")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
