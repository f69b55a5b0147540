"""What an agent is told: a YAML file that says what to do with what its model understands.

    skill: classify                     # the task that decides; none: the one a request names, or the bundle's own
    slots: [tag]                        # tasks whose spans fill slots: a span's label -> its words
    rules:
      refund:
        tool: refund                    # {slots.NAME} in arguments, and in replies also {result...}, {label}
        arguments: {order: "{slots.ORDER}"}
        ask: {order: "Which order is it about?"}        # said where an argument is missing
        reply: "{result.amount} euro for order {slots.ORDER} are on their way."
      complaint: {handover: true, reply: "A colleague will call you."}
      greeting: {reply: "Hello! How can I help?"}
    unsure: [retrieve, ask, handover]   # below the threshold, the first of these that can
    threshold: 0.7                      # none: the bundle's own
    knowledge: {name: handbook}
    tools:
      - {python: "shop.tools:refund"}
      - {openapi: crm.yaml, base_url: "http://crm.internal:8080", allow: [findCustomer]}
      - {mcp: {command: [uvx, mcp-server-time]}, allow: [get_current_time]}
    handover: {webhook: "https://desk.internal/tickets", reply: "I pass this on to a colleague."}

Unknown keys are refused with the nearest right one.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mmagent.agent.wording import TemplateError, names

Unsure = Literal["retrieve", "ask", "handover", "answer"]
_ADDRESS = re.compile(r"https?://[^\s/]+(/\S*)?")


class PolicyError(ValueError):
    """A file that is no agent; says which line of it is wrong, and how."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, value: Any) -> Any:
        unknown = sorted(set(map(str, value)) - set(cls.model_fields)) if isinstance(value, dict) else []
        if unknown:
            near = difflib.get_close_matches(unknown[0], cls.model_fields, n=1, cutoff=0.0)[0]
            raise ValueError(f"the key {unknown[0]!r:.60} is unknown; did you mean {near!r}?")
        return value


class Rule(_Part):
    """What a label means."""

    reply: str | None = Field(None, description="a template; none: what the model says")
    tool: str | None = None
    arguments: dict[str, Any] = Field({}, description="of the tool; texts are templates")
    ask: dict[str, str] = Field({}, description="argument -> what is asked where it is missing")
    failed: str = Field("I could not do that just now.", description="said where the tool fails")
    handover: bool = False

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.arguments or self.ask) and self.tool is None:
            raise ValueError("there are arguments, but no tool")
        if extra := sorted(set(self.ask) - set(self.arguments)):
            raise ValueError(f"ask names {extra[0]!r}, which is none of the tool's arguments")
        for text in (self.reply, self.failed, *self.arguments.values()):
            if isinstance(text, str):
                try:
                    names(text)
                except TemplateError as error:
                    raise ValueError(str(error)) from error
        return self


class McpServer(_Part):
    command: tuple[str, ...] | None = None
    url: str | None = None
    environment: tuple[str, ...] = Field((), description="variables that a started server is given, beside PATH")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.command is None) == (self.url is None):
            raise ValueError("an MCP server has a command or a url, one of the two")
        return self


class ToolSource(_Part):
    """Where tools come from: a Python function, an OpenAPI document, or an MCP server."""

    python: str | None = Field(None, description="MODULE:FUNCTION")
    openapi: str | None = Field(None, description="a file, beside the agent's own")
    base_url: str | None = None
    headers: dict[str, str] = {}
    mcp: McpServer | None = None
    allow: tuple[str, ...] = Field((), description="of an OpenAPI document or a server: which are taken")
    timeout_s: float = Field(10.0, gt=0, le=600)
    max_bytes: int = Field(65_536, gt=0)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(each is not None for each in (self.python, self.openapi, self.mcp)) != 1:
            raise ValueError("a tool comes from python, openapi or mcp, one of them")
        if self.openapi is not None and not self.base_url:
            raise ValueError("an OpenAPI document wants a base_url: what it says of servers itself is not trusted")
        if self.python is None and not self.allow:
            raise ValueError("allow is empty: name the operations or tools that may be used")
        return self


class Knowledge(_Part):
    name: str = Field(description="as `jobs.index --name` gave it")
    passages: int = Field(3, gt=0, le=20, description="that are looked at, and quoted")
    at_least: float = Field(0.3, ge=-1, le=1, description="likeness of a passage (cosine) that counts as found")


class Handover(_Part):
    webhook: str | None = Field(None, description="an address that is told of each, as JSON")
    reply: str = "I am not sure about this, so I pass it on to a person."

    @field_validator("webhook")
    @classmethod
    def _is_address(cls, webhook: str | None) -> str | None:
        if webhook is not None and not _ADDRESS.fullmatch(webhook):
            raise ValueError(f"{webhook!r:.100} is no address: https://HOST/PATH is wanted, or http://...")
        return webhook


class Policy(_Part):
    """A whole agent."""

    skill: str | None = None
    slots: tuple[str, ...] = ()
    rules: dict[str, Rule] = Field({}, description="label -> what to do; '*' for all others")
    unsure: tuple[Unsure, ...] = ("ask",)
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    ask: str = Field(
        "I am not sure that I understand. Is it about {first} or {second}?", description="said where it is unsure"
    )
    instructions: str | None = Field(None, description="a system message, for models that write")
    knowledge: Knowledge | None = None
    tools: tuple[ToolSource, ...] = ()
    handover: Handover = Handover()
    max_steps: int = Field(4, gt=0, le=20, description="calls of tools in one turn")

    @model_validator(mode="after")
    def _can_do_it(self) -> Self:
        if "retrieve" in self.unsure and self.knowledge is None:
            raise ValueError("unsure says retrieve, but there is no knowledge")
        return self

    def rule(self, label: str | None) -> Rule | None:
        return self.rules.get(label or "") or self.rules.get("*")


def read(file: Path) -> Policy:
    """
    Raises:
        PolicyError: see the class.
    """
    try:
        found = yaml.safe_load(file.read_text())
    except OSError as error:
        raise PolicyError(f"the agent {file} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise PolicyError(f"the agent {file} is no YAML: {' '.join(str(error).split())}") from error
    try:
        return Policy.model_validate(found or {})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = str(first["msg"]).removeprefix("Value error, ")
        raise PolicyError(f"the agent {file}: {f'{place}: ' if place else ''}{reason}") from error


def check(policy: Policy, labels: dict[str, tuple[str, ...]], default: str, tools: set[str]) -> None:
    """Whether a policy fits a bundle and the tools that were found.

    Args:
        labels: of each of the bundle's tasks.

    Raises:
        PolicyError: a task, label or tool that is not there, with the nearest that is.
    """
    for task in filter(None, (policy.skill, *policy.slots)):
        if task not in labels:
            raise PolicyError(f"the bundle has no task {task!r}; its tasks are: {', '.join(labels)}")
    skill = policy.skill or default
    known = labels[skill]
    for label, rule in policy.rules.items():
        if label != "*" and known and label not in known:
            near = difflib.get_close_matches(label, known, n=1, cutoff=0.0)[0]
            raise PolicyError(f"the rule {label!r}: the task {skill!r} has no such label; did you mean {near!r}?")
        if rule.tool is not None and rule.tool not in tools:
            raise PolicyError(
                f"the rule {label!r}: there is no tool {rule.tool!r}; there are: {', '.join(sorted(tools))}"
            )
