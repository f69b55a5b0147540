"""Tools: what an agent may do beside answering. A tool has a name, a JSON schema of its arguments, and limits.

What a tool gives back is data: it is put into a template or shown to a model as a tool's words, and never read as an
instruction. A tool that fails, is slow or says too much costs its turn an error, never the service.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import re
import time
import typing
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jsonschema
from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, ValidationError, create_model
from pydantic_core import to_jsonable_python

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")  # OpenAI's
_THREADS = ThreadPoolExecutor(8, thread_name_prefix="tool")


class ToolError(ValueError):
    """A tool that cannot be registered, or a call that failed; says of which tool, and why."""


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    description: str
    parameters: Mapping[str, Any]  # JSON schema of an object
    call: Callable[[dict[str, Any]], Awaitable[Any]] = field(repr=False)
    timeout_s: float = 10.0
    max_bytes: int = 65_536  # of its result as JSON

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ToolError(
                f"{self.name!r:.80} is no name of a tool: letters, digits, '_' and '-' are wanted, 64 at most"
            )
        try:
            jsonschema.Draft202012Validator.check_schema(self.parameters)
        except jsonschema.SchemaError as error:
            raise ToolError(f"the parameters of the tool {self.name!r} are no JSON schema: {error.message}") from error

    def as_openai(self) -> dict[str, Any]:
        """As chat templates and OpenAI's API write it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    @property
    def wanted(self) -> tuple[str, ...]:
        """Arguments that it cannot do without."""
        return tuple(self.parameters.get("required", ()))

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raises:
        ToolError: arguments that are not what its schema says.
        """
        errors = sorted(jsonschema.Draft202012Validator(self.parameters).iter_errors(dict(arguments)), key=str)
        if errors:
            place = "".join(f"[{part!r}]" for part in errors[0].path) or "its arguments"
            raise ToolError(f"{self.name}: {place}: {errors[0].message:.300}")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a call."""

    value: Any = None
    error: str = ""
    ms: float = 0.0

    @property
    def words(self) -> str:
        """For a model to read."""
        return json.dumps({"error": self.error} if self.error else self.value, ensure_ascii=False)


async def run(tool: Tool, arguments: Mapping[str, Any]) -> Result:
    """Calls a tool with checked arguments; whatever goes wrong is in the result."""
    started = time.perf_counter()

    def spent_ms() -> float:
        return round(1000 * (time.perf_counter() - started), 1)

    try:
        tool.check(arguments)
        value = to_jsonable_python(await asyncio.wait_for(tool.call(dict(arguments)), tool.timeout_s))
        size = len(json.dumps(value, allow_nan=False).encode())
    except TimeoutError:
        return Result(error=f"{tool.name} did not answer within {tool.timeout_s:g} s", ms=spent_ms())
    except ToolError as error:
        return Result(error=str(error), ms=spent_ms())
    except Exception as error:  # noqa: BLE001  whatever a tool raises is its own affair
        return Result(error=f"{tool.name} failed: {type(error).__name__}: {str(error)[:300]}", ms=spent_ms())
    if size > tool.max_bytes:
        return Result(error=f"{tool.name} gave {size} bytes; the limit max_bytes is {tool.max_bytes}", ms=spent_ms())
    return Result(value=value, ms=spent_ms())


def of_function(
    function: Callable[..., Any], *, name: str = "", timeout_s: float = 10.0, max_bytes: int = 65_536
) -> Tool:
    """A Python function as a tool; its signature is its schema. Arguments come to it converted and checked.

    Raises:
        ToolError: a parameter without a type, or of a type that JSON has no words for; ``*args``; no docstring.
    """
    name = name or getattr(function, "__name__", "")
    description = inspect.getdoc(function) or ""
    if not description:
        raise ToolError(f"the tool {name!r} has no docstring: it tells models and people what the tool is for")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters
    except (NameError, TypeError, ValueError) as error:
        raise ToolError(f"the signature of the tool {name!r} cannot be read: {error}") from error
    fields: dict[str, Any] = {}
    for key, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ToolError(f"the tool {name!r} takes {parameter}: only parameters with names can be given")
        if key not in hints:
            raise ToolError(f"the parameter {key!r} of the tool {name!r} has no type")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[key] = (hints[key], default)
    try:
        model = create_model(f"{name}_arguments", __config__=ConfigDict(extra="forbid"), **fields)
        schema = model.model_json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ToolError(f"the tool {name!r} has a parameter that JSON has no words for: {reason}") from error

    async def call(arguments: dict[str, Any]) -> Any:
        try:
            given = model.model_validate(arguments)
        except ValidationError as error:
            raise ToolError(f"{name}: {error.errors()[0]['msg']}") from error
        values = {key: getattr(given, key) for key in fields}
        if inspect.iscoroutinefunction(function):
            return await function(**values)
        return await asyncio.get_running_loop().run_in_executor(_THREADS, lambda: function(**values))

    return Tool(name, description, schema, call, timeout_s, max_bytes)


def of_path(path: str, **limits: Any) -> Tool:
    """The function of ``MODULE:FUNCTION``.

    Raises:
        ToolError: there is none, or see `of_function`.
    """
    module, colon, name = path.partition(":")
    if not colon:
        raise ToolError(f"{path!r} names no function: MODULE:FUNCTION is wanted")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ToolError(f"the module {module!r} of the tool {path!r} cannot be imported: {error}") from error
    function = getattr(found, name, None)
    if not callable(function):
        raise ToolError(f"the module {module!r} has no function {name!r}")
    return of_function(function, name=name, **limits)
