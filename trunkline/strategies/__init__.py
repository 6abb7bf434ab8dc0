"""One algorithm per file; this table is the only list of them."""

from typing import Any

from pydantic import ValidationError

from trunkline.errors import ConfigError, nearest
from trunkline.protocol.plan import LocalPlan
from trunkline.strategies.central import Central
from trunkline.strategies.clustered import Clustered
from trunkline.strategies.conflict_averse import ConflictAverse
from trunkline.strategies.ditto import Ditto
from trunkline.strategies.fedadam import FedAdam
from trunkline.strategies.fedavg import FedAvg
from trunkline.strategies.fedavgm import FedAvgM
from trunkline.strategies.fedbabu import FedBABU
from trunkline.strategies.fedbn import FedBN
from trunkline.strategies.fedper import FedPer
from trunkline.strategies.fedprox import FedProx
from trunkline.strategies.fedrep import FedRep
from trunkline.strategies.fedyogi import FedYogi
from trunkline.strategies.local import Local
from trunkline.strategies.median import Median
from trunkline.strategies.multikrum import MultiKrum
from trunkline.strategies.strategy import Averaging, FitQuerying, Strategy, StrategyState
from trunkline.strategies.trimmed_mean import TrimmedMean

STRATEGIES: dict[str, type[Averaging]] = {
    "central": Central,
    "clustered": Clustered,
    "conflict_averse": ConflictAverse,
    "ditto": Ditto,
    "fedadam": FedAdam,
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedbabu": FedBABU,
    "fedbn": FedBN,
    "fedper": FedPer,
    "fedprox": FedProx,
    "fedrep": FedRep,
    "fedyogi": FedYogi,
    "local": Local,
    "median": Median,
    "multikrum": MultiKrum,
    "trimmed_mean": TrimmedMean,
}


def build_strategy(name: str, options: dict[str, Any], training: LocalPlan) -> Averaging:
    """The strategy `[strategy]` asks for.

    Raises:
        ConfigError: an unknown name or option, or an option out of its range.
    """
    if name not in STRATEGIES:
        raise ConfigError(
            f"[strategy] name = {name!r} is not known{nearest(name, STRATEGIES)} Allowed: {', '.join(sorted(STRATEGIES))}."
        )
    kind = STRATEGIES[name]
    options_of_kind = [field for field in kind.model_fields if field != "training"]
    for key in options:
        if key not in options_of_kind:
            allowed = f"allowed: {', '.join(options_of_kind)}" if options_of_kind else "it has no options"
            raise ConfigError(
                f"[strategy] {key!r} is not an option of {name!r}{nearest(key, options_of_kind)} {allowed.capitalize()}."
            )
    try:
        return kind(training=training, **options)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"[strategy] {'.'.join(map(str, first['loc']))} = {first['input']!r} for {name!r}: {first['msg']}."
        ) from None


__all__ = ["STRATEGIES", "FitQuerying", "Strategy", "StrategyState", "build_strategy"]
