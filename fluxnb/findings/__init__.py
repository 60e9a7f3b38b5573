"""What the rows say, in words and tables: computed, so that another GPU gives another sentence."""

from __future__ import annotations

import math

from fluxnb.findings import published
from fluxnb.measure import quality
from fluxnb.techniques import precision
from fluxnb.world import probe

LOSS_ALLOWED = 0.05  # the plans' criterion: quality within 5 % of the uncached model


def baseline_of(rows: list[dict]) -> dict:
    """The row of the baseline."""
    return next(r for r in rows if r["technique"] == "baseline")


def of(rows: list[dict], technique: str) -> list[dict]:
    """The rows of one technique."""
    return [r for r in rows if r["technique"] == technique]


def keeps_adherence(row: dict, baseline: dict) -> bool:
    """Whether prompt adherence is within 5 % of the baseline's (relative); True where it can't be measured."""
    if row["adherence"] is None or baseline["adherence"] is None:
        return True
    return row["adherence"] >= (1 - LOSS_ALLOWED) * baseline["adherence"]


def psnr_or_infinite(row: dict) -> float:
    """Mean PSNR in dB; infinite where every image is identical."""
    return math.inf if row["psnr_db"] is None else row["psnr_db"]


def share(value: float | None) -> str:
    """A share as percent, or a dash."""
    return "–" if value is None else f"{value:.0%}"


def control_psnr(rows: list[dict], at: str, value: float, control: str = "fewer steps") -> float | None:
    """PSNR of the fewer-steps control where its column `at` (computed_steps, speedup) has this value.

    Between its two nearest rows, linearly; None outside of them.
    """
    points = sorted((r[at], r["psnr_db"]) for r in of(rows, control) if r["psnr_db"] is not None)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= value <= x1 and x0 < x1:
            return y0 + (y1 - y0) * (value - x0) / (x1 - x0)
    return None


def against_control(rows: list[dict], technique: str, at: str, control: str = "fewer steps") -> list[float]:
    """How many dB each setting of a technique is above a control, at equal computed steps or equal speedup."""
    pairs = [(r["psnr_db"], control_psnr(rows, at, r[at], control)) for r in of(rows, technique)]
    return [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]


def interval_sentence(rows: list[dict], technique: str) -> str:
    """Whether looking beats not looking: a technique beside a fixed interval at equal hit rate."""
    gaps = against_control(rows, technique, "computed_steps", "fixed interval")
    if not gaps:
        return f"no setting of {technique} computes as many steps as a fixed interval here."
    mean = sum(gaps) / len(gaps)
    where = "level with" if abs(mean) < 0.05 else f"{abs(mean):.1f} dB {'above' if mean > 0 else 'below'}"
    return (
        f"at equal hit rate, {technique} is {where} a fixed interval, which doesn't look ({min(gaps):+.1f} to "
        f"{max(gaps):+.1f} dB over {len(gaps)} setting{'s' if len(gaps) > 1 else ''})."
    )


def cache_sentence(rows: list[dict], technique: str) -> str:
    """The result in one breath: the fastest setting that keeps quality, and how it stands to fewer steps."""
    baseline, cached = baseline_of(rows), of(rows, technique)
    kept = [r for r in cached if keeps_adherence(r, baseline) and psnr_or_infinite(r) >= 30]
    best = max(kept or cached, key=lambda r: r["speedup"])
    quality_words = quality.format_psnr(best["psnr_db"], best["psnr_identical"] or 0)
    sentence = (
        f"{best['label']} makes an image **{best['speedup']:.2f} times** faster "
        f"([{best['speedup_ci_low']:.2f}, {best['speedup_ci_high']:.2f}], n = {best['n']}), computing "
        f"{best['computed_steps']:.1f} of {best['total_steps']} steps, at {quality_words}"
    )
    if best["adherence"] is not None:
        sentence += f" and {best['adherence']:.1%} adherence (uncached {baseline['adherence']:.1%})"
    sentence += " — the fastest setting above 30 dB that keeps adherence within 5 %." if kept else "."
    for at, words in (("computed_steps", "computed steps"), ("speedup", "time")):
        if gaps := against_control(rows, technique, at):
            mean = sum(gaps) / len(gaps)
            sentence += (
                f" At equal {words} it is {abs(mean):.1f} dB {'above' if mean >= 0 else 'below'} simply using fewer "
                f"steps, on average over its settings ({min(gaps):+.1f} to {max(gaps):+.1f} dB)."
            )
    return sentence


def frontier_alt(rows: list[dict], technique: str) -> str:
    """What the frontier chart shows, in words."""

    def points(chosen):
        return "; ".join(
            f"{r['label']}: {r['speedup']:.2f} times, {quality.format_psnr(r['psnr_db'], r['psnr_identical'] or 0)}"
            for r in chosen
        )

    others = [name for name in dict.fromkeys(r["technique"] for r in rows) if name not in (technique, "baseline")]
    return " ".join(["Speedup against PSNR."] + [f"{name}: {points(of(rows, name))}." for name in (technique, *others)])


def under_image(reference, image, prompt: str | None) -> str:
    """The caption of an image in a grid: PSNR against the reference, and adherence to the prompt if one is given."""
    words = quality.format_psnr(quality.psnr(reference, image))
    found = probe.adherence([prompt], [image])[0] if prompt else None
    return words if found is None else f"{words}, {share(found)}"


def computed_shares(rows: list[dict]) -> dict[float, float]:
    """Threshold -> share of steps computed."""
    return {r["settings"]["threshold"]: r["computed_steps"] / r["total_steps"] for r in rows}


def agreement_sentence(ours: dict[float, float], theirs: dict[float, float]) -> str:
    """How far two curves of shares are apart, in percentage points."""
    gaps = {t: 100 * (ours[t] - theirs[t]) for t in theirs}
    worst = max(gaps, key=lambda t: abs(gaps[t]))
    mean = sum(map(abs, gaps.values())) / len(gaps)
    here, there = (", ".join(f"{100 * curve[t]:.0f}" for t in theirs) for curve in (ours, theirs))
    return (
        f"share of steps computed {here} % at thresholds {', '.join(f'{t:g}' for t in theirs)}, beside a published "
        f"{there} % of the time: {mean:.0f} points apart on average, at most {abs(gaps[worst]):.0f} (at {worst:g})."
    )


def cache_table(rows: list[dict]):
    """Every setting with its latency, steps and quality, as a data frame."""
    import pandas as pd

    lines = []
    for r in rows:
        line = {
            "setting": r["label"],
            "first": r["first_s"],
            "second": (r["samples"] or [None])[0],
            "p50": r["latency_p50"],
            "p90": r["latency_p90"],
            "n": r["n"],
            "speedup": r["speedup"],
            "low": r["speedup_ci_low"],
            "high": r["speedup_ci_high"],
            "computed steps": r["computed_steps"],
            "steps": r["total_steps"],
        }
        if r["weights"] == "trained":
            line |= {
                "PSNR": r["psnr_db"],
                "worst": r["psnr_min_db"],
                "identical": r["psnr_identical"],
                "SSIM": r["ssim"],
                "adherence": r["adherence"],
                "worst adherence": r["adherence_min"],
            }
        lines.append(line)
    return pd.DataFrame(lines).set_index("setting")


PRESETS = {  # name -> (least mean PSNR in dB, the plan's threshold, the plan's expected speedup)
    "conservative": (40.0, 0.05, 1.5),
    "balanced": (30.0, 0.12, 2.0),
    "aggressive": (0.0, 0.2, 2.5),
}


def presets(rows: list[dict], technique: str):
    """The plan's three presets, derived: the fastest setting that keeps the preset's quality."""
    import pandas as pd

    baseline, lines = baseline_of(rows), []
    for name, (floor, planned, expected) in PRESETS.items():
        fitting = [r for r in of(rows, technique) if psnr_or_infinite(r) >= floor and keeps_adherence(r, baseline)]
        best = max(fitting, key=lambda r: r["speedup"], default=None)
        at_plan = next((r for r in of(rows, technique) if r["settings"]["threshold"] == planned), None)
        lines.append(
            {
                "preset": name,
                "threshold": best and best["settings"]["threshold"],
                "speedup": best and best["speedup"],
                "computed steps": best and best["computed_steps"],
                "PSNR": best and best["psnr_db"],
                "adherence": best and best["adherence"],
                "plan's threshold": planned,
                "plan's expectation": expected,
                "measured there": at_plan and at_plan["speedup"],
            }
        )
    return pd.DataFrame(lines).set_index("preset")


def hit_cost_sentence(rows: list[dict]) -> str:
    """What a reused step costs as a share of a computed one: least squares of the denoising time.

    The time is taken as computed steps times one cost plus reused steps times another; nothing for fewer than
    three schedules.
    """
    import numpy as np

    computed = np.array([r["computed_steps"] for r in rows], dtype=float)
    reused = np.array([r["total_steps"] for r in rows], dtype=float) - computed
    if len(rows) < 3 or not reused.any():
        return ""
    times = np.array([r["denoise_s"] for r in rows])
    (step, hit), *_ = np.linalg.lstsq(np.stack((computed, reused), axis=1), times, rcond=None)
    return (
        f"A computed step takes {1e3 * step:.3g} ms and a reused one {hit / step:.1%} of that "
        f"(least squares over {len(rows)} schedules)."
    )


CRITERIA = {"First Block Cache": 2.0, "TeaCache": 1.3, "combined cache": 3.0}  # the plan's least speedups


def fastest_keeping(rows: list[dict], technique: str) -> dict | None:
    """The fastest setting of a technique with adherence within 5 % of the baseline's; None if there is none."""
    baseline = baseline_of(rows)
    return max(
        (r for r in of(rows, technique) if keeps_adherence(r, baseline)), key=lambda r: r["speedup"], default=None
    )


def criteria_sentence(rows: list[dict]) -> str:
    """The plan's criteria for speed at adherence within 5 %, each met or not, in one run."""
    parts = []
    for technique, least in CRITERIA.items():
        best = fastest_keeping(rows, technique)
        if best is None:
            parts.append(f"{technique}: no setting keeps adherence within 5 %")
            continue
        verdict = "met" if best["speedup"] >= least else "not met"
        parts.append(
            f"{technique} {best['speedup']:.2f}× (asked: {least:g}×, {verdict}; {best['label']}, "
            f"{quality.format_psnr(best['psnr_db'], best['psnr_identical'] or 0)})"
        )
    return "Fastest settings with adherence within 5 % of the uncached model: " + "; ".join(parts) + "."


def combined_sentence(rows: list[dict], floor: float = 35.0) -> str:
    """Whether combining the two gates pays: the fastest setting above a floor of quality, of each kind."""
    kinds = ("combined cache", "First Block Cache", "TeaCache", "fixed interval", "fewer steps")
    best = {}
    for kind in kinds:
        fitting = [r for r in of(rows, kind) if psnr_or_infinite(r) >= floor]
        if fitting:
            best[kind] = max(fitting, key=lambda r: r["speedup"])
    if "combined cache" not in best:
        return f"No combined setting stays above {floor:g} dB."
    together = best.pop("combined cache")
    words = ", ".join(f"{kind} {r['speedup']:.2f}× ({r['label']})" for kind, r in best.items())
    faster = [kind for kind, r in best.items() if r["speedup"] >= together["speedup"]]
    if not faster:
        verdict = "combining pays"
    elif set(faster) & {"First Block Cache", "TeaCache"}:
        verdict = "combining doesn't pay"
    else:
        verdict = f"combining beats either cache alone, and {' and '.join(faster)} beat it"
    return (
        f"{verdict}: above {floor:g} dB, {together['label']} is the fastest combination with "
        f"**{together['speedup']:.2f}×** ([{together['speedup_ci_low']:.2f}, {together['speedup_ci_high']:.2f}], "
        f"{together['computed_steps']:.1f} of {together['total_steps']} steps, {together['psnr_db']:.1f} dB); alone or "
        f"as controls: {words or 'nothing stays above it'}."
    )


def steps_of_work(traces: list[dict], blocks: int) -> float:
    """The blocks that ran for an image, on average, in steps of `blocks` each: a reused step may have run one."""
    ran = [sum(1.0 if at is None else at == "residual" and 1 / blocks for at in t["reused_at"]) for t in traces]
    return sum(ran) / len(ran)


def best_at_equal_steps(rows: list[dict]):
    """For each number of steps of the control: the best cache setting that computes at most one step more."""
    import pandas as pd

    caches = [
        r for r in rows if r["technique"] in ("combined cache", "First Block Cache", "TeaCache", "fixed interval")
    ]
    second = {r["steps"]: r["psnr_db"] for r in of(rows, "fewer steps, DPM-Solver++")}
    lines = []
    for control in sorted(of(rows, "fewer steps"), key=lambda r: -r["steps"]):
        near = [r for r in caches if r["psnr_db"] is not None and r["computed_steps"] <= control["steps"]]
        best = max(near, key=lambda r: r["psnr_db"], default=None)
        if best is None or control["psnr_db"] is None:
            continue
        lines.append(
            {
                "steps": control["steps"],
                "best cache": best["label"],
                "computed": best["computed_steps"],
                "cache PSNR": best["psnr_db"],
                "cache worst": best["psnr_min_db"],
                "Euler PSNR": control["psnr_db"],
                "Euler worst": control["psnr_min_db"],
                "gain": best["psnr_db"] - control["psnr_db"],
                "gain, worst": best["psnr_min_db"] - control["psnr_min_db"],
                "DPM-Solver++ PSNR": second.get(control["steps"]),
            }
        )
    return pd.DataFrame(lines).set_index("steps")


def spread_sentence(traces: dict[str, list[dict]]) -> str:
    """How far the decisions of a gate differ between images: a gate that doesn't, acts like a schedule."""
    parts = []
    for label, found in traces.items():
        counts = [t["mask"].count("1") for t in found]
        masks = len({t["mask"] for t in found})
        hit_rate = 1 - sum(counts) / sum(len(t["mask"]) for t in found)
        parts.append(
            f"{label}: hit rate {hit_rate:.0%}, {min(counts)} to {max(counts)} computed, {masks} different masks"
        )
    images = len(next(iter(traces.values())))
    return f"over {images} images, " + "; ".join(parts) + "."


def engine_sentence(rows: list[dict]) -> str:
    """What the engine costs on a computed step, and what a reused step costs, as shares of a computed step."""
    plain, looks, first, none = (r["denoise_s"] for r in rows)
    n = rows[0]["steps"]
    step = plain / n
    reused = {"with the first block": first, "without any block": none}
    words = ", ".join(f"{name} {(seconds - step) / (n - 1) / step:.1%}" for name, seconds in reused.items())
    return (
        f"a computed step takes {1e3 * step:.3g} ms; looking at it costs {(looks - plain) / plain:+.1%}; "
        f"a reused step costs {words} of a computed one."
    )


# --- techniques of one image: matrices, gains, recommendations --------------------------------------------

UNITS = {"first": "s", "p50": "s", "alone": "s", "per step": "ms", "load": "GiB", "peak": "GiB", "PSNR": "dB"}
LOSSLESS = 40.0  # dB of mean PSNR from which a difference is taken as lossless
ABOUT = 1.02  # times as much memory is about as much
CARDS = (16, 24, 48, 80)  # GiB
LEAST_PEAK = 0.1  # GiB: what lies below is chance
SPARE = 0.05  # share of a card that isn't counted on


def number(row: dict) -> str | None:
    """The number format that a row's matrix products are done in; None where no ceiling stands for it."""
    quantization = row["settings"].get("quantization", "")
    if "sparse" in quantization:
        return None
    for kind, name in (("torchao fp8 row", "fp8"), ("torchao fp8 tensor", "fp8"), ("torchao int8", "int8")):
        if quantization == kind:
            return name
    return row["settings"].get("dtype")  # weight-only formats compute in the model's own


def of_limit(row: dict, ceilings, work) -> float | None:
    """Share of the limit that denoising reaches: what its computed steps take at least, by what they took.

    Args:
        ceilings, work: of fluxnb.measure.ceilings.
    """
    if row["status"] != "ok" or not row["denoise_s"] or row["batch"] != 1:
        return None
    step_s = ceilings.step_s(work, number(row))
    return step_s and row["computed_steps"] * step_s / row["denoise_s"]


def step_parts(rows: list[dict], ceilings, work):
    """Where one step goes, by kind of kernel, with the limits of products and attention; None without profiles."""
    import pandas as pd

    lines = []
    for r in rows:
        if r["status"] != "ok" or not (parts := (r["proof"] or {}).get("step_ms")):
            continue
        step_ms = 1e3 * r["denoise_s"] / r["steps"]
        product = ceilings.products.get(number(r))
        lines.append(
            {
                "setting": r["label"],
                "one step": step_ms,
                "products": parts["matrix products"],
                "at least": product and 1e3 * work.products / product,
                "attention": parts["attention"],
                "at least ": 1e3 * work.attention / ceilings.attention,
                "the rest": parts["the rest"],
                "no kernel": max(0.0, step_ms - sum(parts.values())),
            }
        )
    return pd.DataFrame(lines).set_index("setting") if lines else None


def matrix(rows: list[dict], ceilings=None, work=None):
    """Every technique with its time, memory, quality and proof, or the reason why there is none.

    With ceilings and work (fluxnb.measure.ceilings) also the share of the limit that it reaches; where a cache leaves
    steps out, also how many are computed.
    """
    import pandas as pd

    lines, cached = [], any((r["computed_steps"] or 0) < (r["total_steps"] or 0) for r in rows)
    for r in rows:
        line = {
            "setting": r["label"],
            "status": r["status"],
            "first": r["first_s"],
            "p50": r["latency_p50"],
            "per step": r["denoise_s"] and 1e3 * r["denoise_s"] / (r["total_steps"] or r["steps"]),
            "of the limit": of_limit(r, ceilings, work) if ceilings else None,
            "speedup": r["speedup"],
            "low": r["speedup_ci_low"],
            "high": r["speedup_ci_high"],
            "computed": r["computed_steps"] if cached else None,
            "load": r["memory_load_gib"],
            "peak": r["memory_peak_gib"],
            "of the card": r["gpu_memory_avg_pct"] and r["gpu_memory_avg_pct"] / 100,
        }
        if r["weights"] == "trained":
            line |= {"PSNR": r["psnr_db"], "SSIM": r["ssim"], "adherence": r["adherence"]}
        lines.append(line | {"applied": precision.describe_proof(r["proof"]), "why not": r["reason"]})
    return _with_units(pd.DataFrame(lines).set_index("setting").dropna(axis=1, how="all"))


def _with_units(frame):
    """The frame with the units of its columns, for html.table; without peaks that are too small to be measured."""
    if "peak" in frame and not frame["peak"].max() >= LEAST_PEAK:
        frame = frame.drop(columns="peak")
    frame.attrs["units"] = {column: unit for column, unit in UNITS.items() if column in frame}
    return frame


def fastest_sentence(rows: list[dict]) -> str:
    """The fastest of several techniques, if it is faster than the baseline beyond the noise."""
    ok = [r for r in rows if r["status"] == "ok"]
    others, missing = ok[1:], len(rows) - len(ok)
    words = f" {missing} of {len(rows)} can't run here; the table says why." if missing else ""
    best = max(others, key=lambda r: r["speedup"], default=None)
    if best is None or best["speedup_ci_low"] <= max(1.0, ok[0]["speedup_ci_high"]):
        return f"nothing is faster than {ok[0]['label']} beyond the noise.{words}"
    return (
        f"{best['label']} is the fastest, **{best['speedup']:.2f} times** {ok[0]['label']} "
        f"([{best['speedup_ci_low']:.2f}, {best['speedup_ci_high']:.2f}], n = {best['n']}), "
        f"{best['latency_p50']:.3g} s per image.{words}"
    )


def changes(rows: list[dict]):
    """How far each technique's images are from the baseline's; no PSNR where all are the same to the last bit."""
    import pandas as pd

    columns = {"PSNR": "psnr_db", "SSIM": "ssim", "adherence": "adherence"}
    lines = [
        {"setting": r["label"], "status": r["status"], **{name: r[column] for name, column in columns.items()}}
        | {"why not": r["reason"]}
        for r in rows
    ]
    return _with_units(pd.DataFrame(lines).set_index("setting").dropna(axis=1, how="all"))


def changes_sentence(rows: list[dict]) -> str:
    """Which technique changes the images most, and whether adherence holds under all of them."""
    ok = [r for r in rows[1:] if r["status"] == "ok"]
    if not ok:
        return "no variant can run here; the table says why."
    worst = min(ok, key=psnr_or_infinite)
    if math.isinf(psnr_or_infinite(worst)):
        return "every variant makes the eager images, to the last bit."
    lost = [r["label"] for r in ok if not keeps_adherence(r, rows[0])]
    kept = f"adherence is lost by more than {LOSS_ALLOWED:.0%} with {', '.join(lost)}" if lost else "adherence is kept"
    return f"of {len(ok)} variants {worst['label']} changes images most, to {worst['psnr_db']:.1f} dB; {kept}."


def quality_sentence(rows: list[dict]) -> str:
    """The order of formats by what they change, from the least to the most."""
    ok = [r for r in rows[1:] if r["status"] == "ok"]
    missing = len(rows) - 1 - len(ok)
    ranked = sorted(ok, key=lambda r: -psnr_or_infinite(r))
    if not ranked:
        return "no quantized format can run here; the table says why."
    worst, best = ranked[-1], ranked[0]
    kept = sum(keeps_adherence(r, rows[0]) for r in ok)
    return (
        f"of {len(ok)} formats, {best['label']} changes the image least "
        f"({quality.format_psnr(best['psnr_db'], best['psnr_identical'] or 0)}) and {worst['label']} most "
        f"({quality.format_psnr(worst['psnr_db'], worst['psnr_identical'] or 0)}); {kept} keep adherence within 5 %."
        + (f" {missing} can't run here; the table says why." if missing else "")
    )


def fits(rows: list[dict]):
    """Which cards hold each setting: its peak and some to spare."""
    import pandas as pd

    lines = []
    for r in rows:
        need = r["memory_peak_gib"] / (1 - SPARE)
        lines.append({"setting": r["label"], **{f"{card} GiB": "yes" if need <= card else "no" for card in CARDS}})
    return pd.DataFrame(lines).set_index("setting")


# settings that change the order of operations at most, and what of these is nevertheless another arithmetic
_SAME = (
    "dtype",
    "inputs",
    "compile",
    "mode",
    "options",
    "fused_qkv",
    "fused_gelu",
    "fused_rope",
    "modulation",
    "cuda_graph",
    "text",
    "hooks",
    "vae_mode",
    "pixels",
)
_EXACT = {
    "attention": ("default", "cudnn", "flash", "efficient", "math", "flash 3", "flash 4"),
    "vae": ("eager", "channels-last", "compiled", "sliced", "parallel", "parallel + compiled"),
}


def arithmetic(row: dict) -> dict:
    """What of a row's settings changes its images: number formats, caches, tiles; empty if nothing does."""
    return {
        name: value
        for name, value in row["settings"].items()
        if name not in _SAME and value not in _EXACT.get(name, ())
    }


def quality_of(row: dict, judged: list[dict]) -> dict | None:
    """The row on trained weights with the same change of arithmetic; None if none was judged.

    Where only the order of operations is another, it is the row of that part of it which changes the images most.
    """
    others = [o for o in judged if o["status"] == "ok" and o["technique"] != "baseline"]
    if arithmetic(row):
        return next((o for o in others if arithmetic(o) == arithmetic(row)), None)
    parts = [o for o in others if not arithmetic(o) and (own := _chosen(o)) and own <= _chosen(row)]
    return min(parts, key=psnr_or_infinite, default=None)


def _chosen(row: dict) -> set[tuple[str, str]]:
    """A row's settings without those that every row has."""
    return {(name, str(value)) for name, value in row["settings"].items() if name not in ("dtype", "inputs")}


def quality_of_phases(rows: list[dict], judged: list[dict]) -> list[float | None]:
    """PSNR on trained weights for each phase; None where a phase changes no arithmetic or made identical images."""
    found = [quality_of(r, judged) if arithmetic(r) else None for r in rows]
    return [other and other["psnr_db"] for other in found]


def recommendations(rows: list[dict], judged: list[dict]):
    """The best row for each goal: fastest lossless, fastest within 5 % of adherence, smallest memory.

    Of rows whose memory differs by 2 % or less, the fastest is the smallest one's equal.

    Args:
        rows: time and memory; quality too if they are of trained weights.
        judged: rows of trained weights that quality is looked up in.
    """
    import pandas as pd

    ok = [r for r in rows if r["status"] == "ok" and r["speedup"] is not None]
    baseline = next((r for r in judged if r["technique"] == "baseline"), None)  # a study may have no trained weights
    looked_up = [(r, r if r["weights"] == "trained" else quality_of(r, judged)) for r in ok]

    def unchanged(r):
        return r["weights"] == "random" and not arithmetic(r)

    def lossless(r, seen):
        return unchanged(r) if seen is None else psnr_or_infinite(seen) >= LOSSLESS

    def within(r, seen):
        return unchanged(r) if seen is None else keeps_adherence(seen, baseline)

    goals = {
        "fastest, lossless (40 dB or more)": (lossless, lambda r: -r["speedup"]),
        "fastest, adherence within 5 %": (within, lambda r: -r["speedup"]),
    }
    if max(r["memory_peak_gib"] or 0.0 for r in ok) >= LEAST_PEAK:
        peaks = [r["memory_peak_gib"] for r, seen in looked_up if within(r, seen) and r["memory_peak_gib"]]
        least = min(peaks, default=math.inf) * ABOUT
        goals["smallest memory (to 2 %), adherence within 5 %"] = (
            lambda r, seen: within(r, seen) and (r["memory_peak_gib"] or math.inf) <= least,
            lambda r: -r["speedup"],
        )
    lines = []
    for goal, (allowed, cost) in goals.items():
        best = min(((r, seen) for r, seen in looked_up if allowed(r, seen)), key=lambda pair: cost(pair[0]))
        r, seen = best
        lines.append(
            {
                "goal": goal,
                "p50": r["latency_p50"],
                "speedup": r["speedup"],
                "peak": r["memory_peak_gib"],
                "PSNR": seen and seen["psnr_db"],
                "adherence": seen and seen["adherence"],
                "choose": r["label"],
            }
        )
    return _with_units(pd.DataFrame(lines).set_index("goal"))


def recommendation_sentence(table) -> str:
    """The recommendation in one breath."""
    parts = [f"{goal}: {row['choose']} ({row['speedup']:.2f}×)" for goal, row in table.iterrows()]
    return "; ".join(parts) + "."


def stack_sentence(rows: list[dict]) -> str:
    """From the baseline to the whole stack, and what the largest single step was."""
    first, last = rows[0], rows[-1]
    gains_ = {b["label"]: a["latency_p50"] / b["latency_p50"] for a, b in zip(rows, rows[1:], strict=False)}
    largest = max(gains_, key=gains_.get)
    return (
        f"the whole stack takes **{last['latency_p50']:.2f} s** instead of {first['latency_p50']:.2f} s, "
        f"{last['speedup']:.2f}× ([{last['speedup_ci_low']:.2f}, {last['speedup_ci_high']:.2f}]), at "
        f"{last['memory_peak_gib']:.1f} GiB instead of {first['memory_peak_gib']:.1f}; the largest single step is "
        f"{largest.removeprefix('+ ')}, {gains_[largest]:.2f}×."
    )


def gains(rows: list[dict], ceilings=None, work=None):
    """Every phase with its gain over the one before and the baseline; its share of the limit if that is known."""
    import pandas as pd

    lines, before = [], None
    for r in rows:
        lines.append(
            {
                "phase": r["label"],
                "status": r["status"],
                "p50": r["latency_p50"],
                "per step": r["denoise_s"] and 1e3 * r["denoise_s"] / r["steps"],
                "of the limit": of_limit(r, ceilings, work) if ceilings else None,
                "own gain": before / r["latency_p50"] if before and r["latency_p50"] else None,
                "speedup": r["speedup"],
                "low": r["speedup_ci_low"],
                "high": r["speedup_ci_high"],
                "load": r["memory_load_gib"],
                "peak": r["memory_peak_gib"],
                "applied": precision.describe_proof(r["proof"]),
                "why not": r["reason"],
            }
        )
        before = r["latency_p50"] or before
    return _with_units(pd.DataFrame(lines).set_index("phase").dropna(axis=1, how="all"))


def beside_published(rows: list[dict], most: float = 0.15):
    """Published speedups, each over its own baseline, beside those of our rows by label.

    Where they differ by more than `most`, the reason that fluxnb.findings.published has for it stands beside them.
    """
    import pandas as pd

    by_label = {r["label"]: r for r in rows}
    lines = []
    for claim in published.COUNTERPARTS:
        ours = by_label.get(claim.ours)
        ratio = claim.ratio()
        line = {"claim": claim.text, "GPU": claim.gpu, "published": ratio, "ours": None, "difference": None}
        if ours is not None:
            over = by_label[claim.over]["latency_p50"]
            line["ours"] = over / ours["latency_p50"]
            line["difference"] = line["ours"] / ratio - 1
        close = line["difference"] is not None and abs(line["difference"]) <= most
        line["why"] = "" if close else claim.why if ours is not None else "not run here"
        lines.append(line)
    return pd.DataFrame(lines).set_index("claim")


# --- use cases: what pays where, what a mask and a condition ask for --------------------------------------

MASK_UNITS = dict.fromkeys(("inside", "outside", "kept", "VAE alone"), "dB")


# --- several GPUs -----------------------------------------------------------------------------------------


def scaling_table(rows: list[dict], world: int):
    """Every way of dividing beside one rank alone and beside as many replicas."""
    import pandas as pd

    replicas = next((r["images_per_s"] for r in rows if r["technique"] == "replicas" and r["images_per_s"]), None)
    lines = []
    for r in rows:
        proof = r["proof"] or {}
        line = {
            "setting": r["label"],
            "status": r["status"],
            "p50": r["latency_p50"],
            "alone": proof.get("alone_s"),
            "speedup": r["speedup"],
            "low": r["speedup_ci_low"],
            "high": r["speedup_ci_high"],
            "efficiency": r["speedup"] and r["speedup"] / world,
            "communication": proof.get("communication"),
            "images/s": r["images_per_s"],
            "of replicas": r["images_per_s"] and replicas and r["images_per_s"] / replicas,
            "load": r["memory_load_gib"],
            "peak": r["memory_peak_gib"],
            "computed": r["computed_steps"],
        }
        if r["weights"] == "trained":
            line |= {"PSNR": r["psnr_db"], "decided": proof.get("decisions")}
        shown = ("alone_s", "alone_stages", "alone_steps_ms", "communication", "decisions")  # here or in other tables
        proved = {name: value for name, value in proof.items() if name not in shown}
        lines.append(line | {"applied": precision.describe_proof(proved), "why not": r["reason"]})
    return _with_units(pd.DataFrame(lines).set_index("setting").dropna(axis=1, how="all"))


def scaling_parts(rows: list[dict]):
    """Where a step goes on the first GPU, by kind of kernel, and how fast the GPUs ran; None without profiles.

    A step that a cache skips has no profile, but a time. Rows of earlier runs have no steps by themselves.
    """
    import pandas as pd

    lines = []
    for r in rows:
        proof = r["proof"] or {}
        parts, steps = proof.get("step_ms", {}), proof.get("steps_ms", {})
        if not parts and not steps:
            continue
        image, step = 1e3 * r["latency_p50"] / r["total_steps"], steps.get("computed")
        lines.append(
            {
                "setting": r["label"],
                "image / steps": image,
                "one step": step,
                "alone": proof.get("alone_steps_ms", {}).get("computed"),
                "set off in": steps.get("computed, set off in"),
                **parts,
                "text, VAE, waiting": max(0.0, image - sum(parts.values())) if parts else None,
                "waiting": max(0.0, step - sum(parts.values())) if parts and step else None,
                "skipped step": steps.get("skipped"),
                "it set off in": steps.get("skipped, set off in"),
                "SM clock": (r["telemetry"] or {}).get("sm_clock_avg_mhz"),
            }
        )
    if not lines:
        return None
    frame = pd.DataFrame(lines).set_index("setting").dropna(axis=1, how="all")
    frame.attrs["units"] = {column: "MHz" if column == "SM clock" else "ms" for column in frame}
    return frame


def scaling_stages(rows: list[dict]):
    """What an image's time is made of on the first GPU, divided and alone; None if no row has its stages.

    Only steps are divided, the VAE too where it is parallel: the rest is what keeps N GPUs from being N times as fast.
    """
    import pandas as pd

    stages = {"text": "text_s", "steps": "denoise_s", "VAE": "vae_s"}
    lines = []
    for r in rows:
        single = (r["proof"] or {}).get("alone_stages")
        if single is None or r["speedup"] is None or not r["denoise_s"]:
            continue
        line = {"setting": r["label"]}
        for name, column in stages.items():
            line |= {name: _ms(r[column]), f"{name}, alone": _ms(single[column])}
        line["the rest"] = _ms(r["latency_p50"]) - sum(line[name] or 0.0 for name in stages)
        line["the rest, alone"] = _ms(r["proof"]["alone_s"]) - sum(line[f"{name}, alone"] or 0.0 for name in stages)
        lines.append(line | {"steps divided": single["denoise_s"] / r["denoise_s"]})
    if not lines:
        return None
    frame = pd.DataFrame(lines).set_index("setting")
    frame.attrs["units"] = {column: "×" if column == "steps divided" else "ms" for column in frame}
    return frame


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def divided(rows: list[dict]) -> list[dict]:
    """What 11_parallel measured at full size: its finished rows of random weights."""
    return [r for r in rows if (r["notebook"], r["weights"], r["status"]) == ("11_parallel", "random", "ok")]


def scaling_sentence(rows: list[dict], world: int) -> str:
    """Which way makes one image soonest, and which makes most images."""
    divided = [r for r in rows if r["speedup"] is not None and r["technique"] == "context parallel"]
    replicas = next((r for r in rows if r["technique"] == "replicas"), None)
    best = min(divided, key=lambda r: r["latency_p50"], default=None)
    if best is None:
        return "no way of dividing an image could be measured; the table says why."
    said = (
        f"{best['label']} makes one image **{best['speedup']:.2f} times** as fast as one GPU "
        f"([{best['speedup_ci_low']:.2f}, {best['speedup_ci_high']:.2f}], {best['latency_p50']:.3g} s, "
        f"{best['speedup'] / world:.0%} of {world} times)"
    )
    if (share := (best["proof"] or {}).get("communication")) is not None:
        said += f", with {share:.0%} of a step's kernels moving data between GPUs"
    if replicas:
        more = replicas["images_per_s"] / best["images_per_s"]
        said += (
            f"; {world} replicas make {replicas['images_per_s']:.3g} images a second, {more:.2f} times as many: "
            f"{'replicas win for many images' if more > 1 else 'dividing wins for many images, too'}"
        )
    stacks = [r for r in rows if r["technique"] == "parallel stack" and r["latency_p50"] is not None]
    if soonest := min(stacks, key=lambda r: r["latency_p50"], default=None):
        said += f"; the soonest image of all is there after **{soonest['latency_p50']:.3g} s** ({soonest['label']})"
    return said + "."


def recorded_sentence(rows: list[dict]) -> str | None:
    """What recording kernels in a CUDA graph does to a divided image; None if no way was measured with and without."""
    own = {r["label"]: r for r in rows if r["speedup"] is not None}
    pairs = [(r, own[f"{label}, CUDA graph"]) for label, r in own.items() if f"{label}, CUDA graph" in own]
    if not pairs:
        return None
    gains = "; ".join(
        f"{bare['label']} {bare['latency_p50']:.3g} → **{graph['latency_p50']:.3g} s**" for bare, graph in pairs
    )
    return (
        f"with kernels recorded in a CUDA graph instead of set off by the host, one by one: {gains}. Every GPU has a "
        "part of the kernels' time and all of their launches."
    )


def same_everywhere_sentence(rows: list[dict]) -> str:
    """How far the pictures of several ranks are from one rank's, and whether the caches decided alike."""
    ok = [r for r in rows if r["status"] == "ok" and r["technique"] not in ("replicas", "PipeFusion")]
    different = [r for r in ok if not r["psnr_identical"]]
    decided = [r["proof"]["decisions"] for r in ok if "decisions" in (r["proof"] or {})]
    alike = sum(d == "identical on all ranks" for d in decided)
    worst = min(different, key=lambda r: r["psnr_db"], default=None)
    said = f"{len(ok)} ways of dividing make the picture of one rank"
    if worst:
        said += f", {len(ok) - len(different)} of them to the last bit and the others within {worst['psnr_db']:.1f} dB"
    if decided:
        said += f"; under {alike} of {len(decided)} caches all ranks decided alike"
    for stale in (r for r in rows if r["status"] == "ok" and r["technique"] == "PipeFusion"):
        said += (
            f"; {stale['label']}, whose patches see each other a step late, makes another ({stale['psnr_db']:.1f} dB)"
        )
    missing = len(rows) - len([r for r in rows if r["status"] == "ok"])
    return said + (f"; {missing} could not run, the table says why." if missing else ".")


def load_table(rows: list[dict]):
    """Every load with its percentiles, what of them was waiting, and what became of the requests that got nothing.

    Together: how many requests were made at once, on average over requests, where that is allowed.
    """
    import pandas as pd

    lines = [
        {
            "load": r["label"],
            "requests": r["n"],
            "together": r["proof"].get("batch") if r["settings"]["batching"] > 1 else None,
            "p25": r["latency_p25"],
            "p50": r["latency_p50"],
            "p90": r["latency_p90"],
            "p99": r["latency_p99"],
            "average": r["latency_avg"],
            "queued": r["proof"]["queued_s"],
            "served": r["proof"]["service_s"],
            "images/s": r["images_per_s"],
            "refused": r["proof"].get("refused"),
            "failed": r["proof"].get("failed"),
            "GPU busy": r["gpu_util_avg"] and r["gpu_util_avg"] / 100,
            "memory": r["memory_peak_gib"],
        }
        for r in rows
    ]
    frame = pd.DataFrame(lines).set_index("load").dropna(axis=1, how="all")
    units = {**dict.fromkeys(("p25", "p50", "p90", "p99", "average", "queued", "served"), "s"), "memory": "GiB"}
    frame.attrs["units"] = {name: unit for name, unit in units.items() if name in frame}
    return frame


def load_sentence(rows: list[dict]) -> str:
    """What more users do to the rate and to the wait, and whether making requests together pays."""
    one_by_one = [r for r in rows if r["technique"] == "users" and r["settings"]["batching"] == 1]
    first = one_by_one[0]
    most = max((r for r in one_by_one if r["images"] == first["images"]), key=lambda r: r["users"])
    said = (
        f"with {most['users']} users {most['images_per_s']:.3g} images a second are made, "
        f"{most['images_per_s'] / first['images_per_s']:.0%} of a single user's rate, and half of them wait longer "
        f"than **{most['latency_p50']:.3g} s** instead of {first['latency_p50']:.3g} s, "
        f"{most['proof']['queued_s'] / most['latency_avg']:.0%} of it in the queue"
    )
    same = (r for r in rows if r["settings"]["batching"] > 1 and r["users"] == most["users"])
    if together := next((r for r in same if r["images"] == most["images"]), None):
        ratio = together["images_per_s"] / most["images_per_s"]
        said += f"; made {together['settings']['batching']} together, {ratio:.2f} times as many images are made"
    return said + "."


def use_cases_sentence(cases: dict[str, list[dict]], technique: str) -> str:
    """What a technique gives in each use case, and whether adherence holds in all of them.

    Args:
        cases: use case -> its rows, the baseline first.
    """
    found = {case: next((r for r in of(rows, technique)), None) for case, rows in cases.items()}
    found = {case: r for case, r in found.items() if r and r["status"] == "ok"}
    if not found:
        return f"{technique} could not be measured in any use case."
    slowest, fastest = (pick(found, key=lambda case: found[case]["speedup"]) for pick in (min, max))
    label = found[slowest]["label"]
    said = f"{label} makes every one of {len(found)} use cases faster: " if len(found) > 1 else f"{label}: "
    if found[slowest]["speedup"] <= 1:
        said = f"{label} doesn't pay in every use case: "
    said += f"from **{found[slowest]['speedup']:.2f}×** ({slowest}) to **{found[fastest]['speedup']:.2f}×** ({fastest})"
    judged = {case: r for case, r in found.items() if r["adherence"] is not None}
    if not judged:
        return said + "."
    lost = [case for case, r in judged.items() if not keeps_adherence(r, cases[case][0])]
    if lost:
        return said + f"; adherence is lost by more than {LOSS_ALLOWED:.0%} in {', '.join(lost)}."
    return said + f", with adherence within {LOSS_ALLOWED:.0%} of the uncached image in all of them."


def use_case_table(cases: dict[str, list[dict]]):
    """A row for each use case, a column for each acceleration: the speedup over the use case's own baseline."""
    import pandas as pd

    lines = []
    for case, rows in cases.items():
        line = {"use case": case, "steps run": rows[0]["total_steps"], "baseline": rows[0]["latency_p50"]}
        line |= {r["label"]: r["speedup"] if r["status"] == "ok" else None for r in rows[1:]}
        lines.append(line | {"peak": rows[0]["memory_peak_gib"]})
    frame = _with_units(pd.DataFrame(lines).set_index("use case"))
    frame.attrs["units"]["baseline"] = "s"
    return frame


def pays_differently(cases: dict[str, list[dict]], beyond: float = 1.15) -> list[str]:
    """For each acceleration one sentence: where it gives most and least, if that differs beyond the noise.

    Args:
        cases: use case -> its rows, the baseline first.
        beyond: ratio of the highest to the lowest speedup from which they count as different.
    """
    said = []
    techniques = dict.fromkeys(r["technique"] for rows in cases.values() for r in rows[1:])
    for technique in techniques:
        found = {case: r for case, rows in cases.items() for r in of(rows[1:], technique) if r["status"] == "ok"}
        if len(found) < 2:
            continue
        low, high = (pick(found, key=lambda case: found[case]["speedup"]) for pick in (min, max))
        a, b = found[low]["speedup"], found[high]["speedup"]
        labels = {r["label"] for r in found.values()}
        name = labels.pop() if len(labels) == 1 else technique
        apart = found[high]["speedup_ci_low"] > found[low]["speedup_ci_high"]
        if b >= beyond * a and apart:
            said.append(f"{name} pays most in {high} ({b:.2f}×) and least in {low} ({a:.2f}×).")
        else:
            why = f"less than {beyond - 1:.0%} apart" if apart else "within the noise"
            said.append(f"{name} pays alike in all of them, {a:.2f}× to {b:.2f}×, {why}.")
    return said


def mask_table(cases: dict[str, list[dict]]):
    """PSNR inside and outside the mask against the baseline, and outside against the given picture."""
    import pandas as pd

    lines = [
        {
            "setting": f"{case}: {r['label']}",
            "inside": r["psnr_inside_db"],
            "outside": r["psnr_outside_db"],
            "kept": r["kept_db"],
            "VAE alone": r["kept_vae_db"],
            "adherence": r["adherence"],
        }
        for case, rows in cases.items()
        for r in rows
        if r["status"] == "ok"
    ]
    return pd.DataFrame(lines).set_index("setting")


def kept_sentence(cases: dict[str, list[dict]], slack_db: float = 0.5) -> str:
    """Whether what lies outside the mask is as the VAE alone would leave it."""
    ok = [r for rows in cases.values() for r in rows if r["status"] == "ok" and r["kept_db"] is not None]
    if not ok:
        return "Nothing was inpainted here."
    worst = min(ok, key=lambda r: r["kept_db"] - r["kept_vae_db"])
    apart = worst["kept_vae_db"] - worst["kept_db"]
    said = f"outside the mask the picture is kept at {worst['kept_db']:.1f} dB at worst ({worst['label']}), "
    said += f"where the VAE alone keeps {worst['kept_vae_db']:.1f} dB: "
    return said + ("nothing but the VAE's own error." if apart <= slack_db else f"{apart:.1f} dB are lost on the way.")


def mean_agreement(images: list, conditions: list, kind: str) -> float:
    """Mean agreement of images with conditions (fluxnb.models.control)."""
    from fluxnb.models import control

    return sum(control.agreement(i, c, kind) for i, c in zip(images, conditions, strict=True)) / len(images)


def agreement_table(cases: dict[str, list[dict]]):
    """Agreement with the condition and adherence to the prompt, for each setting under a ControlNet."""
    import pandas as pd

    lines = [
        {"setting": f"{case}: {r['label']}", "agreement": r["agreement"], "adherence": r["adherence"]}
        for case, rows in cases.items()
        for r in rows
        if r["status"] == "ok"
    ]
    return pd.DataFrame(lines).set_index("setting")


def agreement_with_condition(cases: dict[str, list[dict]], free: dict[str, float], kind: str) -> str:
    """Whether images follow the condition better than without a ControlNet, and whether accelerated ones still do.

    Args:
        free: model -> mean agreement of the same prompts and seeds without a ControlNet.
    """
    rows = cases.get("ControlNet txt2img") or next(iter(cases.values()))
    baseline, own = rows[0], free.get(rows[0]["model"])
    worst = min((r for r in rows if r["status"] == "ok"), key=lambda r: r["agreement"])
    said = f"images agree with the given {kind} to {share(baseline['agreement'])}"
    if own is not None:
        said += f", to {share(own)} without a ControlNet"
    return said + f"; of the accelerated ones {worst['label']} agrees least, to {share(worst['agreement'])}."
