"""What is settled before the service runs, whoever starts it: `serve.start`, or Ray Serve itself by
`serve.replica.build_app`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmagent import channels, storage
from mmagent.agent import policy as policies
from serve.config import ServeConfig, key_hashes

STORE_VARIABLE = "MMAGENT_STORE_URL"  # the store's address holds its password: it need not stand in a command or a file


class StartError(ValueError):
    """The service cannot be started or stopped; the message says what to do."""


def configured(given: Mapping[str, Any]) -> ServeConfig:
    """The config of what was asked for, with the keys and the store that the environment holds.

    Raises:
        StartError: it cannot be served so.
    """
    settings = {"store": os.environ.get(STORE_VARIABLE, ""), **given, "key_hashes": key_hashes()}
    try:
        return ServeConfig.model_validate(settings)
    except ValidationError as error:
        raise StartError("; ".join(_explain(item) for item in error.errors())) from error


def folder_of(bundle: str | None, channel: str | None) -> Path:
    """The bundle folder, checked as a replica will check it, so that what is wrong is said here."""
    from mmagent import bundle as bundles

    asked = channels.read(channel).bundle if channel else bundle
    assert asked is not None
    return bundles.load(asked).path


def check_agent(config: ServeConfig, folder: Path) -> None:
    """An agent's file, checked as a replica will check it, but for its tools, which replicas load."""
    if not config.agent:
        return
    from mmagent import bundle

    policy = policies.read(Path(config.agent))
    found = bundle.load(folder)
    tools = {rule.tool for rule in policy.rules.values() if rule.tool}
    policies.check(policy, {name: info.labels for name, info in found.tasks.items()}, found.task, tools)
    if policy.knowledge is not None and not storage.folder("kb", policy.knowledge.name).is_dir():
        raise StartError(
            f"there is no knowledge {policy.knowledge.name!r}: python -m jobs.index --docs FOLDER --name "
            f"{policy.knowledge.name} makes it"
        )


def check_target(config: ServeConfig, folder: Path) -> None:
    """Says where a bundle cannot keep what is asked of it; it is served all the same, and answers nothing surely."""
    if config.target_accuracy is None:
        return
    from mmagent import bundle

    found = bundle.load(folder)
    for name in found.tasks:
        calibration = found.calibration.get(name)
        if calibration is None or calibration.threshold(config.target_accuracy) is None:
            best = max((right for *_, right in calibration.curve), default=None) if calibration else None
            known = "has no accuracy by confidence" if best is None else f"came to {best:.3f} at most"
            print(
                f"warning: validation of the task {name} {known}, and --target-accuracy is {config.target_accuracy:g}: "
                "every answer of it will count as abstained",
                file=sys.stderr,
            )


def check_store(config: ServeConfig) -> None:
    """SQLite is one file of one node: replicas of several would each have conversations of their own."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1 and not config.store:
        raise StartError(
            f"this Ray has {len(nodes)} nodes, and conversations would lie in SQLite on one of them: give a store that "
            f"all reach, --store redis://HOST:PORT/0, or {STORE_VARIABLE} in the environment"
        )


def record(channel: str, url: str) -> None:
    """Where `jobs.promote` finds the service of a channel."""
    file = storage.root() / "serve" / "services.json"
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    storage.publish_json(file, {**known, channel: {"url": url}})


def _explain(item: Any) -> str:
    reason = str(item["msg"]).removeprefix("Value error, ")
    flag = "--" + str(item["loc"][0]).replace("_", "-") if item["loc"] else ""
    return reason if item["type"] == "value_error" else f"{flag} is {item['input']!r}: {reason}"
