"""The pages of what a run is told: every key of a recipe with what it takes, its default and its meaning; every recipe
that comes with the project."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from docs.made import markup
from docs.made.commands import CHECKOUT
from mmagent import config as configs

_SIGNS: dict[type, str] = {Gt: ">", Ge: ">=", Lt: "<", Le: "<="}
_NAMES = {"str": "text", "int": "whole number", "float": "number", "bool": "true · false", "NoneType": "none"}


def page() -> str:
    """Every key, a table for each section."""
    text = (
        "# Keys of a recipe\n\nA recipe is a YAML file of sections; `section.key=value` behind a command takes the "
        "place of what it says. An unknown key is refused with the nearest right one.\n"
    )
    plain = {name: info for name, info in configs.Config.model_fields.items() if _section(info) is None}
    text += "\n" + _table("", plain)
    for name, info in configs.Config.model_fields.items():
        if section := _section(info):
            text += _part(name, section)
    return text


def _part(path: str, section: type[BaseModel]) -> str:
    own = {name: info for name, info in section.model_fields.items() if _section(info) is None}
    about = markup.prose(section.__doc__ or "") if "__doc__" in vars(section) and section.__doc__ else ""
    text = f"\n## {path}\n\n{about}\n\n{_table(f'{path}.', own)}"
    for name, info in section.model_fields.items():
        if inner := _section(info):
            text += _part(f"{path}.{name}", inner)
    return text


def _table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    rows = [
        [
            markup.code(prefix + name),
            f"{markup.cell(info.description or '')}<br>*{_default(info)}* · {markup.cell(_takes(info))}",
        ]
        for name, info in fields.items()
    ]
    return markup.table(["key", "what; *default*; what it takes"], rows)


def _section(info: FieldInfo) -> type[BaseModel] | None:
    return configs._model_of(info.annotation)


def _default(info: FieldInfo) -> str:
    found = info.get_default(call_default_factory=True, validated_data={})
    if found is PydanticUndefined:
        return "must be given"
    if isinstance(found, tuple):
        return "[" + ", ".join(map(str, found)) + "]"
    return "none" if found is None else str(found).lower() if isinstance(found, bool) else str(found)


def _takes(info: FieldInfo) -> str:
    return _kind(info.annotation) + _bounds(info.metadata)


def _bounds(metadata: Iterable[Any]) -> str:
    out = []
    for item in metadata:
        for kind, sign in _SIGNS.items():
            if isinstance(item, kind):
                out.append(f"{sign} {getattr(item, kind.__name__.lower())}")
        if isinstance(item, MultipleOf):
            out.append(f"a multiple of {item.multiple_of}")
        if isinstance(item, FieldInfo):
            out += [part for part in [_bounds(item.metadata).removeprefix(", ")] if part]
    return f", {' and '.join(out)}" if out else ""


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(arguments[0]) + _bounds(arguments[1:])
    if origin in (Union, types.UnionType):
        return " · ".join(_kind(each) for each in arguments)
    if origin is Literal:
        return " · ".join(f"`{each}`" for each in arguments)
    if origin is tuple:
        return "list of " + _kind(arguments[0])
    if origin is dict:
        return f"map of {_kind(arguments[0])} to {_kind(arguments[1])}"
    return _NAMES.get(annotation.__name__, annotation.__name__)


def recipes() -> str:
    """Every recipe, whole: its comments say what it is for."""
    text = (
        "# Recipes\n\nThe files of `jobs/recipes/`. A run takes one by `--config`, a search its space by `--space`.\n"
    )
    for name, content in _files():
        text += f"\n## {name}\n\n```yaml\n{content.strip()}\n```\n"
    return text


def _files() -> Iterator[tuple[str, str]]:
    for file in sorted((CHECKOUT / "jobs" / "recipes").glob("*.yaml")):
        yield file.name, file.read_text()
