"""One small run and one adaptation, which every test of the API looks at."""

from pathlib import Path

import pytest

import trunkline as tl

RUN = {"name": "small", "rounds": 1, "training": {"steps": 2, "keep": "last"}, "cohort": {"min_sites": 1}}


@pytest.fixture(scope="session")
def simulated(plants: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tl.SimulationResult:
    out = tmp_path_factory.mktemp("api") / "run"
    return tl.simulate(RUN, plants[:2], out, workers=0, progress=False)


@pytest.fixture(scope="session")
def adapted(
    plants: list[Path], simulated: tl.SimulationResult, tmp_path_factory: pytest.TempPathFactory
) -> tl.Adaptation:
    return tl.adapt(plants[-1], simulated.trunk, tmp_path_factory.mktemp("api") / "adapted", groups=2)
