"""How ranks find out, and agree, which transport all of them can have."""

from __future__ import annotations

import os
import select
import socket
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup


class UnavailableError(RuntimeError):
    """A transport that not all ranks can have; raised on all of them, and the text says which rank and why."""


def gather(group: ProcessGroup | None, value: object) -> list:
    """Every rank's value, in order of the ranks. Also a barrier."""
    values: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def agree(group: ProcessGroup | None, reason: str | None) -> None:
    """Called by all ranks after each step of a transport's start: where one has a reason against it, all give up.

    Args:
        group: of the ranks.
        reason: why this rank cannot go on; None: it can.
    Raises:
        UnavailableError: on all ranks, with the first rank's reason.
    """
    for rank, other in enumerate(gather(group, reason)):
        if other is not None:
            raise UnavailableError(f"rank {rank}: {other}")


@dataclass(frozen=True, slots=True)
class Member:
    """A rank's process.

    Args:
        host: a machine as it was booted, and the numbering of its processes (containers have their own).
        name: of the machine, for people.
        pid: the process in that numbering.
    """

    host: str
    name: str
    pid: int

    @staticmethod
    def this() -> Member:
        """This process."""
        try:
            with open("/proc/sys/kernel/random/boot_id") as file:
                host = file.read().strip() + os.readlink("/proc/self/ns/pid")
        except OSError:  # no /proc: nothing says that two processes are on one machine
            host = f"{socket.gethostname()} {os.getpid()}"
        return Member(host, socket.gethostname(), os.getpid())

    def ends_within(self, timeout_ms: int) -> bool:
        """Whether the process, of this machine, has ended or does so now."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        except OSError:  # the system does not say
            return False
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        try:
            return bool(poll.poll(timeout_ms))
        finally:
            os.close(descriptor)
