"""Sums over all ranks, inside the training step's graph: bucketed allreduce through Horovod."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hpctrain.errors import UserError
from hpctrain.parallel.buckets import assign_buckets
from hpctrain.parallel.world import World


class Reducer:
    """Adds tensors over all ranks of a world. On a single rank it returns what it is given; Horovod is not loaded.

    The sums are float32 sums, not averages: whoever needs an average scales once, by a number that is the same
    everywhere. With `deterministic` the order of addition is checked at the start to be the balanced tree.
    """

    def __init__(
        self, world: World, *, bucket_bytes: float = 4e6, compression: str = "none", deterministic: bool = False
    ) -> None:
        self.world = world
        self.bucket_bytes = bucket_bytes
        self.compression = compression
        self.deterministic = deterministic
        self._give: Callable[[Sequence[Any]], Any] | None = None
        self._given_finite: Any = None
        if world.size > 1:
            self._hvd = _start_horovod(world)
            if deterministic and world.size & (world.size - 1) == 0:
                self._check_order()

    @property
    def adds_plainly(self) -> bool:
        """Whether sums of gradients are of float32 numbers as they are, in whatever order."""
        return self.compression == "none" and not self.deterministic

    def leave_sums_to_the_update(self, give: Callable[[Sequence[Any]], Any] | None) -> None:
        """Have `sum_gradients` return what it is given, from now on, when `give` has laid it out for the other ranks.

        `give` takes the gradients and returns whether they are finite (`optim/host.py`), and the update adds them up.
        With None gradients are summed here. What was found in summands so far is forgotten.
        """
        self._give = give
        if self.world.size > 1 and (look := _horovod_operation("summands_finite")):
            look()

    def sum_gradients(self, gradients: Sequence[Any]) -> list[Any]:
        """Return the sums over ranks of a list of tensors in the order of the layers, reduced bucket by bucket.

        Inside a tf.function each bucket is under way as soon as its gradients are there, beside the rest of the
        backward pass. With compression, bf16 or fp16 goes over the wire and the result is float32 again.
        """
        if self.world.size == 1:
            return list(gradients)
        if self._give is not None:
            self._given_finite = self._give(gradients)
            with tf.control_dependencies([self._given_finite]):
                return [tf.identity(gradient) for gradient in gradients]
        sizes = [gradient.shape.num_elements() * gradient.dtype.size for gradient in gradients]
        sums: list[Any] = [None] * len(gradients)
        for number, bucket in enumerate(assign_buckets(sizes, self.bucket_bytes)):
            tensors = [gradients[i] for i in bucket]
            for i, total in zip(bucket, self._sum_bucket(tensors, f"gradients.{number}"), strict=True):
                sums[i] = total
        return sums

    def sum(self, tensor: Any, name: str) -> Any:
        """Return the sum over ranks of a vector, uncompressed. `name` is the same on all ranks and unique."""
        if self.world.size == 1:
            return tensor
        # MPI takes another algorithm, which adds in another order, for a vector shorter than the number of ranks.
        count = tensor.shape.num_elements()
        padded = tf.pad(tensor, [[0, max(0, self.world.size - count)]])
        return self._hvd.allreduce(padded, op=self._hvd.Sum, name=name)[:count]

    @property
    def looks(self) -> bool:
        """Whether `summands_finite` can tell: not on a single rank, with compression, or with a Horovod as it comes."""
        if self.world.size == 1 or self.compression != "none":
            return False
        return self._give is not None or _horovod_operation("summands_finite") is not None

    def summands_finite(self, sums: Sequence[Any]) -> Any:
        """Return bool[]: whether all that this rank has given to sums since it last asked was finite.

        It is told once `sums` are there. Whoever adds or copies the numbers looks while it has them in the cache, which
        costs less than reading them for that.
        """
        if self._give is not None:
            return self._given_finite
        with tf.control_dependencies(list(sums)):
            return _horovod_operation("summands_finite")()

    def broadcast(self, variables: Sequence[Any]) -> None:
        """Overwrite the tf.Variables on every rank with rank 0's values.

        By MPI itself: Horovod would build and optimize a graph for this one use.
        """
        if self.world.size == 1:
            return
        for variable in variables:
            array = np.array(variable.numpy())
            self.world.copy_from_root(array)
            if not self.world.is_root:
                variable.assign(array)

    def _sum_bucket(self, tensors: list[Any], name: str) -> list[Any]:
        if self.compression == "none" and not self.deterministic:
            return self._hvd.grouped_allreduce(tensors, op=self._hvd.Sum, name=name)
        flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)
        if self.compression == "none":
            flat = self.sum(flat, name)
        else:
            flat = self._sum_compressed(flat, tf.bfloat16 if self.compression == "bf16" else tf.float16, name)
        parts = tf.split(flat, [tensor.shape.num_elements() for tensor in tensors])
        return [tf.reshape(part, tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def _sum_compressed(self, flat: Any, wire: Any, name: str) -> Any:
        """Allreduce with 2-byte numbers on the wire and float32 sums: reduce-scatter by all-to-all, then allgather.

        As many bytes as a ring allreduce of the 2-byte numbers, but each summand is rounded once and the sum once,
        where adding in the short format would round after every rank. MPI cannot add bfloat16 at all. A rank's
        summand is about the sum divided by the number of ranks; float16 has no room for numbers that small, so it
        travels multiplied by that number, and what float16 has no room for at the other end as the largest there is.
        """
        size = self.world.size
        scale = float(size) if wire == tf.float16 else 1.0
        count = flat.shape.num_elements()
        padded = tf.pad(flat * scale, [[0, -count % size]])
        received = self._hvd.alltoall(_to_wire(padded, wire), name=f"{name}.scatter")
        rows = tf.unstack(tf.reshape(_from_wire(received, wire), [size, -1]), num=size)
        mine = _to_wire(tf.add_n(rows) / scale, wire)
        gathered = self._hvd.allgather(mine, name=f"{name}.gather")
        return _from_wire(gathered, wire)[:count]

    def _check_order(self) -> None:
        """Compare a real allreduce with the tree, bit for bit: an MPI may not have taken the hint at its algorithm."""
        count = 64 * self.world.size + 1
        summands = [_probe(rank, count) for rank in range(self.world.size)]
        with tf.device("CPU:0"):
            total = self.sum(tf.constant(summands[self.world.rank]), "hpctrain.order_probe").numpy()
        while len(summands) > 1:
            summands = [a + b for a, b in zip(summands[::2], summands[1::2], strict=True)]
        if any(self.world.allgather(total.tobytes() != summands[0].tobytes())):
            raise UserError(
                f"train.deterministic is set but allreduce of {self.world.mpi_version} does not add in tree order; "
                "select recursive doubling or Rabenseifner's algorithm for it (docs/architecture.md names the "
                "variables of each MPI), or set train.deterministic=false"
            )


def _horovod_operation(name: str) -> Any:
    """Return an operation that our changes to Horovod bring, or None where it is without them."""
    from horovod.tensorflow import mpi_ops

    return getattr(mpi_ops.MPI_LIB, f"horovod_{name}", None)


def _to_wire(tensor: Any, wire: Any) -> Any:
    # Beyond the largest number of the format a cast makes infinity, after the check of gradients for it.
    if wire == tf.float16:
        tensor = tf.clip_by_value(tensor, tf.float16.min, tf.float16.max)
    return tf.bitcast(tf.cast(tensor, wire), tf.uint16)


def _from_wire(tensor: Any, wire: Any) -> Any:
    return tf.cast(tf.bitcast(tensor, wire), tf.float32)


def _probe(rank: int, count: int) -> np.ndarray:
    return np.random.default_rng(rank).standard_normal(count).astype(np.float32)


def _start_horovod(world: World) -> Any:
    try:
        import horovod.tensorflow as hvd
    except ImportError as error:
        raise UserError(
            f"Horovod cannot be loaded ({error}), and {world.size} ranks need it; "
            "install hpctrain with its install.sh, which builds Horovod against this TensorFlow and MPI"
        ) from None
    hvd.init()
    if hvd.size() != world.size or hvd.rank() != world.rank:
        raise UserError(
            f"Horovod is rank {hvd.rank()} of {hvd.size()} where MPI is rank {world.rank} of {world.size}: it was "
            "built against another MPI; run install.sh again with the MPI that the job uses"
        )
    return hvd
