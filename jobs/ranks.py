"""Ranks without Ray: processes of this machine that form a group, for a rehearsal or a measurement."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from jobs.workers import Group
from mmagent.config import Config

_KILLED = -9
_DEATH_S = 0.5


class RanksFailed(RuntimeError):
    """A rank failed or was killed; the message is its own."""


def together(work: Callable[[Group], Any], world: int, config: Config) -> list[Any]:
    """Runs `work` in processes that form a group, without Ray; what each rank gives back, in their order.

    Args:
        work: importable, with what it takes.

    Raises:
        RanksFailed: one of them failed or was killed; the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="mmagent-group-") as meeting:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(target=_entry, args=(work, rank, world, config, f"{meeting}/store", sender), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()  # so that the end of the process is the end of its pipe
            return _answers(processes, [receiver for receiver, _ in pipes])
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _answers(processes: list[Any], receivers: list[Any]) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in found]
        for ready in multiprocessing.connection.wait(waiting):
            rank = next(rank for rank, receiver in enumerate(receivers) if receiver is ready)
            try:
                failed, found[rank] = receivers[rank].recv()
            except EOFError:
                processes[rank].join()
                raise RanksFailed(_last_words(processes[rank].exitcode)) from None
            if failed:
                for process in processes:
                    process.join(_DEATH_S)  # another's end may be the cause of what this one says
                killed = any(process.exitcode == _KILLED for process in processes)
                raise RanksFailed(_last_words(_KILLED) if killed else found[rank])
    return [found[rank] for rank in range(len(receivers))]


def _last_words(status: int | None) -> str:
    if status == _KILLED:
        return (
            "a worker was killed, most likely by the kernel for memory: it does not fit; lower train.micro_batch "
            "(train.accumulation makes up for it), freeze more, or give zero.stage=2 or 3 and more workers"
        )
    return f"a worker ended with status {status} and said nothing"


def _entry(work: Callable[[Group], Any], rank: int, world: int, config: Config, store: str, sender: Any) -> None:
    """One process of a group, as Ray Train would have set it up."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }  # the group meets in a file; DeepSpeed wants them set
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}
    torch.set_num_threads(config.cluster.threads)
    if config.cluster.gpu:
        torch.cuda.set_device(rank)
    backend = "nccl" if config.cluster.gpu else "gloo"
    try:
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
        sender.send((False, work(Group(rank=rank, world=world, blocks=_no_stream, report=lambda _: True))))
        dist.destroy_process_group()
    except Exception as error:  # noqa: BLE001  told by the parent
        sender.send((True, f"{type(error).__name__}: {error}" if str(error) else repr(error)))


def _no_stream(name: str) -> Iterator[pa.Table]:
    raise AssertionError(f"ranks without Ray read their rows themselves, but the stream {name!r} was asked for")
