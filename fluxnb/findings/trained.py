"""What the embedded models' own figures say: how good they are, and how they were made."""

from __future__ import annotations

from collections.abc import Mapping

from fluxnb.findings.table import listed, pairs

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


def recomputed(committed: Mapping[str, float], here: Mapping[str, float]):
    """Figures of the same images, as committed and as made again on this machine."""
    return listed(
        ({"figure": said, "committed": committed[name], "here": here[name]} for name, said in FIGURES.items()), "figure"
    )


def sizes(pipe):
    """How many parameters each part of a pipeline has."""
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    return pairs({p: sum(w.numel() for w in getattr(pipe, p).parameters()) for p in parts}, "part", "parameters")


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
