"""Shards, sample order, input pipeline: from HDF5 files to batches. Knows nothing of MPI or Horovod."""

from hpctrain._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "ShardReader": "hpctrain.data.reader",
        "ShardWriter": "hpctrain.data.writer",
        "batch_indices": "hpctrain.data.order",
        "evaluation_pipeline": "hpctrain.data.pipeline",
        "input_pipeline": "hpctrain.data.pipeline",
        "training_pipeline": "hpctrain.data.pipeline",
    },
)
