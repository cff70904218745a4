"""Ranks as threads of one process, over torch's own threaded process group: milliseconds a rank."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

T = TypeVar("T")


def on_ranks(size: int, work: Callable[[], T]) -> list[T]:
    """What `work` returns on each of `size` ranks, in each of which torch.distributed is initialized."""
    _install_threaded_pg()
    store, found, failed = dist.HashStore(), {}, []

    def rank(number: int) -> None:
        try:
            dist.init_process_group("threaded", rank=number, world_size=size, store=store)
            found[number] = work()
            dist.destroy_process_group()
        except BaseException as error:
            failed.append(error)
            ProcessLocalGroup.exception_handle(error)
            raise

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
    if failed:
        raise failed[0]
    return [found[number] for number in range(size)]
