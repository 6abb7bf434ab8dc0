"""JSON Schemas of site.toml and run.toml, for editors that complete and check TOML."""

from typing import Any, Literal

from pydantic.json_schema import GenerateJsonSchema

from trunkline.config.run import RunConfig, StrategyConfig
from trunkline.config.site import SiteConfig
from trunkline.strategies import STRATEGIES

Schema = dict[str, Any]
DRAFT = "https://json-schema.org/draft/2020-12/schema"
MODELS: dict[str, type[SiteConfig] | type[RunConfig]] = {"site": SiteConfig, "run": RunConfig}


class _TomlSchema(GenerateJsonSchema):
    """Without a title for each key: an editor would show `Robust Z` in place of the description."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False


def build_schema(file: Literal["site", "run"]) -> Schema:
    """The JSON Schema (draft 2020-12) of site.toml or run.toml.

    It holds names, kinds and ranges of the keys. Rules between keys, such as `reference` needs `group`, are checked by
    `trunkline check` and at the start of a run only.
    """
    schema = MODELS[file].model_json_schema(schema_generator=_TomlSchema)
    if file == "run":
        schema["$defs"][StrategyConfig.__name__] = _strategy_schema()
    return {"$schema": DRAFT, **_without_null(schema), "title": f"{file}.toml"}


def _strategy_schema() -> Schema:
    """`[strategy]`: a name, and the options of the strategy of that name."""
    default = StrategyConfig().name
    name = {"enum": sorted(STRATEGIES), "default": default, "description": "see docs/strategies.md"}
    cases = []
    for key, strategy in sorted(STRATEGIES.items()):
        options = strategy.model_json_schema(schema_generator=_TomlSchema)["properties"]
        options.pop("training", None)
        same_name = {"properties": {"name": {"const": key}}}
        cases.append(
            {
                "if": same_name if key == default else {**same_name, "required": ["name"]},
                "then": {"properties": {"name": True, **options}, "additionalProperties": False},
            }
        )
    return {"type": "object", "description": StrategyConfig.__doc__, "properties": {"name": name}, "allOf": cases}


def _without_null(part: Any) -> Any:
    """`part` without null: TOML has no such value, a key is left out instead."""
    if isinstance(part, list):
        return [_without_null(entry) for entry in part]
    if not isinstance(part, dict):
        return part
    kept = {key: _without_null(value) for key, value in part.items() if value is not None}
    choices = [choice for choice in kept.get("anyOf", ()) if choice != {"type": "null"}]
    if "anyOf" in kept and len(choices) < len(kept["anyOf"]):
        del kept["anyOf"]
        kept |= choices[0] if len(choices) == 1 else {"anyOf": choices}
    return kept
