"""HTTP tools from an OpenAPI document: each operation that is allowed by its operationId becomes a tool.

Parameters of the path and the query, and the fields of a JSON body, are the tool's arguments. The address is the
operator's (``base_url``), never a model's or a user's; redirects are not followed; what comes back is JSON or text, up
to a limit. A value in a header may come from the environment: ``Authorization: env:CRM_TOKEN``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import yaml

from mmagent.agent.tools import Tool, ToolError

_METHODS = ("get", "post", "put", "patch", "delete")
_DEEPEST = 20  # references within references


def of_file(
    file: Path,
    *,
    base_url: str,
    allow: Sequence[str],
    headers: Mapping[str, str],
    timeout_s: float,
    max_bytes: int,
) -> list[Tool]:
    """
    Raises:
        ToolError: the document cannot be read, lacks an operation that is allowed, or wants a header's variable that
            is not set.
    """
    try:
        document = yaml.safe_load(file.read_text())  # JSON is YAML
    except (OSError, yaml.YAMLError) as error:
        raise ToolError(f"the OpenAPI document {file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(document, dict) or not isinstance(document.get("paths"), dict):
        raise ToolError(f"{file} is no OpenAPI document: it has no paths")
    given = {name: _value(name, text) for name, text in headers.items()}
    operations = {
        operation["operationId"]: (method, path, operation, item.get("parameters", []))
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in _METHODS and isinstance(operation, dict) and "operationId" in operation
    }
    if missing := [name for name in allow if name not in operations]:
        raise ToolError(f"{file} has no operation {missing[0]!r}; it has: {', '.join(sorted(operations)) or 'none'}")
    return [
        _tool(
            document,
            name,
            *operations[name],
            base_url=base_url,
            headers=given,
            timeout_s=timeout_s,
            max_bytes=max_bytes,
        )
        for name in allow
    ]


def _value(name: str, text: str) -> str:
    if not text.startswith("env:"):
        return text
    variable = text.removeprefix("env:")
    if variable not in os.environ:
        raise ToolError(f"the header {name} wants the environment variable {variable}, which is not set")
    return os.environ[variable]


def _tool(
    document: Mapping[str, Any],
    name: str,
    method: str,
    path: str,
    operation: Mapping[str, Any],
    shared: Sequence[Mapping[str, Any]],
    *,
    base_url: str,
    headers: Mapping[str, str],
    timeout_s: float,
    max_bytes: int,
) -> Tool:
    properties: dict[str, Any] = {}
    required: list[str] = []
    places: dict[str, str] = {}
    for each in [*shared, *operation.get("parameters", [])]:
        parameter = _resolved(document, each)
        if parameter.get("in") in ("path", "query"):
            key = parameter["name"]
            properties[key] = {**_resolved(document, parameter.get("schema", {})), **_told(parameter)}
            places[key] = parameter["in"]
            if parameter.get("required") or parameter["in"] == "path":
                required.append(key)
    content = _resolved(document, operation.get("requestBody", {})).get("content", {})
    body = _resolved(document, content.get("application/json", {}).get("schema", {}))
    for key, schema in body.get("properties", {}).items():
        properties[key], places[key] = schema, "body"
    required += body.get("required", [])
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    words = operation.get("description") or operation.get("summary") or f"{method.upper()} {path}"

    async def call(arguments: dict[str, Any]) -> Any:
        target, query, sent = path, {}, {}
        for key, value in arguments.items():
            if places[key] == "path":
                target = target.replace("{" + key + "}", quote(str(value), safe=""))
            elif places[key] == "query":
                query[key] = value
            else:
                sent[key] = value
        async with (
            httpx.AsyncClient(timeout=timeout_s, follow_redirects=False, trust_env=False) as client,
            client.stream(
                method.upper(), base_url.rstrip("/") + target, params=query, headers=dict(headers),
                json=sent if "body" in places.values() else None,
            ) as answer,
        ):  # fmt: skip
            found = bytearray()
            async for chunk in answer.aiter_bytes():
                found += chunk
                if len(found) > max_bytes:
                    raise ToolError(f"{name} gave more than {max_bytes} bytes")
            if not answer.is_success:
                raise ToolError(f"{name} answered {answer.status_code}")
        try:
            return json.loads(found)
        except ValueError:
            return found.decode("utf-8", "replace")

    # References stay whole in the schema: it carries what they point to.
    more = {"components": document["components"]} if "components" in document else {}
    return Tool(name, str(words), {**schema, **more}, call, timeout_s, max_bytes)


def _told(parameter: Mapping[str, Any]) -> dict[str, str]:
    return {"description": parameter["description"]} if parameter.get("description") else {}


def _resolved(document: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a reference within the document points to."""
    for _ in range(_DEEPEST):
        if "$ref" not in part:
            return part
        found: Any = document
        for key in str(part["$ref"]).removeprefix("#/").split("/"):
            found = found.get(key.replace("~1", "/").replace("~0", "~"), {}) if isinstance(found, Mapping) else {}
        part = found
    raise ToolError("the OpenAPI document refers to itself without end")
