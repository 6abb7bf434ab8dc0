"""What decides and checks what leaves a plant stands without the code that trains."""

import subprocess
import sys

import pytest

MODULES = ("consent", "contracts", "egress", "manifest")


@pytest.mark.parametrize("module", MODULES)
def test_a_policy_module_imports_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, trunkline.client.policy.{module}; print(sorted({{'torch', 'ray'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
