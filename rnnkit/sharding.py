"""Parameters of which a process may hold a shard, as with FSDP2: their whole values, read and written.

What computes with whole matrices (`init`, `convert_update_gate`, weights of other libraries) goes this way. Reading and
writing a shard are collective: every process takes part.
"""

import sys
from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2's parameters are; torch.distributed.tensor is not imported for this."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> Tensor:
    """The whole values of a tensor: itself, or those of all shards."""
    values: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return values


def sharded_like(parameter: Any, values: Tensor) -> Tensor:
    """The whole values, sharded as the parameter is, or as they are if it is not. Rank 0's values count."""
    if not is_sharded(parameter):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, parameter.device_mesh, parameter.placements)
