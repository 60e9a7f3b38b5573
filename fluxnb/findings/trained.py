"""What the embedded models' own figures say: how good they are, and how they were made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fluxnb.findings.table import listed, pairs

PASS, FAIL = 0.99, 0.95  # asked of the probe: shares of undamaged images that pass, and of damaged ones that fail
FIGURES = {  # of fluxnb.training.train.summary -> what a reader sees
    "adherence": "prompt adherence",
    "all_facts_right": "images with all facts",
    "probe_accuracy": "probe on drawn scenes",
    "vae_psnr_db": "VAE reconstruction (dB)",
}


def evaluation_sentence(figures: Mapping[str, float]) -> str:
    """How many of the prompts' facts the images have, and how far the judge of that is to be trusted."""
    return (
        f"On {figures['images']:.0f} prompts and seeds kept out of training, {figures['adherence']:.1%} of the "
        f"prompts' facts are in the image ({figures['all_facts_right']:.1%} of images have all of them), measured by a "
        f"probe that finds {figures['probe_accuracy']:.2%} of the facts of drawn scenes; the VAE gives drawn scenes "
        f"back at {figures['vae_psnr_db']:.1f} dB (worst {figures['vae_psnr_min_db']:.1f} dB)."
    )


def distilled_sentence(figures: Mapping[str, float], teacher: Mapping[str, float]) -> str:
    """What a distilled model shows of its prompts beside its teacher, and how far its images are from the teacher's.

    Args:
        figures: of fluxnb.training.train_schnell.summary.
        teacher: of fluxnb.training.train.summary, of the same prompts and seeds.
    """
    facts, all_of_them = figures["adherence"], figures["all_facts_right"]
    return (
        f"On {figures['images']:.0f} prompts and seeds kept out of training, {facts:.1%} of the prompts' facts are in "
        f"the image ({all_of_them:.1%} of images have all of them); its teacher has {teacher['adherence']:.1%} "
        f"({teacher['all_facts_right']:.1%}) of {teacher['images']:.0f} of them. To the teacher's image from the same "
        f"noise: PSNR {figures['psnr_db']:.1f} dB on average, {figures['psnr_min_db']:.1f} dB at worst; ST-LPIPS "
        f"{figures['st_lpips']:.3f} on average, {figures['st_lpips_max']:.3f} at worst."
    )


def worst_distilled(evaluation, count: int = 4):
    """Of a distilled model's evaluation the images with the lowest PSNR, then by ST-LPIPS and by missed facts, once.

    Args:
        evaluation: a data frame with the columns of fluxnb.training.train_schnell.
        count: of each.
    """
    missed = (evaluation.facts - evaluation.right).sort_values(ascending=False, kind="stable")
    places = [*evaluation.psnr_db.nsmallest(count).index, *evaluation.st_lpips.nlargest(count).index]
    places += [place for place in missed.index[:count] if missed[place]]
    frame = evaluation.loc[list(dict.fromkeys(places))].set_index("seed")
    frame = frame.rename(columns={"psnr_db": "PSNR", "st_lpips": "ST-LPIPS"})
    frame.attrs |= {"units": {"PSNR": "dB"}, "formats": {"PSNR": ".1f", "ST-LPIPS": ".3f"}}
    return frame


def failing(rows: Iterable[Mapping]) -> dict[str, float]:
    """Share of images that fail, by damage; of damage to a part also by part."""
    found: dict[str, list[Mapping]] = {}
    for row in rows:
        part = row["part"]
        for name in (f"{row['damage']} (a part)", f"any damage ({part})") if part else (row["damage"],):
            found.setdefault(name, []).append(row)
    return {name: sum(r["failed"] for r in own) / sum(r["images"] for r in own) for name, own in found.items()}


def damages(rows: Sequence[Mapping], undamaged: Sequence[str]):
    """A data frame of the probe's evaluation: for each damage of all of an image, or of a part, how many images fail.

    Args:
        rows: of fluxnb.training.train_probe.evaluate.
        undamaged: which of their damages are none, so that the images are to pass.
    """
    lines = []
    for name, whole in dict.fromkeys((row["damage"], not row["part"]) for row in rows):
        own = [row for row in rows if row["damage"] == name and (not row["part"]) == whole]
        images, failed = (sum(row[column] for row in own) for column in ("images", "failed"))
        weak = (row for row in own if row["part"] and row["failed"] < FAIL * row["images"])
        lines.append(
            {
                "damage": name,
                "of": "nothing" if name in undamaged else "all of the image" if whole else "a part",
                "trained with": "yes" if own[0]["trained"] else "no",
                "images": images,
                "fail": failed / images,
                "pass": 1 - failed / images,
                "parts that fall short": ", ".join(f"{r['part']} {r['failed']} of {r['images']}" for r in weak),
            }
        )
    return listed(lines, "damage")


def judge_sentence(rows: Sequence[Mapping], undamaged: Sequence[str]) -> str:
    """Whether the probe passes what is undamaged and fails what is damaged as often as is asked of it."""
    kinds = failing(rows)
    passed = {name: 1 - share for name, share in kinds.items() if name in undamaged}
    failed = {name: share for name, share in kinds.items() if name not in undamaged}
    short = [f"{name} ({share:.1%} pass)" for name, share in passed.items() if share < PASS]
    short += [f"{name} ({share:.1%} fail)" for name, share in failed.items() if share < FAIL]
    damaged = dict.fromkeys((r["damage"], bool(r["part"]), r["trained"]) for r in rows if r["damage"] not in undamaged)
    low, new = min(failed, key=lambda name: failed[name]), sum(not trained for _, _, trained in damaged)
    does = f"falls short of that with {', '.join(short)}" if short else "does that"
    return (
        f"Asked of the probe: {PASS:.0%} of undamaged scenes pass and {FAIL:.0%} of damaged ones fail, with each kind "
        f"of damage and each part that is damaged. It {does}: {min(passed.values()):.1%} or more pass of {len(passed)} "
        f"kinds undamaged, and {failed[low]:.1%} ({low}) or more fail of {len(damaged)} kinds of damage, {new} of them "
        "never trained with."
    )


def recomputed(committed: Mapping[str, float], here: Mapping[str, float]):
    """Figures of the same images, as committed and as made again on this machine."""
    return listed(
        ({"figure": said, "committed": committed[name], "here": here[name]} for name, said in FIGURES.items()), "figure"
    )


def sizes(pipe):
    """How many parameters each part of a pipeline has."""
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    frame = pairs({p: sum(w.numel() for w in getattr(pipe, p).parameters()) for p in parts}, "part", "parameters")
    frame.attrs["formats"] = {"parameters": ","}
    return frame


def training_sentence(curve, about: Mapping) -> str:
    """How long the stages of a training run took, and on what.

    Args:
        curve: a data frame with stage and seconds, as training.csv has them.
        about: training.json.
    """
    seconds = curve.groupby("stage", sort=False).seconds.last()
    hardware = about["hardware"]
    on = ", ".join(gpu["name"] for gpu in hardware.get("gpus", [])) or hardware.get("cpu") or "a CPU"
    stages = f" ({', '.join(f'{name} {s:.0f} s' for name, s in seconds.items())})" if len(seconds) > 1 else ""
    return f"Trained in {seconds.sum() / 60:.0f} minutes on {on}{stages}."


def following_sentence(followed) -> str:
    """Whether images follow the condition, with the ControlNet and without.

    Args:
        followed: a data frame with kind, seed, agreement and agreement_without, as evaluation.csv has them.
    """
    means = followed.groupby("kind")[["agreement", "agreement_without"]].mean()
    said = (
        f"images agree with {kind} to {row.agreement:.0%} ({row.agreement_without:.0%} without the ControlNet)"
        for kind, row in means.iterrows()
    )
    return f"{'; '.join(said)}, on {followed.seed.nunique()} prompts kept out of training."
