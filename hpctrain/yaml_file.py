"""YAML files that people write: read strictly, and their mistakes told in one sentence."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from hpctrain.errors import UserError, nearest


class Section(BaseModel):
    """A mapping in such a file: no keys but its own, no infinite numbers, and `true` is not 1."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("true and false are for switches only")
        return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, or raise UserError."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected a YAML file") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{line}: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no `key: value` lines; expected some such as name: value")
    return values


class StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, and reads 1e-4 as a number, where YAML 1.1 insists on 1.0e-4."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


_UNKNOWN_KEY = ("extra_forbidden", "invalid_key")  # as pydantic calls it; the second is one that is no text


def explain(error: ValidationError, where: str, known: Sequence[str]) -> str:
    """Return one sentence for the first thing that is wrong in `where`, whose `known` keys are suggested."""
    # A key that is not known first: it is often the misspelled one that another error misses.
    first = min(error.errors(), key=lambda one: one["type"] not in _UNKNOWN_KEY)
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] in _UNKNOWN_KEY:
        return f"there is no configuration key {key} (in {where}); {nearest(key, known)}"
    if first["type"] == "missing":
        return f"{where} does not set {key}, which is needed"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return message
    given = first.get("input")
    message = message[:1].lower() + message[1:]
    return f"{key} is {given!r}: {message.replace('input should be', 'expected')}"
