"""The model card of a bundle: the ``README.md`` that says what it is, how good it is, and what not to use it for.

    text = card.render(manifest, config, evaluation=evaluation, dataset=dataset.info, licence=card.licence(folder))

Its front matter is that of the Hugging Face hub (https://huggingface.co/docs/hub/model-cards), so that a bundle can be
published there as it is.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmagent.charts import percent
from mmagent.config import Config
from mmagent.examples import group_name

_PIPELINES = {
    ("text",): "text-classification",
    ("text", "image"): "visual-question-answering",
    ("text", "audio"): "audio-classification",
}
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_LICENCES = (  # how the text of a well-known licence begins, and its SPDX-like name on the hub
    (r"apache license\s+version 2\.0", "apache-2.0"),
    (r"\bmit license\b", "mit"),
    (r"bsd 3-clause", "bsd-3-clause"),
)
_LABELS_SHOWN = 30
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # the hub refuses a base model that is a folder


def render(
    manifest: Mapping[str, Any],
    config: Config,
    *,
    evaluation: Mapping[str, Any] | None = None,
    dataset: Mapping[str, Any] | None = None,
    licence: str | None = None,
    where: str = "BUNDLE",
) -> str:
    """The card.

    Args:
        manifest: of the bundle.
        evaluation: as in ``evaluation.json``; without it the card says that nothing was measured.
        dataset: as in ``dataset.json`` of the training data.
        licence: of the backbone, see `licence`.
        where: what to write for the bundle in the commands, e.g. a run's name.
    """
    parts = [
        f"---\n{yaml.safe_dump(_front(manifest, config, evaluation, licence), sort_keys=False, allow_unicode=True)}---",
        f"# {manifest['name']}",
        _intended(manifest),
        _use(where),
        _results(evaluation),
        _calibration(evaluation),
        _data(manifest, dataset),
        _training(manifest, config),
        _limits(manifest, evaluation),
        _licence_section(config, licence),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def licence(folder: Path) -> str | None:
    """What a model folder says about its licence, in the front matter of its README.md or in its licence file; None
    where it says nothing that is understood."""
    readme = folder / "README.md"
    if readme.is_file():
        found = _FRONT_MATTER.match(readme.read_text(errors="replace"))
        try:
            front = yaml.safe_load(found[1]) if found else None
        except yaml.YAMLError:
            front = None  # a README that is no card says nothing
        if isinstance(front, dict) and isinstance(front.get("license"), str):
            return str(front["license"])
    for file in sorted(folder.glob("LICENSE*")):
        words = file.read_text(errors="replace")[:2000].lower()
        for pattern, name in _LICENCES:
            if re.search(pattern, words):
                return name
    return None


def _front(
    manifest: Mapping[str, Any], config: Config, evaluation: Mapping[str, Any] | None, licence: str | None
) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "mmagent"}
    if licence:
        front["license"] = licence
    pipeline = _PIPELINES.get(tuple(manifest["modalities"]), "any-to-any")
    front["pipeline_tag"] = pipeline
    front["tags"] = ["mmagent", manifest["task"], *manifest["modalities"]]
    if _HUB_ID.fullmatch(config.model.backbone):
        front["base_model"] = config.model.backbone
    front["datasets"] = [manifest.get("data") or config.data.name]
    if evaluation:
        front["metrics"] = ["accuracy", "f1"]
        front["model-index"] = [{"name": manifest["name"], "results": [_index(evaluation, pipeline)]}]
    return front


def _index(evaluation: Mapping[str, Any], pipeline: str) -> dict[str, Any]:
    values = evaluation["metrics"]
    names = (("accuracy", "accuracy"), ("f1", "macro_f1"))
    return {
        "task": {"type": pipeline},
        "dataset": {"name": evaluation["data"], "type": evaluation["data"], "split": evaluation["split"]},
        "metrics": [{"type": kind, "name": name, "value": round(values[name]["value"], 4)} for kind, name in names],
    }


def _intended(manifest: Mapping[str, Any]) -> str:
    labels = manifest["labels"]
    shown = ", ".join(f"`{label}`" for label in labels[:_LABELS_SHOWN])
    more = f" and {len(labels) - _LABELS_SHOWN} more (labels.json)" if len(labels) > _LABELS_SHOWN else ""
    return f"""
Answers a question or message ({_and(manifest["modalities"])}, in any mix) with one of {len(labels)} labels, a
probability for each, and whether it would rather abstain.

## Intended use

Inputs like those of the data set `{manifest.get("data", "?")}`, where the answer is one of:
{shown}{more}.
"""


def _use(where: str) -> str:
    return f"""
## Load it, serve it

```python
from mmagent import Predictor
predictor = Predictor.load("{where}")
[answer] = predictor.predict([{{"text": "..."}}])  # also "image" and "audio": a path, base64 or bytes
```

`make serve BUNDLE={where}`, or `python -m serve.start --bundle {where}`, puts it behind an HTTP address.
"""


def _results(evaluation: Mapping[str, Any] | None) -> str:
    if not evaluation:
        return "## Results\n\nNothing was measured yet: `python -m jobs.evaluate` does."
    before = evaluation.get("before", {})
    names = {"majority": "majority answer", "linear_probe": "linear probe"}
    head = ["slice", "answers", "accuracy", "95 % interval", "macro F1", *(names.get(key, key) for key in before)]
    rows = []
    for name, part in {"all": evaluation, **evaluation["slices"]}.items():
        accuracy = part["metrics"]["accuracy"]
        cells = [group_name(name), f"{part['n']:,}", percent(accuracy["value"])]
        cells += [f"{percent(accuracy['low'])} to {percent(accuracy['high'])}"]
        cells += [percent(part["metrics"]["macro_f1"]["value"])]
        for other in before.values():
            there = other if name == "all" else other["slices"].get(name)
            cells.append(percent(there["metrics"]["accuracy"]["value"]) if there else "")
        rows.append(cells)
    notes = "".join(f"- {names.get(key, key)}: {other['what']}.\n" for key, other in before.items())
    return f"""
## Results

On the split `{evaluation["split"]}` of `{evaluation["data"]}`. The last columns are what simpler answers reach.

{_table(head, rows)}

{notes}"""


def _calibration(evaluation: Mapping[str, Any] | None) -> str:
    if not evaluation:
        return ""
    values = evaluation["metrics"]
    ece, sure, right = (percent(values[name]["value"]) for name in ("ece", "mean_confidence", "accuracy"))
    lines = [
        f"Expected calibration error {ece} (15 bins); mean confidence {sure}, accuracy {right}.",
        f"{percent(evaluation['abstained'])} of the answers lie under the threshold for abstaining.",
    ]
    blind = evaluation.get("blind")
    if blind and blind["n"]:
        lines.append(
            f"With the {blind['without']} taken away it is {percent(blind['mean_confidence'])} sure and "
            f"{percent(blind['accuracy'])} right: a gap of {percent(blind['gap'])}."
        )
    return "## Confidence\n\n" + "\n".join(lines)


def _data(manifest: Mapping[str, Any], dataset: Mapping[str, Any] | None) -> str:
    name = manifest.get("data", "?")
    if not dataset:
        return f"## Data\n\nTrained on the data set `{name}`."
    rows = [
        [split, f"{info['rows']:,}", ", ".join(f"{key} {count:,}" for key, count in info.get("modalities", {}).items())]
        for split, info in dataset["splits"].items()
    ]
    aside = dataset.get("quarantine", {}).get("rows", 0)
    made = f"made from `{dataset['source']}` on {_day(dataset['created_ms'])}, seed {dataset['seed']}"
    return f"""
## Data

`{name}`, {made}. {aside:,} rows were set aside as unusable.

{_table(["split", "rows", "of which"], rows)}
"""


def _training(manifest: Mapping[str, Any], config: Config) -> str:
    tree = yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
    chosen = manifest.get("checkpoint") or {}
    step = f" The checkpoint of step {chosen['step']} was chosen on validation." if "step" in chosen else ""
    return f"""
## Training

Run `{manifest.get("run", "?")}`, exported on {_day(manifest["created_ms"])}.{step} What differs from the defaults
(config.yaml holds everything):

```yaml
{tree.strip()}
```
"""


def _limits(manifest: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    lines = [
        "It always answers with one of its labels, also where none is right: look at the confidence.",
        "The numbers hold for data like the test split; other voices, cameras, languages or wordings may be worse.",
        "Decisions about people need more than this: no test for fairness among groups was made.",
    ]
    if evaluation:
        parts = {name: part for name, part in evaluation["slices"].items() if part["n"] >= 30}
        if len(parts) > 1:
            worst = min(parts, key=lambda name: parts[name]["metrics"]["accuracy"]["value"])
            value = percent(parts[worst]["metrics"]["accuracy"]["value"])
            lines.insert(0, f"Weakest slice of the test: {group_name(worst)}, {value}.")
        weak = [label for label, row in evaluation["per_class"].items() if row["support"] and row["f1"] < 0.8]
        if weak:
            lines.insert(0, f"Labels with an F1 under 80 %: {', '.join(weak[:_LABELS_SHOWN])}.")
    missing = [name for name in ("text", "image", "audio") if name not in manifest["modalities"]]
    if missing:
        lines.append(f"It takes no {_and(missing)}.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licence_section(config: Config, licence: str | None) -> str:
    said = f"`{licence}`, as its folder says" if licence else "not stated in its folder: look at where it came from"
    return f"""
## Licence

Backbone `{config.model.backbone}`: {said}. Made with mmagent (Apache-2.0), which claims no rights on the weights; the
data set's own terms hold for what was learnt from it.
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), "|" + " --- |" * len(head), *map(line, rows)])


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _day(time_ms: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(time_ms / 1000))
