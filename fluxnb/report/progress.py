"""progress.md of one configuration: the plans' checklists, ticked by committed rows, and what is still to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fluxnb import findings

ASKED = {2: 1.75, 4: 3.0, 8: 3.0}  # GPUs -> times as fast as one of them


@dataclass(frozen=True)
class Item:
    """A line of a checklist: `done` says whether rows show it, and what shows it; `why_not` what keeps it open."""

    text: str
    done: Callable[[list[dict]], str | None]
    why_not: Callable[[list[dict]], str | None] = lambda rows: None


def _rows(notebook: str, technique: str | None = None, least: int = 1, **equals) -> Callable[[list[dict]], str | None]:
    def done(rows):
        own = [r for r in rows if r["status"] == "ok" and r["notebook"] == notebook]
        own = [r for r in own if technique in (None, r["technique"])]
        own = [r for r in own if all(r[k] == v for k, v in equals.items())]
        return f"{len(own)} row{'s' * (len(own) > 1)} of {notebook}" if len(own) >= least else None

    return done


def _reached(notebook: str, technique: str, least: float) -> Callable[[list[dict]], str | None]:
    """Whether a technique is that many times faster while it keeps adherence."""

    def done(rows):
        own = [r for r in rows if r["notebook"] == notebook and r["status"] == "ok" and r["adherence"] is not None]
        baselines = {(r["model"], r["steps"]): r for r in own if r["technique"] == "baseline"}
        kept = [
            r
            for r in own
            if r["technique"] == technique
            and r["speedup"] is not None
            and (first := baselines.get((r["model"], r["steps"]))) is not None
            and findings.keeps_adherence(r, first)
        ]
        best = max(kept, key=lambda r: r["speedup"], default=None)
        if best is None or best["speedup"] < least:
            return None
        return f"{best['speedup']:.2f}× with {best['computed_steps']:.3g} of {best['total_steps']} steps"

    return done


def _loss(rows):
    """Whether some accelerated image loses at most 5 % of adherence: what the plans call quality."""
    own = [r for r in rows if r["status"] == "ok" and r["adherence"] is not None and r["speedup"] is not None]
    baseline = next((r for r in own if r["technique"] == "baseline" and r["notebook"] == "07_combined_cache"), None)
    kept = [r for r in own if r["notebook"] == "07_combined_cache" and r["technique"] not in ("baseline",)]
    kept = [r for r in kept if baseline and findings.keeps_adherence(r, baseline)]
    best = max(kept, key=lambda r: r["speedup"], default=None)
    if best is None or best["speedup"] <= 1:
        return None
    return f"adherence within {findings.LOSS_ALLOWED:.0%} up to {best['speedup']:.2f}×"


def _memory(rows):
    own = {r["technique"]: r for r in rows if r["notebook"] == "13_final_stack" and r["weights"] == "random"}
    if not {"baseline", "quantization"} <= own.keys() or not own["quantization"]["memory_load_gib"]:
        return None
    return f"{own['quantization']['memory_load_gib']:.3g} GiB loaded, {own['baseline']['memory_load_gib']:.3g} before"


def _formats(rows):
    names = {r["technique"] for r in rows if r["notebook"] == "04_quantization" and r["status"] == "ok"}
    names -= {"baseline"}
    return f"{len(names)} formats in 04_quantization" if len(names) >= 3 else None


def _divided(rows):
    """Whether one image on several GPUs is there as much sooner as was asked for on so many."""
    found = [r for r in findings.divided(rows) if r["technique"] == "context parallel" and r["speedup"]]
    best = max(found, key=lambda r: r["speedup"], default=None)
    if best is None or best["speedup"] < ASKED.get(best["gpus"], math.inf):
        return None
    return f"{best['speedup']:.2f}× on {best['gpus']}"


def _parallel_vae(rows):
    """By itself or in a stack."""
    count = sum("parallel" in str(r["settings"].get("vae")) for r in findings.divided(rows))
    return f"{count} row{'s' * (count > 1)} of 11_parallel" if count else None


def _alike(rows):
    """Whether all ranks decided alike under every cache."""
    proofs = [r["proof"] for r in rows if r["status"] == "ok" and r["notebook"] == "11_parallel" and r["proof"]]
    decided = [p["decisions"] for p in proofs if "decisions" in p]
    alike = decided and all(d == "identical on all ranks" for d in decided)
    return f"under {len(decided)} cache{'s' * (len(decided) > 1)}" if alike else None


def _evaluated(text: str, pattern: str) -> Item:
    """A technique, by part of its name: done when it ran; where it can't, its row says why."""

    def done(rows):
        ok = [r for r in rows if pattern in r["technique"] and r["status"] == "ok"]
        return f"{len(ok)} row{'s' if len(ok) > 1 else ''}" if ok else None

    def why_not(rows):
        reason = next((r["reason"] for r in rows if pattern in r["technique"] and r["reason"]), None)
        return reason and f"can't run here: {reason}"

    return Item(text, done, why_not)


def _batches(rows):
    own = [r for r in rows if r["status"] == "ok" and r["notebook"] == "04_quantization" and r["batch"]]
    sizes = sorted({r["batch"] for r in own})
    return f"batches of {', '.join(map(str, sizes))}" if len(sizes) > 1 else None


CHECKLISTS: dict[str, list[Item]] = {
    "First Block Cache and TeaCache": [
        Item("Environment set up", _rows("00_environment")),
        Item("First Block Cache tested", _rows("05_first_block_cache", "First Block Cache", 3)),
        Item("TeaCache tested", _rows("06_teacache", "TeaCache", 3)),
        Item("Both together tested", _rows("07_combined_cache", "combined cache", 3)),
        Item("First Block Cache 2× or more", _reached("05_first_block_cache", "First Block Cache", 2.0)),
        Item("TeaCache 1.3× or more", _reached("06_teacache", "TeaCache", 1.3)),
        Item("Both together 3× or more", _reached("07_combined_cache", "combined cache", 3.0)),
        Item("Quality loss under 5 %", _loss),
        Item("Thresholds optimised", _rows("07_combined_cache", "combined cache", 10)),
        Item("Cache on a 4-bit transformer", _rows("08_quantized_cache", "First Block Cache")),
    ],
    "Quantization": [
        Item("Baseline of number formats", _rows("01_baseline")),
        Item("Several formats tested", _formats),
        _evaluated("FP8 per row", "TorchAO FP8 per row"),
        _evaluated("2:4 sparsity evaluated", "sparse"),
        Item("Memory measured", _memory),
        Item("Batch sizes tested", _batches),
    ],
    "The stack": [
        Item("Attention kernels", _rows("02_attention", least=3)),
        Item("Compilation", _rows("03_compile", "torch.compile")),
        Item("VAE options", _rows("09_vae", least=2)),
        Item("Use cases", _rows("10_use_cases", least=6)),
        Item("Everything together", _rows("13_final_stack", least=3)),
    ],
    "Scale": [Item("Concurrent users", _rows("12_load"))],
}
SEVERAL: dict[str, list[Item]] = {  # of a configuration of several GPUs, which runs the notebooks of these only
    "One image on several GPUs": [
        Item("Environment set up", _rows("00_environment")),
        Item("Context parallelism", _rows("11_parallel", "context parallel", weights="random")),
        Item("1.75× or more on 2 GPUs, 3× or more on 4 and on 8", _divided),
        Item("xDiT", _rows("11_parallel", "xDiT", weights="random")),
        Item("FSDP", _rows("11_parallel", "FSDP", weights="random")),
        Item("Parallel VAE", _parallel_vae),
        Item("Caches decide alike everywhere", _alike),
    ],
    "Many images": [
        Item("Replicas", _rows("11_parallel", "replicas", weights="random")),
        Item("Concurrent users", _rows("12_load")),
    ],
}


def cannot_run(rows: list[dict]) -> dict[str, str]:
    """Techniques that no row of a configuration shows to run, each with the reason of the last that tried.

    What the small model can't have (5 heads on 4 GPUs, say) is not counted where a full-size one was measured.
    """
    large = any(r["model"] and r["weights"] == "random" for r in rows)
    ran = {r["technique"] for r in rows if r["status"] == "ok"}
    failed = [r for r in rows if r["status"] != "ok" and not (large and r["weights"] == "trained")]
    return {r["technique"]: r["reason"] for r in failed if r["technique"] not in ran}


def progress_md(gpu: str, rows: list[dict], pages: list, several: bool = False) -> str:
    """The file's text.

    Args:
        gpu: name of the configuration.
        several: it has several GPUs, and a list of its own.
        rows: of its results.csv.
        pages: fluxnb.report.render.Page of every notebook.
    """
    chosen = SEVERAL if several else CHECKLISTS
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
    lines += [f"- run {p.stem}" for p in pages if p.status == "missing"] or ["- every notebook has run"]
    return "\n".join(lines) + "\n"
