"""The ledger of claims: every published figure that the study is about, beside ours, with a verdict by rule.

A claim (fluxnb.findings.published) is compared with the row that has its own configuration: what the source names, no
more and no less. Of several such rows it is the one that differs least, then the one with most rounds; where a source
leaves the setting open (“First Block Cache: 2× or more”), the fastest by the lower end of its interval. The rule:

    not run         no row has the configuration; the reason says what it takes
    not comparable  the row differs in model, steps, size, batch, GPU, number of GPUs, number format or settings, its
                    weights are random where they decide, the source leaves open what decides, or a schedule was made
                    from the published time itself; the reason says which of these
    undecided       alike in all, but a time of fewer than ten rounds or without an interval, or the interval reaches
                    across an end of what agrees
    reproduced      the whole interval lies where figures agree with the claim (`Claim.agreeing`)
    not reproduced  the whole interval lies outside

A plan's mark for a cache on FLUX.1-schnell leaves open with which images it is met, and is judged by rows of four steps
alone: those settings count that keep the quality of the embedded model distilled to four steps, each with the time that
as many computed steps take at full size (`_marked`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fluxnb import families
from fluxnb.findings import published
from fluxnb.findings.published import Claim
from fluxnb.findings.rows import LOSS_ALLOWED, ends, is_baseline, judged
from fluxnb.measure import stats
from fluxnb.models import embedded
from fluxnb.study.results import canonical
from fluxnb.study.row import FINISHED, Row

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "undecided"
NOT_COMPARABLE, NOT_RUN = "not comparable", "not run"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, UNDECIDED, NOT_COMPARABLE, NOT_RUN)
SCHNELL = "FLUX.1-schnell"
_NO_PART = ("dtype", "inputs")  # settings that are no technique's

Figure = tuple[float, float, float] | None  # ours with its interval; without one all three are alike


@dataclass(frozen=True)
class Entry:
    """A claim with ours beside it: `figure` is in its unit, of `n` rounds, with an interval if `sure`."""

    claim: Claim
    verdict: str
    reason: str
    figure: Figure = None
    sure: bool = False
    row: Row | None = None

    @property
    def ours(self) -> float | None:
        """Our figure."""
        return self.figure[0] if self.figure else None

    @property
    def text(self) -> str:
        """Our figure with its unit, its interval and the number of rounds."""
        if self.figure is None:
            return "–"
        value, low, high = self.figure
        places = ".3g" if self.claim.about == published.SECONDS else ".2f"
        within = f"{low:{places}}, {high:{places}}"
        told = f" [{within}]" if (self.row.n or 0) >= stats.LEAST else f", range {within.replace(', ', ' to ')}"
        told = told if self.sure and low != high else ""
        return f"{self.claim.said(value)}{told}, n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{self.row.n}"

    @property
    def setting(self) -> str:
        """What ours was measured with."""
        if self.row is None:
            return ""
        steps = f"{self.row.steps} steps"
        parts = (self.row.model, self.row.gpu, steps if steps not in self.row.label else "", self.row.label)
        return ", ".join(filter(None, parts))


@dataclass(frozen=True, eq=False)
class Timed:
    """A row, the settings of its techniques, and all rows that were timed with its baseline, that one among them."""

    row: Row
    parts: dict
    own: list[Timed]


def latest(rows: list[Row]) -> list[Row]:
    """The rows that a reader of the pages finds there.

    Those of the machine that a notebook was last run on, as figures of two machines aren't mixed; rows of the earlier
    format know no host, and machines of one kind count as one. Of what was measured again the newest: a stack by its
    name, whatever it is built of now; anything else by its settings. A baseline stays while rows were timed with it. A
    stack of full size without a name is one that nothing builds any more.
    """
    last: dict[str, Row] = {}  # the newest row of each notebook; of two alike the later one
    for row in rows:
        if row.notebook not in last or _when(row) >= _when(last[row.notebook]):
            last[row.notebook] = row
    here = [r for r in rows if (r.host, r.kind) == (last[r.notebook].host, last[r.notebook].kind)]
    here = [r for r in here if r.stack or r.weights != "random" or r.family != families.STACK.name]
    newest = {_part(row): row for row in sorted(here, key=lambda r: (r.status in FINISHED, _when(r)))}
    referred = {r.baseline for r in newest.values() if r.baseline}
    return [r for r in here if newest[_part(r)] is r or r.id in referred]


def _when(row: Row) -> str:
    return row.measured_at or ""


def _part(row: Row) -> tuple:
    """What is replaced when it is measured again."""
    name = (row.stack,) if row.stack else (row.technique, canonical(row.settings))
    at = (row.notebook, row.model, row.use_case, row.gpus, row.width, row.height, row.steps, row.batch)
    return (*name, *at, row.users, row.images_each, row.seed)


# --- verdicts ---------------------------------------------------------------------------------------------


def entries(rows: Iterable[Row]) -> list[Entry]:
    """Every claim with its verdict, in the order of published.csv.

    Args:
        rows: of all configurations, as `latest` leaves them.
    """
    whole = (r for r in rows if r.ok and r.model and r.steps and r.use_case == "txt2img")  # an image, from its text
    timed = _timed_with([r for r in whole if r.family != families.SERVING.name])
    return [_entry(claim, timed) for claim in published.claims()]


def counts(found: list[Entry]) -> dict[str, int]:
    """How many entries have each verdict."""
    return {name: sum(e.verdict == name for e in found) for name in VERDICTS}


def sentence(found: list[Entry]) -> str:
    """How many claims hold, and how many could not be put to the test."""
    n = counts(found)
    tried = n[REPRODUCED] + n[NOT_REPRODUCED]
    said = f"Of {len(found)} published claims, each counted once, {tried or 'none'} could be put to the test"
    said += f" ({n[REPRODUCED]} reproduced, {n[NOT_REPRODUCED]} not)" if tried else ""
    return f"{said}; {n[UNDECIDED]} are undecided, {n[NOT_COMPARABLE]} not comparable and {n[NOT_RUN]} not run."


def verdict(claim: Claim, low: float, high: float) -> str:
    """What an interval of ours, alike in all, says of a claim."""
    least, most = claim.agreeing
    if least <= low and high <= most:
        return REPRODUCED
    return NOT_REPRODUCED if high < least or low > most else UNDECIDED


def _entry(claim: Claim, timed: list[Timed]) -> Entry:
    if claim.configuration is None or claim.about == published.WORDS:
        return _worded(claim, timed)
    if claim.model == SCHNELL and (entry := _marked(claim, timed)):
        return entry
    found = []
    for candidate in filter(lambda c: _stands_for(c, claim), timed):
        row, over = candidate.row, _over(claim, candidate.own)
        if over is not row and (figure := _figure(claim, row, over)):
            differs = _differences(claim, candidate, over)
            low = figure[1] if claim.about == published.SPEEDUP else row.speedup or 0
            rank = (len(differs), -low if claim.anything else 0, -(row.n or 0), row.notebook)
            found.append((rank, differs, row, over, figure))
    if not found:
        return Entry(claim, NOT_RUN, _taken(claim))
    _, differs, row, over, figure = min(found, key=lambda one: one[0])
    sure = claim.about != published.SPEEDUP or all(is_baseline(r) or ends(r) for r in (row, over) if r)
    if differs:
        return Entry(claim, NOT_COMPARABLE, "; ".join(differs), figure, sure, row)
    few = _few(row, over or row) if claim.about in (published.SPEEDUP, published.SECONDS) else ""
    if few or not sure:
        return Entry(claim, UNDECIDED, few or "our row has no interval", figure, sure, row)
    said = verdict(claim, *figure[1:])
    agrees = "what agrees with it: " + _between(claim)
    whole = "ours" if figure[1] == figure[2] else "all of our interval"
    reason = {REPRODUCED: "", NOT_REPRODUCED: f"{whole} lies outside {agrees}"}
    return Entry(claim, said, reason.get(said, f"our interval reaches across an end of {agrees}"), figure, sure, row)


def _worded(claim: Claim, timed: list[Timed]) -> Entry:
    """Of what is said without a figure: that it can be done, which a row of it shows on the same class of GPU."""
    wanted = claim.configuration and _plain(claim.configuration).items()
    rows = [t.row for t in timed if wanted and wanted <= t.parts.items()]
    rows.sort(key=lambda row: _gpu(row.gpu) != _gpu(claim.gpu))
    if not rows:
        words = claim.about == published.WORDS and claim.note
        ours = f"fluxnb has {claim.family}, and no row of this configuration of it" if claim.family else ""
        return Entry(claim, NOT_RUN, words or ours or "fluxnb has no counterpart of it")
    if _gpu(rows[0].gpu) != _gpu(claim.gpu):
        why = f"GPU: {_gpu(claim.gpu)}, ours {_gpu(rows[0].gpu)}"
        return Entry(claim, NOT_COMPARABLE, why, row=rows[0])
    return Entry(claim, REPRODUCED, "a row of it ran", row=rows[0])


def _marked(claim: Claim, timed: list[Timed]) -> Entry | None:
    """A mark for FLUX.1-schnell by two rows: quality of the distilled stand-in, time at full size. None without them.

    A cache computes on the stand-in so many steps, and its quality there is what the mark asks of quality; of random
    weights as many are prescribed for the time. A format of numbers has its quality on the stand-in.
    """
    kept = [(t, lost) for t in timed if (lost := _lost(claim, t)) is not None]
    if not claim.anything:
        best = min(kept, key=lambda one: one[1], default=None) if claim.about == published.QUALITY else None
        return best and _of_quality(claim, *best)
    pairs = [(ours, theirs, lost, over) for theirs, lost in kept for ours, over in _as_many(claim, theirs, timed)]
    if claim.about != published.QUALITY:
        pairs = [pair for pair in pairs if _figure(claim, pair[0].row, pair[3])]
    if not pairs:
        return None
    if claim.about == published.QUALITY:
        marks = [c for c in published.claims() if (c.source, c.technique) == (claim.source, claim.technique)]
        least = next(c.low for c in marks if c.about == published.SPEEDUP and c.kind == published.CRITERION)
        fast = [pair for pair in pairs if (ends(pair[0].row) or (0,))[0] >= least]
        sure = [pair for pair in fast if not _few(pair[0].row)]
        if not sure:
            none, few = "" if fast else "no ", _few(*(pair[0].row for pair in fast or pairs))
            said = f"{none or 'a '}setting of it is {published.LEAST}{least:.2f}×, whatever it keeps"
            return Entry(claim, UNDECIDED if few else NOT_REPRODUCED, "; ".join(filter(None, (said, few))))
        ours, theirs, lost, _ = min(sure, key=lambda pair: pair[2])
        return _of_quality(claim, theirs, lost, f" at {ours.row.speedup:.2f}× of {ours.row.model}")
    good = [pair for pair in pairs if pair[2] <= LOSS_ALLOWED]
    ours, theirs, lost, over = max(good or pairs, key=lambda pair: (ends(pair[0].row) or (0,))[0])
    figure, row, few = _figure(claim, ours.row, over), ours.row, _few(ours.row)
    why = [f"{row.computed_steps:.0f} of {row.steps} steps computed, as {theirs.row.label} does on {theirs.row.model}"]
    why[0] += f", where adherence loses {lost:.0%}"
    if differs := _differences(replace(claim, unstated=""), ours, over):
        said = NOT_COMPARABLE
    elif few or not ends(row):
        said, differs = UNDECIDED, [few or "our row has no interval"]
    else:
        said = verdict(claim, *figure[1:]) if good else NOT_REPRODUCED
    return Entry(claim, said, "; ".join(why + differs), figure, True, row)


def _few(*rows: Row) -> str:
    """That rounds are too few for a verdict; "" where they are enough."""
    n = min(r.n or 0 for r in rows)
    said = f"n = {n}: no verdict rests on fewer than {stats.HEADLINE} rounds of one session"
    return said if n < stats.HEADLINE else ""


def _lost(claim: Claim, timed: Timed) -> float | None:
    """Which share of its baseline's adherence a row of the stand-in loses; None for what is no such row."""
    row, base = timed.row, next((t.row for t in timed.own if is_baseline(t.row)), None)
    if (row.model, row.steps) != (embedded.SCHNELL, claim.steps) or base is None or is_baseline(row):
        return None
    cache = claim.anything and row.family == claim.family and (row.computed_steps or row.steps) < row.steps
    if not (cache or (not claim.anything and timed.parts == _plain(claim.configuration))):
        return None
    return 1 - row.adherence / base.adherence if judged(row) and row.adherence is not None and base.adherence else None


def _as_many(claim: Claim, of: Timed, timed: list[Timed]) -> list[tuple[Timed, Row]]:
    """Schedules at full size of as many computed steps, rounded up, and the baselines that they are over."""
    found = []
    for t in timed:
        row, looks = t.row, t.parts.get("first_block", True)
        alike = (_model(row), row.weights, row.family) == (claim.model, "random", families.SCHEDULE.name)
        alike &= row.steps == claim.steps and not t.parts.keys() - {"mask", "first_block"}
        right = looks == (claim.family != families.TEACACHE.name)  # a reused step of TeaCache runs no block
        if alike and right and row.computed_steps == math.ceil(of.row.computed_steps - 1e-9):
            found += [(t, over) for over in [next((o.row for o in t.own if is_baseline(o.row)), None)] if over]
    return found


def _of_quality(claim: Claim, theirs: Timed, lost: float, at: str = "") -> Entry:
    """Whether what is lost on the stand-in is what may be."""
    said = REPRODUCED if lost <= LOSS_ALLOWED else NOT_REPRODUCED
    why = f"adherence of {theirs.row.label} on {theirs.row.model}{at}"
    return Entry(claim, said, why, (1 - lost,) * 3, True, theirs.row)


def _taken(claim: Claim) -> str:
    """What would make a row for it."""
    if claim.model == SCHNELL and (claim.anything or claim.about == published.QUALITY):
        own = f"a judged row of {claim.family or _listed(_plain(claim.configuration))} on {embedded.SCHNELL}"
        at = f", and as many computed steps timed on {claim.setting}" if claim.anything else ""
        return f"it takes {own}{at}"
    parts = ", ".join(filter(None, [claim.family, _listed(_plain(claim.configuration))]))
    beside = f", beside {claim.over} in one session" if _plain(claim.over_configuration) and claim.gpus == 1 else ""
    return f"it takes a row of {claim.setting}{f' with {parts}' if parts else ''}{beside}"


def _between(claim: Claim) -> str:
    least, most = (None if math.isinf(end) else claim.said(end) for end in claim.agreeing)
    return f"{least} to {most}" if least and most else f"{least} or more" if least else f"{most} or less"


# --- which row --------------------------------------------------------------------------------------------


def _timed_with(rows: list[Row]) -> list[Timed]:
    """Baselines are found by their id, those of rows of an earlier format by what they have in common."""
    every = [Timed(row, _plain(row.settings), []) for row in rows]
    places: dict[tuple, list[Timed]] = {}
    own: dict[Timed, list[Timed]] = {}
    for timed in every:
        if is_baseline(timed.row):
            places.setdefault(_place(timed.row), []).append(timed)
    known = {timed.row.id: timed for timed in every if timed.row.id}
    for timed in every:
        alike = [b for b in places.get(_place(timed.row), []) if b.parts.items() <= timed.parts.items()]
        base = timed if is_baseline(timed.row) else known.get(timed.row.baseline)
        base = base or max(alike, key=lambda b: len(b.parts), default=timed)
        own.setdefault(base, []).append(timed)
    return [Timed(t.row, t.parts, same) for same in own.values() for t in same]


def _place(row: Row) -> tuple:
    where = (row.notebook, row.gpu, row.gpus, row.host, row.session, row.model)
    return (*where, row.width, row.height, row.steps, row.batch)


def _plain(settings: dict) -> dict:
    """The settings that are a technique's; what isn't plain as text."""
    parts = {name: value for name, value in settings.items() if name not in _NO_PART}
    return {name: canonical(value) if isinstance(value, dict) else value for name, value in parts.items()}


def _stands_for(timed: Timed, claim: Claim) -> bool:
    """Whether it has all that the claim names and nothing else, or is the stack of its name.

    Random weights decide nothing, so they stand for no cache; for FLUX.1-schnell stands only itself, at its own steps.
    """
    row, wanted = timed.row, _plain(claim.configuration)
    if claim.model == SCHNELL and (_model(row), row.steps) != (SCHNELL, claim.steps):
        return False
    if row.stack == claim.technique:
        return True
    if row.weights == "random" and (claim.anything or "threshold" in wanted):
        return False
    named = is_baseline(row) if not wanted and not claim.anything else not claim.family
    return (named or claim.family in (row.family, row.technique)) and (claim.anything or timed.parts == wanted)


def _over(claim: Claim, own: list[Timed]) -> Row | None:
    """What ours is over, of the rows of one baseline: that baseline, or what the claim is over.

    None where there is no such row, and on several GPUs, where a row is over the same on one of them.
    """
    if not claim.over or claim.gpus > 1:
        return None
    wanted, dtype = _plain(claim.over_configuration), claim.over_configuration.get("dtype")
    among = {claim.over_family, families.BASELINE.name} | ({claim.family} if not wanted else set())
    found = [t.row for t in own if t.parts == wanted and t.row.family in among]
    return min(found, key=lambda r: r.setting("dtype") != dtype, default=None)


def _figure(claim: Claim, row: Row, over: Row | None) -> Figure:
    """Ours in the claim's unit; None where it wasn't measured."""
    if claim.about == published.SPEEDUP:
        mine, others = _speedup(row), (1.0, 1.0, 1.0) if claim.gpus > 1 else over and _speedup(over)
        return (mine[0] / others[0], mine[1] / others[2], mine[2] / others[1]) if mine and others else None
    if claim.about == published.SECONDS:
        ordered = sorted(row.samples or [])
        left = stats.left_out(len(ordered))
        return (row.latency_p50, ordered[left], ordered[-1 - left]) if ordered else None
    seen = judged(row) and row.weights != "random"
    value = {published.GIB: row.memory_peak_gib, published.QUALITY: row.ssim_min if seen else None}
    if claim.about == published.MEMORY and over and over.memory_peak_gib and row.memory_peak_gib:
        value[published.MEMORY] = row.memory_peak_gib / over.memory_peak_gib
    found = value.get(claim.about)
    return (found, found, found) if found else None


def _speedup(row: Row) -> Figure:
    """Over its baseline; a baseline is as fast as itself."""
    if is_baseline(row):
        return (1.0, 1.0, 1.0)
    return (row.speedup, *(ends(row) or (row.speedup, row.speedup))) if row.speedup else None


# --- what differs -----------------------------------------------------------------------------------------


def _differences(claim: Claim, timed: Timed, over: Row | None) -> list[str]:
    """What of ours is not as theirs, each in a few words."""
    row, mine, wanted = timed.row, timed.parts, _plain(claim.configuration)
    pairs = [
        ("model", claim.model, _model(row)),
        ("steps", claim.steps, row.steps),
        ("size", (claim.width, claim.height), (row.width, row.height)),
        ("batch", claim.batch, row.batch),
        ("GPU", _gpu(claim.gpu), _gpu(row.gpu)),
        ("GPUs", claim.gpus, row.gpus),
    ]
    if not claim.anything:
        name = families.NUMBER_FORMAT.name
        pairs.append((name, own := claim.configuration.get("dtype"), row.setting("dtype")))
        under = (claim.over_configuration.get("dtype"), over.setting("dtype")) if over is not None else (own, own)
        pairs += [(f"{name} of the baseline", *under)] if under != pairs[-1][1:] else []
    found = [f"{what}: {_said(theirs)}, ours {_said(ours)}" for what, theirs, ours in pairs if theirs != ours]
    also, lacks = mine.keys() - wanted.keys(), wanted.keys() - mine.keys()
    if "mask" in mine and "threshold" in lacks:
        found.append("our schedule was made from the published time at this threshold, so it can't confirm it")
        also, lacks = also - {"mask", "first_block"}, lacks - {"threshold"}
    if also and not claim.anything:
        found.append(f"ours has {_listed({k: mine[k] for k in also})} as well")
    if lacks:
        found.append(f"ours lacks {_listed({k: wanted[k] for k in lacks})}")
    if claim.unstated:
        found.append(f"the source does not say {claim.unstated}")
    return found


def _said(value) -> str:
    if isinstance(value, tuple):
        return "not said" if None in value else "×".join(map(str, value))
    return str(value or "not said")


def _model(row: Row) -> str:
    """The class of a row's model: what is FLUX.1's in size, or a folder or hub id by its name."""
    return (row.model or "").split("/")[-1].replace("flux-", "FLUX.1-").removesuffix("-random")


def _gpu(name: str | None) -> str:
    """The class of GPU: H100 of "H100 80GB" and of h100x2."""
    return re.sub(r"x\d+$", "", name or "").split(" ")[0].upper()


def _listed(settings: dict) -> str:
    words = [name.replace("_", " ") + ("" if value is True else f" {value}") for name, value in settings.items()]
    return ", ".join(sorted(words))
