"""Train a trunk with all plants but one; then make a model for that one from few labels.

trunkline sites synthetic --out sites
python examples/adapt_new_plant.py sites out/newcomer
"""

import sys
from pathlib import Path

import trunkline as tl

RUN = {"name": "without-one", "rounds": 2, "training": {"steps": 4}}


def main(sites: Path, out: Path) -> None:
    *members, newcomer = sorted(path.parent for path in sites.glob("*/site.toml"))
    federation = tl.simulate(RUN, members, out / "federation", overwrite=True, progress=False)
    print(federation)
    adapted = tl.adapt(newcomer, federation.trunk, out / "adapted", groups=2)
    print(adapted)
    for row in adapted.rows:
        print(row["task"], {name: gain["difference"] for name, gain in row["gains"].items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
