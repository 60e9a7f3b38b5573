import math

import numpy as np
import pytest
from PIL import Image

from fluxnb.measure import quality


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


def test_compare_of_identical_images_has_no_decibels():
    found = quality.compare([noise(0), noise(1)], [noise(0), noise(1)])
    assert (found["psnr_db"], found["psnr_min_db"], found["psnr_identical"]) == (None, None, 2)
    assert found["ssim"] == found["ssim_min"] == pytest.approx(1.0)


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
