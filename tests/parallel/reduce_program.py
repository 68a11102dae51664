"""What each rank of test_reduce.py runs: sums of random tensors against NumPy's in float64."""

import sys

import numpy as np

from hpctrain.parallel.launch import set_environment
from hpctrain.parallel.quiet import import_tensorflow
from hpctrain.parallel.world import start

MIB = 2**18  # float32 numbers; Horovod's parts within a host are of one MiB
SIZES = (1, 5, 1000, MIB - 1, MIB, MIB + 1, 2 * MIB - 1, 2 * MIB + 1, 3 * MIB + 2, 0, 7)


def summands(rank: int) -> list[np.ndarray]:
    generator = np.random.default_rng(rank)
    return [generator.standard_normal(size).astype(np.float32) for size in SIZES]


def main() -> None:
    bucket_bytes, compression = float(sys.argv[1]), sys.argv[2]
    set_environment(deterministic=False)
    world = start(threads=1)
    import_tensorflow()
    import tensorflow as tf

    from hpctrain.parallel.reduce import Reducer

    reducer = Reducer(world, bucket_bytes=bucket_bytes, compression=compression)
    expected = [sum(parts) for parts in zip(*(summands(rank) for rank in range(world.size)), strict=True)]
    own = summands(world.rank)

    @tf.function
    def reduce(factor: tf.Tensor) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """The sums, and the summands, which are still needed and so must be what they were."""
        tensors = [tf.constant(part) * factor for part in own]
        sums = reducer.sum_gradients(tensors)
        with tf.control_dependencies(sums):
            return sums, [tensor + 0.0 for tensor in tensors]

    @tf.function
    def reduce_alone(factor: tf.Tensor) -> list[tf.Tensor]:
        """The sums alone: nobody else reads the summands, so they may be overwritten."""
        return reducer.sum_gradients([tf.constant(part) * factor for part in own])

    tolerance = {"none": 1e-5, "bf16": 2**-4}[compression]
    for factor in (1.0, -2.0):
        sums, kept = reduce(tf.constant(factor))
        for total, wanted in zip(sums, expected, strict=True):
            np.testing.assert_allclose(total.numpy(), factor * wanted, rtol=tolerance, atol=tolerance)
        for tensor, part in zip(kept, own, strict=True):
            np.testing.assert_array_equal(tensor.numpy(), factor * part)
        for total, wanted in zip(reduce_alone(tf.constant(factor)), expected, strict=True):
            np.testing.assert_allclose(total.numpy(), factor * wanted, rtol=tolerance, atol=tolerance)
    world.barrier()
    if world.is_root:
        print("all sums are right")


if __name__ == "__main__":
    main()
