import golden_metrics
import numpy as np
import pytest

from sdprune_jax.metrics import clip_score, paired


def test_ssim_is_that_of_skimage():
    got, want = golden_metrics.images()
    np.testing.assert_allclose(paired.ssim(got, want), golden_metrics.golden()["ssim"], rtol=1e-12)


def test_psnr_is_that_of_skimage():
    got, want = golden_metrics.images()
    np.testing.assert_allclose(paired.psnr(got, want), golden_metrics.golden()["psnr"], rtol=1e-7)


def test_ssim_of_one_window_is_by_hand():
    """The weighted moments of an 11 x 11 image, summed term by term."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, size=(2, 11, 11))
    weights = np.array(
        [[np.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)]
    )
    weights /= weights.sum()
    u, v = (x + 1) / 2, (y + 1) / 2
    mean_u, mean_v = np.sum(weights * u), np.sum(weights * v)
    variance_u, variance_v = (np.sum(weights * (w - m) ** 2) for w, m in ((u, mean_u), (v, mean_v)))
    covariance = np.sum(weights * (u - mean_u) * (v - mean_v))
    luminance = (2 * mean_u * mean_v + 1e-4) / (mean_u**2 + mean_v**2 + 1e-4)
    structure = (2 * covariance + 9e-4) / (variance_u + variance_v + 9e-4)
    as_image = lambda z: np.repeat(z[None, :, :, None], 3, axis=-1)
    found = paired.ssim(as_image(x), as_image(y))
    np.testing.assert_allclose(found, [luminance * structure], rtol=1e-12)


def test_an_image_equals_itself_beyond_its_range_too():
    got, want = golden_metrics.images()
    assert np.all(paired.ssim(want, want) == 1)
    beyond = np.where(want > 0.9, want + 0.5, want)
    assert np.array_equal(paired.ssim(beyond, got), paired.ssim(np.minimum(beyond, 1), got))


def test_images_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="11 x 11 or more, got 10 x 64"):
        paired.ssim(np.zeros((1, 10, 64, 3)), np.zeros((1, 10, 64, 3)))


def test_mse_is_of_each_latent():
    got = np.zeros((2, 2, 2, 4), np.float32)
    want = np.concatenate([np.full((1, 2, 2, 4), 0.5), np.zeros((1, 2, 2, 4))])
    want[1, 0, 0, 0] = 2
    assert paired.mse(got, want).tolist() == [0.25, 0.25]


def test_clip_scores_carry_the_name_of_their_convention():
    images, texts = golden_metrics.unit_vectors()
    cosines = clip_score.cosines(images, texts)
    direct = [float(np.dot(i.astype(np.float64), t)) for i, t in zip(images, texts, strict=True)]
    np.testing.assert_allclose(cosines, direct, rtol=1e-12)
    assert min(cosines) < 0 < cosines.mean()
    assert clip_score.clip_score(cosines, "cosine") == pytest.approx(np.mean(direct), rel=1e-12)
    want = golden_metrics.golden()["clip_score"]  # bounded as a mean, or it would be higher
    assert clip_score.clip_score(cosines, "torchmetrics") == pytest.approx(want, rel=1e-6)
    assert clip_score.clip_score(-cosines, "torchmetrics") == 0
    assert clip_score.clip_score(-cosines, "cosine") == pytest.approx(-np.mean(direct), rel=1e-12)


def test_what_cannot_be_scored_is_refused():
    images, texts = golden_metrics.unit_vectors()
    with pytest.raises(
        ValueError, match=r"1 embeddings of texts are not unit.*number 4 of length 2"
    ):
        clip_score.cosines(images, texts * np.where(np.arange(9) == 4, 2, 1)[:, None])
    with pytest.raises(ValueError, match=r"'percent' is unknown: use one of \['cosine', 'torchm"):
        clip_score.clip_score(np.ones(2), "percent")
    with pytest.raises(ValueError, match="no image to score"):
        clip_score.clip_score(np.ones(0), "cosine")
