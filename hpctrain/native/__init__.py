"""TensorFlow operations of our own, for what TensorFlow's do in several times the time.

`install.sh` compiles them (`python -m hpctrain.native.build`). Where that was not done, those who ask for an operation
get None and use TensorFlow's. Nothing is loaded before it is asked for.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

from hpctrain.errors import UserError

FOLDER = Path(__file__).parent
# Each a .cc file of this folder.
OPERATIONS = ("batch_norm", "crop_resize", "host_meeting", "host_summands", "kernel_grad", "momentum", "winograd")


def compiled_file(operation: str) -> Path:
    """Return where the compiled operation is, or would be."""
    return FOLDER / f"_{operation}.so"


def missing() -> list[str]:
    """Return the operations that are not compiled."""
    return [operation for operation in OPERATIONS if not compiled_file(operation).is_file()]


def crop_resize() -> Any:
    """Return the module with `hpctrain_crop_resize` and `hpctrain_decode_crop_resize`, or None.

    Both are operations (*images, boxes int32[k, 4], flips bool[k]) -> float32[k, size, size, 3]. Images are, for the
    first, a list of uint8[h, w, 3], or of uint8[n, h, w, 3] with n images each, k in all; for the second two tensors,
    bytes uint8[n] and offsets int64[k + 1]: the i-th JPEG file is bytes[offsets[i]:offsets[i + 1]]. Attributes are
    `size`, and `scale` and `shift`, three numbers each: a pixel becomes pixel * scale + shift.
    """
    return _load("crop_resize")


def batch_norm() -> Any:
    """Return the module with `hpctrain_batch_norm` and `hpctrain_batch_norm_grad`, or None.

    `models/batch_norm.py` says what they compute; it also registers the gradient.
    """
    return _load("batch_norm")


@functools.cache
def winograd() -> Any:
    """Return the module with `hpctrain_winograd` and `hpctrain_winograd_kernel_grad`, or None. Needs AVX-512.

    `models/convolution.py` says what they compute; it also registers the gradient.
    """
    return _load_if_it_works("winograd")


@functools.cache
def kernel_grad() -> Any:
    """Return the operation (x, dy) -> float32[kh, kw, in, out] for bfloat16 images and gradients, or None.

    It is the gradient of a convolution's kernel. Attributes are `kernel_size`, two integers, `stride`, `padding`,
    "SAME" or "VALID", and whether `amx` may be used where it is there. Needs that or AVX512_BF16.
    """
    loaded = _load_if_it_works("kernel_grad")
    return loaded and loaded.hpctrain_kernel_grad


def momentum() -> Any:
    """Return the operation (variable, buffer, gradient, factor, rate, memory, summands) for float32 variables, or None.

    Variables are given by their handles. It sets step = factor * (gradient + decay * variable),
    buffer = momentum * buffer + step, and then variable -= rate * buffer, or rate * (momentum * buffer + step) with
    `nesterov`. `momentum`, `decay` and `nesterov` are attributes, factor and rate scalars. `memory` is empty, or the
    one handle of what the ranks of a host have in common. Where variable and buffer lie in that, it does so for part
    number `part` of `parts` of the numbers. `summands` is empty, or the one handle of where the other ranks have laid
    out theirs (`host_summands`), from `summands_offset` on: then the gradient is the sum of that and theirs.
    """
    loaded = _load("momentum")
    return loaded and loaded.hpctrain_momentum


def host_meeting() -> Any:
    """Return the operation (memory, variables, summands, gradients), which waits for all ranks of a host, or None.

    `memory` is the handle of a uint8 variable over memory that they have in common, zeros in its first 256 bytes when
    it is first used; `rank` of `ranks` are attributes. `variables` are handles of float32 variables in it, from the
    bytes `offsets` on. If one is no longer there on some rank, all ranks get copies of their own of them all, and
    `gradients` are laid out whole in `summands`, at the `summand_offsets`; both are empty where they are not used.
    """
    loaded = _load("host_meeting")
    return loaded and loaded.hpctrain_host_meeting


def host_summands() -> Any:
    """Return the module with `hpctrain_give_summands` and `hpctrain_host_squares`, or None.

    The first is (summands, gradient) -> bool[]: it copies all of a float32 gradient but part number `part` of `parts`,
    which nobody else will add up, into this rank's part of the uint8 variable `summands`, `offset` bytes from its
    beginning, and tells whether the gradient is finite. The second is (memory, summands, gradients, weights) ->
    float64[3, n]: |g|^2, |w|^2 and g.w, g the sum of the ranks' gradients. It waits for all ranks of the host,
    of which each reads its part, and all get the same bits. It needs 24 n bytes at the beginning of each rank's part.
    """
    return _load("host_summands")


def _load_if_it_works(operation: str) -> Any:
    loaded = _load(operation)
    if loaded is None:
        return None
    works = getattr(ctypes.CDLL(str(compiled_file(operation))), f"hpctrain_{operation}_works")
    works.restype = ctypes.c_bool
    return loaded if works() else None


@functools.cache
def _load(operation: str) -> Any:
    if not compiled_file(operation).is_file():
        return None
    import tensorflow as tf

    try:
        return tf.load_op_library(str(compiled_file(operation)))
    except (tf.errors.OpError, RuntimeError) as error:
        raise UserError(
            f"{compiled_file(operation)} does not fit TensorFlow {tf.__version__} ({str(error).splitlines()[0]}); "
            "compile it again with `python -m hpctrain.native.build`"
        ) from error
