"""What the control plane costs as it grows, measured, fitted and extended to a cluster of a thousand nodes.

    make bench-scale            (python -m tests.bench.scale [--only PART ...] [--minutes 10])

- trials: searches of 10, 100, 1,000 trials of empty work: through our own bookkeeping alone (proposing, recording,
  comparing, reading back, the report), and through all of `jobs.trials` with Ray Tune's Tuner.
- objects: 10,000, 100,000, 1,000,000 objects below the storage root, in listings of ours: shards of a data set that is
  opened, files of frozen parts' states that are counted, runs (of four objects each) that `jobs.status` tells.
- replicas: 1, 8, 64 replicas of Ray Serve that do nothing: what its controller takes of a core.
- nodes: 10, 50 nodes of Ray without resources, raylets on this machine: what the head's GCS takes of a core.

The first three are seconds of CPU, which a busy machine does not change.

Every part has its share of the minutes and of the free memory: a point that would not fit, by the points before it, is
left out and said. `scale.PART.N` is a point, `scale.PART.at_1000` what its law says of a cluster of 1,000 nodes with a
trial, a replica and 1,000 objects for each, `scale.PART.nodes` how many nodes its limit allows, and
`scale.bottleneck` the fewest of these. SCALE=small for a short one.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from jobs import cluster
from mmagent.arguments import Parser
from mmagent.measurement import Row, publish, table
from tests.bench import scale_points as points
from tests.bench.law import Law, fit

SMALL = os.environ.get("SCALE") == "small"
NODES = 1000
_SPARE_BYTES = 2 << 30  # that a point leaves free


@dataclass(frozen=True)
class Part:
    """A cost that grows with a count."""

    name: str
    counts: tuple[int, ...]
    begin: Callable[[], points.Points]  # what measures it, count by count
    unit: str
    what: str
    limit: float  # of the cost, that a cluster can bear
    why: str  # that limit
    each: float = 1.0  # how many a node brings
    share: float = 1.0  # of the minutes, beside the others
    ours: bool = False
    small: tuple[int, ...] = ()


PARTS = (
    Part("own", (10, 100, 1000), points.Bookkeeping, "s", "of CPU: our bookkeeping of a search", 60.0,
         "a minute of a search's time", share=0.5, ours=True, small=(10, 40)),
    Part("trials", (10, 100, 1000), points.Trials, "s", "of CPU of a search's process, with Tune's Tuner",
         600.0, "trials of ten minutes, one on each node, all begun before the first ends", share=2.5, small=(2, 6)),
    Part("shards", (10_000, 100_000, 1_000_000), points.Shards, "s", "of CPU to open a data set of so many shards",
         60.0, "a minute before a run", each=1000.0, share=0.6, ours=True, small=(100, 1000)),
    Part("states", (10_000, 100_000, 1_000_000), points.States, "s", "of CPU to count files of kept states", 60.0,
         "a minute before a run", each=1000.0, share=0.6, ours=True, small=(100, 1000)),
    Part("status", (10_000, 100_000, 1_000_000), points.Status, "s", "of CPU of jobs.status, of runs of four objects",
         60.0, "a minute for an answer", each=1000.0, share=1.2, ours=True, small=(100, 1000)),
    Part("replicas", (1, 8, 64), points.Replicas, "cores", "of Serve's controller, replicas that do nothing", 1.0,
         "its one loop", share=2.0, small=(1, 2)),
    Part("nodes", (10, 50), points.Nodes, "cores", "of the head's GCS, nodes that do nothing", 1.0,
         "its one thread", share=2.5, small=(1, 2)),
)  # fmt: skip


@dataclass
class Found:
    part: Part
    points: list[tuple[int, float]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    law: Law | None = None

    @property
    def nodes(self) -> float:
        """How many nodes the part's limit allows."""
        return math.inf if self.law is None else self.law.reaches(self.part.limit) / self.part.each


def main(argv: Sequence[str] | None = None, checkout: Path = cluster.CHECKOUT) -> int:
    names = [each.name for each in PARTS]
    parser = Parser("tests.bench.scale", __doc__)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these parts alone")
    parser.add_argument("--minutes", type=float, default=10.0, help="in all (%(default)s)")
    args = parser.parse_args(argv)
    wanted = [each for each in PARTS if each.name in args.only]
    shares, left_s = sum(each.share for each in wanted), 60 * args.minutes
    found: list[Found] = []
    rows: list[Row] = []
    for part in wanted:
        began = time.monotonic()
        found.append(measure(part, left_s * part.share / shares))
        left_s, shares = left_s - (time.monotonic() - began), shares - part.share
        publish("scale", rows := figures(found), checkout, keep=len(wanted) < len(PARTS))
    print(table(rows))
    return 0


def measure(part: Part, seconds: float) -> Found:
    """The points of a part that fit into so many seconds and the free memory."""
    out = Found(part)
    try:
        with part.begin() as at:
            _measure(out, at, time.monotonic() + seconds)
    except (RuntimeError, subprocess.SubprocessError, OSError, ValueError) as error:  # Ray does not start, say
        out.left_out.append(f"it failed: {str(error).strip().splitlines()[-1]:.200}")
    for line in out.left_out:
        print(f"{part.name}: left out: {line}", flush=True)
    if len(out.points) > 1:
        out.law = fit(out.points)
    return out


def _measure(out: Found, at: points.Points, deadline: float) -> None:
    took, before, part = 0.0, 0, out.part
    for count in part.small if SMALL else part.counts:
        free = psutil.virtual_memory().available
        needs_s = took * count / before if before else 0.0
        needs_bytes = at.bytes_each * (count - before)
        if time.monotonic() + needs_s > deadline:
            out.left_out.append(f"{count:,} would take {needs_s:.0f} s more")
            return
        if before and needs_bytes + _SPARE_BYTES > free:
            out.left_out.append(f"{count:,} want {needs_bytes / 2**30:.1f} GB, and {free / 2**30:.1f} are free")
            return
        began = time.monotonic()
        cost = at.measure(count)
        took, before = time.monotonic() - began, count
        out.points.append((count, cost))
        print(f"{part.name} {count:,}: {cost:.4g} {part.unit} (made and measured in {took:.0f} s)", flush=True)


def figures(found: Sequence[Found]) -> list[Row]:
    rows = []
    for each in found:
        part, name = each.part, each.part.name
        rows += [Row(f"scale.{name}.{count}", cost, part.unit, part.what) for count, cost in each.points]
        if each.law is None:
            continue
        aside = f"; left out: {', '.join(each.left_out)}" if each.left_out else ""
        law = f"{part.what}: {each.law}, off by {100 * each.law.error:.0f} %{aside}"
        rows.append(Row(f"scale.{name}.at_1000", each.law.at(NODES * part.each), part.unit, law))
        if math.isfinite(each.nodes):
            what = f"come to {part.limit:g} {part.unit}: {part.why}"
            rows.append(Row(f"scale.{name}.nodes", each.nodes, "nodes", what))
    known = [each for each in found if math.isfinite(each.nodes)]
    if known:
        first = min(known, key=lambda each: each.nodes)
        whose = "ours" if first.part.ours else "Ray's"
        rows.append(Row("scale.bottleneck", first.nodes, "nodes", f"the first limit that a growing cluster meets: "
                        f"{first.part.what} ({first.part.name}, {whose}), {first.part.why}"))  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
