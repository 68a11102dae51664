"""Weights and momentum once a host, in memory that its ranks have in common, of which each updates a part.

Every rank would otherwise do the same to its own copies, and several cores want the same memory bandwidth for it.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hpctrain.optim.sgd import SGD, HostPart
from hpctrain.parallel.host_memory import HostMemory
from hpctrain.parallel.world import World

_HEADER_BYTES = 256  # what the operation that waits for the other ranks keeps there
_LINE_BYTES = 64  # also what TensorFlow wants its tensors aligned to


def share_weights(optimizer: keras.optimizers.Optimizer, world: World) -> None:
    """Move what the optimizer changes to memory that the ranks of each host have in common, and share its updates out.

    All ranks call it together, with the same values everywhere, before the first step is traced. Nothing changes where
    a rank is alone on its host, where memory cannot be had, and for optimizers that do not change numbers in place. A
    rank may still assign to a variable: in the next step the ranks of its host go back to variables of their own.
    """
    if world.size == 1:
        return
    variables = optimizer.changed_in_place() if isinstance(optimizer, SGD) else []
    counts = [variable.shape.num_elements() for variable in variables]
    offsets = [_HEADER_BYTES]
    for count in counts:
        offsets.append(offsets[-1] + -(-count * 4 // _LINE_BYTES) * _LINE_BYTES)
    memory = HostMemory.create(world, offsets[-1] if variables else 0)
    if memory is None:
        world.barrier()
        return
    arrays = [
        memory.array[offset : offset + count * 4].view(np.float32).reshape(variable.shape)
        for variable, offset, count in zip(variables, offsets, counts, strict=False)
    ]
    if memory.position == 0:
        for variable, array in zip(variables, arrays, strict=True):
            array[...] = variable.numpy()
    world.barrier()
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(_tensor_over(array))
    with tf.device("CPU:0"):
        everything = tf.Variable(_tensor_over(memory.array), trainable=False)
    optimizer.share_host(HostPart(everything, variables, offsets[:-1], memory.position, len(memory.ranks)))


def _tensor_over(array: Any) -> Any:
    """A tensor with the memory of the array, which a variable that is assigned it then has as well."""
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
