import io
import math
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fluxnb.errors import UserError
from fluxnb.measure import perceptual, quality
from fluxnb.world import scenes


def noise(seed, height=64, width=96):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(phase, height=64, width=96):
    y, x = np.mgrid[:height, :width]
    channels = [127 + 100 * np.sin(x / 9 + phase), 127 + 90 * np.cos(y / 7 - phase), 60 + x + y / 2]
    return np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)


def test_psnr_of_two_independent_noise_images_is_7_75_db():
    # E[(x - y)^2] of uniform bytes is (256^2 - 1) / 6, so 10 log10(255^2 / 10922.5) = 7.747 dB
    assert quality.psnr(noise(0, 512, 512), noise(1, 512, 512)) == pytest.approx(7.747, abs=0.03)


def test_psnr_does_not_wrap_around_in_8_bits():
    black, nearly_white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert quality.psnr(black, nearly_white) == quality.psnr(nearly_white, black) == 0.0


def test_psnr_of_one_level_of_difference():
    image = smooth(0)
    brighter = (image.clip(0, 254) + 1).astype(np.uint8)
    assert quality.psnr(image.clip(0, 254), brighter) == pytest.approx(48.1308, abs=1e-4)


def test_identical_images_are_identical_not_100_db():
    assert quality.psnr(noise(0), noise(0)) == math.inf
    assert quality.ssim(noise(0), noise(0)) == pytest.approx(1.0, abs=1e-12)


def test_pil_images_are_taken():
    a, b = noise(0), noise(1)
    assert quality.psnr(Image.fromarray(a), Image.fromarray(b)) == quality.psnr(a, b)


def test_ssim_of_flat_images_has_its_closed_form():
    a, b = np.full((20, 20, 3), 100, np.uint8), np.full((20, 20, 3), 180, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert quality.ssim(a, b) == pytest.approx((2 * 100 * 180 + c1) / (100**2 + 180**2 + c1), abs=1e-9)


@pytest.mark.parametrize(
    "a, b",
    [
        (noise(0), noise(1)),
        (smooth(0), smooth(0.3)),
        (smooth(0), (smooth(0) * 0.7 + noise(2) * 0.3).astype(np.uint8)),
        (noise(3, 11, 30), smooth(1, 11, 30)),  # the smallest height: one row of windows
    ],
    ids=["noise", "smooth", "mixed", "smallest"],
)
def test_ssim_equals_skimage(a, b):
    metrics = pytest.importorskip("skimage.metrics")
    oracle = metrics.structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=255
    )
    assert quality.ssim(a, b) == pytest.approx(oracle, abs=1e-6)
    oracle = metrics.peak_signal_noise_ratio(a, b, data_range=255)
    assert quality.psnr(a, b) == pytest.approx(oracle, abs=1e-9)


@pytest.mark.parametrize(
    "a, b",
    [
        (noise(0), noise(0)[:32]),
        (noise(0), noise(0).astype(np.float32)),
        (noise(0)[..., 0], noise(0)[..., 0]),
        (noise(0)[:0], noise(0)[:0]),
    ],
    ids=["sizes", "floats", "grey", "empty"],
)
def test_images_that_do_not_fit_are_refused(a, b):
    with pytest.raises(ValueError):
        quality.psnr(a, b)
    with pytest.raises(ValueError):
        quality.ssim(a, b)


def test_ssim_refuses_an_image_smaller_than_its_window():
    with pytest.raises(ValueError, match="11 pixels"):
        quality.ssim(noise(0, 10, 20), noise(1, 10, 20))


def test_compare_takes_the_mean_of_decibels_without_identical_pairs():
    references = [smooth(0), smooth(1), smooth(2)]
    candidates = [smooth(0), smooth(1.2), smooth(2.01)]
    found = quality.compare(references, candidates)
    decibels = [quality.psnr(smooth(1), smooth(1.2)), quality.psnr(smooth(2), smooth(2.01))]
    assert found["psnr_db"] == pytest.approx(sum(decibels) / 2)
    assert found["psnr_min_db"] == min(decibels) < found["psnr_db"]
    assert found["psnr_identical"] == 1
    likeness = [quality.ssim(a, b) for a, b in zip(references, candidates, strict=True)]
    assert found["ssim"] == pytest.approx(sum(likeness) / 3)
    assert found["ssim_min"] == min(likeness) < found["ssim"]


def test_compare_of_many_pairs_is_that_of_each_and_has_the_worst_beside_the_mean():
    references = [smooth(0), smooth(1), smooth(2), noise(0)]
    candidates = [smooth(0), smooth(1.2), smooth(2.01), smooth(3)]
    found = quality.compare(references, candidates)
    each = [quality.compare([a], [b]) for a, b in zip(references, candidates, strict=True)]
    for name in ("st_lpips", "flip"):
        values = [one[name] for one in each]
        assert found[name] == pytest.approx(sum(values) / 4, rel=1e-5) and values[0] == 0 < min(values[1:])
        assert found[f"{name}_max"] == pytest.approx(max(values), rel=1e-5) and found[f"{name}_max"] > found[name]
    assert found["psnr_min_db"] == min(one["psnr_db"] for one in each[1:])


def test_compare_of_sizes_that_differ_is_refused():
    for pair in ((smooth(0), smooth(0)[:32]), (noise(0, 16, 16), noise(1, 16, 16))):
        with pytest.raises(ValueError):
            quality.compare(*([image] for image in pair))


def test_compare_of_identical_images_has_no_decibels():
    found = quality.compare([noise(0), noise(1)], [noise(0), noise(1)])
    assert (found["psnr_db"], found["psnr_min_db"], found["psnr_identical"]) == (None, None, 2)
    assert found["ssim"] == found["ssim_min"] == pytest.approx(1.0)
    assert found["st_lpips"] == found["st_lpips_max"] == found["flip"] == found["flip_max"] == 0


def test_compare_needs_pairs():
    with pytest.raises(ValueError, match="2 references, 1 candidates"):
        quality.compare([noise(0), noise(1)], [noise(0)])
    with pytest.raises(ValueError):
        quality.compare([], [])


def test_format_psnr():
    assert quality.format_psnr(33.249) == "33.2 dB"
    assert quality.format_psnr(math.inf) == "identical"
    assert quality.format_psnr(None, identical=3) == "identical"
    assert quality.format_psnr(33.249, identical=3) == "33.2 dB"
    assert quality.format_psnr(None) == quality.format_psnr(math.nan) == "not measured"


def test_psnr_of_a_part():
    a = np.zeros((12, 12, 3), np.uint8)
    b = a.copy()
    b[:6] = 10
    upper = np.arange(12)[:, None].repeat(12, 1) < 6
    assert quality.psnr(a, b, upper) == pytest.approx(10 * math.log10(255**2 / 100))
    assert quality.psnr(a, b, ~upper) == math.inf
    with pytest.raises(ValueError, match="mask"):
        quality.psnr(a, b, np.zeros((12, 12), bool))


# --- what a person sees: ST-LPIPS and FLIP ---


def pattern(side=128):
    """The picture of shared/examples/st_lpips.py, in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    disc = (x.square() + y.square() < 0.4).float() * 2 - 1
    return torch.stack([torch.sin(6 * x) * torch.cos(4 * y), disc, torch.sin(20 * (x + y))])[None] * 0.8


def test_st_lpips_is_the_authors():
    """Figures of the authors' own code, from the weights of their package; the noise is torch's."""
    torch.manual_seed(0)
    x, weights = pattern(), perceptual._weights()

    def distance(y):
        return perceptual._distance(weights, *(perceptual._features(weights, x) for x in (x, y))).item()

    def blurred(k):
        return torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, [k // 2] * 4, mode="reflect"), k, 1)

    with torch.inference_mode():
        assert distance(x) == 0
        noisy = [distance((x + s * torch.randn_like(x)).clamp(-1, 1)) for s in (0.02, 0.05, 0.1, 0.2)]
        assert noisy == pytest.approx([0.0002, 0.0039, 0.0273, 0.1192], abs=5e-5)
        shifted = [distance(x.roll(k, 3)) for k in (1, 2, 4)]
        assert shifted == pytest.approx([0.0032, 0.0119, 0.0416], abs=5e-5)
        assert [distance(blurred(k)) for k in (3, 5, 9)] == pytest.approx([0.0095, 0.0367, 0.1152], abs=5e-5)


def test_images_for_st_lpips_are_bytes_between_minus_one_and_one():
    eight_bits = ((pattern()[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    (found,) = perceptual.st_lpips([eight_bits], [np.roll(eight_bits, 4, axis=1)])
    assert found == pytest.approx(0.0416, abs=2e-3)
    many = perceptual.st_lpips([eight_bits] * 3, [np.roll(eight_bits, k, axis=1) for k in (0, 4, 8)])
    assert many[0] == 0 and many[1] == pytest.approx(found, rel=1e-5) and many[2] > many[1]
    assert perceptual.st_lpips([], []) == []


def test_st_lpips_says_how_large_an_image_has_to_be():
    assert perceptual.st_lpips([noise(0, 21, 40)], [noise(1, 21, 40)])[0] > 0
    with pytest.raises(ValueError, match="at least 21 pixels, got 40x20"):
        perceptual.st_lpips([noise(0, 20, 40)], [noise(1, 20, 40)])


def test_weights_of_st_lpips_that_are_damaged_are_refused_in_one_sentence(tmp_path):
    data = bytearray(perceptual.WEIGHTS.read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(data)
    for name in ("damaged.safetensors", "gone.safetensors"):
        with pytest.raises(UserError, match="install fluxnb again") as said:
            perceptual._weights.__wrapped__(tmp_path / name)
        assert name in str(said.value) and "\n" not in str(said.value)


def test_the_weights_of_st_lpips_and_their_licence_are_installed_with_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    folder = perceptual.WEIGHTS.parents[1]
    given = project["tool"]["setuptools"]["package-data"]["fluxnb"]
    shipped = {path for pattern in given for path in folder.glob(pattern)}
    licence = perceptual.WEIGHTS.with_name("st_lpips.LICENSE")
    assert {perceptual.WEIGHTS, licence} <= shipped and "BSD 2-Clause" in licence.read_text(encoding="utf-8")
    assert f"fluxnb/{licence.relative_to(folder)}" in project["project"]["license-files"]


def test_flip_has_a_heat_map_that_is_dark_where_nothing_differs():
    image = smooth(0)
    changed = image.copy()
    changed[:, 60:] = 255 - changed[:, 60:]
    mean, heat = perceptual.flip(image, changed)
    seen = np.asarray(heat).astype(int).sum(2)
    assert heat.size == (96, 64) and 0 < mean < 1
    assert seen[:, :40].max() < 30 < 300 < seen[:, 75:].mean()
    assert perceptual.flip(image, image)[0] == 0


def test_without_its_package_flip_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flip_evaluator", None)
    with pytest.raises(UserError, match="flip-evaluator, of the extra study"):
        perceptual.flip(smooth(0), smooth(1))


# --- metrics that can fail: damage of every kind, more and more of it ---


def drawn(prompt):
    return np.asarray(scenes.draw(scenes.complete(prompt, 0), 0))


APPLE, PANDA = drawn("a red apple on a white table"), drawn("A cute panda holding a sign that says hello world")
SIGN = np.s_[80:120, 12:108]  # where the panda's is


def speckled(image, sigma):
    return np.clip(image + np.random.default_rng(0).normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


def blurred(image, radius):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def blocky(image, quality_of_jpeg):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", quality=quality_of_jpeg)
    return np.asarray(Image.open(buffer))


def erased(image, side):
    """A square in the middle, where the apple is, in the colour beside it."""
    gone, half = image.copy(), side // 2
    gone[74 - half : 74 + half, 64 - half : 64 + half] = image[74, 8]
    return gone


def tinted(image, by):
    return np.clip(image.astype(int) + np.array([-by, by // 2, by]), 0, 255).astype(np.uint8)


def scrambled(image, blocks):
    """The sign's letters in another order: squares of it change places."""
    broken, sign = image.copy(), image[SIGN]
    tiles = [sign[y : y + 8, x : x + 8] for y in range(0, 40, 8) for x in range(0, 96, 8)]
    order = np.arange(len(tiles))
    chosen = np.random.default_rng(1).choice(len(tiles), blocks, replace=False)
    order[chosen] = np.roll(chosen, 1)
    rows = [np.concatenate([tiles[i] for i in order[r : r + 12]], axis=1) for r in range(0, 60, 12)]
    broken[SIGN] = np.concatenate(rows)
    return broken


@pytest.mark.parametrize(
    "damage, amounts",
    [
        (speckled, (4, 12, 36)),
        (blurred, (0.5, 1.5, 4)),
        (blocky, (80, 30, 5)),
        (erased, (12, 28, 52)),
        (tinted, (6, 24, 60)),
    ],
)
def test_every_metric_gets_worse_with_growing_damage(damage, amounts):
    found = [quality.compare([APPLE], [damage(APPLE, amount)]) for amount in amounts]
    for name, sign in {"psnr_db": -1, "ssim": -1, "st_lpips": 1, "flip": 1}.items():
        values = [sign * one[name] for one in found]
        assert values == sorted(values) and values[0] < values[1] < values[2], (name, values)
    assert found[-1]["st_lpips"] > 0.1 and found[-1]["flip"] > 0.05


def test_one_scrambled_sign_among_many_images_is_the_worst_figure():
    images = [APPLE, PANDA, drawn("a cat holding a sign that says hello"), drawn("a blue cube on grass at sunset")]
    slight = [speckled(image, 2) for image in images]
    clean, broken = quality.compare(images, slight), slight.copy()
    broken[1] = scrambled(PANDA, 40)
    found = quality.compare(images, broken)
    assert found["psnr_min_db"] < 25 < clean["psnr_min_db"] and found["ssim_min"] < clean["ssim_min"]
    assert found["st_lpips_max"] > 4 * clean["st_lpips_max"] and found["flip_max"] > 1.5 * clean["flip_max"]


def test_two_black_images_are_not_identical():
    black, image = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 90, np.uint8)
    with pytest.raises(UserError, match="^The image to compare with is black, as what is no number ends"):
        quality.compare([image, black], [image, black])
    assert quality.in_words(black, black) == quality.BLACK
    assert quality.compare([image], [black])["psnr_identical"] == 0
