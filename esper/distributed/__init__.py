"""Models that several ranks train: what they agree on, gradients of kernels, sharded checkpoints."""

from esper.distributed.checkpoint import ShardedCheckpointError, load_checkpoint, save_checkpoint
from esper.distributed.ranks import Ranks, RanksError

__all__ = ["Ranks", "RanksError", "ShardedCheckpointError", "load_checkpoint", "save_checkpoint"]
