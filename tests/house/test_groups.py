"""Tests that share what is costly to make run on one worker."""

import subprocess
import sys
from pathlib import Path

from tests.groups import group_of

SHARED = """
import os, pytest
@pytest.mark.xdist_group("together")
@pytest.mark.parametrize("number", range(6))
def test_together(number, record_property): print("worker", os.environ["PYTEST_XDIST_WORKER"])
@pytest.mark.parametrize("number", range(6))
def test_alone(number): pass
"""


def test_a_group_runs_on_one_worker(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "import tests; tests.__path__.append(sys.path[0] + '/tests')\nimport tests.groups as groups\n"
        f"from pathlib import Path; groups.ROOT = Path({str(tmp_path)!r})\n"
        "pytest_xdist_make_scheduler = groups.pytest_xdist_make_scheduler\n"
    )
    (tmp_path / "tests" / "test_shared.py").write_text(SHARED)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-rP", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len({line for line in done.stdout.splitlines() if line.startswith("worker")}) == 1, done.stdout


def test_marks_are_read_of_a_whole_file_and_of_single_tests() -> None:
    assert (
        group_of("tests/end_to_end/test_resume.py::test_resuming_with_another_run_file_is_refused_by_key") == "resume"
    )
    assert group_of("tests/chaos/test_chaos.py::test_a_full_disk_takes_nothing_until_it_is_freed") == ""
    name = "test_a_run_ends_by_itself_with_the_same_bytes_whatever_happens_to_it"
    assert group_of(f"tests/chaos/test_chaos.py::{name}[3]") == "chaos"
