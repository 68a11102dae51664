"""Exact evaluation: every image of the validation split once, on any number of ranks, with the same result.

The split is cut into micro-batches by the configuration alone; each rank takes a contiguous run of them. What a
micro-batch contributes is computed in the same shape everywhere, and the contributions are added in their order in
float64, so loss and accuracy have the same bits on 1, 2, 3 or any other number of ranks.
"""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hpctrain.data.pipeline import evaluation_pipeline
from hpctrain.data.reader import ShardReader
from hpctrain.parallel.world import World
from hpctrain.training.step import cross_entropy, graph, is_correct


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and the shares (0 to 1) of images whose label is the best, or among the five best, scores."""

    loss: float
    top1: float
    top5: float
    num_images: int


class Evaluator:
    """Evaluates a model on one split; made once, since the first call builds the graph."""

    def __init__(
        self,
        model: keras.Model,
        reader: ShardReader,
        world: World,
        *,
        micro_batch: int,
        image_size: int,
        crop_fraction: float = 0.875,
        threads: int = 1,
        on_bad_record: str = "error",
    ) -> None:
        self.model, self.reader, self.world = model, reader, world
        self.micro_batch = micro_batch
        self.bad_records: set[int] = set()  # of this rank's share, skipped so far
        self._pipeline_options: dict[str, Any] = {
            "micro_batch": micro_batch,
            "image_size": image_size,
            "crop_fraction": crop_fraction,
            "threads": threads,
            "on_bad_record": on_bad_record,
        }
        self._sums = graph(self._micro_batch_sums)

    def __call__(self) -> Evaluation:
        """Evaluate the model as it is now. All ranks call it together and get the same result."""
        total = -(-self.reader.num_records // self.micro_batch)
        first = self.world.rank * total // self.world.size
        last = (self.world.rank + 1) * total // self.world.size
        pipeline = evaluation_pipeline(self.reader, range(first, last), **self._pipeline_options)
        mine = [self._sums(images, labels).numpy() for images, labels in pipeline]
        self.bad_records |= pipeline.bad_records
        own = np.array(mine, np.float64).reshape(-1, 4)
        # Rank by rank, so micro-batch by micro-batch in their order.
        rows = np.concatenate(self.world.allgather(own))
        loss, top1, top5, count = (sum(column.tolist()) for column in rows.T)
        count = max(count, 1.0)
        return Evaluation(loss / count, top1 / count, top5 / count, int(count))

    def _micro_batch_sums(self, images: Any, labels: Any) -> Any:
        """Return [sum of losses, correct, correct among five, images], without the padding."""
        logits = self.model(images, training=False)
        parts = [
            cross_entropy(logits, labels),
            is_correct(logits, labels, 1),
            is_correct(logits, labels, 5),
            labels >= 0,
        ]
        return tf.stack([tf.reduce_sum(tf.cast(part, tf.float32)) for part in parts])
