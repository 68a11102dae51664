"""Errors that are the user's to mend, and the help that goes into their one sentence."""

import difflib
import os
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: a key, a path, a size, a name.

    The message is one plain sentence that names the thing, says what was expected and what would cure it.
    The command line prints it without a traceback and exits with code 2.
    """


def cannot_start(launcher: str, error: OSError) -> UserError:
    """Return what to say where the program that starts the ranks cannot be started."""
    return UserError(
        f"{launcher}, which is to start the ranks, cannot be started ({error.strerror}); "
        "load the module that brings it, or name another launcher"
    )


def not_permitted(error: PermissionError) -> str:
    """Return what to say where a file or folder may not be used; it is named in `error.filename`."""
    return f"cannot use {os.fsdecode(error.filename)}: {error.strerror}; change its permissions or choose another one"


def nearest(name: str, choices: Iterable[str], limit: int = 3) -> str:
    """Return the end of an error sentence that lists the valid names nearest to `name`.

    Falls back to all the choices, sorted, when nothing is similar: an error should teach what is valid.
    """
    names = sorted(choices)
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "valid: " + ", ".join(names)
