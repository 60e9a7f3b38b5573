"""Other people's rows: packed into one file, checked when they come, and shown beside ours, marked as theirs.

A contribution is one JSON text, never an archive: nothing in it is unpacked, loaded as code or taken for a path. What
comes is kept in `reports/contributed/`, one file each, named by its digest; our tables are never written here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import socket
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fluxnb.errors import UserError
from fluxnb.findings.rows import ends, is_baseline, overlap
from fluxnb.installed import need
from fluxnb.measure import stats
from fluxnb.params.reading import plain
from fluxnb.report import RUN, Place, html, machine_of, read_json, write_atomic, write_changed
from fluxnb.report.configurations import Configuration
from fluxnb.scrub import scrub, scrubbed
from fluxnb.study.results import Results, checked, key_of
from fluxnb.study.row import FINISHED, KEY, Row

FOLDER, PAGE, FORMAT = "contributed", "index.html", 1
MOST_BYTES, MOST_ROWS, MOST_TEXT, MOST_NUMBERS, MOST_SHOWN = 30_000_000, 20_000, 4_000, 100_000, 300
LARGEST = 1e15  # of a number: no measurement is anywhere near
AGREES, DIFFERS, UNDECIDED = "agrees", "differs", "undecided"
_PARTS = {"format", "gpu", "name", "run", "rows", "digest"}
_OF_RUN = ("started_at", "commit", "dirty", "versions", "params_digest")
_OF_MACHINE = ("cpu", "cores", "threads", "usable_threads", "ram_gib", "os", "driver", "cuda")
_OF_GPU = ("name", "memory_gib", "compute_capability", "power_limit_w", "sm_clock_max_mhz", "memory_clock_max_mhz")
_SAME = tuple(name for name in KEY if name not in ("host", "versions"))  # what has to be alike to be set side by side
_NAME = r"|\w[\w .,'-]{0,59}"
_ABOVE_ZERO = re.compile(r"latency_|speedup|baseline_p50|n$|images_per_s")
_PATH = re.compile(
    r"(?<![\w:/.])(?:~[\w.-]*)?/[\w.@+~-]+(?:/[^\s'\",;:)\]]*)?|\b[A-Za-z]:[\\/][^\s'\",;)\]]*|\\\\\w[^\s'\",;)\]]*"
)
_ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\")\]]+|\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+", re.IGNORECASE)
_NUMBERED = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b|\b(?:[0-9a-f]{1,4}:){4,}[0-9a-f:]+\b", re.IGNORECASE)


@dataclass(frozen=True)
class Contribution:
    """What somebody else has measured: the configuration, how they want to be called, their machine, their rows."""

    gpu: str
    name: str
    run: dict
    rows: list[Row]
    digest: str

    @property
    def file(self) -> str:
        """Its file below reports/contributed/."""
        return f"{self.digest[:12]}.json"

    @property
    def title(self) -> str:
        """What readers see of it."""
        return f"{self.name or 'Somebody'}, {self.gpu}: {machine_of(self.run)}"


# --- packing ----------------------------------------------------------------------------------------------


def contribute(
    place: Place, name: str = "", to: Path | None = None, yes: bool = False, ask: Callable[[str], str] = input
) -> Path | None:
    """Packs a user's own rows into one file, after saying what is in it and asking; None where the answer is no.

    Raises UserError where there are no rows, for a model of the user's, whose name may be a path, and for a name that
    can't be one.
    """
    rows = [r for r in Results(place.table).rows() if r.status in FINISHED] if place.table.is_file() else []
    if not rows:
        raise UserError(f"There is no run of yours to contribute: run 'make report GPU={place.gpu}' first.")
    if place.model:
        raise UserError("What is contributed is about the study's own models: leave --model out.")
    if not re.fullmatch(_NAME, name):
        raise UserError(f"--name {plain(name)!r} isn't allowed: give up to 60 letters, digits, blanks, dots or dashes.")
    packed, removed = _packed(rows)
    run = _about(read_json(place.reports / RUN))
    whole = {"format": FORMAT, "gpu": place.gpu, "name": name, "run": run}
    text = _text(whole | {"rows": packed})
    theirs = _checked(json.loads(text), "what was packed")
    path = to or place.root / "reports" / "own" / f"fluxnb-{place.gpu}-{theirs.digest[:12]}.json"
    if path.exists():
        raise UserError(f"{plain(path, 300)} is there already: move it away, or give another name with --to.")
    print(f"{path} will hold, for anybody to read:")
    print(f"  {len(rows)} rows of {place.gpu}, with their settings, times, quality and ids; of the notebooks "
          f"{', '.join(sorted({r.notebook for r in rows}))}")  # fmt: skip
    print(f"  the machine: {machine_of(run)}; of {RUN} {', '.join(run) or 'nothing'}")
    print(f"  your name: {name or 'none (--name adds one)'}")
    print("  a digest of all this")
    print(f"and no token, no path and no host name: machines and sessions are numbered, {removed} paths, addresses and "
          f"names were taken out, rows that failed were left out.")  # fmt: skip
    if not yes:
        try:
            agreed = ask("Write it? [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            raise UserError("Nothing was written: run it in a terminal, where it can ask, or add --yes.") from None
        if not agreed:
            print("Nothing was written.")
            return None
    write_atomic(path, text)
    return path


def _packed(rows: Sequence[Row]) -> tuple[list[dict], int]:
    """The rows as plain values that say nothing of who or where, and how many paths and names were taken out."""
    hosts: dict[str | None, str] = {None: ""}
    sessions: dict[str | None, str] = {None: ""}
    ids, packed, removed = {r.id for r in rows}, [], 0

    def clean(value, free=False):
        nonlocal removed
        if isinstance(value, dict):
            return {clean(name): clean(part, free) for name, part in value.items()}
        if isinstance(value, list):
            return [clean(part, free) for part in value]
        if not isinstance(value, str):
            return value
        for pattern, said in ((_ADDRESS, "[address]"), (_PATH, "[path]"), *(_names() if free else ())):
            value, n = pattern.subn(said, value)
            removed += n
        return value[:MOST_TEXT]

    for row in rows:
        if row.baseline and row.baseline not in ids:  # of a baseline that failed
            row = replace(row, baseline=None, speedup=None, speedup_ci_low=None, speedup_ci_high=None)
        host = hosts.setdefault(row.host, f"machine {len(hosts)}")
        session = sessions.setdefault(row.session, f"session {len(sessions)}")
        columns = {n: clean(v, n == "reason") for n, v in row.as_dict().items() if v is not None}
        packed.append(columns | {"host": host or "machine 0", "session": session or "session 0", "run_id": "r"})
    return scrubbed(packed), removed


def _names() -> list[tuple[re.Pattern, str]]:
    """What an error's text may hold of this machine and of whoever uses it."""
    own = {socket.gethostname(), socket.gethostname().partition(".")[0], os.environ.get("FLUXNB_HOST", "")}
    own |= {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "HOSTNAME")}
    words = sorted((re.escape(word) for word in own if len(word) > 2), key=len, reverse=True)
    return [(_NUMBERED, "[address]"), *((re.compile(rf"(?<!\w){w}(?!\w)", re.IGNORECASE), "[name]") for w in words)]


def _about(run: dict) -> dict:
    """What of run.json says what was measured on what, and nothing else."""
    found = {name: run[name] for name in _OF_RUN if run.get(name) is not None}
    given = run.get("machine") if isinstance(run.get("machine"), dict) else {}
    machine: dict = {name: given[name] for name in _OF_MACHINE if given.get(name) is not None}
    if isinstance(given.get("gpus"), list):
        machine["gpus"] = [
            {n: g[n] for n in _OF_GPU if g.get(n) is not None} for g in given["gpus"] if isinstance(g, dict)
        ]
    return found | ({"machine": machine} if machine else {})


def _digest(whole: dict) -> str:
    text = json.dumps({k: v for k, v in whole.items() if k != "digest"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _text(whole: dict) -> str:
    rows = ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in whole["rows"])
    head = json.dumps({k: v for k, v in whole.items() if k not in ("rows", "digest")}, ensure_ascii=False)
    return f'{head[:-1]}, "digest": "{_digest(whole)}", "rows": [\n{rows}\n]}}\n'


# --- checking ---------------------------------------------------------------------------------------------


def read(path: Path) -> Contribution:
    """The contribution in a file. Raises UserError, one sentence, for anything else."""
    name = plain(path.name, 100)
    try:
        if not path.is_file():
            raise _refused(name, "is no file")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise _refused(name, f"has {size / 1e6:.0f} MB where {MOST_BYTES / 1e6:.0f} are allowed")
        text = path.read_bytes().decode("utf-8")
        whole = json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
    except (OSError, UnicodeDecodeError):
        raise _refused(name, "can't be read as text: it is one JSON file, never an archive") from None
    except (ValueError, RecursionError) as error:
        what = f"not JSON as it is written here ({plain(error)})"
        raise _refused(name, f"is {what if isinstance(error, ValueError) else 'nested too deeply'}") from None
    if scrub(text) != text:
        raise _refused(name, "holds what looks like a token")
    return _checked(whole, name)


def _checked(whole, name: str) -> Contribution:
    """Raises UserError unless all of it is what a contribution holds."""
    if not isinstance(whole, dict) or set(whole) != _PARTS:
        raise _refused(name, f"doesn't hold {', '.join(sorted(_PARTS))} and nothing else")
    if isinstance(whole["format"], int) and whole["format"] > FORMAT:
        raise UserError(f"{name} is of format {plain(whole['format'])}, and this fluxnb knows {FORMAT}: update fluxnb.")
    if type(whole["format"]) is not int or whole["format"] != FORMAT:
        raise _refused(name, f"is of format {plain(whole['format'])}, and {FORMAT} is known")
    try:
        _measured(whole)
        if whole["digest"] != _digest(whole):
            raise ValueError("its digest isn't that of its content, so it was changed since it was packed")
        for part, pattern in (("gpu", r"[a-z0-9][a-z0-9_-]{0,40}"), ("name", _NAME)):
            if not isinstance(whole[part], str) or not re.fullmatch(pattern, whole[part]):
                raise ValueError(f"its {part} is {plain(whole[part])!r}, allowed are letters, digits, dots and dashes")
        if not isinstance(whole["run"], dict) or _about(whole["run"]) != whole["run"]:
            raise ValueError(f"its part run holds more than {', '.join(_OF_RUN)} and the machine")
        machine_of(whole["run"]).strip()
        rows = whole["rows"]
        if not isinstance(rows, list) or not 0 < len(rows) <= MOST_ROWS or not all(isinstance(r, dict) for r in rows):
            raise ValueError(f"its rows aren't a list of 1 to {MOST_ROWS:,} rows")
        found = [_row(number, columns, whole["gpu"]) for number, columns in enumerate(rows, start=1)]
        _check_together(found)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        said = str(error) if isinstance(error, ValueError) else "a value of it is of another kind than its name says"
        raise _refused(name, f"can't be taken: {plain(said, 300)}") from None
    return Contribution(whole["gpu"], whole["name"], whole["run"], found, whole["digest"])


def _row(number: int, columns: dict, gpu: str) -> Row:
    try:
        row = checked(columns)
        if not re.fullmatch("[0-9a-f]{10}", row.id or ""):
            raise ValueError("its id isn't 10 hex digits")
        if row.gpu != gpu:
            raise ValueError(f"it is of gpu {plain(row.gpu)}, the file of {gpu}")
        for name, word in (("host", "machine"), ("session", "session")):
            if not re.fullmatch(rf"{word} \d{{1,6}}", getattr(row, name) or ""):
                raise ValueError(f"its {name} isn't numbered, as in {word} 1")
        for name in filter(_ABOVE_ZERO.match, columns):
            if columns[name] is not None and columns[name] <= 0:
                raise ValueError(f"{name} is {columns[name]}, allowed is what is above 0")
        own = (row.speedup_ci_low, row.speedup, row.speedup_ci_high)
        if None not in own and not own[0] <= own[1] <= own[2]:
            raise ValueError("its speedup lies outside of its interval")
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from None
    return row


def _check_together(rows: list[Row]) -> None:
    ids = {r.id for r in rows}
    kinds: dict[str, str] = {}
    if len(ids) < len(rows):
        raise ValueError("two of its rows have one id")
    for number, row in enumerate(rows, start=1):
        if row.baseline and row.baseline not in ids:
            raise ValueError(f"row {number}: its baseline {plain(row.baseline)} isn't there")
        if kinds.setdefault(row.host, row.kind) != row.kind:
            raise ValueError(f"row {number}: {row.host} is of another kind than before")


def _measured(value, depth: int = 0) -> None:
    """Raises ValueError for text, numbers or nesting that no measurement has."""
    if depth > 12:
        raise ValueError("it is nested too deeply")
    if isinstance(value, str):
        if len(value) > MOST_TEXT:
            raise ValueError(f"a text of it is longer than {MOST_TEXT:,} characters")
        if strange := next((c for c in value if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")), ""):
            raise ValueError(f"a text of it has the character U+{ord(strange):04X}, which can't be seen")
    elif isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise ValueError("a number of it is larger than any measurement")
    elif isinstance(value, dict | list):
        if depth > 1 and len(value) > MOST_NUMBERS:
            raise ValueError(f"a list of it is longer than {MOST_NUMBERS:,}")
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _measured(part, depth + 1)


def _refused(name: str, what: str) -> UserError:
    return UserError(f"{name} {what}: nothing was changed; ask for a file as `python -m fluxnb contribute` writes it.")


def _no_number(name: str):
    raise ValueError(f"{name} is no number")


def _once(pairs: list[tuple]) -> dict:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


# --- beside ours ------------------------------------------------------------------------------------------


def merge(root: Path, path: Path, found: list[Configuration]) -> bool:
    """Keeps a contribution beside ours; whether it is new. Raises UserError for a bad one or rows of ours."""
    folder, theirs = root / "reports" / FOLDER, read(path)
    ours = {r.id for c in found for r in c.rows}
    if all(r.id in ours for r in theirs.rows):
        raise _refused(plain(path.name, 100), "holds nothing but rows of the reference itself")
    for part in (folder, folder / theirs.file):
        if part.is_symlink():
            raise UserError(f"{plain(part, 300)} is a link, which could lead anywhere: put a folder in its place.")
    if (folder / theirs.file).exists():
        return False
    write_atomic(folder / theirs.file, path.read_bytes().decode("utf-8"))
    return True


def every(reports: Path) -> list[Contribution]:
    """What was contributed, by file. Raises UserError for one that was damaged since."""
    paths = sorted((reports / FOLDER).glob("*.json"))
    return [_kept(path, (stat := path.stat()).st_ino, stat.st_mtime_ns, stat.st_size) for path in paths]


@functools.lru_cache
def _kept(path: Path, *_) -> Contribution:
    """A file that every page asks for again, checked once as long as it stays as it is."""
    return read(path)


def independent(given: Sequence[Contribution]) -> list[list[Contribution]]:
    """Contributions by who measured: files that share a row are of one, as a later file of the same run."""
    groups: list[list[Contribution]] = []
    for one in given:
        ids = {r.id for r in one.rows}
        near = [g for g in groups if any(r.id in ids for other in g for r in other.rows)]
        groups = [g for g in groups if g not in near] + [[*(c for g in near for c in g), one]]
    return groups


def pairs(group: Sequence[Contribution], found: list[Configuration]) -> list[tuple[Row, Row, str]]:
    """(our row, theirs, how they agree) for every speedup that both have of the same settings.

    It agrees where both intervals overlap, and is undecided where one is of fewer rounds than an interval takes.
    """
    mine = {key_of(r, _SAME): r for c in found for r in c.ok if r.speedup is not None and not is_baseline(r)}
    ours = {r.id for c in found for r in c.rows}
    theirs = {
        key_of(r, _SAME): r for one in group for r in one.rows if r.ok and r.speedup is not None and r.id not in ours
    }
    return [(mine[key], row, _agreement(mine[key], row)) for key, row in theirs.items() if key in mine]


def _agreement(one: Row, other: Row) -> str:
    own = ends(one), ends(other)
    if None in own or min(one.n or 0, other.n or 0) < stats.LEAST:
        return UNDECIDED
    return AGREES if overlap(*own) else DIFFERS


def sentence(reports: Path, found: list[Configuration]) -> str:
    """How many others have measured the same, and with what result; zero is said."""
    groups = [pairs(group, found) for group in independent(every(reports))]
    said = [how for own in groups for _, _, how in own]
    n = sum(any(how == AGREES for _, _, how in own) for own in groups)
    if not groups:
        return "Independent reproductions: 0. Nobody has contributed rows yet."
    return (f"Independent reproductions: {n}, of {len(groups)} that contributed rows; of the {len(said)} speedups that "
            f"they and we have, {said.count(AGREES)} agree within their intervals, {said.count(DIFFERS)} differ and "
            f"{said.count(UNDECIDED)} are of too few rounds.")  # fmt: skip


def write(root: Path, found: list[Configuration]) -> Path:
    """The page of what others contributed, beside ours; its path."""
    from fluxnb.report.audit import check_page
    from fluxnb.report.render import render_template

    pd, reports = need("pandas", "The page of contributions"), root / "reports"
    blocks = [html.callout_html(sentence(reports, found), "note"),
              f"<p>{html.inline(HOW)}</p>"]  # fmt: skip
    for number, group in enumerate(independent(every(reports)), start=1):
        own, last = pairs(group, found), group[-1]
        blocks.append(f"<h2>Theirs, {number}: {html.inline(last.title)}</h2>")
        versions = ", ".join(sorted({r.versions for c in group for r in c.rows}))
        count = len({r.id for c in group for r in c.rows})
        blocks.append(f"<p>{html.inline(f'{count} rows, with {versions}.')} "
                      + ", ".join(f'<a href="{c.file}">their file</a>' for c in group) + "</p>")  # fmt: skip
        lines = [
            {"setting": ours.label or ours.technique, "ours": _speedup(ours), "theirs": _speedup(row), "is": how,
             "our row": ours.id, "their row": row.id}
            for ours, row, how in own[:MOST_SHOWN]
        ]  # fmt: skip
        cut = f", the first {MOST_SHOWN} of {len(own)}" * (len(own) > MOST_SHOWN)
        if lines:
            caption = f"Speedups of the same settings, ours beside theirs{cut}."
            blocks.append(html.table_html(pd.DataFrame(lines), caption))
        else:
            blocks.append("<p>None of their speedups is of settings that we have rows of.</p>")
    crumbs = [(PAGE, "Contributed"), ("../index.html", "fluxnb")]
    text = render_template("blocks.html.j2", PAGE, crumbs, title="Other people’s rows", blocks=blocks)
    check_page(text, PAGE)
    write_changed(reports / FOLDER / PAGE, text)
    return reports / FOLDER / PAGE


HOW = (
    "These rows are theirs: their form was checked, what they say wasn't, and no recommendation, headline or verdict "
    "rests on them. To add yours: `make report GPU=…`, then `python -m fluxnb contribute --gpu …`, which says what is "
    "in the file before it writes it, and send the file with a pull request or an issue: “I ran fluxnb at commit … on "
    "…, and nothing else ran there”. `python -m fluxnb merge FILE` checks it and puts it here."
)


def _speedup(row: Row) -> str:
    low, high = ends(row) or (None, None)
    within = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    return f"{row.speedup:.3g}×{within}, n = {row.n}"
