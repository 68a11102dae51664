"""Plain TensorFlow and Keras: a loop around Keras' own layers, alone or with Horovod's ops in the obvious way.

python -m benchmarks.peers.keras_loop ...                     one process
mpirun -n 2 python -m benchmarks.peers.keras_loop --horovod   an allreduce for each gradient, all defaults
"""

import sys
from collections.abc import Callable
from typing import Any

from benchmarks.peers.work import Work, parse_work, time_steps


def prepare(work: Work) -> None:
    """Set precision and, for one process, threads."""
    import keras
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(work.threads)
    tf.config.threading.set_inter_op_parallelism_threads(min(2, work.threads))
    keras.config.set_dtype_policy(work.precision)


def batch(work: Work) -> tuple[Any, Any]:
    """Return random (images, labels)."""
    import tensorflow as tf

    images = tf.random.normal([work.micro_batch, work.image_size, work.image_size, 3])
    return images, tf.random.uniform([work.micro_batch], 0, work.classes, tf.int32)


def training_step(work: Work, reduce: Callable[[Any], Any] | None = None) -> tuple[Callable[[Any, Any], Any], Any]:
    """Return a step (images, labels) -> loss, to be made a tf.function, and its model; `reduce` is for a gradient."""
    import keras
    import tensorflow as tf

    from benchmarks.peers import keras_networks

    model = keras_networks.build(work.model, work.image_size, work.classes)
    optimizer = keras.optimizers.SGD(1e-6, momentum=0.9)
    optimizer.build(model.trainable_variables)

    def step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        gradients = tape.gradient(loss, [weight.value for weight in model.trainable_variables])
        if reduce is not None:
            gradients = [reduce(gradient) for gradient in gradients]
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    return step, model


def main() -> None:
    """Train; `--horovod` anywhere on the command line makes it one of several ranks."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--horovod"]
    work = parse_work(arguments)
    import tensorflow as tf

    reduce = None
    if len(arguments) < len(sys.argv) - 1:
        import horovod.tensorflow as hvd

        hvd.init()
        reduce = hvd.allreduce
    prepare(work)
    step, model = training_step(work, reduce)
    if reduce is not None:
        hvd.broadcast_variables([variable.value for variable in model.variables], root_rank=0)
    images, labels = batch(work)
    graph = tf.function(step)
    time_steps(work, lambda: graph(images, labels).numpy())


if __name__ == "__main__":
    main()
