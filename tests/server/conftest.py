"""What the tests of gateway and nginx share: a federation on disk, and what answers behind."""

from pathlib import Path

import pytest

from tests.server.federation import Behind, Federation


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


@pytest.fixture
def behind() -> Behind:
    return Behind()
