"""What rows of one image on several GPUs say."""

from __future__ import annotations

from dataclasses import replace

from fluxnb import stacks
from fluxnb.families import REPLICAS
from fluxnb.findings.rows import LOSSLESS_DB, alike, finished, is_baseline, of, of_one_session, same_image, thousand
from fluxnb.findings.table import (
    ALONE,
    APPLIED,
    CLOCKS,
    JUDGED,
    LOADED,
    P50,
    PEAK,
    PSNR,
    SPEEDUP,
    Column,
    proved,
    table,
)
from fluxnb.findings.words import labels, sureness
from fluxnb.measure import quality
from fluxnb.study.row import Row

_REPLICAS = REPLICAS, stacks.REPLICAS  # the latter with what else is built in
_ALIKE = "identical on all ranks"  # what a row's `decisions` say then
_STALE = "pipefusion"  # a setting: patches see each other as they were a step before


def scaling_table(rows: list[Row]):
    """Every way of dividing beside one rank alone and beside as many replicas."""
    rate = next((r.images_per_s for r in of(rows, *_REPLICAS) if r.images_per_s), None)
    columns = (
        P50,
        ALONE,
        *SPEEDUP,
        Column("efficiency", lambda r: r.speedup and r.speedup / r.gpus, share=True),
        proved("communication", share=True),
        Column("images/s", "images_per_s"),
        Column("of replicas", lambda r: r.images_per_s and rate and r.images_per_s / rate, share=True),
        LOADED,
        PEAK,
        Column("computed", "computed_steps", "steps"),
        JUDGED,
        PSNR,
        proved("decided", "decisions"),
        *CLOCKS,
        APPLIED,
    )
    return table(rows, columns)


def scaling_parts(rows: list[Row]):
    """Where a step goes on the first GPU, by kind of kernel, and how fast the GPUs ran; None without profiles.

    A step that a cache skips has no profile, but a time. Rows of earlier runs have no steps by themselves.
    """
    profiled = [r for r in rows if r.shown("step_ms") or r.shown("steps_ms")]
    if not profiled:
        return None

    kinds = dict.fromkeys(kind for r in profiled for kind in r.shown("step_ms", {}))

    def image(r: Row) -> float:
        return 1e3 * r.latency_p50 / r.total_steps

    def left(whole: float | None, r: Row) -> float | None:
        parts = r.shown("step_ms", {}).values()
        return max(0.0, whole - sum(parts)) if parts and whole else None

    columns = (
        Column("image / steps", image, "ms"),
        proved("one step", "steps_ms", "computed", unit="ms"),
        proved("alone", "alone_steps_ms", "computed", unit="ms"),
        proved("set off in", "steps_ms", "computed, set off in", unit="ms"),
        *(proved(kind, "step_ms", kind, unit="ms") for kind in kinds),
        Column("text, VAE, waiting", lambda r: left(image(r), r), "ms"),
        Column("waiting", lambda r: left(r.shown("steps_ms", {}).get("computed"), r), "ms"),
        proved("skipped step", "steps_ms", "skipped", unit="ms"),
        proved("it set off in", "steps_ms", "skipped, set off in", unit="ms"),
        Column("SM clock", lambda r: (r.telemetry or {}).get("sm_clock_avg_mhz"), "MHz"),
    )
    return table(profiled, columns)


def scaling_stages(rows: list[Row]):
    """What an image's time is made of on the first GPU, divided and alone; None if no row has its stages.

    Only steps are divided, the VAE too where it is parallel: the rest is what keeps N GPUs from being N times as fast.
    """
    staged = [r for r in rows if r.shown("alone_stages") and r.speedup is not None and r.denoise_s]
    if not staged:
        return None
    names = {"text": "text_s", "steps": "denoise_s", "VAE": "vae_s"}

    def divided(r: Row) -> list[float | None]:
        stages = [getattr(r, name) for name in names.values()]
        return [*stages, r.latency_p50 - sum(filter(None, stages))]

    def alone(r: Row) -> list[float | None]:
        stages = [r.shown("alone_stages")[name] for name in names.values()]
        return [*stages, r.shown("alone_s") - sum(filter(None, stages))]

    columns = []
    for i, name in enumerate((*names, "the rest")):
        columns += [
            Column(name, [thousand(divided(r)[i]) for r in staged], "ms"),
            Column(f"{name}, alone", [thousand(alone(r)[i]) for r in staged], "ms"),
        ]
    columns.append(Column("steps divided", lambda r: r.shown("alone_stages")["denoise_s"] / r.denoise_s, "×"))
    return table(staged, columns)


def scaling_sentence(rows: list[Row]) -> str:
    """Which way makes one image soonest without changing it, which makes most images, and the soonest image of all.

    Of the session that most rows are of.
    """
    own = of_one_session([r for r in finished(rows) if not is_baseline(r)])
    replicas = of(own, *_REPLICAS)
    one = sorted((r for r in own if r not in replicas), key=lambda r: r.latency_p50)
    best, *others = [r for r in one if same_image(r) and r.speedup is not None] or [None]
    if best is None:
        return "no way of dividing an image could be measured; the table says why."
    said = (
        f"{best.label} makes one image **{best.speedup:.2f} times** as fast as one GPU ({sureness(best)}; "
        f"{best.latency_p50:.3g} s instead of {best.baseline_s:.3g} s, {best.speedup / best.gpus:.0%} of {best.gpus}×)"
    )
    if same := [r for r in others if alike(r, best)]:
        said += f", within the noise of {labels(same)}"
    if (moving := best.shown("communication")) is not None:
        said += f", with {moving:.0%} of a step's kernels moving data between GPUs"
    if replicas:
        said += f"; {_beside_replicas(best, replicas[0])}"
    soonest = one[0]
    if soonest.latency_p50 < best.latency_p50 and not alike(soonest, best):
        said += f"; the soonest image of all is there after **{soonest.latency_p50:.3g} s** ({soonest.label})"
    return said + "."


def _beside_replicas(best: Row, replicas: Row) -> str:
    """Whether as many replicas make more images than dividing each, and where they are of a slower pipeline."""
    more = replicas.images_per_s / best.images_per_s
    said = f"{best.gpus} replicas make {replicas.images_per_s:.3g} images a second, {more:.2f} times as many"
    each = replace(replicas, samples=[s / replicas.gpus for s in replicas.samples or []])
    if not alike(each, best):
        said += f": {'replicas win for many images' if more > 1 else 'dividing wins for many images, too'}"
    if best.baseline_s and abs(replicas.latency_p50 / best.baseline_s - 1) > 0.01:
        said += f" (of another stack: alone it takes {replicas.latency_p50:.3g} s, this one {best.baseline_s:.3g} s)"
    return said


def recorded_sentence(rows: list[Row]) -> str | None:
    """What recording kernels in a CUDA graph does to a divided image; None if no way was measured with and without.

    Only rows of one session are set beside each other.
    """

    def without(row: Row) -> tuple:
        settings = {name: str(value) for name, value in row.settings.items() if name != "cuda_graph"}
        return row.session, tuple(sorted(settings.items()))

    own = [r for r in finished(rows) if r.speedup is not None]
    bare = {without(r): r for r in own if "cuda_graph" not in r.settings}
    graphs = {without(r): r for r in own if "cuda_graph" in r.settings and without(r) in bare}
    if not graphs:
        return None
    pairs = ((bare[key], graph) for key, graph in graphs.items())
    gains = "; ".join(f"{b.label} {b.latency_p50:.3g} → **{g.latency_p50:.3g} s**" for b, g in pairs)
    return (
        f"with kernels recorded in a CUDA graph instead of set off by the host, one by one: {gains}. Every GPU has a "
        "part of the kernels' time and all of their launches."
    )


def same_everywhere_sentence(rows: list[Row]) -> str:
    """How far the pictures of several ranks are from one rank's, and whether the caches decided alike."""
    ok = finished(rows)
    seen = [r for r in ok if (r.psnr_db is not None or r.psnr_identical) and r not in of(ok, *_REPLICAS)]
    stale = [r for r in seen if r.setting(_STALE)]
    others = [r for r in seen if r not in stale and r.psnr_db is not None and r.psnr_db < LOSSLESS_DB]
    compared = [r for r in seen if r not in stale and r not in others]
    different = [r for r in compared if not r.psnr_identical]
    decided = [d for r in compared if (d := r.shown("decisions"))]
    one = len(compared) == 1
    said = f"{len(compared)} way{'' if one else 's'} of dividing make{'s' * one} the picture of one rank (one compared)"
    if not seen:
        said = "no picture of several ranks was compared with one rank's"
    if different:
        exact, worst = len(compared) - len(different), min(r.psnr_db for r in different)
        said += f", {f'{exact} of them to the last bit and the others ' * (exact > 0)}within {worst:.1f} dB"
    if decided:
        said += f"; under {decided.count(_ALIKE)} of {len(decided)} caches all ranks decided alike"
    for r in (*others, *stale):
        why = ", whose patches see each other a step late," if r in stale else ""
        said += f"; {r.label}{why} makes another ({quality.format_psnr(r.psnr_db, r.psnr_identical or 0)})"
    missing = len(rows) - len(ok)
    return said + (f"; {missing} could not run, the table says why." if missing else ".")
