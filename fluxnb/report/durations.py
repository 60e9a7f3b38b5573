"""How long notebooks take to measure: a record beside a configuration's reports, and what it says of a run to come."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from fluxnb.report import Place, duration, machine_of, newest_row, read_json, write_json

FILE = "durations.json"  # notebook -> SHORT or THOROUGH -> seconds in which all its rows were measured, and where
SHORT, THOROUGH = "short", "thorough"


def carried(before: dict, place: Place, stem: str) -> float | None:
    """Seconds that the rows which are there took, by the state of a notebook's last execution; None if nobody knows.

    A run that was killed took until its last row: what came after that has to be done again.
    """
    if (last := newest_row(place.table, stem)) is None:
        return 0.0
    known = before.get("measuring_s")
    if known is None or before.get("status") not in ("running", "interrupted"):
        return known
    since = datetime.fromisoformat(last) - datetime.fromisoformat(before["started"])
    return known + max(0.0, since.total_seconds())


def measuring(state: dict, before: dict, earlier: float | None) -> float | None:
    """Seconds that all rows of an execution took, those of earlier ones that it found among them; None if not known.

    Args:
        state: of the execution: its seconds, the rows that it asked for and those that it found.
        before: the state that it began with.
        earlier: what was `carried` then.
    """
    asked, found = state.get("asked", 0), state.get("found", 0)
    if not found:
        return state["seconds"]
    if earlier is None or (before.get("thorough") and not state["thorough"]):  # it found more than it asked for
        return None
    goes_on = before.get("status") != "ok" or asked > before.get("asked", 0)
    return earlier + state["seconds"] if goes_on and found < asked else earlier


def record(place: Place, stem: str, state: dict) -> None:
    """Keeps how long a notebook took that has measured something and knows the time of all of it."""
    if state.get("measuring_s") is None or state.get("asked", 0) <= state.get("found", 0):
        return
    kept = read_json(place.reports / FILE)
    took = {"seconds": round(state["measuring_s"], 1), "machine": machine_of(state["provenance"])}
    mode = THOROUGH if state["thorough"] else SHORT
    kept[stem] = kept.get(stem, {}) | {mode: took | {"finished": state["finished"]}}
    write_json(place.reports / FILE, dict(sorted(kept.items())))


def merge(mine: Path, theirs: Path) -> None:
    """Takes the records of one folder over into those of another."""
    kept = read_json(theirs / FILE)
    kept |= {stem: kept.get(stem, {}) | took for stem, took in read_json(mine / FILE).items()}
    if kept:
        write_json(theirs / FILE, dict(sorted(kept.items())))


def known(stems: list[str], folders: list[Path], params) -> dict[str, dict]:
    """Notebook -> its record: that of the first of the folders that has one.

    Where there is none of a short run a thorough one's has `most`, unless they are the same: the short takes no longer.
    """
    kept, found = [read_json(folder / FILE) for folder in folders], dict[str, dict]()
    for stem in stems:
        own = [one.get(stem, {}) for one in kept]
        modes = (THOROUGH, SHORT) if params.thorough else (SHORT, THOROUGH)
        more = {"most": True} if params.added(stem) else {}
        same = next((r[modes[0]] for r in own if modes[0] in r), None)
        other = next((r[modes[1]] | more for r in own if modes[1] in r), None)
        found |= {stem: took} if (took := same or (other if not (more and params.thorough) else None)) else {}
    return found


def sentence(stems: list[str], records: dict[str, dict], machine: str, rows: int) -> str:
    """How long a run will take in all, as far as that is known.

    Args:
        stems: the notebooks that will be executed, one after the other.
        records: of `known`.
        machine: what it runs on.
        rows: of these notebooks that are there already.
    """
    missing = [stem for stem in stems if stem not in records]
    if not records:
        return "how long it takes in all isn't known: no run of it is recorded yet"
    about = "at most" if any(took.get("most") for took in records.values()) else "about"
    of = f" for {len(records)} of {len(stems)} notebooks" if missing else " in all"
    where = sorted({took["machine"] for took in records.values()})
    text = f"{about} {duration(sum(took['seconds'] for took in records.values()))}{of}, as measured on "
    text += " and ".join(f"{name}{' (another machine)' * (name != machine)}" for name in where)
    text += f", less for {rows} rows that are there already" * bool(rows)
    return text + f"; how long {', '.join(missing)} takes isn't recorded" * bool(missing)
