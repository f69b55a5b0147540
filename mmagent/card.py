"""The model card of a bundle: the ``README.md`` that says what it is, how good it is, and what not to use it for.

    text = card.render(manifest, config, evaluation=evaluation, dataset=dataset.info, licence=licence.read(folder))

Its front matter is that of the Hugging Face hub (https://huggingface.co/docs/hub/model-cards), so that a bundle can be
published there as it is.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mmagent import wording
from mmagent.charts import percent
from mmagent.config import Config
from mmagent.evaluation import blocks
from mmagent.examples import group_name
from mmagent.targets import TaskInfo, kind

_PIPELINES = {  # of classify, by modalities
    ("text",): "text-classification",
    ("text", "image"): "visual-question-answering",
    ("text", "audio"): "audio-classification",
}
_TEXT_PIPELINES = {  # of the other kinds, where text is all that comes in
    "multilabel": "text-classification",
    "regress": "text-classification",
    "relate": "text-classification",
    "tag": "token-classification",
    "extract": "question-answering",
    "match": "text-ranking",
    "generate": "text-generation",
}
_HUB_METRICS = {"macro_f1": "f1", "micro_f1": "f1"}  # as the hub calls them
_GAPS = {
    "accuracy": "right answers", "demographic_parity": "how often a label is answered",
    "equalized_odds": "how often it is answered where it is right, or is not",
}  # fmt: skip
_LABELS_SHOWN = 30
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # the hub refuses a base model that is a folder


def render(
    manifest: Mapping[str, Any],
    config: Config,
    *,
    tasks: Mapping[str, TaskInfo],
    evaluation: Mapping[str, Any] | None = None,
    dataset: Mapping[str, Any] | None = None,
    licence: str | None = None,
    where: str = "BUNDLE",
) -> str:
    """The card.

    Args:
        manifest: of the bundle.
        tasks: of the bundle.
        evaluation: as in ``evaluation.json``; without it the card says that nothing was measured.
        dataset: as in ``dataset.json`` of the training data.
        licence: of the backbone, see `mmagent.licence`.
        where: what to write for the bundle in the commands, e.g. a run's name.
    """
    parts = [
        f"---\n{yaml.safe_dump(_front(manifest, config, evaluation, licence), sort_keys=False, allow_unicode=True)}---",
        f"# {manifest['name']}",
        _intended(manifest, tasks),
        _use(where),
        _results(evaluation),
        _calibration(evaluation),
        _data(manifest, dataset),
        _training(manifest, config),
        _audit(evaluation),
        _limits(manifest, tasks, evaluation),
        _licence_section(config, licence),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _front(
    manifest: Mapping[str, Any], config: Config, evaluation: Mapping[str, Any] | None, licence: str | None
) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "mmagent"}
    if licence:
        front["license"] = licence
    pipeline = _pipeline(manifest)
    front["pipeline_tag"] = pipeline
    front["tags"] = ["mmagent", *manifest["tasks"], *manifest["modalities"]]
    if _HUB_ID.fullmatch(config.model.backbone):
        front["base_model"] = config.model.backbone
    front["datasets"] = [manifest.get("data") or config.data.name]
    if evaluation:
        measured = [_index(evaluation, block, pipeline) for block in blocks(evaluation).values()]
        front["metrics"] = list(dict.fromkeys(number["type"] for each in measured for number in each["metrics"]))
        front["model-index"] = [{"name": manifest["name"], "results": measured}]
    return front


def _pipeline(manifest: Mapping[str, Any]) -> str:
    """The hub's name for what the default task does."""
    found, modalities = kind(manifest["task"]), tuple(manifest["modalities"])
    if found == "classify":
        return _PIPELINES.get(modalities, "any-to-any")
    return _TEXT_PIPELINES.get(found, "any-to-any") if modalities == ("text",) else "any-to-any"


def _index(evaluation: Mapping[str, Any], block: Mapping[str, Any], pipeline: str) -> dict[str, Any]:
    values = block["metrics"]
    names = (block["main"], *wording.beside(block))
    return {
        "task": {"type": pipeline, "name": block["task"]},
        "dataset": {"name": evaluation["data"], "type": evaluation["data"], "split": evaluation["split"]},
        "metrics": [
            {"type": _HUB_METRICS.get(name, name), "name": name, "value": round(values[name]["value"], 4)}
            for name in names
        ],
    }


def _intended(manifest: Mapping[str, Any], tasks: Mapping[str, TaskInfo]) -> str:
    ordered = [manifest["task"], *(name for name in sorted(tasks) if name != manifest["task"])]
    lines = "\n".join(_task_line(tasks[name]) for name in ordered)
    default = f"\nA request that names no task means `{manifest['task']}`.\n" if len(ordered) > 1 else ""
    return f"""
Answers a question or message ({_and(manifest["modalities"])}, in any mix), with how sure it is and whether it would
rather abstain.

## Intended use

Inputs like those of the data set `{manifest.get("data", "?")}`. The answer is:

{lines}
{default}"""


def _task_line(info: TaskInfo) -> str:
    shown = ", ".join(f"`{label}`" for label in info.labels[:_LABELS_SHOWN])
    rest = len(info.labels) - _LABELS_SHOWN
    more = f" and {rest} more (tasks.json)" if rest > 0 else ""
    said = wording.answers(info.kind, len(info.labels))
    return f"- `{info.task}`: {said}{': ' if shown else ''}{shown}{more}."


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
    tasks = blocks(evaluation)
    parts = "\n\n".join(_measured(block, len(tasks) > 1) for block in tasks.values())
    return f"""
## Results

On the split `{evaluation["split"]}` of `{evaluation["data"]}`. The last columns are what simpler answers reach.

{parts}"""


def _measured(block: Mapping[str, Any], named: bool) -> str:
    before, main = block.get("before", {}), block["main"]
    names, beside = wording.BEFORE, wording.beside(block)
    shown = [wording.name(metric) for metric in beside]
    head = ["slice", "answers", wording.name(main), "95 % interval", *shown, *(names.get(key, key) for key in before)]
    rows = []
    for name, part in {"all": block, **block["slices"]}.items():
        found = part["metrics"][main]
        ends = [wording.written(main, found[end]) for end in ("low", "high") if found[end] is not None]
        cells = [group_name(name), f"{part['n']:,}", wording.value(part, main), " to ".join(ends)]
        cells += [wording.value(part, metric) for metric in beside]
        for other in before.values():
            there = other if name == "all" else other["slices"].get(name)
            cells.append(wording.value(there, main) if there else "")
        rows.append(cells)
    notes = "".join(f"- {names.get(key, key)}: {other['what']}.\n" for key, other in before.items())
    title = f"### `{block['task']}`\n\n" if named else ""
    return f"{title}{_table(head, rows)}\n\n{notes}"


def _calibration(evaluation: Mapping[str, Any] | None) -> str:
    lines = []
    for task, block in (blocks(evaluation) if evaluation else {}).items():
        values = block["metrics"]
        if "ece" in values:
            ece, sure, best = (wording.value(block, name) for name in ("ece", "mean_confidence", block["main"]))
            metric = wording.name(block["main"])
            lines.append(
                f"`{task}`: expected calibration error {ece} (15 bins); mean confidence {sure}, {metric} {best}."
            )
        lines.append(f"{percent(block['abstained'])} of the answers lie under the threshold for abstaining.")
        blind = block.get("blind")
        if blind and blind["n"]:
            lines.append(
                f"With the {blind['without']} taken away it is {percent(blind['mean_confidence'])} sure and "
                f"{percent(blind['accuracy'])} right: a gap of {percent(blind['gap'])}."
            )
    return "## Confidence\n\n" + "\n".join(lines) if lines else ""


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


def _audit(evaluation: Mapping[str, Any] | None) -> str:
    """Gaps between groups, answers that hang on words that should not matter, training text that comes back."""
    if not evaluation:
        return ""
    rows: list[tuple[str, str, str]] = []
    for task, block in blocks(evaluation).items():
        for column, each in _grouped(block).items():
            rows += [
                (f"`{task}`: {_GAPS[what]}, between {len(each['groups'])} groups of {column}", *_interval(each[what]))
                for what in _GAPS
                if what in each
            ]
    swapped = evaluation.get("counterfactual")
    if swapped and swapped["changed"]:
        rows.append((f"answers that change with words swapped, of {swapped['n']}", *_interval(swapped["changed"])))
    for task, each in evaluation.get("verbatim", {}).items():
        share = each["repeated"] / max(1, each["n"])
        rows.append(
            (f"`{task}`: answers that hold {each['words']} words or more of a training text", f"{share:.1%}", "")
        )
    return "## Audit\n\n" + _table(["what", "value", "95 % interval"], rows) if rows else ""


def _grouped(block: Mapping[str, Any]) -> dict[str, Any]:
    """The gaps between groups of people or things: kinds of input are none."""
    return {column: each for column, each in block.get("gaps", {}).items() if column != "modalities"}


def _interval(number: Mapping[str, float]) -> tuple[str, str]:
    return f"{number['value']:.1%}", f"{number['low']:.1%} to {number['high']:.1%}"


def _limits(manifest: Mapping[str, Any], tasks: Mapping[str, TaskInfo], evaluation: Mapping[str, Any] | None) -> str:
    lines = [
        "The numbers hold for data like the test split; other voices, cameras, languages or wordings may be worse.",
    ]
    if any(map(_grouped, blocks(evaluation).values()) if evaluation else ()):
        lines.append("Decisions about people need more than the gaps between groups that are told above.")
    else:
        lines.append("Decisions about people need more than this: no test for fairness among groups was made.")
    if any(info.kind in ("classify", "relate", "match") for info in tasks.values()):
        lines.insert(0, "It always gives one of its answers, also where none is right: look at the confidence.")
    for block in blocks(evaluation).values() if evaluation else ():
        lines = [*_weak(block), *lines]
    missing = [name for name in ("text", "image", "audio") if name not in manifest["modalities"]]
    if missing:
        lines.append(f"It takes no {_and(missing)}.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _weak(block: Mapping[str, Any]) -> list[str]:
    """Labels and slices where a task is at its worst."""
    lines, main = [], block["main"]
    weak = [label for label, row in block.get("per_class", {}).items() if row["support"] and row["f1"] < 0.8]
    if weak:
        lines.append(f"Labels with an F1 under 80 %: {', '.join(weak[:_LABELS_SHOWN])}.")
    parts = {name: part for name, part in block["slices"].items() if part["n"] >= 30}
    if len(parts) > 1:
        worst = min(parts, key=lambda name: parts[name]["metrics"][main]["value"])
        lines.append(f"Weakest slice of the test: {group_name(worst)}, {wording.value(parts[worst], main)}.")
    return lines


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
