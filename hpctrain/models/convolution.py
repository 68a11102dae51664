"""Convolutions of images, each by the fastest way there is here.

TensorFlow's kernels (oneDNN) do them by the definition. For 3x3 with stride 1 and padding that keeps the size our own
operation (`hpctrain/native/winograd.cc`) takes less than half the time, as Winograd's algorithm needs a quarter of the
multiplications: where it is compiled, on CPUs with AVX-512, for float32, and with multiples of 16 channels. It rounds
more: errors are about 1e-6 of the results' size, where sums in float32 have 2e-7 and bfloat16 has 4e-3. `products.py`
says when images and kernels in bfloat16 are multiplied in float32.
"""

import functools
from typing import Any

import tensorflow as tf

from hpctrain import native
from hpctrain.models.products import convolve_images

_CHANNELS = 16  # a vector of AVX-512


def convolve(x: Any, kernel: Any, stride: int, padding: str) -> Any:
    """Return the convolution of x (N, H, W, Cin) with kernel (kh, kw, Cin, Cout): (N, H', W', Cout), of the type of x.

    `padding` is "same" or "valid", as TensorFlow means them. The kernel may be float32 beside x in bfloat16: it is
    rounded, and its gradient is float32.
    """
    return convolve_images(_convolve, x, kernel, stride, padding.upper())


def _convolve(x: Any, kernel: Any, stride: int, padding: str) -> Any:
    *size, channels, filters = kernel.shape
    if (
        (size, stride, padding) == ([3, 3], 1, "SAME")
        and x.dtype == tf.float32
        and channels % _CHANNELS == filters % _CHANNELS == 0
        and (winograd := _winograd())
    ):
        return winograd(x, kernel)
    return tf.nn.conv2d(x, kernel, stride, padding)


@functools.cache
def _winograd() -> Any:
    library = native.winograd()
    if library is None:
        return None

    @tf.RegisterGradient("HpctrainWinograd")
    def _gradient(op: Any, dy: Any) -> list[Any]:
        x, kernel = op.inputs
        turned = op.get_attr("turned")
        dx = library.hpctrain_winograd(dy, kernel, turned=not turned)
        return [dx, library.hpctrain_winograd_kernel_grad(*((dy, x) if turned else (x, dy)))]

    return library.hpctrain_winograd
