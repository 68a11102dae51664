"""YAML files that people write: read strictly, and their mistakes told in one sentence.

A file may come from somebody else, so reading it runs no code, follows no alias and takes memory in proportion to its
size, which is limited.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from hpctrain.errors import UserError, nearest

_MAX_FILE_BYTES = 1 << 20
_MAX_DEPTH = 20  # of mappings and lists in each other
_MAX_INTEGER_CHARACTERS = 100
_MAX_SHOWN = 100  # characters of a value in an error
# Control characters but tab and line feed, and halves of characters: bytes of the command line that are no UTF-8.
_NO_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


class Section(BaseModel):
    """A mapping in such a file: no keys but its own, no infinite numbers, no control characters; `true` is not 1."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_plain_text(cls, value: Any) -> Any:
        _check_texts(value)
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("true and false are for switches only")
        return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, or raise UserError."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise UserError(f"{path} has more than {_MAX_FILE_BYTES:,} bytes; expected a YAML file that a person wrote")
        values = parse_yaml(content.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{line}: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no `key: value` lines; expected some such as name: value")
    return values


def parse_yaml(text: str) -> Any:
    """Return what a YAML text says; anything that is wrong with it raises yaml.YAMLError."""
    try:
        return yaml.load(text, StrictLoader)
    except ValueError as error:  # a date there is none of, such as 2024-13-01
        raise yaml.YAMLError(str(error)) from None


class StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, and reads 1e-4 as a number, where YAML 1.1 insists on 1.0e-4.

    Tags (`!!python/object`) and aliases (`*name`, of which a few lines can make gigabytes) are refused as well, and so
    is what is nested deeper than anybody writes.
    """

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _problem("aliases such as *name are not used here; write the value again", event)
        if getattr(event, "tag", None) is not None:
            raise _problem(f"tags such as {_shown(event.tag)} are not used here; leave it out", event)
        if self._depth >= _MAX_DEPTH:
            raise _problem(f"more than {_MAX_DEPTH} levels lie in each other", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _problem("a key is a list or a mapping", key_node)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _problem(f"{_shown(key)} is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > _MAX_INTEGER_CHARACTERS:
            raise _problem(f"a number has {len(node.value):,} digits", node)
        return int(super().construct_yaml_int(node))


def _problem(text: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, text, place.start_mark)


def _check_texts(value: Any) -> None:
    """Raise ValueError for text, at any depth, that no file name, terminal or UTF-8 file takes."""
    if isinstance(value, str):
        if _NO_TEXT.search(value):
            raise ValueError("expected text without control characters")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_texts(key)
            _check_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_texts(inner)


StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_yaml_int)
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
    key = _shown(".".join(str(part) for part in first["loc"]))
    if first["type"] in _UNKNOWN_KEY:
        return f"there is no configuration key {key} (in {where}); {nearest(key, known)}"
    if first["type"] == "missing":
        return f"{where} does not set {key}, which is needed"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return message
    given = first.get("input")
    message = message[:1].lower() + message[1:]
    return f"{key} is {_shown(repr(given))}: {message.replace('input should be', 'expected')}"


def _shown(value: Any) -> str:
    """Return a value as one line of printable text that is not too long for an error."""
    text = str(value)
    text = text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
