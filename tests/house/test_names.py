"""A variable says what it holds. The list is short, the rule is old: a name is a noun for a thing, a verb for an act."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.code import PACKAGE, modules, tree_of

EMPTY = {
    "one", "ones", "some", "found", "came", "own", "theirs", "there", "here", "at", "known", "told", "why", "who",
    "what", "beside", "place", "number", "said", "given", "made", "gone", "away", "again", "both", "each", "much",
    "others", "rest",
}  # fmt: skip
# File -> bindings of such names that it may still have. The ratchet: a figure may only fall, and a file that is not
# listed has none.
LEFT: dict[str, int] = {
    "client/availability.py": 5,
    "client/check.py": 6,
    "client/data/notes.py": 6,
    "client/policy/contracts.py": 13,
    "client/policy/manifest.py": 1,
    "client/site.py": 3,
    "client/state/at_rest.py": 20,
    "client/state/identity.py": 1,
    "client/state/permissions.py": 3,
    "client/state/rekeying.py": 4,
    "client/state/vault.py": 11,
    "flower/records.py": 7,
    "flower/replies.py": 5,
    "protocol/header.py": 1,
    "protocol/opening_hours.py": 7,
    "runtime/progress.py": 1,
    "runtime/storage.py": 12,
    "security/hash_chain.py": 2,
    "server/membership/registry.py": 1,
    "server/operations/backup.py": 1,
    "server/rounds/admission.py": 2,
    "simulations/search.py": 5,
}


def bindings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


@pytest.mark.parametrize("path", modules().values(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_variables_say_what_they_hold(path: Path) -> None:
    empty = Counter(name for name in bindings(tree_of(path)) if name.strip("_") in EMPTY)
    limit = LEFT.get(str(path.relative_to(PACKAGE)), 0)
    assert sum(empty.values()) <= limit, f"{dict(empty)}: name what each of them holds"
    assert sum(empty.values()) == limit, f"{path.name} has {sum(empty.values())}: lower its figure in LEFT"


def test_the_ratchet_names_files_that_exist() -> None:
    assert [name for name in LEFT if not (PACKAGE / name).is_file()] == []
    assert sum(LEFT.values()) < 300
