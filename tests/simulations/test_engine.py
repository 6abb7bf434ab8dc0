"""Workers die; a simulation does not."""

from pathlib import Path
from typing import Any

import pytest
import ray

from tests.loopback import federate, trunk_of
from trunkline.simulations.engine import RayGrid


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that Ray leaves open
def test_a_worker_that_dies_is_replaced_once_and_the_bytes_are_the_same(
    plants: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = {
        "min_sites": 4,
        "deadline_s": 120.0,
        "gather_s": 120.0,
    }  # a process may take long to start on a busy machine
    federate(plants, tmp_path / "loopback", cohort=patient)
    out = tmp_path / "ray"
    grid = RayGrid(plants, [out / "state" / plant.name for plant in plants], workers=1)
    made: list[Any] = []
    honest = grid._worker

    def counted() -> Any:
        made.append(honest())
        return made[-1]

    monkeypatch.setattr(grid, "_worker", counted)
    try:
        ray.kill(grid._workers[0])  # all four sites are its own, and all four will be waiting for it
        federate(plants, out, grid=grid, cohort=patient)  # type: ignore[arg-type]
    finally:
        grid.close()
    assert len(made) == 1
    assert trunk_of(out).digest() == trunk_of(tmp_path / "loopback").digest()
