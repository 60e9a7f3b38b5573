"""Takes secrets out of what is written or printed: tokens of the environment, of the hub's files, and the like.

Every writer of the project calls `scrub`, so a token that an error's message holds ends in no row, page, notebook, log
or terminal. Imports the standard library only.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

SHORTEST = 8  # characters; what is shorter may be any word
LOOK_EVERY_S = 10.0  # for new tokens in the hub's files
_NAMES = re.compile(
    r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|COOKIE|BEARER|_PAT|_PWD|_AUTH|PASS)(_ID|_\d+)?$",
    re.I,
)
# Of the hub's, git's and package hosts', and of others that wrap models
_TOKEN = re.compile(
    r"\b(?:(?:hf|api_org|gh[opsu])_[A-Za-z0-9]{16,}|(?:github_pat_|glpat-|pypi-|nvapi-|xox[abp]-|sk-(?:proj|ant)-)[\w-]{16,}|"
    r"sk-[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}\b|eyJ[\w-]{10,}\.eyJ[\w-]{10,}(?:\.[\w-]+)?)"
)
_HEADER = re.compile(
    r"(?i)(\bbearer\s+|\bauthorization[\"']?\s*[:=]\s*[\"']?(?:basic|token)\s+|"
    r"\b(?:x-[\w-]*(?:key|token)|private-token|(?:set-)?cookie)[\"']?\s*[:=]\s*[\"']?(?:[\w-]+=)?)[\w.~+/=%-]{8,}"
)
_HEADERS = ("earer", "uthorization", "BEARER", "AUTHORIZATION", "ookie", "COOKIE", "oken", "TOKEN", "x-", "X-")
# a signed address, such as the hub's files have; and what is handed on in one
_SIGNED = re.compile(
    r"(?i)([?&;][\w-]*(?:token|signature|secret|password|credential|api_?key|\bsig)[\w-]*=)[^\s&\"'<>;]{8,}"
)
# the secret of `user:secret@` in an address, or a long one alone; and of an address that is quoted in another
_ADDRESS = re.compile(r"(://)(?:[^\s/@:'\"<>]*:[^\s/@'\"<>]+|[^\s/@:'\"<>]{16,})(@)")
_QUOTED = re.compile(r"(?i)(%3a%2f%2f)(?:[^\s/@:'\"<>%&]*%3a[^\s/@'\"<>]+?|[^\s/@:'\"<>%&]{16,})(%40)")
# What may come between two characters of one: colours of a terminal, the end of an attribute or of a line; tags.
_INSIDE = r"(?:(?:\x1b|\\u001b|\\x1b)\[[0-9;?]*[A-Za-z]|\"\s+[\w:-]+=\"|\u200b|\xad|\\?\r?\n\s*)"
_BETWEEN = rf"(?:{_INSIDE}|<[^<>]{{0,300}}>)"


def scrub(text: str) -> str:
    """The text with every secret named instead: "[HF_TOKEN]" for the value of that variable."""
    if secrets := _secrets():
        for name, value in secrets.items():
            for form in _forms(value):
                text = text.replace(form, f"[{name}]")
        bare = [_bare(text, between) for between in (_BETWEEN, _INSIDE)]
        for name, value in secrets.items():
            if any(_bare(value, between) in found for between, found in zip((_BETWEEN, _INSIDE), bare, strict=True)):
                text = _scattered(value).sub(f"[{name}]", text)
    text = _SIGNED.sub(r"\1[removed]", _TOKEN.sub("[token removed]", text))
    if any(word in text for word in _HEADERS):
        text = _HEADER.sub(r"\1[removed]", text)
    if "%40" in text:
        text = _QUOTED.sub(r"\1[removed]\2", text)
    return _ADDRESS.sub(r"\1[removed]\2", text) if "@" in text else text


def scrubbed(value):
    """Plain values with every text in them scrubbed."""
    if isinstance(value, str):
        return scrub(value)
    text = json.dumps(value, default=str, ensure_ascii=False, skipkeys=True)
    if scrub(text) == text:  # as nearly always: looked through once
        return value
    if isinstance(value, dict):
        return {scrub(name) if isinstance(name, str) else name: scrubbed(part) for name, part in value.items()}
    return [scrubbed(part) for part in value] if isinstance(value, list | tuple) else value


def scrub_file(path: Path) -> None:
    """Scrubs a file that something else has written, such as a log; one without secrets is left alone."""
    with contextlib.suppress(OSError):
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        if (clean := scrub(text)) != text:
            beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            beside.write_bytes(clean.encode("utf-8", "surrogateescape"))
            os.replace(beside, path)


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """What is printed meanwhile is scrubbed."""
    with contextlib.redirect_stdout(_Stream(sys.stdout)), contextlib.redirect_stderr(_Stream(sys.stderr)):
        yield


def excepthook(*error) -> None:
    """Prints what nobody has caught; sys.excepthook."""
    sys.stderr.write(scrub("".join(traceback.format_exception(*error))))


class _Stream:
    """A text stream that scrubs what is written to it."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        """As a stream does; a text is written with one call."""
        self._stream.write(scrub(text))
        return len(text)

    def writelines(self, lines) -> None:
        """As a stream does."""
        self.write("".join(lines))

    def __getattr__(self, name):
        return getattr(self._stream, name)


def _secrets() -> dict[str, str]:
    """Secret -> its value, the longest first: one may be a part of another."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        if _NAMES.search(name):
            found[name] = value.strip()
        elif "@" in value and (inside := re.search(r"://(?:[^\s/@:]*:([^\s/@]+)|[^\s/@:]{16,})@", value)):
            found[name] = unquote(inside[1] or inside[0][3:-1])
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    files = [os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token"), "~/.huggingface/token"]
    files += [os.environ.get("HF_STORED_TOKENS_PATH") or os.path.join(home, "stored_tokens")]
    found |= _of_files(tuple(files), int(time.monotonic() / LOOK_EVERY_S))
    kept = {name: value for name, value in found.items() if len(value) >= SHORTEST}
    return dict(sorted(kept.items(), key=lambda item: len(item[1]), reverse=True))


@functools.lru_cache(maxsize=4)
def _of_files(files: tuple[str, ...], _) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in files:
        with contextlib.suppress(OSError, UnicodeDecodeError, RuntimeError):
            for line in Path(file).expanduser().read_text(encoding="utf-8").splitlines():
                if not line.startswith("["):
                    found[f"token {len(found) + 1} of the hub"] = line.rpartition("=")[2].strip()
    return found


@functools.lru_cache
def _forms(value: str) -> list[str]:
    """How a value may be written as a whole."""
    quoted = [value, quote(value, safe=""), quote(value), quote(quote(value, safe=""), safe="")]
    quoted += [
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        html.escape(value),
        repr(value)[1:-1],
    ]
    data = value.encode("utf-8", "surrogateescape")
    for before in range(3):  # bytes before it in the same group of three: those of "user:", say
        whole = base64.b64encode(bytes(before) + data).decode().rstrip("=")
        inside = whole[before and before + 1 : len(whole) - bool((before + len(data)) % 3)]
        quoted += [inside, inside.replace("+", "-").replace("/", "_")]
    quoted += [data.hex(), data.hex().upper()]
    return sorted(dict.fromkeys(quoted), key=len, reverse=True)


@functools.lru_cache
def _scattered(value: str) -> re.Pattern:
    """Finds a value whose characters are escaped one by one or have something between them."""

    def character(c: str) -> str:
        point, percent = ord(c), "".join(f"%(?:25)*{byte:02x}" for byte in c.encode("utf-8", "surrogateescape"))
        forms = [
            re.escape(c),
            f"\\\\+{re.escape(c)}",
            percent,
            f"&(?:amp;)*\\#0*{point};",
            f"&(?:amp;)*\\#x0*{point:x};",
        ]
        forms += [f"\\\\+u{point:04x}", f"\\\\+x{point:02x}", re.escape(html.escape(c)).replace("\\&", "&(?:amp;)*")]
        # letters of the value itself differ by case; those of an escape don't
        return f"(?:{'|'.join(form if form == re.escape(c) else f'(?i:{form})' for form in dict.fromkeys(forms))})"

    return re.compile(f"{_BETWEEN}*".join(map(character, value)))


def _bare(text: str, between: str) -> str:
    """A text, or a value, without what may be between the characters of a value, and with none escaped."""
    text = re.sub(between, "", text)
    for _ in range(3 if "%" in text else 0):
        text = unquote(text)
    text = re.sub(r"\\+(?:u00|x)([0-9a-fA-F]{2})", lambda match: chr(int(match[1], 16)), text)
    for _ in range(3 if "&" in text else 0):
        text = html.unescape(text)
    return re.sub(between, "", text).replace("\\", "")
