"""How well a run went, how it scales and how it would: reports, plots, predictions. Never imports TensorFlow."""

from hpctrain._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "predict": "hpctrain.scaling.performance.predict",
        "read_metrics": "hpctrain.scaling.run_data",
        "read_run": "hpctrain.scaling.run_data",
        "summarize": "hpctrain.scaling.run_data",
        "summary_table": "hpctrain.scaling.report",
        "write_report": "hpctrain.scaling.report",
    },
)
