"""Every field of LocalPlan is honoured by a stack, or sends the site to single training; none is silently ignored."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.simulations.vectorized.test_sites import ROWS, order_of, run, write
from trunkline.client.handlers import answer_score
from trunkline.client.site import open_site
from trunkline.client.state.vault import Vault
from trunkline.models.trunk import first_trunk
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import ScoreRequest, TrainRequest
from trunkline.protocol.plan import Augment, LocalPlan, Phase
from trunkline.simulations.vectorized.eligibility import HONOURED, kind_of, unsupported

ROUNDS = 3
CHANGED: dict[str, Any] = {
    "phases": (Phase(parts=("heads",), share=0.5), Phase(parts=("trunk",))), "steps": 2, "epochs": 2.0, "batch_size": 8,
    "learning_rate": 0.003, "private_rate": 0.1, "optimizer": "lbfgs", "weight_decay": 0.5, "clip_norm": 0.01,
    "schedule": "constant", "proximal": 0.1, "keep": "last", "patience_rounds": 1, "balance": "famo",
    "sampling": "balanced", "augment": Augment(jitter=0.1), "personal": 0.1, "finish_steps": 3, "finish_parts": ("stem",),
    "finish_rate": 0.2, "finetune_steps": 4, "finetune_rate": 0.9,
}  # fmt: skip
# what a field needs beside it to have an effect at all
BESIDE: dict[str, dict[str, Any]] = {
    "finish_parts": {"finish_steps": 3}, "finish_rate": {"finish_steps": 3}, "finetune_rate": {"finetune_steps": 4},
    "patience_rounds": {"steps": 20, "learning_rate": 0.05}, "keep": {"learning_rate": 0.5},
}  # fmt: skip
Outcome = dict[str, NDArray[np.float64]]


def request_of(**plan: Any) -> TrainRequest:
    return order_of(trunk=ROWS, baseline=True, rounds=ROUNDS, plan=plan)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("sites")
    return [write(root, place, window="", more="", rows=6) for place in range(2)]


def outcome(folders: list[Path], state: Path, request: TrainRequest, *, together: bool) -> Outcome:
    """All that some rounds come to: each update and metric, what the vaults hold, and every candidate's figure at the end."""
    results = run(folders, state, request, ROUNDS, together)
    arrays = dict(first_trunk(request.trunk, request.seed))
    values: Outcome = {}
    for round, by_site in enumerate(results):
        arrays = {
            key: (array + np.mean([site[0][key] for site in by_site.values()], axis=0)).astype(np.float32)
            for key, array in arrays.items()
        }
        for site, (change, metrics, _) in by_site.items():
            values |= {f"{site}, round {round}: {key}": np.asarray(value, float) for key, value in change.items()}
            values |= {f"{site}, round {round}: {key}": np.array([value]) for key, value in metrics.items()}
    last = ScoreRequest(**{**request.model_dump(exclude={"kind"}), "round": ROUNDS + 1})
    for folder in folders:
        entry = Vault(state / folder.name, request.run).before(ROUNDS + 1)
        assert entry is not None
        states = {
            "private": entry.private,
            "local": entry.local,
            **{f"best {who}": one for who, one in entry.best.items()},
        }
        for name, arrays_of_state in states.items():
            values |= {
                f"{folder.name}, {name}: {key}": np.asarray(value, float) for key, value in arrays_of_state.items()
            }
        site = open_site({"site": str(folder), "state": str(state / folder.name)})
        for row in answer_score(site, last, Arrays(arrays)).rows:
            figures = {key: value for key, value in row.candidates.items() if value is not None}
            values |= {f"{folder.name}, {row.task} {key}": np.array([value]) for key, value in figures.items()}
    return values


def differences(one: Outcome, other: Outcome) -> list[str]:
    """What differs by more than rounding."""
    if one.keys() != other.keys():
        return sorted(one.keys() ^ other.keys())
    return [key for key in one if not np.allclose(one[key], other[key], rtol=2e-3, atol=2e-4)]


@pytest.fixture(scope="module")
def plain(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The outcome of single training by a plan with some settings, each trained once."""
    root = tmp_path_factory.mktemp("plain")

    @cache
    def outcome_of(settings: tuple[tuple[str, Any], ...]) -> Outcome:
        name = "-".join(f"{key}={value}" for key, value in settings) or "default"
        return outcome(folders, root / name, request_of(**dict(settings)), together=False)

    return outcome_of


@pytest.mark.usefixtures("smooth")
@pytest.mark.parametrize("field", list(LocalPlan.model_fields))
def test_a_field_is_honoured_by_a_stack_or_sends_the_site_to_single_training(
    field: str, folders: list[Path], tmp_path: Path, plain: Any
) -> None:
    assert field in CHANGED, (
        f"LocalPlan.{field} is new: give it a value here, and either honour it in stacks or leave it out"
    )
    assert CHANGED[field] != LocalPlan.model_fields[field].get_default()
    beside = BESIDE.get(field, {})
    request = request_of(**beside, **{field: CHANGED[field]})
    site = open_site({"site": str(folders[0]), "state": str(tmp_path / "state")})
    assert kind_of(site, request_of(**beside)) is not None
    if field not in HONOURED:
        assert unsupported(request.plan) == [field]
        assert kind_of(site, request) is None
        return
    assert kind_of(site, request) is not None
    stacked = outcome(folders, tmp_path / "stacked", request, together=True)
    alone = outcome(folders, tmp_path / "alone", request, together=False)
    assert differences(alone, stacked) == []
    assert differences(plain(tuple(beside.items())), stacked) != []


def test_the_list_of_honoured_fields_names_fields_only() -> None:
    assert set(LocalPlan.model_fields) >= HONOURED
