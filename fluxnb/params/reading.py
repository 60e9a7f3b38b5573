"""Reads a params file and checks each value: a mistake is one sentence that says what is wrong and what is allowed."""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path

import yaml

from fluxnb.errors import UserError
from fluxnb.params.schema import SCHEMA, Key

THOROUGH = "thorough"  # the section of a file that holds sections again, laid over the others by THOROUGH=1
_OVER = {name: keys for name, keys in SCHEMA.items() if name != "gpu"}  # which says what the machine is
FILE = {**SCHEMA, THOROUGH: _OVER}


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this loader refuses them."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            name = key_node.value
            if isinstance(name, str) and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name} stands there twice", key_node.start_mark
                )
            seen.add(name if isinstance(name, str) else None)
        return super().construct_mapping(node, deep)


def read(file: Path) -> dict:
    """The sections of a YAML file, unchecked. Raises UserError if it is none."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise UserError(f"{file_name(file)} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{file_name(file)} is not UTF-8 text: save it as UTF-8.") from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: an impossible date, for instance
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{file_name(file)}{line} is not valid YAML: {what}; correct that line.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{file_name(file)} holds {_shown(values)} where sections are allowed: {', '.join(FILE)}.")
    return values


def checked(values: dict, schema: dict, source: str, path: str = "") -> dict:
    """`values` with every key known and every value of its type and in range; numbers become int or float.

    Raises UserError that begins with `source`, where they are from.
    """
    found = {}
    for name, value in values.items():
        if name not in schema:
            raise UserError(f"{source}: {_unknown(name, schema, path)}")
        key = schema[name]
        if not isinstance(key, dict):
            found[name] = _checked_value(value, key, f"{source}: {path}{name}")
        elif isinstance(value, dict) or value is None:  # a section whose lines are all commented out is None
            found[name] = checked(value or {}, key, source, f"{path}{name}.")
        else:
            raise UserError(f"{source}: {path}{name} is {_shown(value)}; allowed is a section with {', '.join(key)}.")
    return found


def _unknown(name, schema: dict, path: str) -> str:
    what = f"{path}{name} is not a known {'section' if schema in (FILE, _OVER) else 'key'}"
    for section, keys in SCHEMA.items():
        if schema is not keys and name in keys:
            return f"{what}; it belongs into the section {section}."
    return f"{what}{did_you_mean(name, schema)}; allowed here: {', '.join(schema)}."


def _checked_value(value, key: Key, where: str):
    if value is None and key.optional:
        return None
    if not key.many:
        return _checked_item(value, key, where)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is {_shown(value)}; allowed is {key.allowed}.")
    items = [_checked_item(v, key, f"{where}[{i}]") for i, v in enumerate(value)]
    for i, item in enumerate(items):
        if item in items[:i]:
            raise UserError(f"{where}[{i}] repeats {_shown(item)}; allowed is {key.allowed}.")
    return items


def _checked_item(value, key: Key, where: str):
    right_type = {
        bool: isinstance(value, bool),
        str: isinstance(value, str) and bool(value.strip()),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf,
    }[key.item]
    in_range = right_type and (
        (not key.choices or value in key.choices)
        and (key.low is None or value >= key.low)
        and (key.high is None or value <= key.high)
        and (not key.multiple_of or value % key.multiple_of == 0)
    )
    if not in_range:
        raise UserError(f"{where} is {_shown(value)}; allowed is {key.allowed}{_yaml_trap(value, key)}.")
    return float(value) if key.item is float else value


def _yaml_trap(value, key: Key) -> str:
    """Why a value that looks right in the file arrived as something else, or nothing."""
    if isinstance(value, str) and key.item in (int, float):
        try:
            number = float(value)
        except ValueError:
            return did_you_mean(value, key.choices)
        if "e" in value.lower() and math.isfinite(number):
            mantissa, exponent = value.lower().split("e")
            return f" (YAML reads {value} as text: write {float(mantissa)}e{int(exponent):+d})"
        return " (it is text: take the quotes away)"
    if isinstance(value, bool) and key.item is str:
        return " (YAML reads on, off, yes and no as true or false: put quotes around it)"
    if isinstance(value, int | float | dict) and key.item is str:
        return " (put quotes around it to make it text)"
    return did_you_mean(value, key.choices) if isinstance(value, str) else ""


def lacking(short, full) -> str:
    """What one value of a parameter has less than another, in words: "without a, b", "3 instead of 10"."""
    if isinstance(short, list) and isinstance(full, list) and all(item in full for item in short):
        return f"without {', '.join(str(item) for item in full if item not in short)}"
    said = [", ".join(map(str, v)) if isinstance(v, list) else v for v in (short, full)]
    said = [{True: "yes", False: "no", None: "none"}[v] if v is None or isinstance(v, bool) else v for v in said]
    return f"{said[0]} instead of {said[1]}"


def did_you_mean(name, known) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or nothing."""
    close = difflib.get_close_matches(str(name).lower(), [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _shown(value) -> str:
    """A value as short text; text in quotes, null and true as YAML writes them."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError):  # a list that holds itself, a key that is a date
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def file_name(file: Path) -> str:
    """A file as messages name it: with its folder."""
    return f"{file.parent.name}/{file.name}"
