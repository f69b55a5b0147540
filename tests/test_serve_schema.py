"""The service against its own OpenAPI document: what fits the schema gets a status and a body that the schema has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mmagent.predictor import Predictor
from serve.config import ServeConfig
from serve.service import Service
from tests.serving import running

_EXAMPLES = 12  # of each operation
_CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def schema(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    patch = pytest.MonkeyPatch()
    patch.setenv("MMAGENT_STORAGE", str(tmp_path_factory.mktemp("storage")))
    with running(Service(Predictor.load(tiny_bundle), ServeConfig(), "production")) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")
    patch.undo()


@pytest.mark.long
def test_every_operation_keeps_to_its_schema(schema: Any) -> None:
    broken = []
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=_EXAMPLES, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck), database=None,
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def keeps(case: Any) -> None:
            case.call_and_validate(checks=_CHECKS, timeout=30)

        try:
            keeps()
        except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001  one broken operation hides no other
            broken.append(f"{operation.label}: {error}")
            print(broken[-1])
    assert broken == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "is it red?"}], "stream": True}),
        ("/v1/audio/speech", {"input": "it is red", "response_format": "flac"}),
    ],
    ids=["streamed", "spoken"],
)
def test_answers_that_are_no_json_are_in_the_schema_too(schema: Any, path: str, body: dict[str, Any]) -> None:
    answer = schema[path]["POST"].Case(body=body, media_type="application/json").call_and_validate(checks=_CHECKS)
    assert answer.status_code == 200
    assert "json" not in answer.headers["content-type"][0]
