"""Only a model's convolutions: forward, backward for the input and for the weights, one after the other.

By themselves, on made-up numbers of each layer's shape, and nothing between them: no batch norm, no activations, no
dense layers, no update. It is what a train step could reach if all the rest were for nothing. They are done as
hpctrain's models do them or, with BARE_CONVOLUTIONS=TensorFlow in the environment, all by TensorFlow's own kernels.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.work import Work, parse_work, time_steps

BY = "BARE_CONVOLUTIONS"  # environment variable

Call = Callable[[], Any]


@dataclass(frozen=True)
class Convolution:
    """A plain convolution of a model; a grouped one is as many of these as it has groups. Shapes without the batch."""

    input_shape: tuple[int, int, int]  # height, width, channels
    kernel_shape: tuple[int, int, int, int]
    output_shape: tuple[int, int, int]
    stride: int
    padding: str
    is_first: bool  # of the model: nobody needs the gradient of its input

    @property
    def flops(self) -> int:
        """Of all its passes over one image; each multiplication and each addition is one."""
        height, width, _ = self.output_shape
        size, other, before, after = self.kernel_shape
        return 2 * height * width * size * other * before * after * (2 if self.is_first else 3)


def convolutions_of(model: Any) -> list[Convolution]:
    """Return the convolutions of a Keras model in the order of its layers."""
    found: list[Convolution] = []
    for layer in model.layers:
        kernel = getattr(layer, "kernel", None)
        if kernel is None or len(kernel.shape) != 4:
            continue
        groups = layer.input.shape[-1] // kernel.shape[2]
        stride = layer.strides if isinstance(layer.strides, int) else layer.strides[0]
        one = Convolution(
            (*layer.input.shape[1:3], kernel.shape[2]),
            (*kernel.shape[:3], kernel.shape[3] // groups),
            (*layer.output.shape[1:3], kernel.shape[3] // groups),
            stride,
            layer.padding.upper(),
            is_first=not found,
        )
        found += [one] * groups
    return found


def passes(one: Convolution, work: Work) -> list[Call]:
    """Return functions that do the passes of a convolution on a micro-batch; each gives its output back uncopied."""
    import tensorflow as tf

    from hpctrain.models.convolution import convolve

    by = tf.nn.conv2d if os.environ.get(BY) == "TensorFlow" else convolve
    kind = tf.bfloat16 if work.bfloat16 else tf.float32

    def made_up(*shape: int) -> Any:
        return tf.cast(tf.random.normal(shape), kind)

    images = made_up(work.micro_batch, *one.input_shape)
    kernel = made_up(*one.kernel_shape)
    dy = made_up(work.micro_batch, *one.output_shape)
    outputs = tf.function(lambda x, k: by(x, k, one.stride, one.padding))

    def gradient(which: int) -> Any:
        @tf.function
        def graph(x: Any, k: Any, of_y: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch((x, k))
                y = by(x, k, one.stride, one.padding)  # nobody reads it, so the graph will do without
            return tape.gradient(y, (x, k)[which], output_gradients=of_y)

        return graph

    kinds: list[tuple[Any, tuple[Any, ...]]] = [(outputs, (images, kernel))]
    kinds += [(gradient(which), (images, kernel, dy)) for which in ([1] if one.is_first else [1, 0])]
    graphs = [(graph.get_concrete_function(*given), given) for graph, given in kinds]
    return [functools.partial(graph, *given) for graph, given in graphs]


def main() -> None:
    """Run a model's convolutions, all forward and then all backward."""
    work = parse_work()
    import keras
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(work.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.config.set_dtype_policy(work.precision)
    from hpctrain.models import build

    found = convolutions_of(build(work.model, image_size=work.image_size, num_classes=work.classes))
    of_shape = {one: passes(one, work) for one in dict.fromkeys(found)}
    calls = [of_shape[one][0] for one in found]
    calls += [call for one in reversed(found) for call in of_shape[one][1:]]

    def step() -> None:
        for call in calls:
            call()

    time_steps(work, step, convolution_flops_per_image=sum(one.flops for one in found))


if __name__ == "__main__":
    main()
