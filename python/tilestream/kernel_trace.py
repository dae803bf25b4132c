"""Kernels for the engine's trace: what torch's profiler sees of a few steps, now and then."""

from __future__ import annotations

import logging
import time

import torch
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger("tilestream.engine")

# The profiler slows down the steps that it watches, so it watches some, and again after so long.
_EVERY_S = 60.0
# Of an op on the host; what is shorter (views, allocations) would be most of the file.
_SHORTEST_HOST_S = 5e-6


class KernelProfiler:
    """Watches `num_steps` steps in a row, about once a minute while there is work.

    On a CUDA device it sees kernels; on the CPU, ops: there a kernel is what one op runs. Ops that a layer program
    replays (decodes of up to 64 tokens, see docs/engine.md) never pass through torch, and are not seen one by one.

    Args:
        num_steps: at least 1.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._num_left = 0
        self._next_s = 0.0
        self._profile: profile | None = None
        self._monotonic_offset_s = 0.0

    def after_step(self) -> list[tuple[str, float, float, bool]]:
        """Called between steps, on the engine's thread.

        Returns:
            When a profile has ended: name; begin and end, of time.monotonic(); whether it ran on a device.
        """
        try:
            return self._after_step()
        except Exception:
            logger.exception("torch's profiler failed; the trace goes on without kernels")
            self._next_s = float("inf")
            self._profile = None
            return []

    def _after_step(self) -> list[tuple[str, float, float, bool]]:
        if self._profile is None:
            if time.monotonic() >= self._next_s:
                activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_initialized() else [])]
                self._profile, self._num_left = profile(activities=activities), self._num_steps
                self._monotonic_offset_s = time.time() - time.monotonic()  # the profiler's clock is the wall's
                self._profile.start()
            return []
        self._num_left -= 1
        if self._num_left:
            return []
        done, self._profile = self._profile, None
        done.stop()
        self._next_s = time.monotonic() + _EVERY_S
        spans = []
        for event in done.profiler.kineto_results.events():
            begin_s, seconds = event.start_ns() / 1e9 - self._monotonic_offset_s, event.duration_ns() / 1e9
            on_device = event.device_type() != torch.autograd.DeviceType.CPU
            if on_device or seconds >= _SHORTEST_HOST_S:
                spans.append((event.name(), begin_s, begin_s + seconds, on_device))
        return spans
