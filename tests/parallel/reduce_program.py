"""What each rank of test_reduce.py runs: sums of random tensors against NumPy's."""

import argparse
import os
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpctrain.parallel.launch import set_environment
from hpctrain.parallel.quiet import import_tensorflow
from hpctrain.parallel.world import start

PART = 2**16  # float32 numbers; sums within a host go in parts of so many
_IN_SUCCESSION = 30
HOST_SUM_LEAST = 4096  # numbers from which they go through memory that the ranks share
MPI_PART = 2**22  # MPI adds so many at a time
SIZES = (1, 5, 1000, PART - 1, PART, PART + 1, 2 * PART - 1, 2 * PART + 1, 5 * PART + 2, 0, 7)


def summands(rank: int, sizes: Sequence[int]) -> list[np.ndarray]:
    generator = np.random.default_rng(rank)
    return [generator.standard_normal(size).astype(np.float32) for size in sizes]


def tree(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of a power of two of arrays, added pairwise over neighbors."""
    half = len(parts) // 2
    return parts[0] if half == 0 else tree(parts[:half]) + tree(parts[half:])


def shares_memory() -> bool:
    return "horovod-sum" in Path("/proc/self/maps").read_text()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bucket_bytes", type=float)
    parser.add_argument("--compression", default="none")
    parser.add_argument("--without-memory", action="store_true", help="there is none that ranks could share")
    parser.add_argument("--without-wish", action="store_true", help="one rank does not want to share memory")
    options = parser.parse_args()
    compression = options.compression
    shares = compression == "none" and not options.without_memory and not options.without_wish
    set_environment(deterministic=False)
    world = start(threads=1)
    import_tensorflow()
    import tensorflow as tf

    from hpctrain.parallel.reduce import Reducer

    reducer = Reducer(world, bucket_bytes=options.bucket_bytes, compression=compression)
    if options.without_memory:  # files and memory with a descriptor may not become longer than this
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    if options.without_wish and world.rank == 1:
        os.environ["HOROVOD_HOST_SUM"] = "0"
    sizes = SIZES if shares else (*SIZES, 2 * MPI_PART + 3)
    by_rank = [summands(rank, sizes) for rank in range(world.size)]
    expected = [sum(parts) for parts in zip(*by_rank, strict=True)]
    own = by_rank[world.rank]

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

    @tf.function
    def reduce_again_and_again(ones: tf.Tensor) -> tf.Tensor:
        """Sums that follow each other without a pause, each of less than a part; and how many of them are wrong."""
        wrong = tf.constant(0)
        for i in range(_IN_SUCCESSION):
            [total] = reducer.sum_gradients([ones * (world.rank + i)])
            wanted = sum(range(world.size)) + world.size * i
            wrong += tf.reduce_sum(tf.cast(total != wanted, tf.int32))
            ones += 0.0 * total
        return wrong

    tolerance = {"none": 1e-5, "bf16": 2**-4, "fp16": 2**-7}[compression]
    for factor in (1.0, -2.0):
        sums, kept = reduce(tf.constant(factor))
        for total, wanted in zip(sums, expected, strict=True):
            np.testing.assert_allclose(total.numpy(), factor * wanted, rtol=tolerance, atol=tolerance)
        for tensor, part in zip(kept, own, strict=True):
            np.testing.assert_array_equal(tensor.numpy(), factor * part)
        sums = [total.numpy() for total in reduce_alone(tf.constant(factor))]
        for total, wanted in zip(sums, expected, strict=True):
            np.testing.assert_allclose(total, factor * wanted, rtol=tolerance, atol=tolerance)
        assert len(set(world.allgather(b"".join(total.tobytes() for total in sums)))) == 1, "ranks have other bits"
        if shares and world.size in (2, 4):
            for total, parts in zip(sums, zip(*by_rank, strict=True), strict=True):
                if total.size >= HOST_SUM_LEAST:
                    np.testing.assert_array_equal(total, factor * tree(parts))
    for _ in range(10):
        assert int(reduce_again_and_again(tf.ones(HOST_SUM_LEAST + 100))) == 0
    if compression == "fp16":  # no infinity from what is finite
        [total] = reducer.sum_gradients([tf.constant([70000.0, -1e9, 1.0])])
        np.testing.assert_array_equal(total.numpy(), [65504, -65504, world.size])
    assert shares_memory() == shares
    world.barrier()
    if world.is_root:
        print("all sums are right")


if __name__ == "__main__":
    main()
