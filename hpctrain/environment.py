"""Environment variables that may be written down: those that explain how a run went, without the secrets in them.

A run directory is read by colleagues, sent to a help desk, put beside a paper. What is a secret cannot be known, only
guessed at from its name and its form; so whoever calls this names the variables that matter, and no others are shown.
"""

import re
from collections.abc import Mapping

HIDDEN = "***"
_WORD = r"(?:token|key|secret|pass(?:word|wd|phrase)?|credentials?|auth(?:orization)?|cookie|signature)"
_SECRET_NAME = re.compile(_WORD, re.IGNORECASE)
_SECRETS = (
    # user:password@ of an address
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s?#]*@"), rf"\1{HIDDEN}@"),
    # Authorization: Bearer abc
    (re.compile(r"\b(bearer|basic)\s+[^\s,;]+", re.IGNORECASE), rf"\1 {HIDDEN}"),
    # password=abc, "api_key": "abc", ?X-Amz-Signature=abc, --token abc
    (re.compile(rf"([\w.-]*{_WORD}[\w.-]*[\"']?\s*[=:]\s*[\"']?)[^\s&;,\"']+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"(--?[\w-]*{_WORD}[\w-]*\s+)[^\s-]\S*", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"([?&]sig=)[^\s&]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    # what well-known services hand out
    (re.compile(r"\b(?:gh[a-z]_|github_pat_|glpat-|hf_|sk-|xox[a-z]-|AKIA|ASIA|AIza|eyJ)[\w.=-]{8,}"), HIDDEN),
    (re.compile(r"-----BEGIN [^-]*PRIVATE KEY-----.*", re.DOTALL), HIDDEN),
    # a long word of letters and digits, as no setting has one
    (re.compile(r"(?<![A-Za-z0-9])(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{32,}(?![A-Za-z0-9])"), HIDDEN),
)


def shown_environment(environ: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    """Return the variables that begin with one of `names`, sorted, their secrets replaced by ***.

    A variable whose own name speaks of a secret is left out.
    """
    return {
        name: without_secrets(value)
        for name, value in sorted(environ.items())
        if name.startswith(names) and not _SECRET_NAME.search(name)
    }


def without_secrets(text: str) -> str:
    """Return a text with *** for what looks like a password, a key or a token."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text
