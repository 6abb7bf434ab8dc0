"""Site folders that many tests share, written once a session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.groups import pytest_xdist_make_scheduler  # noqa: F401 - a hook


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts processes takes longest, so it begins first: at the end one worker would wait for the other."""
    items.sort(key=lambda item: item.get_closest_marker("processes") is None)


DATA = Path(os.environ.get("TRUNKLINE_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session", autouse=True)
def no_power_cuts() -> Iterator[None]:
    """The suite writes thousands of files durably, and no test can cut the power: a flush to the disk would only take time.

    What a kill leaves behind, which tests do look at, does not depend on it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data sets; a test that needs it is skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}; set TRUNKLINE_DATA to the folder that holds cmapss/")
    return DATA


@pytest.fixture(scope="session")
def plants(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The four built-in factories: other sensors, other tasks, other file formats."""
    from trunkline.simulations.factories import write_sites

    return sorted(write_sites("synthetic", tmp_path_factory.mktemp("plants"), groups=12))
