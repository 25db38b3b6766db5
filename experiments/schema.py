"""Mappings of a YAML file as dataclasses: unknown and missing keys and values of another type are errors."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from dissect_clip.errors import SetupError


class Section:
    """A mapping of the file as a dataclass: its fields are the allowed keys, with their types."""

    @classmethod
    def read(cls, where: str, content: Any) -> Any:
        """Build an instance from a mapping.

        Raises:
            SetupError: a key is unknown or missing, or a value of another type; names the place.
        """
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        if not isinstance(content, dict):
            raise SetupError(f"{where}: {content!r} is not a mapping; its keys are {', '.join(fields)}")
        for key in content:
            if key not in fields:
                raise SetupError(f"{where}: {key!r} is unknown; the keys are {', '.join(fields)}")
        missing = [
            name
            for name, f in fields.items()
            if name not in content and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise SetupError(f"{where}: {missing[0]!r} is missing")
        for key, value in content.items():
            if not _is_a(value, hints[key]):
                raise SetupError(f"{where}: {key}: {value!r} is not {_NAMES[str(hints[key])]}")
        return cls(**content)


_NAMES = {
    "<class 'str'>": "a text",
    "str | None": "a text",
    "list[str]": "a list of names",
    "list[str] | None": "a list of names",
    "list[int]": "a list of whole numbers",
    "list[float]": "a list of numbers",
    "dict[str, str]": "a mapping of names to texts",
    "dict[float, str]": "a mapping of numbers to texts",
    "dict[str, typing.Any]": "a mapping",
    "list[typing.Any]": "a list",
}


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a YAML value has a type. Integers are also numbers; booleans are not."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(_is_a(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, parts[0]) for item in value)
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else ()
        return isinstance(value, dict) and all(_is_a(k, parts[0]) and _is_a(v, parts[1]) for k, v in pairs)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _check_keys(file: Path, text: str) -> None:
    """Reject a key that appears twice in a mapping; YAML would keep the last."""
    nodes = [yaml.compose(text, Loader=yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            for place, (key, _) in enumerate(node.value):
                if key.value in keys[:place]:
                    raise SetupError(f"{file}, line {key.start_mark.line + 1}: {key.value!r} appears twice")
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        SetupError: it cannot be read, is not YAML, or is not a mapping.
    """
    try:
        text = file.read_text(encoding="utf-8")
        _check_keys(file, text)
        content = yaml.safe_load(text)
    except OSError as error:
        raise SetupError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SetupError(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise SetupError(f"{file}: a grid is a mapping; this is {type(content).__name__}")
    return content
