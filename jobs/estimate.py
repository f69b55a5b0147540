"""What a rehearsal says of the whole run, for a terminal: rows, tokens, time, memory, disk, and what would not fit."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.loop import Plan
from jobs.rehearsal import Rehearsal

_WEIGHT_BYTES = 4  # of a number in a bundle
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Forecast:
    """Estimates of a whole run, a line each."""

    lines: tuple[str, ...]
    troubles: tuple[str, ...]  # what would not fit, and what to do


def forecast(plan: Plan, found: Rehearsal) -> Forecast:
    """What a run would take, by what its rehearsal took."""
    here, config = len(found.ranks), plan.config
    memory = found.peak_bytes * here
    kept = config.train.keep_last + config.train.keep_best + 1  # and the one that is being written
    checkpoint = found.ranks[0].checkpoint_bytes
    bundle = _WEIGHT_BYTES * sum(part.total for part in plan.parts)
    told = {
        "measured": f"{len(found.ranks[0].steps_s)} steps with {here} of {config.cluster.workers} workers, without Ray",
        **_amount(plan, found),
        **_time(plan, found),
        "memory": f"{found.peak_bytes / _GB:.2f} GB a worker at its peak, {memory / _GB:.2f} GB for {here}; "
        f"{found.available_bytes / _GB:.1f} GB are free",
        "disk": f"{kept} checkpoints of {checkpoint / _GB:.3f} GB, a bundle of {bundle / _GB:.3f} GB; "
        f"{found.free_bytes / _GB:.1f} GB are free",
    }
    lines = tuple(f"{what:<10}{line}" for what, line in told.items())
    return Forecast(lines, tuple(_troubles(plan, found, memory, kept * checkpoint + bundle)))


def _amount(plan: Plan, found: Rehearsal) -> dict[str, str]:
    """Rows and tokens, from those that were looked at."""
    order, looked = plan.order, sum(rank.rows for rank in found.ranks)
    cut = sum(rank.cut_rows for rank in found.ranks) / max(1, looked)
    tokens = sum(rank.tokens for rank in found.ranks) / max(1, looked)
    epochs = plan.total_steps * plan.config.global_batch / order.rows
    return {
        "rows": f"{order.rows:,} an epoch, {epochs:.1f} epochs; of {looked:,} looked at {cut:.1%} are cut: "
        f"about {cut * order.rows:,.0f} an epoch",
        "tokens": f"{tokens:.1f} a row, about {tokens * order.rows:,.0f} an epoch, "
        f"{tokens * order.rows * epochs:,.0f} in all",
    }


def _time(plan: Plan, found: Rehearsal) -> dict[str, str]:
    config = plan.config
    validations = -(-plan.total_steps // config.train.eval_every_steps)
    validating_s = validations * max(rank.validation_s for rank in found.ranks)
    training_s = plan.total_steps * found.step_s
    steps = [second for rank in found.ranks for second in rank.steps_s]
    return {
        "step": f"{found.step_s:.3g} s ({min(steps):.3g} to {max(steps):.3g}), "
        f"{config.global_batch / found.step_s:,.0f} samples/s",
        "time": f"about {_clock(training_s + validating_s)}: {plan.total_steps:,} steps {_clock(training_s)}, "
        f"{validations} validations {_clock(validating_s)}; start, bundle and test come on top",
    }


def _troubles(plan: Plan, found: Rehearsal, memory: float, disk: float) -> list[str]:
    told = []
    if memory > found.available_bytes:
        told.append(
            f"{memory / _GB:.1f} GB of memory into {found.available_bytes / _GB:.1f} GB: lower "
            f"train.micro_batch={plan.config.train.micro_batch} (train.accumulation makes up for it), freeze more, or "
            "give zero.stage=2 or 3 and more workers"
        )
    if disk > found.free_bytes:
        told.append(
            f"{disk / _GB:.1f} GB of checkpoints and bundle on a disk with {found.free_bytes / _GB:.1f} GB free: "
            "lower train.keep_last or train.keep_best, or give another MMAGENT_STORAGE"
        )
    return told


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
