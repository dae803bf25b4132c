"""Several processes that run one model: each a rank with its shard of the weights."""

from tilestream.distributed.communicator import Communicator, connect

__all__ = ["Communicator", "connect"]
