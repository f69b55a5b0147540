"""What a training step spends its time on, from the lines of ``metrics.jsonl``: a chart, and one sentence that names
the bottleneck and the setting to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmagent import charts
from mmagent.charts import percent
from mmagent.markup import Markup
from mmagent.panels import figure, panel

PHASES = ("wait", "copy", "forward", "backward", "communication", "optimizer", "checkpoint", "other")
_WORK = ("forward", "backward")  # what a step is for
_LITTLE = 0.05  # a share below it is not worth a setting
_ADVICE = {
    "wait": "Training waits for data {}: leave more CPUs to reading (fewer cluster.workers or cluster.threads), or "
    "raise data.cache_mb, so that more decoded pictures and sounds are kept.",
    "copy": "Training copies batches to the device {}: send less, by a smaller model.image.size or model.audio.max_s.",
    "communication": "Training exchanges gradients and weights, or waits for its slowest worker, {}: raise "
    "train.accumulation, or let less learn (freeze.strategy=lora:16).",
    "optimizer": "Training updates weights {}: raise train.accumulation, so that more is computed for each update, or "
    "let less learn (freeze.strategy=lora:16).",
    "checkpoint": "Training writes checkpoints {}: raise train.eval_every_steps.",
    "other": "Training spends {} between the parts of its steps: raise train.micro_batch, for fewer and larger passes.",
}


def shares(curves: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the time of training steps, by phase; empty where it was not measured."""
    rows = _measured(curves)
    total = sum(row["step_s"] * row["steps"] for row in rows)
    if not total:
        return {}
    return {name: sum(row[f"{name}_s"] * row["steps"] for row in rows) / total for name in PHASES}


def sentence(found: Mapping[str, float]) -> str:
    """The largest share that could be saved, and how."""
    worst = max(_ADVICE, key=lambda name: found[name])
    if found[worst] >= _LITTLE:
        return _ADVICE[worst].format(f"{percent(found[worst])} of its time")
    work = percent(sum(found[name] for name in _WORK))
    return (
        f"Training computes {work} of its time, and nothing else is worth a setting: faster is only more of "
        "cluster.workers or a faster device, or less to compute (data.max_text_tokens, freeze.strategy)."
    )


def section(curves: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The chart and the sentence; None where nothing was measured."""
    found = shares(curves)
    if not found:
        return None
    rows = _measured(curves)
    mean_s = sum(row["step_s"] * row["steps"] for row in rows) / sum(row["steps"] for row in rows)
    chart = charts.bars([*found.items()], title="Share of a step's time, by phase", x_label="share of a step's time")
    told = f"A step takes {charts.number(1000 * mean_s)}{charts.SPACE}ms. {sentence(found)}"
    return panel(figure("Where the time goes", chart, told))


def _measured(curves: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The training lines, without the first where there are more: while the first rows come and caches fill, a step is
    like no other."""
    rows = [row for row in curves if row.get("kind") == "train" and row.get("step_s")]
    return rows[1:] or rows
