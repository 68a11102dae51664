"""LARS, momentum SGD and learning-rate schedules. Knows nothing of MPI or Horovod; the schedules need no TensorFlow."""

from hpctrain._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "LARS": "hpctrain.optim.lars",
        "SGD": "hpctrain.optim.sgd",
        "make_optimizer": "hpctrain.optim.factory",
        "KerasSchedule": "hpctrain.optim.keras_schedule",
        "make_schedule": "hpctrain.optim.schedules",
        "warmup_poly": "hpctrain.optim.schedules",
        "warmup_step": "hpctrain.optim.schedules",
        "warmup_cosine": "hpctrain.optim.schedules",
        "warmup_constant": "hpctrain.optim.schedules",
        "linear_scaling": "hpctrain.optim.schedules",
        "sqrt_scaling": "hpctrain.optim.schedules",
        "legw": "hpctrain.optim.schedules",
    },
)
