"""Every error Trunkline raises on purpose.

    TrunklineError                 its text is for a person: who, when, expected, found, what to do next
    ├── ConfigError                site.toml or run.toml has an invalid or contradictory value
    ├── DataError                  a plant's files cannot be read as its site.toml describes them
    │   └── SensorMismatch         a batch has other columns than the site declares
    ├── ContractError              something would cross the wire that the run's contract does not name
    │   ├── Refused                the server set one site's reply aside; the round goes on
    │   ├── Declined               the plant's policy, or a person there, refuses a run
    │   ├── Pending                a person at the plant has not decided yet
    │   └── Away                   the plant is outside its hours, or a person there has paused it
    ├── StorageError               a vault or checkpoint cannot be written or read
    │   └── ForeignState           it is intact, but of another run or site, or of a newer Trunkline
    ├── TrustError                 a key, certificate or invitation is missing, expired, or of another owner
    │   └── TamperError            a signed record or release was changed
    ├── StateLost                  a process died with the state of the sites it trained; the run goes back to its checkpoint
    ├── QuorumError                too few sites answered; the run stopped with its state on disk
    └── DeploymentError            a daemon or one of its children cannot start or be reached

The command line prints the text of a TrunklineError and exits with 1. Anything else that escapes is a defect and keeps
its traceback.
"""

import difflib
from collections.abc import Iterable


class TrunklineError(Exception):
    """The root: one `except` for a program that embeds Trunkline."""


class ConfigError(TrunklineError):
    """A configuration file is invalid; the text names file, key, found value and allowed values."""


class DataError(TrunklineError):
    """A plant's data is invalid; the text names file, line or column, the found value and the remedy."""


class SensorMismatch(DataError):
    """A batch has another number of columns than the site declares."""


class ContractError(TrunklineError):
    """An array or metric is not what the run's contract allows."""


class Refused(ContractError):
    """A reply was set aside; the text names site, round, cause and remedy."""


class Declined(ContractError):
    """A plant takes no part in a run; the text is `SITE: reason`, and the operator of the run reads it."""


class Pending(ContractError):
    """A plant's policy leaves a run to a person, who has not decided yet; not a failure, so the server asks again."""


class Away(ContractError):
    """A plant does not train now, because of its hours or a pause; not a failure, so the server asks again later. The text is `SITE: reason`."""


class StorageError(TrunklineError):
    """A file of state could not be written, or no intact version of it is left."""


class ForeignState(StorageError):
    """A file of state is intact, but of another run, site or version; it is neither skipped nor overwritten."""


class TrustError(TrunklineError):
    """A key, certificate or invitation is missing, expired, readable by others, or belongs to somebody else."""


class TamperError(TrustError):
    """A signed record or release was changed after it was signed; the text names the first change."""


class StateLost(TrunklineError):
    """A process of a simulation died with the state of its sites; the state on disk is of the last checkpoint."""


class QuorumError(TrunklineError):
    """A round ended below its quorum.

    Args:
        text: what is missing, and what to do now that the run has stopped.
        situation: what is missing, for a run that waits instead; by default `text`.
    """

    def __init__(self, text: str, situation: str = "") -> None:
        super().__init__(text)
        self.situation = situation or text

    @classmethod
    def stopped(cls, situation: str, round: int) -> "QuorumError":
        """The error of a run whose last finished round is `round`."""
        remedy = (
            f"The run stopped after round {round} with its state on disk; mend the sites and run again with --resume."
        )
        return cls(f"{situation} {remedy}", situation)


class DeploymentError(TrunklineError):
    """A process of the deployment could not be started or reached."""


class TrunklineDeprecation(FutureWarning):
    """A file uses an older name. The text gives the file, both names and the version that refuses the older one.

    Not an error: a warning for the person who wrote the file.
    """


def nearest(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the candidate closest to `word`, or a full stop when none is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "."
