"""The model card: front matter that the hub reads, and the numbers of the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmagent import card, licence
from mmagent.config import Config, resolve
from mmagent.targets import TaskInfo

MANIFEST = {
    "name": "demo",
    "created_ms": 1_700_000_000_000,
    "task": "classify",
    "tasks": ["classify"],
    "labels": ["no", "yes"],
    "modalities": ["text", "image", "audio"],
    "run": "demo",
    "data": "shop",
    "checkpoint": {"step": 700},
}
DATASET = {
    "source": "csv:rows.csv",
    "created_ms": 1_700_000_000_000,
    "seed": 0,
    "splits": {"train": {"rows": 1200, "modalities": {"text+image": 1200}}, "test": {"rows": 300}},
    "quarantine": {"rows": 3},
}

TASKS = {"classify": TaskInfo("classify", ("no", "yes"))}


def number(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def evaluation() -> dict[str, Any]:
    names = ("accuracy", "macro_f1", "ece", "mean_confidence")
    values = dict(zip(names, map(number, (0.973, 0.96, 0.012, 0.965)), strict=True))
    weak = {**values, "accuracy": number(0.905)}
    majority = {"what": "the most frequent answer", "n": 300, "metrics": {"accuracy": number(0.67)}, "slices": {}}
    return {
        "data": "shop",
        "split": "test",
        "task": "classify",
        "kind": "classify",
        "main": "accuracy",
        "n": 300,
        "metrics": values,
        "abstained": 0.02,
        "slices": {"form=text": {"n": 200, "metrics": values}, "form=speech_unseen": {"n": 100, "metrics": weak}},
        "per_class": {"no": {"f1": 0.99, "support": 200}, "yes": {"f1": 0.71, "support": 100}},
        "blind": {"without": "image", "n": 300, "accuracy": 0.67, "mean_confidence": 0.65, "gap": 0.02},
        "before": {"majority": majority},
    }


@pytest.fixture
def config() -> Config:
    return resolve({"data": {"name": "shop"}, "model": {"backbone": "org/some-model"}, "optim": {"lr": 3e-4}}, {})


def front(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def test_the_front_matter_is_the_hubs(config: Config) -> None:
    found = front(card.render(MANIFEST, config, tasks=TASKS, evaluation=evaluation(), licence="apache-2.0"))
    assert found["license"] == "apache-2.0"
    assert found["library_name"] == "mmagent"
    assert found["base_model"] == "org/some-model"
    assert found["datasets"] == ["shop"]
    [result] = found["model-index"][0]["results"]
    assert result["metrics"][0] == {"type": "accuracy", "name": "accuracy", "value": 0.973}
    assert result["dataset"] == {"name": "shop", "type": "shop", "split": "test"}


def test_it_says_how_good_and_where_it_is_weak(config: Config) -> None:
    text = card.render(MANIFEST, config, tasks=TASKS, evaluation=evaluation(), dataset=DATASET, where="demo").replace(
        "\u00a0", " "
    )
    assert "| form: speech unseen | 100 | 90.5 % | 89.5 % to 91.5 % | 96.0 % |  |" in text
    assert "| all | 300 | 97.3 % | 96.3 % to 98.3 % | 96.0 % | 67.0 % |" in text
    assert "Weakest slice of the test: form: speech unseen, 90.5 %." in text
    assert "F1 under 80 %: yes." in text
    assert "a gap of 2.0 %" in text
    assert "1,200" in text
    assert "3 rows were set aside" in text
    assert "lr: 0.0003" in text
    assert 'Predictor.load("demo")' in text
    assert "make serve BUNDLE=demo" in text
    assert "2023-11-14" in text


def test_without_an_evaluation_it_promises_nothing(config: Config) -> None:
    text = card.render(MANIFEST, config, tasks=TASKS)
    assert "Nothing was measured yet" in text
    assert "model-index" not in front(text)
    assert "license" not in front(text)
    assert "not stated in its folder" in text


def test_what_was_audited_stands_in_a_table(config: Config) -> None:
    plain = card.render(MANIFEST, config, tasks=TASKS, evaluation=evaluation())
    assert "## Audit" not in plain
    assert "no test for fairness among groups was made" in plain
    apart = {"groups": {"a": {}, "b": {}}, "accuracy": number(0.12), "demographic_parity": number(0.2)}
    made = evaluation() | {
        "gaps": {"region": apart, "modalities": apart},
        "counterfactual": {"pairs": 2, "n": 50, "changed": number(0.04), "examples": []},
        "verbatim": {"generate": {"words": 8, "n": 40, "repeated": 1, "examples": []}},
    }
    text = card.render(MANIFEST, config, tasks=TASKS, evaluation=made)
    assert "| `classify`: right answers, between 2 groups of region | 12.0% | 11.0% to 13.0% |" in text
    assert "| answers that change with words swapped, of 50 | 4.0% | 3.0% to 5.0% |" in text
    assert "| `generate`: answers that hold 8 words or more of a training text | 2.5% |  |" in text
    assert "groups of modalities" not in text
    assert "no test for fairness" not in text


def test_a_backbone_that_is_a_folder_is_no_base_model_of_the_hub() -> None:
    config = resolve({"data": {"name": "shop"}, "model": {"backbone": "package:some_model/model"}}, {})
    assert "base_model" not in front(card.render(MANIFEST, config, tasks=TASKS))


def test_a_label_cannot_break_a_table(config: Config) -> None:
    broken = evaluation()
    broken["slices"]["form=a|b\nc"] = broken["slices"]["form=text"]
    assert "| form: a\\|b c |" in card.render(MANIFEST, config, tasks=TASKS, evaluation=broken)


def test_several_tasks_have_a_table_each(config: Config) -> None:
    manifest = MANIFEST | {"task": "tag:people", "tasks": ["regress", "tag:people"], "modalities": ["text"]}
    tasks = {
        "tag:people": TaskInfo("tag:people", ("city", "name")),
        "regress": TaskInfo("regress", mean=1.0, deviation=2.0),
    }
    about = {"n": 30, "abstained": 0.1, "slices": {}}
    spans = {"micro_f1": number(0.9), "precision": number(0.8), "recall": number(0.95), "exact": number(0.7)}
    error = {"r2": number(-0.25), "mae": number(1.5)}
    tag = {"task": "tag:people", "kind": "tag", "main": "micro_f1", "metrics": spans, **about}
    regress = {"task": "regress", "kind": "regress", "main": "r2", "metrics": error, **about}
    result = {"data": "shop", "split": "test", **tag, "tasks": {"regress": regress, "tag:people": tag}}
    text = card.render(manifest, config, tasks=tasks, evaluation=result).replace("\u00a0", " ")
    assert "- `tag:people`: the spans of a text that are of 2 types: `city`, `name`." in text
    assert "- `regress`: a number." in text
    assert "A request that names no task means `tag:people`." in text
    assert text.index("### `tag:people`") < text.index("### `regress`")
    assert "| all | 30 | -0.25 | -0.26 to -0.24 | 1.5 |" in text
    found = front(text)
    assert found["pipeline_tag"] == "token-classification"
    assert [each["metrics"][0]["type"] for each in found["model-index"][0]["results"]] == ["f1", "r2"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("README.md", "---\nlicense: mit\n---\n# x", "mit"),
        ("README.md", "# no front matter", None),
        ("README.md", "---\n: [\n---\n", None),
        ("LICENSE", "\n   Apache License\n  Version 2.0, January 2004", "apache-2.0"),
        ("LICENSE.txt", "All rights reserved", None),
        ("config.json", "{}", None),
    ],
)
def test_the_licence_is_what_the_folder_says(tmp_path: Path, name: str, content: str, said: str | None) -> None:
    (tmp_path / name).write_text(content)
    assert licence.read(tmp_path) == said
