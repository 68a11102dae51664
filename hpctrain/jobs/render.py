"""From a template to a job script: the values of its directives and settings are replaced, and nothing else.

A template is a job script that works as it stands. Its directives are lines `#SBATCH --key=value` or `#PBS -l
key=value`; those that need a value of the user's begin with two `#`. Its settings are lines `NAME=${NAME-value}`
between two marks. So `diff` of template and job script shows values only.
"""

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hpctrain.errors import UserError

_SETTINGS_BEGIN = "# ---- settings"
_SETTINGS_END = "# ---- end of settings"
_SETTING = re.compile(r"([A-Z][A-Z_]*)=\$\{\1-.*\}")
_FURTHER = "# Further options of your site"
_DIRECTIVE = {
    "slurm": re.compile(r"##?SBATCH (--[a-z-]+)(?:=(.*))?"),
    "pbs": re.compile(r"##?PBS (-l [a-z]+|-[A-Za-z])(?:[= ](.*))?"),
}
_MARK = {"slurm": "#SBATCH", "pbs": "#PBS"}
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
_FOLDER = re.compile(rf"(?:[A-Za-z0-9._/-]|\${_VARIABLE}|\$\{{{_VARIABLE}(?::-[A-Za-z0-9._/-]*)?\}})*")
_NO_LINE = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")

# What may stand in a directive, where there is no quoting to rely on.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
PBS_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:+,-]*")
WALLTIME = re.compile(r"([0-9]{1,4}):([0-5][0-9]):([0-5][0-9])")
_PATH = re.compile(r"[^\x00-\x1f\x7f\x85\u2028\u2029\"'\\%`$]+")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9._/+=@^-]+")


@dataclass(frozen=True)
class Expanded:
    """A setting's value in which the shell replaces $VARIABLES: a folder that only the node knows, such as $TMPDIR."""

    text: str

    def __post_init__(self) -> None:
        if not _FOLDER.fullmatch(self.text):
            raise UserError(f"{self.text!r} is no folder of plain characters and variables such as $TMPDIR/data")


def render(
    template: str,
    scheduler: str,
    directives: Mapping[str, str | None],
    further: Iterable[str],
    settings: Mapping[str, str | Expanded],
) -> str:
    """Return the job script of a template.

    `directives` maps an option as the template writes it (`--nodes`, `-l walltime`) to its value; None leaves the
    template's line alone. `further` are a site's own options without the mark (`-C knl`, `-l filesystems=home`): one
    that the template has too takes its line, unless `directives` gives it a value, and the others are added. `settings`
    maps names of settings to their values, which are quoted for the shell here.

    Raises UserError for a value that is no single line, and ValueError for a directive or setting the template lacks.
    """
    pattern, mark = _DIRECTIVE[scheduler], _MARK[scheduler]
    lines = template.split("\n")
    begin = next(i for i, line in enumerate(lines) if line.startswith(_SETTINGS_BEGIN))
    end = next(i for i, line in enumerate(lines) if line.startswith(_SETTINGS_END))
    values = {key: value for key, value in directives.items() if value is not None}
    wanted = {key: _directive(mark, key, one_line(value, f"the value of {key}")) for key, value in values.items()}
    has = {match[1] for match in map(pattern.fullmatch, lines[:begin]) if match}
    added = []
    for option in further:
        line = f"{mark} {one_line(option, 'a directive of the site')}"
        match = pattern.fullmatch(line)
        if match is None or match[1] not in has | wanted.keys():
            added.append(line)
        else:
            wanted.setdefault(match[1], line)
    unused = set(wanted) | set(settings)
    result: list[str] = []
    for i, line in enumerate(lines):
        directive = pattern.fullmatch(line) if i < begin else None
        setting = _SETTING.fullmatch(line) if begin < i < end else None
        if directive and directive[1] in wanted:
            unused.discard(directive[1])
            line = wanted[directive[1]]
        elif setting and setting[1] in settings:
            unused.discard(setting[1])
            line = _assignment(setting[1], settings[setting[1]])
        result.append(line)
        if i < begin and line.startswith(_FURTHER):
            result.extend(added)
    if unused:
        raise ValueError(f"the template has no place for {', '.join(sorted(unused))}")
    return "\n".join(result)


def setting_names(template: str) -> list[str]:
    """Return the names of a template's settings, in order."""
    return [match[1] for match in map(_SETTING.fullmatch, template.split("\n")) if match]


def lines_value(values: Iterable[str], what: str) -> str:
    """Return the value of a setting that holds one item a line; `what` names an item in the error for two lines."""
    items = [one_line(value, what) for value in values]
    return "".join(["\n", *(f"  {item}\n" for item in items)]) if items else ""


def one_line(value: str, what: str) -> str:
    """Return `value`, or raise UserError if it holds a line break or another control character."""
    if _NO_LINE.search(value):
        raise UserError(f"{what} is {value!r}; expected one line without control characters")
    return value


def checked(pattern: re.Pattern[str], value: str, what: str, expected: str) -> str:
    """Return `value` if all of it matches, else raise UserError with what was expected."""
    if not pattern.fullmatch(value):
        raise UserError(f"{what} is {value!r}; expected {expected}")
    return value


def walltime_seconds(text: str) -> int:
    """Return the seconds of HH:MM:SS, or raise UserError."""
    match = WALLTIME.fullmatch(text)
    if match is None or not (seconds := int(match[1]) * 3600 + int(match[2]) * 60 + int(match[3])):
        raise UserError(f"the walltime is {text!r}; expected HH:MM:SS, such as 02:30:00")
    return seconds


def output_path(path: str, scheduler: str) -> str | None:
    """Return a path as a directive takes it, or None where PBS cannot be told of it (a space, a colon).

    Raises UserError for characters no directive can hold.
    """
    plain = re.sub("%[jAa]", "", path)
    if _PLAIN_PATH.fullmatch(plain):
        return path
    if scheduler == "pbs":
        return None
    if not _PATH.fullmatch(plain):
        raise UserError(f"the path {path!r} holds a quote, %, $ or another special character; give another --run-dir")
    return f'"{path}"'


def _directive(mark: str, key: str, value: str) -> str:
    return f"{mark} {key}{'=' if key.startswith(('--', '-l ')) else ' '}{value}"


def _assignment(name: str, value: str | Expanded) -> str:
    if isinstance(value, Expanded):
        return f'{name}=${{{name}-"{value.text}"}}'
    if "\0" in value:
        raise UserError(f"the value of {name} holds a zero byte; remove it")
    return f"{name}=${{{name}-{shlex.quote(value) if value else ''}}}"
