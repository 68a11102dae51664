"""Weights and momentum once a host, in memory that its ranks have in common, of which each updates a part.

Every rank would otherwise do the same to its own copies, and several cores want the same memory bandwidth for it. Where
all ranks are on one host, gradients are summed there as well: each rank needs the sums of its own part only.
"""

import dataclasses
import itertools
import mmap
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hpctrain.optim.host import HostPart
from hpctrain.optim.sgd import SGD
from hpctrain.parallel.host_memory import HostMemory
from hpctrain.parallel.world import World

_HEADER_BYTES = 256  # what the operation that waits for the other ranks keeps there
_SQUARES_BYTES = 24  # of a variable, before the summands
_LINE_BYTES = 64  # also what TensorFlow wants its tensors aligned to


def share_weights(optimizer: keras.optimizers.Optimizer, world: World, *, summands: bool = False) -> HostPart | None:
    """Move what the optimizer changes to memory that the ranks of each host have in common, and share its updates out.

    With `summands`, also have memory for gradients that are summed as they are used, if all ranks are on one host and
    the optimizer takes them so. All ranks call it together, with the same values everywhere, before the first step is
    traced. Nothing changes where a rank is alone on its host, where memory cannot be had, and for optimizers that do
    not change numbers in place. A rank may still assign to a variable: in the next step the ranks of its host go back
    to variables of their own. Returns the rank's part, or None.
    """
    if world.size == 1:
        return None
    variables = optimizer.changed_in_place() if isinstance(optimizer, SGD) else []
    offsets, size_bytes = _layout(variables, _HEADER_BYTES)
    memory = HostMemory.create(world, size_bytes if variables else 0)
    if memory is None:
        world.barrier()
        return None
    counts = [variable.shape.num_elements() for variable in variables]
    arrays = [
        memory.array[offset : offset + count * 4].view(np.float32).reshape(variable.shape)
        for variable, offset, count in zip(variables, offsets, counts, strict=True)
    ]
    if memory.position == 0:
        for variable, array in zip(variables, arrays, strict=True):
            array[...] = variable.numpy()
    world.barrier()
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(_tensor_over(array))
    host = HostPart(_bytes_variable(memory), variables, offsets, memory.position, len(memory.ranks))
    if summands and optimizer.may_add_up and len(memory.ranks) == world.size:
        weights = variables[: len(variables) // 2]  # the rest is their momentum
        summand_offsets, size_bytes = _layout(weights, _SQUARES_BYTES * len(weights))
        # As much for each rank, so that each asks for the memory that it will write to.
        places = HostMemory.create(world, -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE * world.size)
        if places is not None:
            host = dataclasses.replace(host, summands=_bytes_variable(places), summand_offsets=tuple(summand_offsets))
    optimizer.share_host(host)
    return host


def _layout(variables: Sequence[Any], first: int) -> tuple[list[int], int]:
    """Where each variable begins, in bytes, if they lie one after the other from `first` on, and where all end."""
    sizes = [variable.shape.num_elements() * 4 for variable in variables]
    ends = itertools.accumulate(sizes, lambda offset, size: _aligned(offset + size), initial=_aligned(first))
    *offsets, end = ends
    return offsets, end


def _aligned(offset: int) -> int:
    return -(-offset // _LINE_BYTES) * _LINE_BYTES


def _bytes_variable(memory: HostMemory) -> Any:
    with tf.device("CPU:0"):
        return tf.Variable(_tensor_over(memory.array), trainable=False)


def _tensor_over(array: Any) -> Any:
    """A tensor with the memory of the array, which a variable that is assigned it then has as well."""
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
