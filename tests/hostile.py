# ruff: noqa: E501  lists of odd values
"""What breaks things: a model that misbehaves on request, and makers of damaged files and command lines."""

import json
import os
import random
import signal
import time
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Misbehaving:
    """A subject whose worker does what a prompt says, and else draws at once."""

    inputs: tuple = (("a red ball", 0), ("a blue cup", 1))

    def load(self):
        return self

    def batch(self, inputs, steps):
        for prompt, _ in inputs:
            if prompt == "raise":
                raise RuntimeError("as asked")
            if prompt == "unwritable":
                raise Unwritable
            if prompt == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if prompt == "exit":
                raise SystemExit(3)
            if prompt == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if prompt == "hang":
                time.sleep(3600)
            if prompt == "too few":
                return []
        time.sleep(0.002)
        return [Image.new("RGB", (8, 8), (seed % 256, 0, 0)) for _, seed in inputs]


class Unwritable(Exception):
    def __str__(self):
        raise ValueError("no words")


WRONG_REQUESTS = [
    ("x", "a", 1), ("x", 0, None), ("x", 0, 1, None), (None, 0, 1), ("", 0, 1), ("x", 0.5, 1), ("x", 0, 0), ("x", 0, 1, 0),
    ("x", 0, 10**9), ("x", 0, 1, 10**9), ("x" * 10**6, 0, 1), (b"x", 0, 1), ("x", True, 1), ("x", 0, 1, 1, float("nan")),
    ("x", 0, 1, 1, "now"), ([], 0, 1), ("x", 0, "2"),
]  # fmt: skip


# --- files ------------------------------------------------------------------------------------------------

_YAML = [
    "!!int '+'", "!!timestamp x", "!!bool ''", "!!map [a]", "!!seq {a: 1}", "!!float x", "!!binary x", "!!set [a]", "!!omap [a]",
    "!!pairs [a]", "!!null x", "!!python/object/apply:os.system [true]", "!x y", "!!str", "0x" + "f" * 5000, "1" + "0" * 400,
    "-1" + "0" * 5000, "[1" + "0" * 400 + "]", '"\\ud800"', '"\\0"', '"a\\nb"', "2026-13-45", "2026-01-01", ".nan", "[.inf]", "-.inf",
    "1e400", "1_0", "0o17", "0b101", "1:30", "~", "''", "[]", "{}", "[[1]]", "{a: 1}", "&a [*a]", "*nope", "<<: 3", "{<<: [1]}",
    "[" * 3000, "{a: " * 2000, "? [a]\n: 1", "yes", "on", "|\n  x", "> ", "%TAG", "@x", "`", "\t1", "'", '"', "- -", "é" * 500, "x" * 50_000,
    "[a, a]", "[1, 1.0]", "[true, 1]", "0", "-1", "1e9", "0.5", "embedded", "[embedded]", "../../x", "$(touch x)", "\u2028", "&a x",
]  # fmt: skip
_BOMBS = [
    "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefg", "bcdefgh", strict=True)),
    "a: &a {x: 1}\n" + "".join(f"{c}: &{c} {{<<: [{','.join(['*' + p] * 9)}]}}\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
]  # fmt: skip


def params_file(rng: random.Random, whole: str, keys: list[str]) -> bytes:
    """A damaged params file: odd values under known keys, or a whole file with bytes changed, cut or put in."""
    kind = rng.random()
    if kind < 0.02:
        return rng.choice(_BOMBS).encode()
    if kind < 0.65:
        lines, used = [], set()
        for path in rng.sample(keys, rng.randint(1, 3)):
            section, _, name = path.partition(".")
            if section not in used:
                used.add(section)
                inner = name if rng.random() < 0.9 else rng.choice(["x", "? 1", "''", "0x" + "e" * 4500])
                lines.append(f"{section}:\n  {inner}: {rng.choice(_YAML)}")
        if rng.random() < 0.2:
            lines.append(f"{rng.choice([k.partition('.')[0] for k in keys])}: {rng.choice(_YAML)}")
        return "\n".join(lines).encode("utf-8", "replace")
    return damaged(rng, whole.encode())


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes with some changed, cut out, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randint(1, 200)]
            case 2:
                data[at:at] = data[max(0, at - rng.randint(1, 300)) : at]
            case 3:
                data[at:at] = rng.choice(_TOKENS)
            case 4:
                data = data[:at] or data
            case 5:
                data = bytearray(rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\0"])) + data
    if rng.random() < 0.05:
        data = data.replace(b"\n", rng.choice([b"\r", b"\r\n", b"\n\n"]))
    return bytes(data)


_TOKENS = [
    b"NaN", b"Infinity", b"-Infinity", b"1e400", b"1" + b"0" * 400, b"[" * 900, b'""a"":', b"\\ud800", b",", b'"', b"\n", b"{", b"}",
    b"null", b"true", b"-1", b"1_0", b"<script>", b"\0", b"\x80", "٣".encode(), b": ", b"- ", b"#", b"&a ", b"*a", b"!!int ", b"\t",
]  # fmt: skip


def table(rng: random.Random, header: list[str], rows: list[dict]) -> bytes:
    """A damaged results.csv: hostile cells in a right one, or its bytes damaged."""
    import csv
    import io

    rows = [dict(row) for row in rng.sample(rows, min(len(rows), rng.randint(1, 4)))]
    for _ in range(rng.randint(0, 3)):
        rng.choice(rows)[rng.choice(header)] = rng.choice(_CELLS)
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode("utf-8", "replace")
    return damaged(rng, data) if rng.random() < 0.5 else data


_CELLS = [
    '{"a":NaN}', '{"a":1e400}', '{"a":-Infinity}', "{" * 900, '{"a":' + "[" * 900 + "]" * 900 + "}", "[1" + "0" * 400 + "]", "[1e400]",
    '{"a":' + "9" * 5000 + "}", "1" + "0" * 400, "1e308", "-1e308", "nan", "inf", "1_0", " 28 ", "٣", "0x10", "-0", "1.5", "", "null",
    "[]", "{}", "[null]", '["a"]', '{"":1}', '{"a":"\\ud800"}', '{"a":{"b":{"c":1}}}', "<script>alert(1)</script>", "=cmd()", "../../x",
    "ok", "oom", "error", "2026-11-20T12:00:00", "9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+00:00", "x" * 200_000, "a\u2028b",
    "\x1b[31m", "true", "999999999999999999", "-1", "0",
]  # fmt: skip

_VALUES = [
    None, True, 0, -1, 0.5, 1e308, float("nan"), float("inf"), 10**400, "", "x", "1" * 30, "\ud800", "\0", "../../x", "<script>",
    "0" * 28, "1" * 28, [], {}, [[]], {"": 1}, {"-1": 1}, {"27": None}, {"27": {"99": 1}}, "x" * 5000, [1e400], "٣", 10**18, -(10**18),
]  # fmt: skip
_JSON = [
    b"",
    b"[]",
    b"{}",
    b"null",
    b"3",
    b"[" * 100_000,
    b"\xff\xfe",
    b'{"a":' * 5000,
    b"1" * 6000,
    b"[[]]",
    b'"x"',
    b"\xef\xbb\xbf[]",
]


def json_file(rng: random.Random, whole) -> bytes:
    """A damaged JSON file: hostile values anywhere in a right one, parts taken out or put in, or its bytes damaged."""
    if rng.random() < 0.05:
        return rng.choice(_JSON)
    whole = json.loads(json.dumps(whole))
    for _ in range(rng.randint(1, 3)):
        place, key = None, None
        inner = whole
        while isinstance(inner, dict | list) and inner and (place is None or rng.random() < 0.85):
            place, key = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner = place[key]
        match place, rng.randrange(4):
            case None, _:
                whole = rng.choice(_VALUES)
            case _, 0:
                del place[key]
            case dict(), 1:
                place[rng.choice(["x", "", "-1", "99", "mask", "<b>", "__class__", "1e9", "\ud800"])] = rng.choice(
                    _VALUES
                )
            case _:
                place[key] = rng.choice(_VALUES)
    data = json.dumps(whole).encode()
    return damaged(rng, data) if rng.random() < 0.15 else data


# --- command lines ----------------------------------------------------------------------------------------

_COMMANDS = (
    "report render reference site analysis rows recipe techniques clean-caches fit-teacache export params nope "
).split(" ")
_OPTIONS = (
    "--gpu --model --size --tokens --steps --only --launch --goal --notebook --technique --prices --nope -h".split()
)
_WORDS = [
    "", " ", "0", "-1", "1e400", "nan", "9" * 5000, "٣", "\ud800", "; touch f", "$(touch f)", "`touch f`", "../../etc/passwd", "/dev/null",
    "/dev/zero", "h100", "h200=x", "h200=-1", "h200=nan", "h200=1e400", "h200=", "=", "a=b=c", "\n", "x" * 5000, "*", "--", "-", "%s",
    "{}", "[]", "1024x1024", "05", "embedded", "flux-dev-random", "black-forest-labs/FLUX.1-dev", "a/b/c", "near-lossless", "👍",
]  # fmt: skip


def command_line(rng: random.Random) -> list[str]:
    """One of fluxnb's, which never begins a run: what would is given something that it can't take."""
    command = rng.choice(_COMMANDS)
    words = [rng.choice(_OPTIONS + _WORDS) for _ in range(rng.randint(0, 4))]
    if command in ("report", "render", "reference", "site"):
        words += ["--gpu", rng.choice(["nope", "", "CPU", "../cpu", "h100 "])] if command != "site" else ["nope"]
    if command == "fit-teacache":
        words += ["--steps", rng.choice(["0", "-1", "1", "1" + "0" * 12, "x", "1e3"])]
    if command == "export":
        words = [w for w in words if w.startswith("-")][:1] + ["embedded", rng.choice(["/dev/null", "/proc/x", ""])]
    return [
        word.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") if word != "\ud800" else "?"
        for word in [command, *words]
    ]
