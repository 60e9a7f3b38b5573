"""What the live explorer makes: images with what decided them, how they compare, and a sheet to show others."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass

from PIL import Image, ImageDraw, ImageFont

from fluxnb.measure import quality
from fluxnb.scrub import scrubbed


@dataclass(frozen=True)
class Wanted:
    """What decides the baseline image."""

    use_case: str
    prompt: str
    seed: int
    steps: int
    kind: str
    strength: float


@dataclass
class One:
    """An image, the seconds that it took less those of its previews, and the steps computed of those run."""

    image: Image.Image
    seconds: float
    computed: int
    total: int


@dataclass
class Made:
    """What was made with a setting, one image for each seed, beside the baseline's."""

    label: str
    code: str
    wanted: Wanted  # of the first seed
    own: list[One]
    baseline: list[One]

    @property
    def speedup(self) -> float:
        """Seconds of all baseline images over those of its own."""
        return sum(one.seconds for one in self.baseline) / sum(one.seconds for one in self.own)

    @property
    def quality(self) -> dict:
        """As `fluxnb.measure.quality.compare` gives it, of all its images."""
        return quality.compare([one.image for one in self.baseline], [one.image for one in self.own])

    @property
    def words(self) -> str:
        """Speed, steps, distance from the baseline and seconds."""
        n, first = len(self.own), self.own[0]
        computed, seconds = (sum(of) / n for of in zip(*((o.computed, o.seconds) for o in self.own), strict=True))
        if n == 1:
            apart = quality.in_words(self.baseline[0].image, first.image)
        else:
            q = self.quality
            apart = quality.format_psnr(q["psnr_db"], q["psnr_identical"])
            if q["psnr_db"] is not None:
                apart = f"mean {apart} (worst {q['psnr_min_db']:.1f} dB), ST-LPIPS {q['st_lpips']:.3f}"
        many = f" of {n} images" if n > 1 else ""
        return f"{self.speedup:.2f}×{many}, {computed:.3g} of {first.total} steps, {apart}, {seconds:.2f} s"

    @property
    def about(self) -> dict:
        """Everything that made it and came out, as plain values."""
        kept = ("psnr_db", "psnr_min_db", "psnr_identical", "st_lpips", "st_lpips_max", "flip")
        out = {"setting": self.label, **asdict(self.wanted), "images": len(self.own), "speedup": round(self.speedup, 3)}
        seconds = {"seconds": [round(o.seconds, 3) for o in self.own]}
        return scrubbed(out | seconds | {k: v for k, v in self.quality.items() if k in kept} | {"code": self.code})


def sheet(made: Made) -> Image.Image:
    """Each seed's baseline and image side by side, and beneath them what made them."""
    pairs = [(first.image, own.image) for first, own in zip(made.baseline, made.own, strict=True)]
    wide, high = pairs[0][0].size
    font, scale = ImageFont.load_default(16), max(1, 320 // wide)
    lines = [made.label, made.words, f"{made.wanted.prompt}, seed {made.wanted.seed}", "left: baseline"]
    lines = scrubbed([*lines, *made.code.splitlines()])
    width = max(2 * wide * scale, *(round(font.getlength(line)) + 16 for line in lines))
    sheet = Image.new("RGB", (width, len(pairs) * high * scale + 22 * len(lines) + 16), "white")
    for row, pair in enumerate(pairs):
        for column, image in enumerate(pair):
            larger = image.resize((wide * scale, high * scale), Image.Resampling.NEAREST)
            sheet.paste(larger, (column * wide * scale, row * high * scale))
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((8, len(pairs) * high * scale + 8 + 22 * i), line, "black", font)
    return sheet


def png(image: Image.Image) -> bytes:
    """The image as a PNG file has it."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()
