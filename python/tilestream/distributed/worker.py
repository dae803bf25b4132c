"""A rank other than 0: it does what rank 0 tells it, and ends with it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from tilestream.distributed.control import Build, ClearPages, Link, Setup, Step, StepReader, Stop
from tilestream.distributed.launch import JOIN_S, KEY_VARIABLE, LOOPBACK, initialise, join, store_at
from tilestream.distributed.ranks import Failed, in_words
from tilestream.distributed.torchrun import Place, Torchrun
from tilestream.engine.errors import RankDiedError


def work_if_not_first(world_size: int) -> None:
    """Returns in rank 0. Where torchrun has started this process as another rank, it works, and the process ends with it.

    Args:
        world_size: the wanted tensor_parallel_size.
    Raises:
        ValueError: torchrun has started another number of ranks.
        RankDiedError: rank 0 has not come.
    """
    torchrun = Torchrun.find(world_size)
    if torchrun is not None and torchrun.place.rank > 0:
        stay_through_signals()
        address, key = torchrun.find_rank_0(JOIN_S)
        work(join(torchrun.place, address, key), torchrun.place)


def stay_through_signals() -> None:
    """Stop signals come to all ranks: rank 0 lets running answers end, for which it needs the others."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def work(link: Link, place: Place) -> NoReturn:
    """Follow rank 0, and end the process with it.

    Args:
        link: the way to it.
        place: this rank's.
    """
    threading.Thread(target=_end_with_rank_0, args=(link, place), name="tilestream-life", daemon=True).start()
    try:
        _follow(link, place)
    except Exception as error:
        if os.environ.get("TILESTREAM_DEBUG") == "1" and not isinstance(error, RankDiedError):
            traceback.print_exc()
        with suppress(OSError):
            link.life.send(Failed(in_words(error)))
        sys.exit(1)


def _follow(link: Link, place: Place) -> NoReturn:
    setup: Setup = _receive(link)
    initialise(place, store_at(setup.store), setup.device_type)
    loaded = setup.load(place)
    link.life.send((loaded.room_tokens, loaded.weight_bytes))
    while True:
        message = _receive(link)
        if isinstance(message, Build):
            runner, steps = loaded.build(message.config), StepReader()
            link.life.send(True)
        elif isinstance(message, Step):
            runner.follow(steps.read(message), message.draws)
        elif isinstance(message, ClearPages):
            runner.clear_pages(message.num_pages)


def _receive(link: Link) -> Any:
    """The next message. Does not return if it is the last, or if there is none any more: then the other thread ends this
    process."""
    try:
        message = link.orders.recv()
    except (EOFError, OSError):
        threading.Event().wait()
    if isinstance(message, Stop):
        _end_gloo()
        sys.exit()
    return message


def _end_gloo() -> None:
    """Its threads end before Python does: one that then still lets go of a tensor would abort the process."""
    import torch.distributed as dist

    if dist.is_initialized() and "nccl" not in dist.get_backend_config():
        dist.destroy_process_group()


def _end_with_rank_0(link: Link, place: Place) -> NoReturn:
    """Wait until rank 0's process is gone, and end this one, whatever it is in: perhaps a wait for rank 0 in a kernel."""
    reason = "rank 0 is gone"
    with suppress(Exception):  # whatever comes is the end
        reason = link.life.recv()
    print(f"tilestream: {place} ends: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def main() -> None:
    stay_through_signals()
    rank, world_size, port = map(int, sys.argv[1:])
    place = Place(rank, world_size, rank, world_size)
    try:
        link = join(place, (LOOPBACK, port), bytes.fromhex(os.environ.pop(KEY_VARIABLE)))
    except RankDiedError as error:
        sys.exit(f"tilestream: error: {error}")
    work(link, place)


if __name__ == "__main__":
    main()
