"""Copies shards and the Python environment to node-local storage. Imports no TensorFlow; `stage_env` nothing at all."""

from hpctrain._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "shards_of_node": "hpctrain.staging.plan",
        "stage": "hpctrain.staging.shards",
    },
)
