"""What the study's own words mean: those of metrics, of caches, of how it measures and of what it says.

The glossary and the front page's search have them beside the names of techniques (fluxnb.report.catalogue).
"""

from __future__ import annotations

from fluxnb.findings import ledger
from fluxnb.findings.recommend import GOALS
from fluxnb.measure import stats
from fluxnb.models import embedded

IMAGES = {
    "PSNR": "how far an image's pixels are from the uncached image's, in decibels (dB): more is nearer, 6 dB more is "
    "half the difference, and identical images have none",
    "SSIM": "structural similarity to the uncached image (Wang et al., 2004): 1 is the same image",
    "ST-LPIPS": "how different two images are to AlexNet's features, whatever is shifted by a pixel (Ghildyal and Liu, "
    "2022): 0 is the same image; not LPIPS",
    "ꟻLIP": "FLIP: what a person would notice when flipping between two images (Andersson et al., 2020): 0 is "
    "the same image",
    "adherence": "the share of a prompt's facts that the probe finds in the image",
    "probe": "a small classifier: looks for a prompt's facts in the embedded model's drawings and fails damaged ones",
    "CLIP score": "the cosine of image and prompt in a CLIP, where one was given",
    "worst image": "that judged image which is furthest from the uncached one; floors and goals are asked of it",
    "floor": "the decibels that the worst judged image has to keep",
}
CACHES = {
    "cache": "reuses at a denoising step what the transformer's blocks added at an earlier one: a gate says when, a "
    "predictor how",
    "gate": "the part of a cache that decides at each denoising step whether the blocks are computed or what they "
    "added is reused: FirstBlock, TeaCache and others",
    "predictor": "the part of a cache that says what a reused step adds in the blocks' place: hold, Taylor and others",
    "residual": "what blocks add to the tokens that they are given: what a cache keeps",
    "threshold": "the dial of a gate that looks: how much may have changed before the blocks are computed again; it is "
    "about one model, number format and number of steps",
    "computed steps": "the denoising steps that ran the blocks; the share of the others is the hit rate",
    "hit rate": "the share of denoising steps that were reused instead of computed",
    "warm-up steps": "the first steps of an image, which a cache computes whatever it sees",
    "denoising step": "one run of the transformer on the way from noise to the image: 28 of FLUX.1-dev, 4 of "
    "FLUX.1-schnell",
    "guidance": "how strongly the prompt is followed; FLUX.1-dev has it as an input, true guidance (CFG) makes every "
    "step twice",
}
MEASURING = {
    "speedup": "the baseline's time over the technique's, round by round, and of these ratios the median",
    "round": "baseline and candidates timed once each, in an order drawn at random",
    "n": f"how many rounds, or samples, a figure rests on; nothing is a result on fewer than {stats.HEADLINE}",
    "interval": f"where the median speedup lies with {stats.NOMINAL:.0%} or more".replace("%", " %")
    + f"; fewer than {stats.LEAST} rounds have only a range",
    "range": f"the smallest and the largest of fewer than {stats.LEAST} rounds: no interval",
    "within the noise": "not told apart: the intervals overlap, or the gain is below what the baseline differs "
    "from itself",
    "p50": "the median: half of all samples took less",
    "p99": f"the time that 99 of 100 samples stay below; only of {stats.P99_NEEDS} samples or more",
    "warm-up": "images that are made, and not counted, until their times are steady",
    "memory at the peak": "GiB that must be free: what PyTorch allocates for the pipeline alone",
    "session": "one stay on one machine: seconds are compared only within one",
    "row": "one measurement with all that was set, found and seen; its id is permanent: `python -m fluxnb rows ID`",
    "configuration": "a GPU, or several of a kind, with what is measured on it: a file in params/",
    "reference": "the committed measurements, beside which your own are shown",
}
MODELS = {
    embedded.NAME: "a small FLUX that ships with the package, trained on drawings: real images and thresholds, a "
    "stand-in whose order of methods is a hypothesis about FLUX",
    embedded.SCHNELL: "the embedded model distilled to four steps without guidance, as FLUX.1-schnell is",
    "FLUX.1-schnell": "the FLUX of four steps without guidance: for it stand embedded-schnell (quality) and "
    "flux-schnell-random (time and memory)",
    "random weights": "FLUX at its full size without its training: time and memory, never quality",
}
SAYING = {
    "goal": "what is wanted: " + ", ".join(goal.text for goal in GOALS),
    "lossless": "the goal of the same image up to the order of operations",
    "near-lossless": "the goal of an image that is hardly told from the uncached one, by its floor for the worst image",
    "balanced": "the goal of speed as long as the worst image keeps a lower floor",
    "recipe": "a stack of techniques with a GPU and a goal: `accelerate(pipe, goal)` puts it on",
    "claim": "a published figure; the ledger has each once, with a verdict",
    "ledger": "every claim beside what was measured here, with a verdict by rule",
    ledger.REPRODUCED: "the verdict where all is alike and the whole interval agrees with the claim",
    ledger.NOT_REPRODUCED: "the verdict where all is alike and the whole interval disagrees with the claim",
    ledger.UNDECIDED: f"the verdict where all is alike, and fewer than {stats.HEADLINE} rounds or the interval "
    "decide nothing",
    ledger.NOT_COMPARABLE: "the verdict where model, GPU, steps or settings differ from the claim's",
    ledger.NOT_RUN: "the verdict where no row has the claim's configuration",
    "survives": "whether a technique still makes the right image when a LoRA is loaded, sizes change and the like",
}
EVERY = IMAGES | CACHES | MEASURING | MODELS | SAYING
