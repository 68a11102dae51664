"""The performance model: how long a step takes on so many nodes, and why. Its equations are in docs/prediction.md."""

from hpctrain._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Measurement": "hpctrain.scaling.performance.measurement",
        "fit_measurements": "hpctrain.scaling.performance.fit",
        "HeldOut": "hpctrain.scaling.performance.fit",
        "held_out": "hpctrain.scaling.performance.fit",
        "load_calibration": "hpctrain.scaling.performance.calibration",
    },
)
