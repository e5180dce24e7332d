"""Seeded inputs of the metrics' golden numbers, and the making of these numbers.

`golden_metrics.json` was printed by

    pip install torch-fidelity==0.4.0 torchmetrics==1.9.0 scikit-image==0.26.0
    python tests/golden_metrics.py torch.py jax.py > tests/golden_metrics.json

where the last two are `distance.py` of github.com/sayakpaul/cmmd-pytorch and `cmmd/distance.py` of
github.com/google-research/google-research. None of its numbers is ours.
"""

import json
import pathlib
import runpy
import sys

import numpy as np

KID_SEED, KID_SUBSETS, KID_SIZE = 2020, 20, 100


def features(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of float32 features, from unequal numbers of images.

    They are not negative and correlate, as those of Inception. `tall` has more images than
    features, `wide` fewer.
    """
    n, m, d = {"tall": (300, 250, 16), "wide": (40, 55, 64)}[kind]
    rng = np.random.default_rng([1, d])
    mix = rng.normal(size=(d, d)) * np.geomspace(1, 0.1, d)[:, None]
    x = np.maximum(rng.normal(size=(n, d)) @ mix + 0.5, 0)
    y = np.maximum(1.1 * rng.normal(size=(m, d)) @ mix + 0.6, 0)
    return x.astype(np.float32), y.astype(np.float32)


def sorted_features(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The same sets in the order that `kernel.kid` gives them, by which others draw alike."""
    x, y = (part[np.argsort(part.sum(axis=1, dtype=np.float64))] for part in features(kind))
    return x, y


def images() -> tuple[np.ndarray, np.ndarray]:
    """Three smooth float32 images in [-1, 1], and how a pruned model might draw them."""
    rng = np.random.default_rng(2)
    x = np.repeat(np.repeat(rng.uniform(-1, 1, size=(3, 5, 8, 3)), 4, axis=1), 5, axis=2)
    y = np.clip(
        x + np.array([0.02, 0.1, 0.4])[:, None, None, None] * rng.normal(size=x.shape), -1, 1
    )
    return y.astype(np.float32), x.astype(np.float32)


def unit_vectors() -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of images and of texts; their mean cosine is above 0, some are below."""
    rng = np.random.default_rng(3)
    x, noise = rng.normal(size=(2, 9, 16))
    unit = lambda v: (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)
    return unit(x), unit(0.3 * x + noise)


def near_unit_vectors() -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of two sets that differ little, as those of a good model and its data."""
    rng = np.random.default_rng(4)
    x = 0.3 * rng.normal(size=(190, 32)) + 1
    y = 0.31 * rng.normal(size=(230, 32)) + 1.02
    unit = lambda v: (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)
    return unit(x), unit(y)


def golden() -> dict:
    return json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())


def _make() -> dict:
    import jax
    import skimage
    import torch
    import torch_fidelity
    import torchmetrics
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    from torch_fidelity import metric_fid, metric_kid
    from torchmetrics.image import fid, kid
    from torchmetrics.multimodal import CLIPScore

    class Identity(torch.nn.Module):
        num_features = 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Given:
        """A CLIP whose pictures and texts are numbers of rows, and its own processor."""

        config = None

        def to(self, device: object) -> "Given":  # noqa: ARG002
            return self

        def __call__(self, images=None, text=None, **_: object) -> dict:
            rows = torch.tensor([int(one.sum()) if images else int(one) for one in images or text])
            return {"pixel_values": rows, "input_ids": rows, "attention_mask": rows}

        def get_image_features(self, rows: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(unit_vectors()[0]).double()[rows]

        def get_text_features(self, rows: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(unit_vectors()[1]).double()[rows]

    found = {
        "made_with": {m.__name__: m.__version__ for m in (torch_fidelity, torchmetrics, skimage)}
    }
    for kind in ("tall", "wide"):
        x, y = (torch.from_numpy(part).double() for part in features(kind))
        a, b = (metric_fid.fid_features_to_statistics(part) for part in (x, y))
        value = metric_fid.fid_statistics_to_metric(a, b, False)
        found[f"fid_{kind}"] = {"torch_fidelity": value["frechet_inception_distance"]}
        network = Identity()
        network.num_features = x.shape[1]
        metric = fid.FrechetInceptionDistance(network, input_img_size=(x.shape[1],))
        metric.set_dtype(torch.float64)
        metric.update(x, real=True)
        metric.update(y, real=False)
        found[f"fid_{kind}"]["torchmetrics"] = float(metric.compute())
    x, y = (torch.from_numpy(part).double() for part in sorted_features("tall"))
    value = metric_kid.kid_features_to_metric(
        x, y, kid_subsets=KID_SUBSETS, kid_subset_size=KID_SIZE, rng_seed=KID_SEED, verbose=False
    )
    found["kid"] = [value[f"kernel_inception_distance_{what}"] for what in ("mean", "std")]
    found["kid_whole"] = float(kid.poly_mmd(x[:250], y))
    got, want = images()
    scaled = [[(image.astype(np.float64) + 1) / 2 for image in part] for part in (got, want)]
    found["ssim"] = [
        structural_similarity(
            p, q, data_range=1, channel_axis=-1, gaussian_weights=True, use_sample_covariance=False
        )
        for p, q in zip(*scaled, strict=True)
    ]
    jax.config.update("jax_enable_x64", True)  # where the codes' differences are exact enough
    embedded = [part.astype(np.float64) for part in near_unit_vectors()]
    found["cmmd"] = {
        name: float(runpy.run_path(path)["mmd"](*embedded))
        for name, path in zip(("torch", "jax"), sys.argv[1:], strict=True)
    }
    score, rows = CLIPScore(lambda: (Given(), Given())), range(9)
    score.update([torch.full((1, 1, 1), float(row)) for row in rows], [str(row) for row in rows])
    found["clip_score"] = float(score.compute())
    found["psnr"] = [
        peak_signal_noise_ratio(q, p, data_range=1) for p, q in zip(*scaled, strict=True)
    ]
    return found


if __name__ == "__main__":
    json.dump(_make(), sys.stdout, indent=1)
