"""What a worker was about to do when it died, and the setting to lower, where memory ran out.

The kernel's killer raises no exception and leaves no message. What each rank told before every step (`jobs.vigil`) is
still there afterwards: the shapes of the batch in hand, the phase, the memory that was free.
"""

from __future__ import annotations

from collections.abc import Mapping

from jobs.vigil import PHASES, Standing
from mmagent.config import Config

_OUT_OF_MEMORY = ("outofmemoryerror", "out of memory", "defaultcpuallocator", "can't allocate memory", "memoryerror")
_DIED = ("actordiederror", "actor died", "worker died", "has died", "worker unexpectedly exits", "actor is dead")
_MOST_WORDS = 300
_SHOWN = 8


def explain(failures: Mapping[int, str], standings: Mapping[int, Standing], config: Config) -> str:
    """Why a group of workers failed, in a line or two.

    Args:
        failures: by rank, the kind of its exception and what it says.
        standings: by rank, what it told last.
    """
    dead = [rank for rank, words in failures.items() if died(words) or ran_out(words)]
    rank = min(dead or failures)  # the others fail because that one is gone
    words = failures[rank]
    standing = standings.get(rank)
    if not died(words) and not ran_out(words):
        return f"rank {rank}: {_short(words)}"
    what = "ran out of memory" if ran_out(words) else "was killed: by somebody, or by the kernel for want of memory"
    return f"rank {rank} {what}{_where(standing)}; where memory is short: {lower(config)}"


def ran_out(words: str) -> bool:
    """Whether an exception speaks of memory that was not there."""
    return any(sign in words.lower() for sign in _OUT_OF_MEMORY)


def died(words: str) -> bool:
    """Whether an exception speaks of a process that is gone."""
    return any(sign in words.lower() for sign in _DIED)


def lower(config: Config) -> str:
    """The settings to lower, the first that keeps what is learnt."""
    train = config.train
    advice = []
    if train.micro_batch > 1:
        half = train.micro_batch // 2
        advice.append(
            f"train.micro_batch={half} train.accumulation={train.accumulation * 2} (now {train.micro_batch} x "
            f"{train.accumulation}), or train.micro_batch=auto"
        )
    if not train.gradient_checkpointing:
        advice.append("train.gradient_checkpointing=true")
    advice.append(f"a smaller data.max_text_tokens (now {config.data.max_text_tokens})")
    return "lower " + "; or ".join(advice)


def _where(standing: Standing | None) -> str:
    if standing is None:
        return " before its first step"
    shapes = standing.shapes or {}
    largest = sorted(shapes, key=lambda name: -_size(shapes[name]))[:_SHOWN]
    told = ", ".join(f"{name} {tuple(shapes[name])}" for name in largest)
    batch = f" on a batch of {told}" if told else ""
    free = f"; {standing.free_bytes / 2**20:,.0f} MiB were free when the step began" if standing.free_bytes else ""
    return f"; it last said that it {PHASES[standing.phase]}, in step {standing.step + 1},{batch}{free}"


def _size(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _short(words: str) -> str:
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return (lines[0] if lines else "no reason given")[:_MOST_WORDS]
