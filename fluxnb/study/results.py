"""The table of measurements: one CSV file, one line per measurement, appended as soon as it is taken.

A row is keyed by everything that determines its figures (`row.KEY`), so a run that was killed finds what it had
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
import stat
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from fluxnb.errors import UserError
from fluxnb.params.reading import plain
from fluxnb.scrub import scrubbed
from fluxnb.study.row import COLUMNS, FINISHED, KEY, STATUSES, WEIGHTS, Row, row_id

try:
    import fcntl
except ImportError:  # Windows has no flock: one process at a time there
    fcntl = None

_ALWAYS = ("notebook", "technique", "gpu", "versions")  # without these, and a host, a key would find strangers
_ANYWHERE = tuple(name for name in KEY if name not in ("host", "versions"))  # whatever the machine and its software
_HEADER = ",".join(COLUMNS)
_MARKS = {b"\xef\xbb\xbf": "a byte order mark", b"\xff\xfe": "UTF-16's mark", b"\xfe\xff": "UTF-16's mark"}
_NUMBERS = {"int": "-?[0-9]{1,18}", "float": "[-+.0-9a-zA-Z]+"}
_MOST_DEPTH = 20  # of settings and proofs, far more than any has


class Results:
    """The measurements in the CSV file `path`; the file and its folder are made by the first append.

    Every method raises UserError when the file holds something else than measurements, and then has changed
    nothing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._rows: list[Row] = []
        self._by_key: dict[tuple, list[Row]] = {}  # of the first of these rows
        self._seen: tuple | None = None  # the state of the file that _rows was read from

    def append(self, columns: dict) -> Row:
        """Writes one measurement, syncs it to the disk and gives its row; missing columns are left empty.

        Numbers keep their full precision. An infinite PSNR is written as empty and needs `psnr_identical`.
        Raises ValueError for an unknown column, a value that its column can't hold or a baseline that isn't there.
        """
        new = checked(scrubbed(columns))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._open(os.O_RDWR | os.O_APPEND | os.O_CREAT) as fd:
                self._refresh(fd)
                row = self._with_id(new)
                self._check_new([row])
                self._write(fd, _line(_encoded(name, getattr(row, name)) for name in COLUMNS))
                self._rows.append(row)
                self._seen = _state(fd)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}; make it writable or make room."
            ) from None
        return row

    def merge(self, other: str | Path) -> int:
        """Appends the rows of another table that this one lacks, such as another machine's; gives their number.

        Rows are told apart by their ids. Nothing is replaced: of two rows with one key the later one is found.
        Raises UserError, before anything is appended, if machines of two kinds have one name.
        """
        known = {row.id for row in self.rows()}
        new = [row for row in Results(other).rows() if row.id not in known]
        self._check_new(new)
        for row in new:
            self.append({name: value for name, value in row.as_dict().items() if value is not None})
        return len(new)

    def find(
        self, key: dict, code: str | None = None, errors: bool = False, anywhere: bool = False, after: int = 0
    ) -> Row | None:
        """The newest finished row (status ok, oom or unavailable) with this key, or None.

        Args:
            key: values of `row.KEY`; what is left out counts as empty, as it does in `append`.
            code: only a row of techniques whose code had this digest; None: of any.
            errors: of a key that has no finished row, its newest error.
            anywhere: of any machine and any versions: what a replay shows.
            after: so many rows at the table's beginning don't count.

        Raises ValueError for a column that is not part of the key, or a missing notebook, technique, gpu, host
        or versions.
        """
        strange = [name for name in key if name not in KEY]
        if strange:
            raise ValueError(f"not part of the key: {', '.join(strange)}; the key is {', '.join(KEY)}")
        _check_there(key, (*_ALWAYS, "host"))
        key = scrubbed(key)
        self._read()
        if anywhere:
            wanted = key_of(key, _ANYWHERE)
            alike = [row for row in self._rows if key_of(row, _ANYWHERE) == wanted]
        else:
            alike = self._alike(key)
        earlier = {row.id for row in self._rows[:after]}
        error = None
        for row in reversed(alike):
            if row.id in earlier:
                continue
            if row.status in FINISHED and code in (None, row.code):
                return row
            error = error or (row if row.status not in FINISHED else None)
        return error if errors else None

    def rows(self) -> list[Row]:
        """Every row of the file in its order, repeated measurements included."""
        self._read()
        return list(self._rows)

    def _alike(self, key: dict) -> list[Row]:
        """The rows with this key, in their order."""
        for row in self._rows[sum(map(len, self._by_key.values())) :]:
            self._by_key.setdefault(key_of(row), []).append(row)
        return self._by_key.get(key_of(key), [])

    def _with_id(self, row: Row) -> Row:
        """The row with an id that no other has: of two that are alike in all that determines them, too."""
        known = {other.id for other in self._rows}
        own = row.id or row_id(row.as_dict())
        while row.id is None and own in known:
            own = row_id({**row.as_dict(), "run_id": own})
        return replace(row, id=own)

    def _check_new(self, rows: list[Row]) -> None:
        """Raises for what `_check_together` would find in the table with these rows."""
        ids = {row.id for row in (*self._rows, *rows)}
        kinds = {row.host: row.kind for row in self._rows if row.kind}
        for row in rows:
            if row.baseline and row.baseline not in ids:
                raise ValueError(f"baseline {row.baseline} is no row of {self.path}")
            if row.host and row.kind and kinds.setdefault(row.host, row.kind) != row.kind:
                raise UserError(
                    f"Another kind of machine has the name {row.host} in {self.path}: give this one another name with "
                    "HOST=name; nothing was changed."
                )

    @contextmanager
    def _open(self, flags: int):
        """A locked file descriptor, so that neither a reader nor a second writer sees half a line."""
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(self.path).st_mode):  # reading a pipe would wait for ever
                raise OSError(errno.EINVAL, "it is no file")
        while True:
            fd = os.open(self.path, flags | getattr(os, "O_BINARY", 0), 0o644)
            if fcntl:
                with suppress(OSError):  # some network disks have no locks
                    fcntl.flock(fd, fcntl.LOCK_EX)
            with suppress(OSError):
                if os.stat(self.path).st_ino == os.fstat(fd).st_ino:
                    break
            os.close(fd)  # another process put an upgraded table in its place meanwhile
        try:
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
            self._rows, self._by_key, self._seen = [], {}, None
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
        lost = self._lost(rows) if whole < len(data) or not whole else []
        if whole < len(data) and repair:
            with open(self.path.with_name(self.path.name + ".partial"), "ab") as partial:
                partial.write(data[whole:] + b"\n")
                partial.flush()
                os.fsync(partial.fileno())
            if not lost:
                os.ftruncate(fd, whole)
        rows = [*lost, *rows]
        if rows and repair and (lost or not data.startswith(_HEADER.encode())):
            self._upgrade(fd, rows)
        self._rows, self._by_key, self._seen = rows, {}, _state(fd)

    def _lost(self, rows: list[Row]) -> list[Row]:
        """Rows that an earlier version had copied to <name>.older and was killed while it wrote them again."""
        known = {row.id for row in rows}
        with suppress(UserError, FileNotFoundError):
            data = self.path.with_name(self.path.name + ".older").read_bytes()
            return [row for row in self._parsed(data, data.rfind(b"\n") + 1) if row.id not in known]
        return []

    def _upgrade(self, fd: int, rows: list[Row]) -> None:
        """Puts a table with today's columns in the place of one that has fewer; `fd` then is that of the new one."""
        place = self.path.resolve()  # what a link leads to
        beside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        for left in place.parent.glob(f".{place.name}.*.tmp"):  # of who was killed at this: the lock is ours
            left.unlink(missing_ok=True)
        lines = [_line(_encoded(name, getattr(row, name)) for name in COLUMNS) for row in rows]
        new = os.open(beside, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)
        try:
            if fcntl:
                with suppress(OSError):
                    fcntl.flock(new, fcntl.LOCK_EX)  # who opens the new table waits until this one is done with it
            with open(new, "wb", closefd=False) as file:
                file.write("".join([f"{_HEADER}\n", *lines]).encode())
            os.fchmod(new, os.fstat(fd).st_mode & 0o777)
            os.fsync(new)
            os.replace(beside, place)
            os.dup2(new, fd)
        except OSError:
            with suppress(OSError):
                beside.unlink()
            raise
        finally:
            os.close(new)

    def _parsed(self, data: bytes, whole: int) -> list[Row]:
        """The rows of the first `whole` bytes, all complete lines. Raises UserError naming the line."""
        if not data:
            return []
        for mark, what in _MARKS.items():
            if data.startswith(mark):
                raise self._malformed(1, f"begins with {what} (save it as UTF-8 without one)")
        if b"\r" in data and b"\n" not in data:
            raise self._malformed(1, "ends with a carriage return alone (save it with line feeds)")
        if whole == 0:
            if not _HEADER.encode().startswith(data):  # else the header itself is unfinished
                raise self._malformed(1, "is not the header of a table of results")
            return []
        columns = data[: data.index(b"\n")].removesuffix(b"\r").decode("utf-8", "replace").split(",")
        self._check_header(columns)
        try:
            text = data[:whole].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._malformed(data[: error.start].count(b"\n") + 1, "is not text") from None
        lines = [line.removesuffix("\r") for line in text.split("\n")[:-1]]
        if csv.field_size_limit() < len(text):  # samples may be longer than the csv module expects
            csv.field_size_limit(len(text))
        rows = [self._row(number, line, columns) for number, line in enumerate(lines[1:], start=2)]
        self._check_together(rows)
        return rows

    def _check_header(self, columns: list[str]) -> None:
        """Raises UserError unless the columns are today's, or those of an earlier table of this format."""
        if "machine" in columns and "id" not in columns:
            raise UserError(
                f"{self.path} is a table of fluxnb's first format, which this version does not read: move it away (a "
                "checkout of the first edition still reads it) and run again; nothing was changed."
            )
        extra = [name for name in columns if name not in COLUMNS]
        if extra and {"id", *KEY} <= set(columns) and all(map(str.isidentifier, extra)):
            raise UserError(
                f"{self.path} was written by a newer fluxnb, with columns this one does not know "
                f"({plain(', '.join(extra), 300)}): update fluxnb, or move the file away; nothing was changed."
            )
        if not set(KEY) <= set(columns) or columns != [name for name in COLUMNS if name in columns]:
            raise self._malformed(1, "is not the header of a table of results")

    def _row(self, number: int, line: str, columns: list[str]) -> Row:
        try:
            cells = next(csv.reader([line], strict=True), [])
        except csv.Error:
            raise self._malformed(number, "has a quotation mark that does not belong there") from None
        if len(cells) != len(columns):
            raise self._malformed(number, f"has {len(cells)} fields instead of {len(columns)}")
        own = dict(zip(columns, cells, strict=True))
        try:
            row = Row(**{name: _decoded(name, own.get(name, "")) for name in COLUMNS})
            _check_row(row.as_dict())
            row = row if row.id else replace(row, id=row_id(row.as_dict()))
        except (ValueError, RecursionError) as error:
            raise self._malformed(number, f"holds what it cannot: {error}") from None
        return row

    def _check_together(self, rows: list[Row]) -> None:
        """Raises UserError for a baseline that isn't there, and for one name of two different machines."""
        ids = {row.id for row in rows}
        kinds: dict[str, str] = {}
        for number, row in enumerate(rows, start=2):
            if row.baseline and row.baseline not in ids:
                raise self._malformed(number, f"has a speedup over the baseline {row.baseline}, which isn't there")
            if row.host and row.kind and kinds.setdefault(row.host, row.kind) != row.kind:
                raise self._malformed(
                    number, f"has a machine called {row.host} of another kind than the one of that name before it"
                )

    def _malformed(self, line: int, what: str) -> UserError:
        said = f"{self.path} line {line} {plain(what, 300)}"
        return UserError(f"{said}: move the file away or restore it from git; nothing was changed.")


def canonical(settings: dict) -> str:
    """Settings as JSON text that is the same for equal settings: sorted keys, 1.0 written as 1.

    Raises ValueError for what JSON can't hold, NaN and infinity among it.
    """
    try:
        return json.dumps(_plain(settings), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except TypeError as error:
        raise ValueError(f"settings cannot be written as JSON: {error}") from None


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


def checked(columns: dict) -> Row:
    """The row of these columns as its table has it. Raises ValueError for what a table can't hold."""
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise ValueError(f"unknown column {', '.join(unknown)}; the columns are {', '.join(COLUMNS)}")
    columns = dict(columns)
    for name in ("psnr_db", "psnr_min_db"):
        if isinstance(columns.get(name), numbers.Real) and columns[name] == math.inf:
            if not columns.get("psnr_identical"):
                raise ValueError(f"{name} is infinite: count the identical images in psnr_identical")
            columns[name] = None
    cells = {name: _encoded(name, columns.get(name)) for name in COLUMNS}
    _check_row({name: cells[name] or None for name in COLUMNS})
    return Row(**{name: _decoded(name, cell) for name, cell in cells.items()})


def _check_there(row: dict, names: tuple[str, ...]) -> None:
    for name in names:
        if not row.get(name):
            raise ValueError(f"{name} is empty")


def _check_row(row: dict) -> None:
    _check_there(row, _ALWAYS)
    if row["status"] not in STATUSES:
        raise ValueError(f"status is {row['status']!r}, allowed are {', '.join(STATUSES)}")
    if row["status"] != "ok" and not row["reason"]:
        raise ValueError(f"status {row['status']} needs a reason")
    if row["weights"] not in WEIGHTS:
        raise ValueError(f"weights is {row['weights']!r}, allowed are {', '.join(WEIGHTS)}")


def _encoded(name: str, value) -> str:
    """The cell of a value. Raises ValueError when the column can't hold it."""
    kind = COLUMNS[name]
    if value is None:
        return "{}" if name == "settings" else ""
    if kind == "dict":
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r}, allowed is a dict")
        return canonical(value)
    if kind == "list":
        return json.dumps([_float(name, v) for v in value], separators=(",", ":"))
    if kind == "int":
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or value != value // 1:
            raise ValueError(f"{name} is {value!r}, allowed is a whole number")
        return str(int(value))  # type: ignore[call-overload]  # typeshed's Real says nothing of int()
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
        if kind in _NUMBERS:
            if not re.fullmatch(_NUMBERS[kind], cell):  # Python takes 1_0, " 1" and other alphabets' digits, too
                raise ValueError
            return int(cell) if kind == "int" else _float(name, float(cell))
        if kind == "time":
            _time(cell)
            return cell
        value = json.loads(cell, parse_constant=_no_constant, parse_float=partial(_read_float, name))
        if cell.count("{") + cell.count("[") > _MOST_DEPTH and _depth(value) > _MOST_DEPTH:
            raise ValueError
        if "\\ud" in cell.lower():  # half a character, which no file can hold
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is {cell[:40]!r}") from None
    if kind == "dict" and isinstance(value, dict):
        return value
    if kind == "list" and isinstance(value, list):
        return [_float(name, v) for v in value]
    raise ValueError(f"{name} is {cell[:40]!r}")


def _depth(value) -> int:
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, below), default=0)


def _read_float(name: str, text: str) -> float:
    return _float(name, float(text))


def _no_constant(name: str):
    raise ValueError(f"{name} is not a number")


def _float(name: str, value) -> float:
    with suppress(OverflowError):
        if not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value):
            return float(value)
    raise ValueError(f"{name} is {value!r:.40}, allowed is a finite number or nothing")


def _time(value: str | datetime) -> str:
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError(f"measured_at is {value!r}, allowed is an ISO 8601 time with its zone")
    return moment.isoformat()


def key_of(row: Row | dict, names: tuple[str, ...] = KEY) -> tuple:
    """What determines a row, or one with these columns, to be compared with another's."""
    columns = row if isinstance(row, dict) else {name: getattr(row, name) for name in names}
    return tuple(_encoded(name, columns.get(name)) for name in names)


def _line(cells) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _state(fd: int) -> tuple:
    now = os.fstat(fd)
    return now.st_ino, now.st_size, now.st_mtime_ns
