"""Write the JSON schema of every command's record into this folder: `python docs/schemas/write.py`.

A schema is made of the dataclass that the command's function returns, see `pat.cli.COMMANDS`.
"""

from __future__ import annotations

import json
import typing
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from pat.cli import COMMANDS

FOLDER = Path(__file__).resolve().parent


class _Schema(GenerateJsonSchema):
    def float_schema(self, schema: Any) -> dict[str, Any]:
        """JSON has no number that is not finite: null stands in its place."""
        return {"type": ["number", "null"]}

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Leave out titles that only repeat names."""
        return False


def schemas() -> dict[str, dict[str, Any]]:
    """Return the schema of each command's record by the command's name."""
    found = {}
    for name, command in COMMANDS.items():
        module, _, function = command.run.partition(":")
        result = typing.get_type_hints(getattr(import_module(module), function))["return"]
        record = (typing.get_args(result) or (result,))[0]  # `pat demo --ui` leaves none
        record = typing.get_type_hints(record).get("record", record)  # some return it beside where things are
        assert is_dataclass(record)
        # Documented for plain dataclasses, and passed on to those inside; here the descriptions come from.
        record.__pydantic_config__ = ConfigDict(use_attribute_docstrings=True)  # type: ignore[attr-defined]
        schema = TypeAdapter(record).json_schema(mode="serialization", schema_generator=_Schema)
        found[name] = {"$schema": GenerateJsonSchema.schema_dialect, "title": f"pat {name}", **_whole(schema)}
    return found


def _whole(schema: Any) -> Any:
    """Have every field of an object that is no free mapping required: a record is written with all of them."""
    if isinstance(schema, dict):
        schema = {key: _whole(value) for key, value in schema.items() if key != "default"}
        if "properties" in schema:
            schema["required"] = list(schema["properties"])
            schema["additionalProperties"] = False
        return schema
    return [_whole(item) for item in schema] if isinstance(schema, list) else schema


if __name__ == "__main__":
    for name, schema in schemas().items():
        (FOLDER / f"{name}.json").write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")
