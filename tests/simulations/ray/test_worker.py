"""What a worker process imports before it has a site."""

import subprocess
import sys

import pytest

MODULES = ["worker", "site_host", "serialization"]


@pytest.mark.parametrize("module", MODULES)
def test_a_worker_starts_without_torch(module: str) -> None:
    code = f"import sys, trunkline.simulations.ray.{module}; assert 'torch' not in sys.modules, 'imported'"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr


def test_a_host_imports_torch_with_its_first_site() -> None:
    code = (
        "import sys\nfrom trunkline.simulations.ray.site_host import SiteHost\nhost = SiteHost('a test')\n"
        "assert 'torch' not in sys.modules, 'imported'\nassert host.app is host.app and 'torch' in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
