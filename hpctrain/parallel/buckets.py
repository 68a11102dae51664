"""Which gradients are reduced together: pure arithmetic on their sizes."""

from collections.abc import Sequence


def assign_buckets(sizes_bytes: Sequence[int], bucket_bytes: float) -> list[list[int]]:
    """Return groups of indices into `sizes_bytes`, each of about `bucket_bytes`, from the last tensor to the first.

    The backward pass yields the gradients of the last layers first, so the reduction of the first bucket runs while
    the rest is still being computed. A tensor larger than a bucket is one alone. The groups partition the indices,
    and do not depend on the number of ranks.
    """
    buckets: list[list[int]] = []
    filled = float("inf")
    for index in reversed(range(len(sizes_bytes))):
        if filled + sizes_bytes[index] > bucket_bytes and filled > 0:
            buckets.append([])
            filled = 0
        buckets[-1].append(index)
        filled += sizes_bytes[index]
    return buckets


def merge_plan(count: int, tree: bool) -> list[int]:
    """Return, for each of `count` summands in order, how many pairs of pending partial sums to add after it.

    A stack machine: push the summand, then that many times replace the two topmost by their sum; in the end one is
    left. With `tree` the additions form the tree that halves `count` as long as it is even, which recursive-doubling
    and Rabenseifner's allreduce continue over a power of two of ranks: so the sum over all micro-batches of a global
    batch has the same bits on 1, 2, 4, ... ranks. An odd rest, and everything without `tree`, is added from left to
    right, which needs no memory but the running sum.
    """
    if count == 1:
        return [0]
    if tree and count % 2 == 0:
        half = merge_plan(count // 2, tree)
        return [*half, *half[:-1], half[-1] + 1]
    return [0] + [1] * (count - 1)
