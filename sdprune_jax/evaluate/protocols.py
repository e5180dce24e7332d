"""Protocols of published evaluations, as data. A number without its protocol means nothing.

The same model family has FID 13.9 under one and 18.1 under another: prompts, sample count, resize
rule, file format, resolution, sampler and guidance are all part of the figure.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: in the results. What the embedded networks say has `embedded` in its name.
        kind: what is computed.
        network: whose features: a directory below the config's `networks`, or "embedded".
        resize: the rule of `data.images` that makes a network's input, or "none".
        size: height and width of that input, in pixels.
        is_fresh: measures images as generated, not as the protocol's files hold them.
        scale: what the published form multiplies the figure by.
    """

    name: str
    kind: Literal["fid", "kid", "cmmd", "clip_score", "recall"]
    network: str
    resize: str
    size: int
    scale: float = 1.0
    is_fresh: bool = False


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How images are made, and what is measured on them.

    Attributes:
        name: in reports.
        source: where it is from.
        data: whose captions and reference pictures, as `task.load` knows them.
        num_images: generated, one a caption.
        sampler: one of `samplers.SAMPLERS`; None is the checkpoint's own.
        num_steps: steps of the sampler.
        guidance_scale: 1 is no guidance.
        generate_size: height and width of generated images, in pixels; None is the model's own.
        file_size: edge of the squares that generated images and reference pictures are resized to
            and kept as bytes, in pixels; None leaves both as they are.
        file_resize: by which rule, for generated images and for reference pictures.
        jpeg_quality: both also go through JPEG files, images once before too; None: through none.
        metrics: what is measured.
        remarks: what is known to differ from what the source did, or unknown of it.
    """

    name: str
    source: str
    data: str
    num_images: int
    sampler: str | None
    num_steps: int
    guidance_scale: float
    generate_size: int | None
    file_size: int | None
    file_resize: tuple[str, str]
    jpeg_quality: int | None
    metrics: tuple[Metric, ...]
    remarks: str = ""


def _embedded(kind: str, name: str, scale: float = 1.0) -> Metric:
    return Metric(name, kind, "embedded", "none", 64, scale)  # pyrefly: ignore[bad-argument-type]


_APTP = (
    Metric("fid", "fid", "inception", "legacy_pytorch", 299),
    Metric("clip_score", "clip_score", "clip-vit-b-32", "clip", 224, 100.0),
    Metric("cmmd", "cmmd", "clip-vit-l-14-336", "cmmd", 336, 1000.0),
)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "embedded",
            "this package",
            "embedded",
            512,
            None,
            25,
            3.0,
            None,
            None,
            ("none", "none"),
            None,
            (
                _embedded("fid", "fd_clip_embedded"),
                _embedded("kid", "kd_clip_embedded"),
                _embedded("cmmd", "mmd_clip_embedded", 1000.0),
                _embedded("clip_score", "cosine_clip_embedded"),
                _embedded("recall", "clip_embedded"),
            ),
            "features of the embedded CLIP: comparable among runs of this package alone",
        ),
        Protocol(
            "sd2prune-paper",
            "Ramesh and Zhao 2024, arXiv:2411.15113, and their code",
            "coco-train2017",
            10_000,
            None,
            50,
            7.5,
            None,
            299,
            ("pil_bicubic", "pil_bicubic"),
            75,
            (
                Metric("fid", "fid", "inception", "none", 299),
                Metric("clip_score", "clip_score", "clip-vit-b-32", "clip", 224, is_fresh=True),
            ),
            "their noise had no seed; which of the two Stable Diffusion 2 checkpoints is unknown",
        ),
        Protocol(
            "aptp-cc3m",
            "APTP, ICLR 2025, arXiv:2406.12042, and its code",
            "cc3m-validation",
            14_000,
            "pndm",
            25,
            7.5,
            768,
            256,
            ("legacy_pytorch", "pil_bicubic"),
            None,
            _APTP,
            "they drew the same noises for every batch; here every image has its own",
        ),
        Protocol(
            "aptp-coco",
            "APTP, ICLR 2025, arXiv:2406.12042, and its code",
            "coco-val2014",
            30_000,
            "pndm",
            25,
            7.5,
            768,
            256,
            ("legacy_pytorch", "legacy_pytorch"),
            None,
            _APTP,
            "they drew the same noises for every batch; here every image has its own",
        ),
        Protocol(
            "bksdm",
            "BK-SDM, ECCV 2024, arXiv:2305.15798, and its code",
            "bksdm",
            30_000,
            "pndm",
            25,
            7.5,
            512,
            256,
            ("pil_bicubic", "pil_bicubic"),
            None,
            (
                Metric("fid", "fid", "inception", "legacy_pytorch", 299),
                Metric("clip_score", "clip_score", "clip-vit-g-14", "clip", 224),
            ),
            "reference statistics: real_im256.npz of the authors; CLIP ViT-g/14",
        ),
    )
}
