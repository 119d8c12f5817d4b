"""Recipes as files: YAML read without its traps, overrides, and errors that name the key and the nearest valid one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

try:
    import yaml
    from pydantic import BaseModel, ValidationError
except ImportError as error:
    raise ImportError("recipes need pydantic and pyyaml: pip install 'tah[train]'") from error

from .recipe_checks import in_words, near
from .recipe_fields import Recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or the packaged one of that name.

    Args:
        source: path of a .yaml file, or a name from `recipe_names()`.
        overrides: `key.key=value`, the value in YAML, applied in order.

    Raises:
        ValueError: no such recipe, or anything wrong in it, in one line with the place.
    """
    path = _find(str(source))
    values = _parse(path)
    values.setdefault("name", path.stem)
    for override in overrides:
        _apply(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = [_one_line(dict(problem)) for problem in error.errors()]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{path.name}: {problems[0]}{more}") from None


def recipe_names() -> list[str]:
    """Of the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


# -- files -----------------------------------------------------------------------------------------------------------


def _find(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    packaged = RECIPES / f"{source}.yaml"
    if "/" not in source and packaged.is_file():
        return packaged
    if "/" in source or source.endswith((".yaml", ".yml")):
        raise ValueError(f"no recipe {source!r}: there is no such file")
    raise ValueError(f"no recipe {source!r}; {near(source, recipe_names())}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2: 4e-5 is a number and `no` is a word, as everybody expects; a key given twice is an error."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":bool", ":float", ":timestamp"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|false|True|False"), list("tfTF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"),
    list("-+.0123456789"),
)


def _parse(path: Path) -> dict[str, Any]:
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
        inner = values.get(name)
        if inner is None:
            inner = values[name] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"{override!r}: {'.'.join(names[: depth + 1])} is {inner!r}, it has no keys below it")
        values = inner
    values[names[-1]] = value


# -- errors ----------------------------------------------------------------------------------------------------------


def _one_line(problem: dict[str, Any]) -> str:
    """One of pydantic's problems in our words."""
    location, kind = problem["loc"], problem["type"]
    place = ".".join(map(str, location))
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "extra_forbidden":
        return f"{place} is unknown; {near(str(location[-1]), _keys(location[:-1]))}"
    if kind == "missing":
        return f"{place} is required"
    return place + in_words(problem["msg"], problem["input"])


def _keys(location: Sequence[Any]) -> list[str]:
    """The keys allowed at a place in a recipe."""
    model: type[BaseModel] = Recipe
    for name in location:
        annotation = model.model_fields[name].annotation
        options = get_args(annotation) if get_origin(annotation) in (Union, type(int | None)) else (annotation,)
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(model.model_fields)
