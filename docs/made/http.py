"""The page of the HTTP API, from the OpenAPI document of the application itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

from docs.made import markup
from serve import app, voice
from serve.config import ServeConfig
from serve.service import Service

_METHODS = ("get", "post", "put", "patch", "delete")


def document() -> dict[str, Any]:
    """The OpenAPI document. Routes are described without a bundle, so none is loaded."""
    nothing = SimpleNamespace(config=ServeConfig(), keys=None, limits=None, metrics=None)
    return app.build(cast(Service, nothing)).openapi()


def page() -> str:
    """Operations by their tags, then the schemas that they name."""
    found = document()
    text = "# HTTP API\n\nOf a running service, `/docs` shows the same, and `/openapi.json` is for programs.\n"
    text += found["info"]["description"]  # Markdown already
    tags: dict[str, list[str]] = {}
    for method, path, operation in _operations(found):
        tags.setdefault(next(iter(operation.get("tags", ["other"]))), []).append(_operation(method, path, operation))
    for tag, parts in tags.items():
        text += f"\n## {tag}\n\n" + "\n".join(parts)
    text += f"\n## voice\n\n### WS /v1/voice\n\n{markup.prose(voice.__doc__ or '')}\n"
    text += "\n## Bodies\n"
    for name, schema in sorted(found["components"]["schemas"].items()):
        text += _schema(name, schema)
    return text


def _operations(found: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in found["paths"].items():
        for method in _METHODS:
            if method in item:
                yield method, path, item[method]


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    text = f"### {method.upper()} {path}\n\n{markup.prose(operation.get('description', ''))}\n\n"
    rows = [
        [markup.code(each["name"]), each["in"], markup.cell(_kind(each.get("schema", {})))]
        for each in operation.get("parameters", [])
    ]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        rows.append(["body", kind, markup.cell(_kind(content.get("schema", {})))])
    if rows:
        text += markup.table(["it takes", "where", "as"], rows) + "\n"
    answers = [
        [status, _answer(said), markup.cell(said.get("description", ""))]
        for status, said in sorted(operation["responses"].items())
        if status.startswith("2")
    ]
    others = sorted(status for status in operation["responses"] if not status.startswith("2"))
    text += markup.table(["status", "body", "what"], answers)
    return text + (f"\nErrors: {', '.join(others)}.\n" if others else "")


def _answer(said: Mapping[str, Any]) -> str:
    kinds = [f"{kind}: {_kind(content.get('schema', {}))}" for kind, content in said.get("content", {}).items()]
    return markup.cell("; ".join(kinds))


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    text = f"\n### {name}\n\n{markup.prose(schema.get('description', ''))}\n\n"
    wanted = schema.get("required", [])
    rows = [
        [markup.code(field) + ("" if field not in wanted else " **needed**"), markup.cell(_kind(about)),
         markup.cell(about.get("description", ""))]
        for field, about in schema.get("properties", {}).items()
    ]  # fmt: skip
    return text + (markup.table(["field", "takes", "what"], rows) if rows else markup.cell(_kind(schema)) + "\n")


def _kind(schema: Mapping[str, Any]) -> str:
    if name := schema.get("$ref"):
        return "`" + name.rpartition("/")[2] + "`"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " · ".join(dict.fromkeys(_kind(each) for each in schema[several]))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " · ".join(f"`{each}`" for each in schema["enum"])
    if schema.get("type") == "array":
        return "list of " + _kind(schema.get("items", {}))
    if schema.get("type") == "null":
        return "none"
    return {"object": "object", "string": "text", "number": "number", "integer": "whole number"}.get(
        schema.get("type", ""), schema.get("type", "anything")
    )
