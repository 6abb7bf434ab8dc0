"""Sizes that keep the house liveable: CONTRIBUTING.md names them, docs/decisions.md says why."""

import ast
from collections.abc import Iterator

from tests.house.code import PACKAGE, modules, tree_of

FILE_LINES = 600  # of any file
LONG_LINES, LONG_FILES = 400, 8  # at most so many files are longer than that
CLASS_LINES, FUNCTION_LINES = 300, 100
LOOSE_MODULES = 8  # of a wing, beside its sub-packages
ROOMS = (
    "cli egress_audit simulations/ray simulations/vectorized simulations/world simulations/factories server/operations "
    "server/rounds server/gateway server/membership server/releases server/reporting client/agent client/adaptation "
    "client/model_selection client/policy client/training client/state client/data client/data/preprocess models/stems "
    "models/backbones models/tasks strategies flower security privacy config protocol runtime"
)


def lengths() -> dict[str, int]:
    return {name: len(path.read_text().splitlines()) for name, path in modules().items()}


def definitions() -> Iterator[tuple[str, ast.AST, int]]:
    for name, path in modules().items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node, (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_file_is_too_long() -> None:
    assert {name: lines for name, lines in lengths().items() if lines > FILE_LINES} == {}
    long = {name: lines for name, lines in lengths().items() if lines > LONG_LINES}
    assert len(long) <= LONG_FILES, long


def test_no_class_and_no_function_is_too_long() -> None:
    over = {
        name: size
        for name, node, size in definitions()
        if size > (CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES)
    }
    assert over == {}


def test_no_wing_is_a_corridor_of_loose_modules() -> None:
    for wing in sorted(folder for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()):
        loose = [file.stem for file in wing.glob("*.py") if file.name != "__init__.py"]
        if any((folder / "__init__.py").exists() for folder in wing.iterdir() if folder.is_dir()):
            assert len(loose) <= LOOSE_MODULES, f"{wing.name}: {loose}"


def test_the_rooms_of_the_design_exist() -> None:
    assert [room for room in ROOMS.split() if not (PACKAGE / room / "__init__.py").exists()] == []


def test_the_tests_lie_as_the_package_does() -> None:
    """A folder of tests is named after a room, so that one finds the tests of a module."""
    tests = PACKAGE.parent / "tests"
    free = {"house", "end_to_end", "chaos", "formats", "api"}  # of no single room
    for folder in (path for path in tests.rglob("*") if (path / "__init__.py").exists()):
        relative = folder.relative_to(tests)
        if relative.parts[0] not in free:
            assert (PACKAGE / relative).is_dir(), f"tests/{relative} is the folder of no room"
