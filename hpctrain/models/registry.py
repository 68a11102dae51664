"""Models by name: the project's own, and `package.module:function` for a user's.

Importing this module imports neither Keras nor TensorFlow, so the names can be listed and checked cheaply.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpctrain.errors import UserError, nearest

if TYPE_CHECKING:
    import keras

_ALEXNET = "hpctrain.models.alexnet"
_RESNET = "hpctrain.models.resnet"

# name -> (module, function, the arguments that make it this model). What else a function takes as keyword-only
# parameters are the options of `build`.
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "alexnet": (_ALEXNET, "alexnet", {}),
    "alexnet_bn": (_ALEXNET, "alexnet_bn", {}),
    **{f"resnet{depth}": (_RESNET, "cifar_resnet", {"depth": depth}) for depth in (20, 56)},
    **{
        f"resnet{depth}": (_RESNET, "resnet", {"depth": depth, "stride_in_3x3": False})
        for depth in (18, 34, 50, 101, 152)
    },
    **{f"resnet{depth}_v15": (_RESNET, "resnet", {"depth": depth, "stride_in_3x3": True}) for depth in (50, 101, 152)},
}


def names() -> list[str]:
    """Return the names of the project's own models, sorted."""
    return sorted(_MODELS)


def check_name(name: str) -> None:
    """Raise UserError if no model of the project has this name and it is not `package.module:function`."""
    if ":" not in name and name not in _MODELS:
        raise UserError(
            f"there is no model named {name!r} (one of your own is given as package.module:function); "
            f"{nearest(name, _MODELS)}"
        )


def build(name: str, num_classes: int = 1000, image_size: int = 224, *, seed: int = 0, **options: Any) -> keras.Model:
    """Build a model: (N, image_size, image_size, 3) float32 normalized images to (N, num_classes) logits.

    `name` is one of `names()`, or `package.module:function` of the user's, which is called as
    `function(num_classes=..., image_size=..., **options)` and returns a `keras.Model`.

    The initial weights of the project's models are a pure function of the name, the options and `seed`. A user's
    function gets `seed` if it has a parameter of that name; if not, Keras's global seed
    (and Python's and NumPy's) is set before it is called.

    Convolutions follow the global Keras dtype policy; the project's models give float32 logits under any.

    Raises UserError for an unknown name or option, a value out of range, an image too small for the network, or a
    function that cannot be imported, does not take the arguments, or does not return a fitting `keras.Model`.
    """
    for key, value in (("num_classes", num_classes), ("image_size", image_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"model.{key} must be a positive whole number, not {value!r}.")
    if ":" in name:
        return _build_users(name, num_classes, image_size, seed, options)
    check_name(name)
    module, function_name, fixed = _MODELS[name]
    function = getattr(importlib.import_module(module), function_name)
    _check_options(name, function, options)
    return function(**fixed, num_classes=num_classes, image_size=image_size, seed=seed, **options)


_FRACTION = "a number from 0 up to but not including 1"
# option -> (what it must be, in words; whether a value is). Every option of the project's own models is here.
_OPTION_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "zero_init_residual": ("true or false", lambda value: isinstance(value, bool)),
    "dropout": (_FRACTION, lambda value: _is_number(value) and 0 <= value < 1),
    "batch_norm_momentum": (_FRACTION, lambda value: _is_number(value) and 0 <= value < 1),
    "batch_norm_epsilon": ("a number greater than 0", lambda value: _is_number(value) and value > 0),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_options(name: str, function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raise UserError if an option is not a keyword-only parameter of `function`, or its value is out of range."""
    parameters = inspect.signature(function).parameters.values()
    valid = sorted(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "seed")
    for option, value in sorted(options.items()):
        if option not in valid:
            raise UserError(f"The model {name} has no option {option!r}; it takes: {', '.join(valid)}.")
        expected, is_valid = _OPTION_CHECKS[option]
        if not is_valid(value):
            raise UserError(f"The option {option} of the model {name} must be {expected}, not {value!r}.")


def _build_users(name: str, num_classes: int, image_size: int, seed: int, options: dict[str, Any]) -> keras.Model:
    """Import and call a user's `package.module:function`, and check what it gives back."""
    import keras
    import numpy as np

    function = _import_function(name)
    arguments = {"num_classes": num_classes, "image_size": image_size, **options}
    signature = inspect.signature(function)
    if "seed" in signature.parameters:
        arguments["seed"] = seed
    else:
        keras.utils.set_random_seed(seed)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        given = ", ".join(arguments)
        raise UserError(
            f"The model {name} cannot be called with {given}: {error}; its parameters are {signature}."
        ) from error
    model = function(**arguments)
    if not isinstance(model, keras.Model):
        raise UserError(f"The model {name} returned a {type(model).__name__}, but must return a keras.Model.")
    images = np.zeros((1, image_size, image_size, 3), np.float32)
    try:
        logits = model(images, training=False)  # also builds a subclassed model
    except Exception as error:
        raise UserError(
            f"The model {name} fails on a batch of shape {images.shape}: {type(error).__name__}: {error}"
        ) from error
    shape = getattr(logits, "shape", None)
    if shape is None or tuple(shape) != (1, num_classes):
        raise UserError(
            f"The model {name} maps a batch of shape {images.shape} to {shape or type(logits).__name__}, "
            f"but must map it to {(1, num_classes)}: one logit for each class."
        )
    return model


def _import_function(name: str) -> Callable[..., Any]:
    """Return what `package.module:function` names, or raise a UserError that says which part of it fails."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"{name!r} is not a model; write package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(missing + "."):
            raise UserError(
                f"The module {module_name} of the model {name} imports {missing!r}, which is not installed."
            ) from error
        raise UserError(
            f"The module {module_name} of the model {name} was not found; put the folder it is in on PYTHONPATH."
        ) from error
    except Exception as error:
        raise UserError(
            f"The module {module_name} of the model {name} fails when imported: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, function_name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"The module {module_name} has no {function_name!r}; {nearest(function_name, functions)}")
    function = getattr(module, function_name)
    if not callable(function):
        raise UserError(
            f"The model {name} is a {type(function).__name__}, but must be a function that returns a keras.Model."
        )
    return function
