"""The package's source as syntax trees, for the rules of the house."""

import ast
from functools import cache
from pathlib import Path

import trunkline

PACKAGE = Path(trunkline.__file__).parent


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    return {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports_of(module: str, *, at_import: bool = False) -> frozenset[str]:
    """What a module imports: modules of the package by dotted name, others by their full name.

    Args:
        at_import: only what runs when the module is imported: not in a function, not behind TYPE_CHECKING.
    """
    imported: set[str] = set()
    for node in _statements(tree_of(modules()[module])) if at_import else ast.walk(tree_of(modules()[module])):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                imported.add(full if full in modules() else node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    return frozenset(imported - {module})


def _statements(tree: ast.AST) -> list[ast.AST]:
    """The nodes of `tree` that run when it is imported."""
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        nodes += [child, *_statements(child)]
    return nodes


def reached_at_import(module: str) -> set[str]:
    """All modules, of the package or not, that importing `module` imports; packages' `__init__` count."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
        waiting += [parent for parent in parents if parent in modules()]
        if name in modules():
            waiting += imports_of(name, at_import=True)
    return reached


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for target in sorted(edges.get(node, ())):
            if target not in order:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], order[target])
        if low[node] == order[node]:
            component: list[str] = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                components.append(sorted(component))

    for node in sorted(edges):
        if node not in order:
            visit(node)
    return components
