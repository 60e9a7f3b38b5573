"""progress.md of one configuration: the plans' checklists, ticked by committed rows, and what is still to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fluxnb import families, notebooks, stacks
from fluxnb.families import Family
from fluxnb.findings import ledger, published
from fluxnb.findings.rows import divided, finished, is_baseline, of
from fluxnb.study.row import Row

OWN_DIVISIONS = (*stacks.SET_OFF, *stacks.recorded(quantized=False))  # the study's ways, unquantized
PARALLEL_VAE = ("parallel", "parallel + compiled")  # the setting `vae`
FP8_ROW = ("torchao fp8 row",)  # the setting `quantization`
SPARSE = ("int8, 2:4 sparse", "torchao fp8 row, 2:4 sparse")

Said = Callable[[list[Row]], str | None]  # what rows show of an item; None where they don't


@dataclass(frozen=True)
class Item:
    """A line of a checklist: `done` says whether rows show it, and what shows it; `why_not` what keeps it open."""

    text: str
    done: Said
    why_not: Said = lambda rows: None


def _counted(found: list, what: str = "row") -> str | None:
    """How many of what there are; None for none."""
    return f"{len(found)} {what}{'s' * (len(found) > 1)}" if found else None


def _rows(notebook: str, *which: Family | str, least: int = 1, **equals) -> Said:
    """Whether a notebook has as many rows, of families or of stacks by name if they are given."""

    def done(rows):
        own = [r for r in finished(rows) if r.notebook == notebook]
        own = [r for r in (of(own, *which) if which else own) if all(getattr(r, k) == v for k, v in equals.items())]
        return f"{_counted(own)} of {notebook}" if len(own) >= least else None

    return done


def _criteria(rows: list[Row]) -> list[Item]:
    """The plans' pass marks: each is a claim of the ledger, and judged by its rules."""

    def item(entry: ledger.Entry) -> Item:
        text = f"{entry.claim.technique}: {entry.claim.text} ({entry.claim.setting})"
        shown = f"{entry.text}, {entry.setting}" if entry.verdict == ledger.REPRODUCED else None
        return Item(text, lambda rows: shown, lambda rows: f"{entry.verdict}: {entry.reason}")

    return [item(e) for e in ledger.entries(rows) if e.claim.kind == published.CRITERION]


def _memory(rows):
    own = [r for r in rows if r.notebook == notebooks.FINAL_STACK and r.weights == "random" and r.memory_load_gib]
    before, after = next(filter(is_baseline, own), None), next(iter(of(own, stacks.QUANTIZED)), None)
    return before and after and f"{after.memory_load_gib:.3g} GiB loaded, {before.memory_load_gib:.3g} before"


def _formats(rows):
    own = of((r for r in finished(rows) if r.notebook == notebooks.QUANTIZATION), families.QUANTIZATION)
    names = {r.technique for r in own}
    return f"{len(names)} formats in {notebooks.QUANTIZATION}" if len(names) >= 3 else None


def _parallel_vae(rows):
    """By itself or in a stack."""
    own = [r for r in divided(rows) if r.setting("vae") in PARALLEL_VAE]
    return f"{_counted(own)} of {notebooks.PARALLEL}" if own else None


def _alike(rows):
    """Whether all ranks decided alike under every cache."""
    decided = [r.shown("decisions") for r in finished(rows) if r.notebook == notebooks.PARALLEL]
    decided = [d for d in decided if d is not None]
    alike = all(d == "identical on all ranks" for d in decided)
    return f"under {_counted(decided, 'cache')}" if decided and alike else None


def _evaluated(text: str, formats: tuple[str, ...]) -> Item:
    """Number formats of weights by themselves: done when one ran; where none can, a row says why."""

    def own(rows):
        return [r for r in of(rows, families.QUANTIZATION) if r.setting("quantization") in formats]

    def why_not(rows):
        reason = next((r.reason for r in own(rows) if r.reason), None)
        return reason and f"can't run here: {reason}"

    return Item(text, lambda rows: _counted(finished(own(rows))), why_not)


def _batches(rows):
    sizes = sorted({r.batch for r in finished(rows) if r.notebook == notebooks.QUANTIZATION and r.batch})
    return f"batches of {', '.join(map(str, sizes))}" if len(sizes) > 1 else None


CHECKLISTS: dict[str, list[Item]] = {
    "First Block Cache and TeaCache": [
        Item("Environment set up", _rows(notebooks.ENVIRONMENT)),
        Item("First Block Cache tested", _rows(notebooks.FIRST_BLOCK, families.FIRST_BLOCK, least=3)),
        Item("TeaCache tested", _rows(notebooks.TEACACHE, families.TEACACHE, least=3)),
        Item("Both together tested", _rows(notebooks.COMBINED, families.COMBINED, least=3)),
        Item("Thresholds optimised", _rows(notebooks.COMBINED, families.COMBINED, least=10)),
        Item("Cache on a 4-bit transformer", _rows(notebooks.QUANTIZED_CACHE, families.FIRST_BLOCK)),
    ],
    "Quantization": [
        Item("Baseline of number formats", _rows(notebooks.NUMBER_FORMATS)),
        Item("Several formats tested", _formats),
        _evaluated("FP8 per row", FP8_ROW),
        _evaluated("2:4 sparsity evaluated", SPARSE),
        Item("Memory measured", _memory),
        Item("Batch sizes tested", _batches),
    ],
    "The stack": [
        Item("Attention kernels", _rows(notebooks.ATTENTION, least=3)),
        Item("Compilation", _rows(notebooks.COMPILATION, families.COMPILATION, *stacks.COMPILED)),
        Item("VAE options", _rows(notebooks.VAE, least=2)),
        Item("Use cases", _rows(notebooks.USE_CASES, least=6)),
        Item("Everything together", _rows(notebooks.FINAL_STACK, least=3)),
    ],
    "Scale": [Item("Concurrent users", _rows(notebooks.LOAD))],
}
SEVERAL: dict[str, list[Item]] = {  # of a configuration of several GPUs, which runs the notebooks of these only
    "One image on several GPUs": [
        Item("Environment set up", _rows(notebooks.ENVIRONMENT)),
        Item("Context parallelism", _rows(notebooks.PARALLEL, *OWN_DIVISIONS, weights="random")),
        Item("xDiT", _rows(notebooks.PARALLEL, stacks.XDIT_ULYSSES, stacks.XDIT_RING, weights="random")),
        Item(stacks.FSDP, _rows(notebooks.PARALLEL, stacks.FSDP, weights="random")),
        Item("Parallel VAE", _parallel_vae),
        Item("Caches decide alike everywhere", _alike),
    ],
    "Many images": [
        Item("Replicas", _rows(notebooks.PARALLEL, families.REPLICAS, stacks.REPLICAS, weights="random")),
        Item("Concurrent users", _rows(notebooks.LOAD)),
    ],
}


def cannot_run(rows: list[Row]) -> dict[str, str]:
    """Techniques and stacks that no row of a configuration shows to run, each with the reason of the last that tried.

    What the small model can't have (5 heads on 4 GPUs, say) is not counted where a full-size one was measured.
    """
    large = any(r.model and r.weights == "random" for r in rows)
    ran = {_called(r) for r in finished(rows)}
    failed = [r for r in rows if not r.ok and not (large and r.weights == "trained")]
    return {_called(r): r.reason for r in failed if _called(r) not in ran}


def _called(row: Row) -> str:
    """What can run or not: a technique, or several together by their name."""
    return (row.family == families.STACK.name and row.stack) or row.technique


def progress_md(gpu: str, rows: list[Row], pages: list, several: bool = False) -> str:
    """The file's text.

    Args:
        gpu: name of the configuration.
        several: it has several GPUs, and a list of its own.
        rows: of its results.csv.
        pages: fluxnb.report.pages.Page of every notebook.
    """
    chosen = SEVERAL if several else CHECKLISTS | {"What the plans ask for": _criteria(rows)}
    lists = {name: [(item, item.done(rows)) for item in items] for name, items in chosen.items()}
    every = [evidence for items in lists.values() for _, evidence in items]
    reached = sum(bool(e) for e in every) / len(every)
    lines = [f"# Progress: {gpu}", "", f"## Overall progress: {reached:.0%}", ""]
    lines += ["Written by `make report` from results.csv: a box is ticked when a row shows it.", ""]
    for name, items in lists.items():
        lines += [f"### {name}", ""]
        for item, evidence in items:
            said = evidence or item.why_not(rows)
            lines.append(f"- [{'x' if evidence else ' '}] {item.text}" + (f" ({said})" if said else ""))
        lines.append("")
    troubled = [f"- {page.title}: {page.problem}" for page in pages if page.status in ("failed", "interrupted")]
    lines += ["### Issues and blockers", ""]
    lines += troubled + [f"- {technique}: {reason}" for technique, reason in cannot_run(rows).items()] or ["- none"]
    lines += ["", "### Next steps", ""]
    again = {"missing": "run", "unshown": "make the page again of"}
    lines += [f"- {again[p.status]} {p.stem}" for p in pages if p.status in again] or ["- every notebook has run"]
    return "\n".join(lines) + "\n"
