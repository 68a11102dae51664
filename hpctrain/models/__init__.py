"""AlexNet, AlexNet-BN and the ResNet family, and a registry by name. Knows nothing of MPI or Horovod."""

from hpctrain._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "build": "hpctrain.models.registry",
        "describe": "hpctrain.models.flops",
        "names": "hpctrain.models.registry",
    },
)
