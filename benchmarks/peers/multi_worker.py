"""TensorFlow's MultiWorkerMirroredStrategy: one worker a process, ring allreduce over gRPC, the plain Keras loop."""

import json
import os

from benchmarks.peers.keras_loop import batch, prepare, training_step
from benchmarks.peers.work import parse_work, time_steps


def main() -> None:
    """Train as one of the workers."""
    work = parse_work()
    cluster = {"worker": [f"127.0.0.1:{port}" for port in work.ports]}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": work.process}})
    import tensorflow as tf

    prepare(work)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        step, _ = training_step(work)  # the optimizer adds up the gradients of all replicas

    @tf.function
    def all_replicas(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return strategy.run(step, args=(images, labels))

    images, labels = batch(work)
    time_steps(work, lambda: all_replicas(images, labels).numpy())
    # At exit a worker that is done first is an error to the other one, so both leave without goodbye.
    os._exit(0)


if __name__ == "__main__":
    main()
