"""What is lost when machines of a cluster fall ill, and how long work stands still: a real Ray of four machines.

    make bench-cluster          (python -m tests.bench.cluster [--only FAULT ...] [--works train,serve,search])

The machines are network namespaces on a bridge (`tests.network`): a head without CPUs of its own, whose state lies in a
real Redis, and three others; where namespaces cannot be made, raylets on the loopback, and what needs a link of its own
is left out, with the reason. On them a model trains on two machines, a service answers from all, and a search tries
four recipes, while one of these happens:

- node_dies: a machine with a rank, a replica and maybe a trial goes silent, and never comes back.
- head_restarts: the head goes silent with all its processes, and starts again on the same Redis.
- link_down: the interface of a machine with a rank is down for a minute.
- drain: a spot machine with a rank is told that it goes in 30 s, and goes.
- traffic: a machine with a rank sends through a narrow queue that drops packets; clients reach the service, and the
  service its Redis, through a proxy that delays, stalls and resets connections (`tests.bench.weather`).

`cluster.FAULT.lost` counts samples that training lost or repeated (by what each rank learned from, beside a run that
nobody hurt), trials that a search lost, requests that no machine answered, and answers whose trace is gone;
`cluster.FAULT.recover_s` is the longest that one of them stood still. SCALE=small for a short one.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from jobs import cluster
from mmagent.arguments import Parser
from mmagent.measurement import Row, publish, table
from tests import network
from tests.bench import lab, weather, works
from tests.bench.weather import Weather
from tests.bench.works import Search, Service, Told, Training
from tests.network import SERVE_PORT, Machine, Machines

SMALL = os.environ.get("SCALE") == "small"
MACHINES, CPUS = 4, 4  # of each but the head: one rank of two CPUs, a replica, and who reads
WORKS = ("train", "serve", "search")
LINK_DOWN_S = 8.0 if SMALL else 60.0
NOTICE_S = 30
AWAY_S = 5.0  # how long the head is gone


def main(argv: Sequence[str] | None = None, checkout: Path = cluster.CHECKOUT) -> int:
    parser = Parser("tests.bench.cluster", __doc__)
    parser.add_argument("--only", nargs="+", choices=[*FAULTS], default=[*FAULTS], help="these faults alone")
    parser.add_argument("--works", default=",".join(WORKS), help="what goes on meanwhile (%(default)s)")
    args = parser.parse_args(argv)
    wanted = [each for each in args.works.split(",") if each in WORKS]
    rows: list[Row] = []
    backbone, began = lab.made(), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # namespaces outlive who made them
    with network.built(MACHINES) as machines:
        print(f"{MACHINES} machines" + ("" if machines.apart else f" on one loopback: {machines.why}"), flush=True)
        machines.start(CPUS)
        print(f"they are there after {time.monotonic() - began:.0f} s", flush=True)
        bench = Bench(machines, backbone, wanted)
        for name in args.only:
            if name in _WANT_LINKS and not machines.apart:
                print(f"{name}: left out, a machine on the loopback has no link: {machines.why}", flush=True)
                continue
            rows += bench.run(name)
            publish("cluster", rows, checkout, keep=len(args.only) < len(FAULTS))
    print(table(rows))
    return int(any(row.met is False for row in rows))


class Bench:
    """The works, and faults one after the other."""

    def __init__(self, machines: Machines, backbone: Path, wanted: Sequence[str]) -> None:
        self.machines, self._backbone, self._wanted = machines, backbone, wanted
        self.service: Service | None = None
        if "serve" in wanted:
            replicas = MACHINES - 1
            self.service = Service(machines, works.bundle(backbone), replicas)
            self.service.start()

    def run(self, name: str) -> list[Row]:
        began = time.monotonic()
        training = Training(self.machines, self._backbone, f"cluster_{name}", 16 if SMALL else Training.EPOCHS)
        search = Search(self.machines, self._backbone, f"cluster_{name}") if "search" in self._wanted else None
        reference = training.reference() if "train" in self._wanted else None
        at_work = [each for each, kind in ((training, "train"), (search, "search"), (self.service, "serve"))
                   if each is not None and kind in self._wanted]  # fmt: skip
        with FAULTS[name](self) as fault:
            try:
                for work in at_work:
                    work.begin()
                for work in at_work:
                    work.ready()
                print(f"{name}: all at work after {time.monotonic() - began:.0f} s", flush=True)
                victim = training.victim() if "train" in self._wanted else self.machines.others[-1]
                for work in at_work:
                    work.hurt()
                fault(victim)
                told = [work.end(reference) if isinstance(work, Training) else work.end() for work in at_work]
            finally:
                for work in at_work:
                    work.stop()
        print(f"{name}: {time.monotonic() - began:.0f} s", *(f"  {each.words}" for each in told), sep="\n", flush=True)
        return _rows(name, told, at_work)

    def mend(self, machine: Machine) -> None:
        self.machines.mend(machine)
        self.machines.wait(len(self.machines.all))


def _rows(name: str, told: Sequence[Told], at_work: Sequence[works.Work]) -> list[Row]:
    kinds = {Training: "training", Search: "search", Service: "service"}
    pauses = ", ".join(f"{kinds[type(work)]} {each.recover_s:.1f} s" for work, each in zip(at_work, told, strict=True))
    return [
        Row(f"cluster.{name}.lost", float(sum(each.lost for each in told)), "count",
            "; ".join(each.words for each in told), "<= 0"),
        Row(f"cluster.{name}.recover_s", max((each.recover_s for each in told), default=0.0), "s",
            f"the longest that one stood still: {pauses}"),
    ]  # fmt: skip


Fault = Callable[[Machine], None]


@contextmanager
def _node_dies(bench: Bench) -> Iterator[Fault]:
    gone: list[Machine] = []

    def fault(victim: Machine) -> None:
        gone.append(victim)
        bench.machines.kill(victim)

    yield fault
    for machine in gone:  # another comes for the fault that follows
        bench.mend(machine)


@contextmanager
def _head_restarts(bench: Bench) -> Iterator[Fault]:
    def fault(_: Machine) -> None:
        bench.machines.kill(bench.machines.head)
        time.sleep(AWAY_S)
        bench.machines.mend(bench.machines.head)

    yield fault


@contextmanager
def _link_down(bench: Bench) -> Iterator[Fault]:
    hurt: list[Machine] = []

    def fault(victim: Machine) -> None:
        hurt.append(victim)
        victim.link("down")
        try:
            time.sleep(LINK_DOWN_S)
        finally:
            victim.link("up")

    yield fault
    if bench.machines.alive() < len(bench.machines.all):  # Ray took it for dead, and its raylet has ended
        for machine in hurt:
            bench.mend(machine)


@contextmanager
def _drain(bench: Bench) -> Iterator[Fault]:
    gone: list[Machine] = []

    def fault(victim: Machine) -> None:
        gone.append(victim)
        bench.machines.drain(victim, NOTICE_S)
        time.sleep(NOTICE_S)
        bench.machines.kill(victim)

    yield fault
    for machine in gone:
        bench.mend(machine)


@contextmanager
def _traffic(bench: Bench) -> Iterator[Fault]:
    machines, service = bench.machines, bench.service
    hurt: list[Machine] = []
    with ExitStack() as stack:
        if service is not None:
            redis = (machines.outside, machines.redis)
            to_store = stack.enter_context(weather.between(machines.outside, redis, Weather(seed=1, broken=0.5)))
            service.store_port = to_store.port
            service.start()  # its replicas reach Redis through the proxy
            places = [each.partition("//")[2].split(":")[0] for each in service.own()]
            ways = [
                stack.enter_context(weather.between(machines.outside, (host, SERVE_PORT), Weather(seed=2 + at)))
                for at, host in enumerate(places)
            ]
            service.addresses = [f"http://{machines.outside}:{way.port}" for way in ways]

        def fault(victim: Machine) -> None:
            hurt.append(victim)
            if machines.apart:
                victim.narrow()
            time.sleep(10.0 if SMALL else 30.0)
            if machines.apart:
                victim.widen()

        yield fault
        if service is not None:
            of_clients = f"{sum(way.broken for way in ways)} of {sum(way.connections for way in ways)}"
            of_redis = f"{to_store.broken} of {to_store.connections}"
            print(f"connections reset: {of_clients} of clients, {of_redis} to Redis", flush=True)
            service.addresses, service.store_port = [], None
            service.start()


FAULTS: dict[str, Callable[[Bench], AbstractContextManager[Fault]]] = {  # what happens to one of the machines
    "node_dies": _node_dies,
    "head_restarts": _head_restarts,
    "link_down": _link_down,
    "drain": _drain,
    "traffic": _traffic,
}  # fmt: skip
_WANT_LINKS = ("link_down",)


if __name__ == "__main__":
    sys.exit(main())
