"""The table of measurements: one CSV file, one line per measurement, appended as soon as it is taken.

A row is keyed by everything that determines its figures (`KEY`), so a run that was killed finds what it had
finished and measures the rest. A line is written with one call under a lock and synced to the disk: it is
there whole, or it is the last line and unfinished; an unfinished line is moved to <name>.partial. Anything
else that does not fit is reported with its line number and left alone.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import numbers
import os
import re
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fluxnb.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock: one process at a time there
    fcntl = None

# Every column in the file's order, with the kind of its values. An empty cell is None.
COLUMNS: dict[str, str] = {
    "notebook": "text",
    "technique": "text",
    "settings": "json",
    "model": "text",
    "weights": "text",
    "use_case": "text",
    "gpu": "text",
    "gpus": "int",
    "width": "int",
    "height": "int",
    "steps": "int",
    "batch": "int",
    "users": "int",
    "images": "int",
    "status": "text",
    "reason": "text",
    "n": "int",
    **dict.fromkeys(
        "latency_min latency_p25 latency_p50 latency_p90 latency_p99 latency_avg load_s warmup_s first_s"
        " text_s denoise_s vae_s images_per_s memory_load_gib memory_avg_gib memory_peak_gib"
        " gpu_util_avg gpu_memory_avg_pct"
        " speedup speedup_ci_low speedup_ci_high computed_steps".split(),
        "float",
    ),
    "total_steps": "int",
    "psnr_db": "float",
    "psnr_min_db": "float",
    "psnr_identical": "int",
    "ssim": "float",
    "ssim_min": "float",
    "adherence": "float",
    "adherence_min": "float",
    "psnr_inside_db": "float",  # of the inpainting mask, against the baseline
    "psnr_outside_db": "float",
    "kept_db": "float",  # outside the mask, against the given image
    "kept_vae_db": "float",  # the same of the given image through the VAE alone: no pipeline keeps more
    "agreement": "float",  # with the ControlNet's condition
    "telemetry": "json",  # of the GPUs meanwhile: utilisation, memory, clocks, power, temperature, throttling
    "seed": "int",
    "samples": "json",
    "proof": "json",
    "machine": "text",
    "versions": "text",
    "measured_at": "time",
    "run_id": "text",
}
KEY = tuple(
    "notebook technique settings model weights use_case gpu gpus width height steps batch users images seed"
    " machine versions".split()
)
STATUSES = ("ok", "oom", "unavailable", "error")
FINISHED = ("ok", "oom", "unavailable")  # an "error" row is measured again
WEIGHTS = ("trained", "random")
_ALWAYS = ("notebook", "technique", "gpu", "machine", "versions")  # without these a key would find strangers
_HEADER = ",".join(COLUMNS)


class Results:
    """The measurements in the CSV file `path`; the file and its folder are made by the first append.

    Every method raises UserError when the file holds something else than measurements, and then has changed
    nothing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._rows: list[dict] = []
        self._finished: dict[tuple, dict] = {}
        self._errors: dict[tuple, dict] = {}
        self._seen = None  # the state of the file that _rows was read from

    def append(self, row: dict) -> None:
        """Writes one measurement and syncs it to the disk; missing columns are left empty.

        Numbers keep their full precision. An infinite PSNR is written as empty and needs `psnr_identical`.
        Raises ValueError for an unknown column or a value that its column can't hold.
        """
        cells = _cells(row)
        line = _line(cells.values())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._open(os.O_RDWR | os.O_APPEND | os.O_CREAT) as fd:
                self._refresh(fd)
                self._write(fd, line)
                self._add({name: _decoded(name, cell) for name, cell in cells.items()})
                self._seen = _state(fd)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}; make it writable or make room."
            ) from None

    def merge(self, other: str | Path) -> int:
        """Appends the rows of another table that this one lacks, such as another machine's; gives their number.

        A row is the same if every value is. Nothing is replaced: of two rows with one key the later one is found.
        """
        known = {json.dumps(row, sort_keys=True) for row in self.rows()}
        new = [row for row in Results(other).rows() if json.dumps(row, sort_keys=True) not in known]
        for row in new:
            self.append({name: value for name, value in row.items() if value is not None})
        return len(new)

    def find(self, key_columns: dict, errors: bool = False) -> dict | None:
        """The newest finished row (status ok, oom or unavailable) with this key; with `errors`, the newest error of a
        key that has no finished row; or None.

        `key_columns` gives values of `KEY`; what is left out counts as empty, as it does in `append`, so one
        dict serves for both. The row has every column: numbers, text, None; settings as dict, samples as
        list. Raises ValueError for a column that is not part of the key, or a missing notebook, technique,
        gpu, machine or versions.
        """
        strange = [name for name in key_columns if name not in KEY]
        if strange:
            raise ValueError(f"not part of the key: {', '.join(strange)}; the key is {', '.join(KEY)}")
        _check_always(key_columns)
        key = tuple(_encoded(name, key_columns.get(name)) for name in KEY)
        self._read()
        row = self._finished.get(key) or (self._errors.get(key) if errors else None)
        return _copy(row) if row else None

    def rows(self) -> list[dict]:
        """Every row of the file in its order, as `find` gives them, repeated measurements included."""
        self._read()
        return [_copy(row) for row in self._rows]

    def frame(self, **equals):
        """The newest row of every key as a pandas DataFrame with the columns of `COLUMNS`.

        A finished row is preferred to an error; a key that has only errors shows its last one. `equals` keeps
        the rows with these values (None: empty), such as frame(notebook="05_first_block_cache", status="ok").
        dtypes: Int64, float64, datetime64 (UTC), and text; settings and samples are JSON text, so that rows
        can be grouped by settings; `setting` reads one value out of it. Raises ValueError for an unknown
        column.
        """
        import pandas as pd

        _check_known(equals)
        wanted = {name: _encoded(name, value) for name, value in equals.items()}
        self._read()
        newest: dict[tuple, dict] = {}
        for row in self._rows:
            key = _key_of(row)
            if key not in newest or row["status"] in FINISHED or newest[key]["status"] not in FINISHED:
                newest.pop(key, None)  # a repeated row takes its place at the end, where it was measured
                newest[key] = row
        kept = [r for r in newest.values() if all(_encoded(n, r[n]) == cell for n, cell in wanted.items())]
        columns = {}
        for name, kind in COLUMNS.items():
            values = [row[name] for row in kept]
            if kind == "int":
                columns[name] = pd.array(values, dtype="Int64")
            elif kind == "float":
                columns[name] = pd.array([math.nan if v is None else v for v in values], dtype="float64")
            elif kind == "time":
                columns[name] = pd.to_datetime(pd.Series(values, dtype=object), utc=True, format="ISO8601").array
            elif kind == "json":
                columns[name] = pd.Series([_encoded(name, v) or None for v in values], dtype=object).array
            else:
                columns[name] = pd.Series(values, dtype=object).array
        return pd.DataFrame(columns)

    @contextmanager
    def _open(self, flags: int):
        """A locked file descriptor, so that neither a reader nor a second writer sees half a line."""
        fd = os.open(self.path, flags | getattr(os, "O_BINARY", 0), 0o644)
        try:
            if fcntl:
                with suppress(OSError):  # some network disks have no locks
                    fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)  # releases the lock

    def _write(self, fd: int, line: str) -> None:
        """One line, with the header when the file is new; after a failure the file is as long as before."""
        size = os.fstat(fd).st_size
        data = (line if size else f"{_HEADER}\n{line}").encode()
        try:
            if os.write(fd, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        except OSError:
            os.ftruncate(fd, size)
            raise

    def _read(self) -> None:
        try:
            try:
                with self._open(os.O_RDWR | os.O_APPEND) as fd:
                    self._refresh(fd)
            except FileNotFoundError:
                raise
            except OSError:  # a file that may only be read, such as a colleague's: an unfinished line stays there
                with self._open(os.O_RDONLY) as fd:
                    self._refresh(fd, repair=False)
        except FileNotFoundError:
            self._rows, self._finished, self._errors, self._seen = [], {}, {}, None
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}.") from None

    def _refresh(self, fd: int, repair: bool = True) -> None:
        """Reads the file again if it isn't what was read last, and moves an unfinished last line away."""
        if self._seen == _state(fd):
            return
        with open(fd, "rb", closefd=False) as file:
            file.seek(0)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        rows = self._parsed(data, whole)
        if whole < len(data) and repair:
            with open(self.path.with_name(self.path.name + ".partial"), "ab") as partial:
                partial.write(data[whole:] + b"\n")
                partial.flush()
                os.fsync(partial.fileno())
            os.ftruncate(fd, whole)
        if rows and repair and not data.startswith(_HEADER.encode()):
            self._upgrade(fd, data, rows)
        self._rows, self._finished, self._errors = [], {}, {}
        for row in rows:
            self._add(row)
        self._seen = _state(fd)

    def _upgrade(self, fd: int, data: bytes, rows: list[dict]) -> None:
        """Rewrites a table of an earlier version with today's columns; the old file is kept as <name>.older."""
        with open(self.path.with_name(self.path.name + ".older"), "wb") as older:
            older.write(data)
            older.flush()
            os.fsync(older.fileno())
        text = "".join([f"{_HEADER}\n", *(_line(_encoded(name, row[name]) for name in COLUMNS) for row in rows)])
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        with open(fd, "wb", closefd=False) as file:
            file.write(text.encode())
            file.flush()
        os.fsync(fd)

    def _add(self, row: dict) -> None:
        self._rows.append(row)
        (self._finished if row["status"] in FINISHED else self._errors)[_key_of(row)] = row

    def _parsed(self, data: bytes, whole: int) -> list[dict]:
        """The rows of the first `whole` bytes, all complete lines. Raises UserError naming the line."""
        if not data:
            return []
        if whole == 0:
            if not _HEADER.encode().startswith(data):  # else the header itself is unfinished
                raise self._malformed(1, "is not the header of a table of results")
            return []
        header = data[: data.index(b"\n")].removesuffix(b"\r").decode("utf-8", "replace")
        columns = header.split(",")
        # a table of an earlier version has fewer columns, in the same order
        if not set(KEY) <= set(columns) or columns != [name for name in COLUMNS if name in columns]:
            difference = _header_difference(header)
            raise self._malformed(1, f"is not the header of a table of results{difference}")
        try:
            text = data[:whole].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._malformed(data[: error.start].count(b"\n") + 1, "is not text") from None
        lines = [line.removesuffix("\r") for line in text.split("\n")[:-1]]
        if csv.field_size_limit() < len(text):  # samples may be longer than the csv module expects
            csv.field_size_limit(len(text))
        rows = []
        for number, line in enumerate(lines[1:], start=2):
            try:
                cells = next(csv.reader([line], strict=True), [])
            except csv.Error:
                raise self._malformed(number, "has a quotation mark that does not belong there") from None
            if len(cells) != len(columns):
                raise self._malformed(number, f"has {len(cells)} fields instead of {len(columns)}")
            try:
                own = dict(zip(columns, cells, strict=True))
                row = {name: _decoded(name, own.get(name, "")) for name in COLUMNS}
                _check_row(row)
            except (ValueError, RecursionError) as error:
                raise self._malformed(number, f"holds what it cannot: {error}") from None
            rows.append(row)
        return rows

    def _malformed(self, line: int, what: str) -> UserError:
        return UserError(
            f"{self.path} line {line} {what}: move the file away or restore it from git; nothing was changed."
        )


def canonical(settings: dict) -> str:
    """Settings as JSON text that is the same for equal settings: sorted keys, 1.0 written as 1.

    Raises ValueError for what JSON can't hold, NaN and infinity among it.
    """
    try:
        return json.dumps(_plain(settings), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except TypeError as error:
        raise ValueError(f"settings cannot be written as JSON: {error}") from None


def setting(frame, name: str):
    """The value of one setting for every row of a frame, as a Series; None where a row has none such."""
    return frame["settings"].map(lambda text: json.loads(text).get(name)).rename(name)


def now() -> str:
    """The present time for `measured_at`: ISO 8601, UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(value):
    """`value` with NumPy numbers as Python ones, and a float that is whole as an int."""
    if isinstance(value, dict):
        if not all(isinstance(k, str) for k in value):
            raise ValueError(f"the names of settings are text, not {list(value)}")
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return int(value) if float(value).is_integer() and abs(value) < 2**53 else float(value)
    return value


def _cells(row: dict) -> dict[str, str]:
    """The text of every cell of a row, checked."""
    _check_known(row)
    row = dict(row)
    for name in ("psnr_db", "psnr_min_db"):
        if isinstance(row.get(name), numbers.Real) and row[name] == math.inf:
            if not row.get("psnr_identical"):
                raise ValueError(f"{name} is infinite: count the identical images in psnr_identical")
            row[name] = None
    cells = {name: _encoded(name, row.get(name)) for name in COLUMNS}
    _check_row({name: cells[name] or None for name in COLUMNS})
    return cells


def _check_known(row: dict) -> None:
    unknown = [name for name in row if name not in COLUMNS]
    if unknown:
        raise ValueError(f"unknown column {', '.join(unknown)}; the columns are {', '.join(COLUMNS)}")


def _check_always(row: dict) -> None:
    for name in _ALWAYS:
        if not row.get(name):
            raise ValueError(f"{name} is empty")


def _check_row(row: dict) -> None:
    _check_always(row)
    if row["status"] not in STATUSES:
        raise ValueError(f"status is {row['status']!r}, allowed are {', '.join(STATUSES)}")
    if row["status"] != "ok" and not row["reason"]:
        raise ValueError(f"status {row['status']} needs a reason")
    if row["weights"] not in WEIGHTS:
        raise ValueError(f"weights is {row['weights']!r}, allowed are {', '.join(WEIGHTS)}")


def _encoded(name: str, value) -> str:
    """The cell of a value. Raises ValueError when the column can't hold it."""
    kind = COLUMNS[name]
    if name == "settings":
        value = {} if value is None else value
        value = json.loads(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise ValueError(f"settings is {value!r}, allowed is a dict")
        return canonical(value)
    if value is None:
        return ""
    if name in ("proof", "telemetry"):
        value = json.loads(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r}, allowed is a dict")
        return canonical(value)
    if name == "samples":
        value = json.loads(value) if isinstance(value, str) else value
        return json.dumps([_float("samples", v) for v in value], separators=(",", ":"))
    if kind == "int":
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or value != value // 1:
            raise ValueError(f"{name} is {value!r}, allowed is a whole number")
        return str(int(value))
    if kind == "float":
        return repr(_float(name, value))
    if kind == "time":
        return _time(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, allowed is text")
    # One row is one line, so a message of several lines is written as one.
    value = re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", " ", value).strip()
    return value.encode("utf-8", "backslashreplace").decode()


def _decoded(name: str, cell: str):
    """The value of a cell. Raises ValueError when the column can't hold it."""
    kind = COLUMNS[name]
    if kind == "text":
        if "\0" in cell:
            raise ValueError(f"{name} has a zero byte")
        return cell or None
    if not cell:
        return {} if name == "settings" else None
    try:
        if kind == "int":
            return int(cell)
        if kind == "float":
            return _float(name, float(cell))
        if kind == "time":
            _time(cell)
            return cell
        value = json.loads(cell)
    except ValueError:
        raise ValueError(f"{name} is {cell[:40]!r}") from None
    if name in ("settings", "proof", "telemetry") and isinstance(value, dict):
        return value
    if name == "samples" and isinstance(value, list):
        return [_float(name, v) for v in value]
    raise ValueError(f"{name} is {cell[:40]!r}")


def _float(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, allowed is a finite number or nothing")
    return float(value)


def _time(value: str | datetime) -> str:
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError(f"measured_at is {value!r}, allowed is an ISO 8601 time with its zone")
    return moment.isoformat()


def _key_of(row: dict) -> tuple:
    return tuple(_encoded(name, row[name]) for name in KEY)


def _line(cells) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _copy(row: dict) -> dict:
    """A row that its reader may change without changing what `find` gives next."""
    return {
        **row,
        "settings": json.loads(json.dumps(row["settings"])),
        "samples": None if row["samples"] is None else list(row["samples"]),
        "proof": row["proof"] and json.loads(json.dumps(row["proof"])),
    }


def _state(fd: int) -> tuple:
    stat = os.fstat(fd)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _header_difference(header: str) -> str:
    """Which columns a header of another version lacks or has too many; nothing when it is no header."""
    names = header.split(",")
    if "notebook" not in names:
        return ""
    missing = [n for n in COLUMNS if n not in names]
    extra = [n for n in names if n not in COLUMNS]
    parts = ["lacks " + " ".join(missing)] * bool(missing) + ["does not know " + " ".join(extra)] * bool(extra)
    return f" ({'; '.join(parts) or 'the order differs'})"
