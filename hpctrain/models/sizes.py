"""What the models weigh, as plain numbers, for planning without TensorFlow. A test compares them with the models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSize:
    """Trainable parameters with 1,000 classes, and multiply-adds of one image's forward pass at the usual size."""

    parameters: int
    multiply_adds: int


SIZES = {
    "alexnet": ModelSize(60_965_224, 724_406_816),
    "alexnet_bn": ModelSize(60_966_600, 724_406_816),
    "resnet18": ModelSize(11_689_512, 1_814_073_344),
    "resnet34": ModelSize(21_797_672, 3_663_761_408),
    "resnet50": ModelSize(25_557_032, 3_857_973_248),
    "resnet101": ModelSize(44_549_160, 7_570_194_432),
    "resnet152": ModelSize(60_192_808, 11_282_415_616),
    "resnet50_v15": ModelSize(25_557_032, 4_089_184_256),
    "resnet101_v15": ModelSize(44_549_160, 7_801_405_440),
    "resnet152_v15": ModelSize(60_192_808, 11_513_626_624),
}
