"""Recipe files: a YAML 1.2 reader, overrides, and errors that name the key and the nearest valid key."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from ..errors import short
from ..names import find_recipe, nearest
from .recipe import Part, Recipe  # first: without pydantic or pyyaml its error names what to install

# isort: split
import yaml
from pydantic import ValidationError


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe in a file, or the packaged recipe of that name.

    Args:
        source: Path of a .yaml file, or a name of `names.RECIPE_FILES`.
        overrides: Changes as `key.key=value`, with the value in YAML, applied in order.

    Raises:
        ValueError: There is no such recipe, or it has an error. The message is one line and names the place.
    """
    path = find_recipe(str(source))
    values = _read(path)
    values.setdefault("name", path.stem)
    for override in overrides:
        _apply(values, override)
    try:
        return validated(Recipe, values)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Read YAML 1.2: `4e-5` is a number and `no` is a string, unlike in pyyaml. A key given twice is an error."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":bool", ":float", ":timestamp"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            problem = None if isinstance(key, yaml.ScalarNode) else "a key must be a word"
            if problem or key.value in seen:
                problem = problem or f"{key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan")
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|false|True|False"), list("tfTF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text("utf-8"), Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{path.name}{where}: not valid YAML: {problem or 'cannot be read'}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: not UTF-8 text") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}: a recipe is a YAML mapping with data, base and backbone; this is not one")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Set `a.b=c` in nested dictionaries."""
    key, equals, text = override.partition("=")
    names = key.split(".")
    if not equals or not all(names):
        raise ValueError(f"{override!r} is not KEY=VALUE, like backbone.training.learning_rate=1e-4")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: the value is not valid YAML") from error
    for depth, name in enumerate(names[:-1]):
        if values.get(name) is None:
            values[name] = {}
        if not isinstance(values[name], dict):
            before = ".".join(names[: depth + 1])
            raise ValueError(f"{override!r}: {before} is {values[name]!r}, it has no keys below it")
        values = values[name]
    values[names[-1]] = value


# -- errors ----------------------------------------------------------------------------------------------------------

PartType = TypeVar("PartType", bound=Part)


def validated(kind: type[PartType], values: Any, place: str = "") -> PartType:
    """Return a section with these values.

    Args:
        place: Place of the section in the recipe, for messages.

    Raises:
        ValueError: A value is not allowed. The message is one line with the place, the value and what is allowed,
            for the first such value.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        others = len({_location(values, problem) for problem in problems}) - 1
        more = f" (and {others} more)" if others else ""
        raise ValueError(_in_words(kind, values, place, problems[0]) + more) from None


def _location(values: Any, problem: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Return the keys and indices that lead to a problem, without the union members that pydantic adds."""
    found: tuple[str | int, ...] = problem["loc"]
    if problem["type"] == "missing":
        return found
    for at, name in enumerate(found):
        if not (name in values if isinstance(values, dict) else isinstance(values, list) and isinstance(name, int)):
            return found[:at]
        values = values[name]
    return found


def _in_words(kind: type[Part], values: Any, place: str, problem: Mapping[str, Any]) -> str:
    """Return one of pydantic's problems as a line."""
    location = _location(values, problem)
    where = ".".join(filter(None, [place, *map(str, location)]))
    if problem["type"] == "missing":
        return f"{where} is required"
    if problem["type"] == "extra_forbidden":
        allowed: Any = kind  # the type of the section
        for name in location[:-1]:
            hint = get_type_hints(allowed, include_extras=False)[str(name)]
            allowed = next(option for option in (*get_args(hint), hint) if hasattr(option, "__annotations__"))
        names = list(allowed.__annotations__)
        near = nearest(str(location[-1]), names)
        hint = f"did you mean {near}?" if near else f"choose from {', '.join(names[:20])}"
        return f"{where} is unknown; {hint}"
    inside_union = len(problem["loc"]) > len(location) + 1  # then pydantic gives only a part of the value
    given = short(reduce(operator.getitem, location, values) if inside_union else problem["input"])
    if problem["type"] == "value_error":  # raised by a validator of this package
        reason = str(problem["ctx"]["error"])
        if isinstance(problem["input"], dict):
            return f"{where}.{reason}" if where else reason
        return f"{where}={reason}" if reason.startswith(given) else f"{where}={given} {reason}"
    message = problem["msg"].replace("Input should be", "must be").partition(" or instance of ")[0]
    message = message.replace("a valid dictionary", "a mapping of keys to values")
    return f"{where}={given}: {message[0].lower()}{message[1:]}"
