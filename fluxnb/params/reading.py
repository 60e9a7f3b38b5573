"""Reads a params file and checks each value: a mistake is one sentence that says what is wrong and what is allowed."""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from pathlib import Path

import yaml

from fluxnb.errors import UserError
from fluxnb.params.schema import SCHEMA, Key

THOROUGH = "thorough"  # the section of a file that holds sections again, laid over the others by THOROUGH=1
_OVER = {name: keys for name, keys in SCHEMA.items() if name != "gpu"}  # which says what the machine is
RANDOM = "random"  # the same for a model of random weights that is asked for (MODEL=…), which shows time only
FILE = {**SCHEMA, THOROUGH: _OVER, RANDOM: _OVER}
_UNWRITABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
MOST_BYTES, MOST_VALUES, MOST_DEPTH = 4_000_000, 50_000, 50  # of a file, far more than any needs


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # of C: ten times as fast
    """PyYAML keeps the last of two equal keys without a word; this loader refuses them."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            name = key_node.value
            if isinstance(name, str) and name in seen:
                raise _error(f"the key {plain(name)} stands there twice", key_node)
            seen.add(name if isinstance(name, str) else None)
        return super().construct_mapping(node, deep)

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception:  # an impossible date, what isn't of the tag that it has: PyYAML raises anything
            raise _error(f"{shown(node.value)} is no {plain(node.tag).rpartition(':')[2]}", node) from None


def _error(problem: str, node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def read(file: Path) -> dict:
    """The sections of a YAML file, unchecked. Raises UserError if it is none."""
    try:
        if file.is_fifo() or file.is_socket() or file.is_char_device():  # reading would wait for ever
            raise UserError(f"{file_name(file)} cannot be read: it is no file; put one in its place.")
        if (size := file.stat().st_size) > MOST_BYTES:
            raise UserError(
                f"{file_name(file)} has {size / 1e6:.0f} MB: parameters have {MOST_BYTES / 1e6:.0f} MB at most."
            )
        text = file.read_text(encoding="utf-8")
        _check_size(text)
        loader = _Loader(text)
        if node := loader.get_single_node():
            _written_out(node, {})
        values = loader.construct_document(node) if node else None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{file_name(file)} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{file_name(file)} is not UTF-8 text: save it as UTF-8.") from None
    except Exception as error:  # noqa: BLE001  whatever a file makes PyYAML raise
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or (error if isinstance(error, yaml.YAMLError) else "a tag doesn't fit")
        what = plain(" ".join(str(what).split()), 200)
        raise UserError(f"{file_name(file)}{line} is not valid YAML: {what}; correct that line.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{file_name(file)} holds {shown(values)} where sections are allowed: {', '.join(FILE)}.")
    return values


def _check_size(text: str) -> None:
    """Raises YAMLError for what would take long, or nests so deeply that PyYAML's C code would run out of stack."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, _Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH or number > MOST_VALUES:
            many = (
                f"nested more than {MOST_DEPTH} deep" if depth > MOST_DEPTH else f"of more than {MOST_VALUES:,} values"
            )
            raise _error(f"it is {many}", event)


def _written_out(node: yaml.Node, sizes: dict[int, float]) -> float:
    """How many values a node has, each alias of it counted. Raises YAMLError for one that no file needs."""
    if (known := sizes.get(id(node))) is not None:
        if known == math.inf:
            raise _error("a value holds itself", node)
        return known
    sizes[id(node)] = math.inf  # until all that is in it has been seen
    below = [] if isinstance(node, yaml.ScalarNode) else node.value
    count = 1 + sum(_written_out(n, sizes) for each in below for n in (each if isinstance(each, tuple) else (each,)))
    if count > MOST_VALUES:
        raise _error(f"it is of more than {MOST_VALUES:,} values, aliases counted", node)
    sizes[id(node)] = count
    return count


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
            raise UserError(f"{source}: {path}{name} is {shown(value)}; allowed is a section with {', '.join(key)}.")
    return found


def _unknown(name, schema: dict, path: str) -> str:
    name = plain(name)
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
        raise UserError(f"{where} is {shown(value)}; allowed is {key.allowed}.")
    items = [_checked_item(v, key, f"{where}[{i}]") for i, v in enumerate(value)]
    seen = set()
    for i, item in enumerate(items):
        if item in seen:
            raise UserError(f"{where}[{i}] repeats {shown(item)}; allowed is {key.allowed}.")
        seen.add(item)
    return items


def _checked_item(value, key: Key, where: str):
    right_type = {
        bool: isinstance(value, bool),
        str: isinstance(value, str) and bool(value.strip()) and not _UNWRITABLE.search(value),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max,
    }[key.item]
    in_range = right_type and (
        (not key.choices or value in key.choices)
        and (key.low is None or value >= key.low)
        and (key.high is None or value <= key.high)
        and (not key.multiple_of or value % key.multiple_of == 0)
    )
    if not in_range:
        raise UserError(f"{where} is {shown(value)}; allowed is {key.allowed}{_yaml_trap(value, key)}.")
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
    if key.item is str and isinstance(value, str) and _UNWRITABLE.search(value):
        return " (it has a character that no text can hold)"
    if isinstance(value, bool) and key.item is str:
        return " (YAML reads on, off, yes and no as true or false: put quotes around it)"
    if isinstance(value, int | float | dict) and key.item is str:
        return " (put quotes around it to make it text)"
    return did_you_mean(value, key.choices) if isinstance(value, str) else ""


def lacking(short, full) -> str:
    """What one value of a parameter has less than another, in words: "without a, b", "3 instead of 10"."""
    if isinstance(short, list) and isinstance(full, list) and set(short) <= set(full):
        return f"without {', '.join(str(item) for item in full if item not in set(short))}"
    said = [", ".join(map(str, v)) if isinstance(v, list) else v for v in (short, full)]
    said = [{True: "yes", False: "no", None: "none"}[v] if v is None or isinstance(v, bool) else v for v in said]
    return f"{said[0]} instead of {said[1]}"


def did_you_mean(name, known) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or nothing."""
    close = difflib.get_close_matches(plain(name).lower(), [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value) -> str:
    """A value as short text; text in quotes, null and true as YAML writes them."""
    try:
        text = json.dumps(value[:80] if isinstance(value, str | list) else value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):  # a number of thousands of digits, a key that is a date
        text = (
            "a number that is too long to show"
            if isinstance(value, int)
            else f"a {type(value).__name__} that is too long to show"
        )
    return plain(text)


def plain(text, most: int = 80) -> str:
    """A text as part of a sentence: one line, not too long, of characters that any file or terminal takes."""
    try:
        text = re.sub(rf"{_UNWRITABLE.pattern}|\s", lambda found: repr(found[0])[1:-1], str(text))
    except ValueError:  # a number of thousands of digits
        text = "a number that is too long to show"
    return text if len(text) <= most else text[: most - 3] + "..."


def file_name(file: Path) -> str:
    """A file as messages name it: with its folder."""
    return f"{file.parent.name}/{file.name}"
