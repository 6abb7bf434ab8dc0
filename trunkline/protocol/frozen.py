"""The base of every value object that is configuration or crosses the wire."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A value object: immutable, and an unknown key is an error rather than a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
