"""Runs the ops of a test on another device, though the test makes its tensors on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OnDevice(TorchDispatchMode):
    """While active, an op of tilestream on CPU tensors runs on `device`, and what it has written comes back.

    Whole storages travel, not views: strides, alignment, and the sentinels and NaN around a tensor are the same there, and
    a write that went astray is seen by the test's own checks. Packing stays on the CPU, and so do arguments named host_*.
    """

    active: OnDevice | None = None

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __enter__(self) -> OnDevice:
        OnDevice.active = self
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        OnDevice.active = None
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "tilestream" or func._schema.name.startswith("tilestream::pack_"):
            return func(*args, **kwargs)
        here: dict[int, torch.Tensor] = {}
        there: dict[int, torch.Tensor] = {}

        def move(name: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not value.is_cpu or name.startswith("host_"):
                return value
            storage = value.untyped_storage()
            key = storage.data_ptr()
            if key not in here:
                here[key] = torch.empty(0, dtype=torch.uint8).set_(storage)
                there[key] = here[key].clone() if self.device.type == "cpu" else here[key].to(self.device)
            whole = torch.empty(0, dtype=value.dtype, device=self.device).set_(there[key].untyped_storage())
            return whole.as_strided(value.shape, value.stride(), value.storage_offset())

        names = [argument.name for argument in func._schema.arguments]
        func(*(move(name, value) for name, value in zip(names, args)), **{k: move(k, v) for k, v in kwargs.items()})
        for key, whole in here.items():
            whole.copy_(there[key])
