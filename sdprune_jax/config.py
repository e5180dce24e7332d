"""The schema of a run. A stage runs if, and only if, its section is set.

`checks.check` holds every field to its type and to what `_of` and `_in` say beside it.
"""

import dataclasses
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
SAMPLERS = ("pndm", "ddim", "dpm++")
STAGES = (
    "pretrain", "prune", "router", "assign", "materialise", "finetune", "generate", "evaluate",
    "sweep", "report",
)  # in order  # fmt: skip
TIMESTEP_WEIGHTS = (
    "uniform", "linear_increasing", "linear_decreasing", "log_increasing", "log_decreasing",
)  # fmt: skip
PROTOCOLS = ("embedded", "sd2prune-paper", "aptp-cc3m", "aptp-coco", "bksdm")


def _of(default: Any, *legal: Any) -> Any:
    """A field with a default and a closed set of legal values."""
    return dataclasses.field(default=default, metadata={"legal": legal})


def _in(default: Any, low: int | float, high: int | float) -> Any:
    """A field with a default and a range, both ends included, for it or for each of a tuple."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


@dataclasses.dataclass
class Mesh:
    """Devices along each axis."""

    data: int = _in(-1, -1, 2**20)  # devices; -1: all that fsdp leaves
    fsdp: int = _in(1, 1, 2**20)  # devices
    # Devices to make of a CPU: one a core trains 1.4 times as fast as one of all cores.
    cpu_devices: int = _in(1, 1, 1024)


@dataclasses.dataclass
class Training:
    """One training: AdamW, linear warm-up, cosine decay to zero, once or in equal cycles."""

    num_steps: int = _in(1000, 1, 10**9)
    batch_size: int = _in(64, 1, 2**20)  # samples over all devices
    learning_rate: float = _in(1e-3, 0.0, 1.0)  # at the end of the warm-up
    warmup_steps: int = _in(100, 0, 10**9)  # of every cycle
    cycles: int = _in(1, 1, 1000)
    weight_decay: float = _in(0.01, 0.0, 10.0)
    clip_norm: float = _in(1.0, 0.0, 1e6)  # of the global gradient
    ema_decay: float = _in(0.999, 0.0, 1.0)
    log_every: int = _in(50, 1, 10**9)  # steps
    save_every: int = _in(500, 1, 10**9)  # steps
    num_evals: int = _in(8, 1, 10**6)  # of the averaged parameters, the last one at the end


@dataclasses.dataclass
class PretrainCLIP:
    """A small CLIP with a tokenizer of its own, learned from the captions."""

    vocab_size: int = _in(2048, 515, 2**20)
    max_length: int = _in(24, 4, 4096)  # tokens, marks included
    text_layers: int = _in(4, 2, 100)  # the text encoder keeps all but the last
    vision_layers: int = _in(4, 1, 100)
    width: int = _in(128, 8, 8192)  # of both towers
    heads: int = _in(4, 1, 256)
    patch_size: int = _in(8, 1, 64)  # pixels
    hard_from: int = _in(0, 0, 10**9)  # step from which batches are of a few subgroups
    whole_from: int = _in(0, 0, 10**9)  # step from which images are read whole, not by half
    training: Training = dataclasses.field(default_factory=Training)


@dataclasses.dataclass
class PretrainVAE:
    """A KL autoencoder with 4 latent channels."""

    # Of each level; each but the first halves the size.
    widths: tuple[int, ...] = _in((16, 32, 64), 1, 8192)
    layers_per_block: int = _in(1, 1, 10)
    norm_num_groups: int = _in(8, 1, 256)
    kl_weight: float = _in(3e-4, 0.0, 1.0)  # of the mean divergence of a latent value
    training: Training = dataclasses.field(default_factory=Training)


@dataclasses.dataclass
class PretrainUNet:
    """A UNet of Stable Diffusion 2's skeleton on the other two."""

    widths: tuple[int, ...] = _in((32, 64, 96, 96), 1, 8192)
    heads: tuple[int, ...] = _in((1, 2, 3, 3), 1, 256)
    norm_num_groups: int = _in(8, 1, 256)
    captions_per_image: int = _in(4, 1, 1000)  # text states computed and cached
    caption_dropout: float = _in(0.1, 0.0, 1.0)  # for classifier-free guidance
    min_snr_gamma: float = _in(5.0, 0.0, 1e9)  # 0: constant weights
    remat: bool = False  # recompute activations in the backward pass: less memory, more time
    training: Training = dataclasses.field(default_factory=Training)


@dataclasses.dataclass
class Pretrain:
    """Trains a model of Stable Diffusion 2's architecture from nothing, on the embedded data."""

    num_images: int = _in(0, 0, 10**9)  # of the training split; 0: all
    clip: PretrainCLIP = dataclasses.field(default_factory=PretrainCLIP)
    vae: PretrainVAE = dataclasses.field(default_factory=PretrainVAE)
    unet: PretrainUNet = dataclasses.field(default_factory=PretrainUNet)


@dataclasses.dataclass
class PruneComponent:
    """Post-training pruning of one component."""

    sparsity: float = _in(0.5, 0.0, 0.999999)  # fraction of the prunable weights removed
    scope: str = _of("linear", "linear", "linear+conv", "obsdiff", "all")
    # sparsegpt is OBS-Diff where calls of the UNet are weighted, as `calibration` does by default.
    method: str = _of("magnitude", "random", "magnitude", "wanda", "sparsegpt")
    # What scores are compared with; none is as the method's paper does. normalised: the whole
    # component, every layer in units of its norm.
    group: str | None = _of(None, None, "layer", "output", "component", "normalised")
    # n:m removes n of every m inputs.
    pattern: str = _of("unstructured", "unstructured", "1:2", "1:4", "2:4", "4:8")
    allocation: str = _of("uniform", "uniform", "owl")  # of sparsity to layers
    owl_multiple: float = _in(5.0, 1.0, 1e6)  # of the mean score, above which one is an outlier
    owl_lambda: float = _in(0.08, 0.0, 0.49)  # half the range of the layers' sparsities
    threshold: str = _of("exact", "exact", "rz")  # rz: Ramesh & Zhao's; overshoots on ties
    damping: float = _in(0.01, 1e-6, 1.0)  # of the Gram matrix, a fraction of its mean diagonal


@dataclasses.dataclass
class Calibration:
    """What wanda and sparsegpt see of a model's inputs. The defaults are OBS-Diff's."""

    prompts: str = "embedded"  # `embedded`: captions of the embedded data; or a text file
    num_prompts: int = _in(100, 1, 10**7)
    batch_size: int = _in(4, 1, 2**16)  # prompts over all devices
    num_steps: int = _in(25, 1, 1000)  # of the model's own sampler
    guidance_scale: float = _in(7.0, 0.0, 100.0)
    timestep_weights: str = _of("log_decreasing", *TIMESTEP_WEIGHTS)
    position_fraction: float = _in(0.125, 1e-6, 1.0)  # of an image, for Gram matrices of convs
    mask_pads: bool = True  # Ramesh & Zhao count the padding of texts too
    # Of statistics at once. What needs more is done in parts, each on the model that those before
    # it left; layers are then compared within a part.
    max_gigabytes: float = _in(8.0, 1e-3, 1e6)


@dataclasses.dataclass
class Prune:
    """Post-training pruning; a component without a section is left alone."""

    text_encoder: PruneComponent | None = None
    unet: PruneComponent | None = None
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    save_dtype: str = _of("float32", *DTYPES)  # of what is written


@dataclasses.dataclass
class RouterData:
    """What the router and the experts are trained on: the embedded pictures and captions."""

    num_images: int = _in(0, 0, 10**9)  # of each split; 0: all
    captions_per_image: int = _in(4, 1, 1000)  # one for val and test
    flips: bool = False  # train on mirrored pictures too, as published
    # Of the prompts that are routed: `text_encoder`, the model's own, pooled at the end of the
    # text; or a directory of sentence-transformers. Published: all-mpnet-base-v2.
    encoder: str = "text_encoder"


@dataclasses.dataclass
class RouterLosses:
    """Weights, as published; code_pull is ours."""

    denoising: float = _in(1.0, 0.0, 1e6)
    output: float = _in(0.2, 0.0, 1e6)  # distillation
    block: float = _in(0.2, 0.0, 1e6)  # distillation
    resource: float = _in(2.0, 0.0, 1e6)
    contrastive: float = _in(100.0, 0.0, 1e6)
    highest: float = _in(0.1, 0.0, 1e6)
    spread: float = _in(0.1, 0.0, 1e6)
    code_pull: float = _in(0.0, 0.0, 1e6)  # of codes to the prompts assigned to them


@dataclasses.dataclass
class Router:
    """APTP: learns the architectures of some experts, and which prompt goes to which.

    Where our default is not what the published code does, the comment says what that is.
    """

    num_codes: int = _in(8, 1, 1024)  # experts
    macs_budget: float = _in(0.8, 0.0, 1.0)  # share of the UNet's MACs to keep
    mac_counter: str = _of("exact", "exact", "paper")  # published: paper
    latent_size: int | None = _in(None, 1, 1024)  # of the budget; None: of the training
    gate_position: str = _of("post_norm", "post_norm", "pre_norm")  # published: pre_norm
    forward_gates: str = _of("hard", "soft", "hard")  # published: soft
    optimal_transport: bool = True  # balance the assignment of every batch
    epsilon: float = _in(0.05, 1e-6, 1e3)  # of the balance
    code_seeds: str = _of("prompts", "random", "prompts")  # published: random
    contrastive_scale: float = _in(1.0, 0.0, 1e6)  # published: one over the number of devices
    resource_kind: str = _of("log", "log", "absolute", "squared")
    min_snr_gamma: float = _in(5.0, 0.0, 1e9)  # 0: constant weights
    snr_weight: str = _of("min_snr", "published", "min_snr")  # of velocities; published: published
    num_steps: int = _in(5000, 1, 10**9)
    warmup_steps: int = _in(500, 0, 10**9)  # of the predictor alone
    batch_size: int = _in(64, 2, 2**20)  # prompts over all devices
    learning_rate: float = _in(2e-3, 0.0, 1.0)  # published: 2e-4 sqrt(batch_size)
    ramp_steps: int = _in(100, 0, 10**9)  # of the learning rate, which is constant then
    ema_decay: float = _in(0.0, 0.0, 1.0)
    remat: bool = False  # recompute activations in the backward pass: less memory, more time
    log_every: int = _in(50, 1, 10**9)  # steps
    save_every: int = _in(500, 1, 10**9)  # steps
    num_evals: int = _in(5, 1, 10**6)  # of routing on unseen prompts, the last one at the end
    data: RouterData = dataclasses.field(default_factory=RouterData)
    losses: RouterLosses = dataclasses.field(default_factory=RouterLosses)


@dataclasses.dataclass
class Assign:
    """APTP: gives every prompt its expert, and every expert its architecture."""

    route_noise: str = _of("none", "none", "published")  # published: depends on the batch
    final_codes: str = _of("median", "median", "draw")  # of the noise; published: one draw
    balance: str = _of("optimal_transport", "none", "optimal_transport")  # published: none
    # Open or close further gates, by what the noise needs for it, until the training prompts keep
    # the budget. Published: false.
    fit_budget: bool = True


@dataclasses.dataclass
class Materialise:
    """APTP: cuts every expert out of the dense UNet."""

    zero_padded: bool = False  # also write each in the dense shape, which other programs can run
    save_dtype: str = _of("float32", *DTYPES)


@dataclasses.dataclass
class Finetune:
    """APTP: trains every expert on its own prompts, with the dense UNet as its teacher."""

    denoising: float = _in(1.0, 0.0, 1e6)  # weight of the loss; published: 0.01, and 1 for COCO
    output: float = _in(0.5, 0.0, 1e6)  # of distillation; published: 0.5, and 0.2 for COCO
    block: float = _in(0.5, 0.0, 1e6)  # of distillation; published: 0.5, and 0.2 for COCO
    min_snr_gamma: float = _in(5.0, 0.0, 1e9)  # 0: constant weights
    snr_weight: str = _of("min_snr", "published", "min_snr")  # of velocities; published: published
    caption_dropout: float = _in(0.1, 0.0, 1.0)  # for classifier-free guidance; published: 0
    schedule: str = _of("cosine", "constant", "cosine")  # of the learning rate; published: constant
    remat: bool = False  # recompute activations in the backward pass: less memory, more time
    save_dtype: str = _of("float32", *DTYPES)
    training: Training = dataclasses.field(default_factory=Training)  # of each expert


@dataclasses.dataclass
class Generate:
    """The same prompts and noise through every model of the run."""

    prompts: str = "embedded"  # `embedded`: captions of the embedded data; or a text file
    num_prompts: int = _in(16, 1, 10**7)
    split: str = _of("train", "train", "val", "test")  # of the embedded captions
    batch_size: int = _in(16, 1, 2**16)  # images over all devices
    sampler: str | None = _of(None, None, *SAMPLERS)  # None: what the model's scheduler says
    num_steps: int = _in(25, 1, 1000)
    guidance_scale: float = _in(7.5, 0.0, 100.0)
    negative_prompt: str = ""
    height: int | None = _in(None, 8, 8192)  # pixels; None: the model's own
    width: int | None = _in(None, 8, 8192)  # pixels


@dataclasses.dataclass
class Evaluate:
    """Every model of the run under one published protocol, or under ours."""

    protocol: str = _of("embedded", *PROTOCOLS)
    num_images: int = _in(0, 0, 10**7)  # of each model; 0: as many as the protocol says
    batch_size: int = _in(16, 1, 2**16)  # images over all devices
    networks: str = ""  # directory that tools/convert_metric_weights.py wrote
    data: str = ""  # directory that tools/prepare_data.py wrote
    # Statistics of the reference pictures, .npz with mu and sigma; empty: computed from `data`.
    references: str = ""
    # Of the bootstrap; 0: no intervals. One of an FID takes a minute.
    num_resamples: int = _in(200, 0, 10**5)


@dataclasses.dataclass
class SweepPoint:
    """One configuration of a sweep; a component without a section stays dense."""

    text_encoder: PruneComponent | None = None
    unet: PruneComponent | None = None


@dataclasses.dataclass
class Cliff:
    """Where quality breaks, by bisecting series: points that differ in one sparsity alone."""

    limit: float = _in(0.5, 0.01, 0.99)  # of the way from dense to chance; broken above it
    tolerance: float = _in(0.0125, 1e-4, 1.0)  # of sparsity
    highest: float = _in(0.95, 0.0, 0.999999)  # tried where no point of a series is broken


@dataclasses.dataclass
class Sweep:
    """Many pruned models, each in memory alone: the same prompts and noise, one table."""

    points: tuple[SweepPoint, ...] = ()
    num_seeds: int = _in(1, 1, 1000)  # from config.seed on: of noise, calibration, random scores
    num_steps: int = _in(0, 0, 1000)  # of the sampler; 0: as the protocol says
    num_kept: int = _in(4, 0, 10**6)  # pictures of each point to keep, for the report
    cliff: Cliff | None = None
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    measure: Evaluate = dataclasses.field(default_factory=lambda: Evaluate(num_resamples=0))


@dataclasses.dataclass
class Report:
    """One self-contained HTML file."""

    title: str = "Pruned Stable Diffusion 2"
    num_images: int = _in(12, 0, 1000)  # prompts in the grid


@dataclasses.dataclass
class Run:
    """One experiment."""

    workdir: str = "runs/run"
    model: str = "embedded"  # directory in diffusers layout, or `embedded`
    variant: str = ""  # e.g. fp16, of the model's files
    seed: int = _in(0, 0, 2**32 - 1)
    dtype: str = _of("float32", *DTYPES)  # of the computation
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    pretrain: Pretrain | None = None
    prune: Prune | None = None
    router: Router | None = None
    assign: Assign | None = None
    materialise: Materialise | None = None
    finetune: Finetune | None = None
    generate: Generate | None = None
    evaluate: Evaluate | None = None
    sweep: Sweep | None = None
    report: Report | None = None


def resize(run: Run, size: str | None) -> Run:
    """Returns `run` for a pod or GPU, or, for `tiny`, shrunk to a minute or two of a CPU.

    Raises:
        ValueError: if `size` is neither None nor `tiny`.
    """
    if size is None:
        return run
    if size != "tiny":
        raise ValueError(
            f"unknown size {size!r} after the config's name; use `tiny`, or leave it out"
        )
    run.workdir += "_tiny"
    if run.pretrain:
        run.pretrain.num_images = 64
        for part in (run.pretrain.clip, run.pretrain.vae, run.pretrain.unet):
            part.training = dataclasses.replace(
                part.training, num_steps=4, batch_size=16, warmup_steps=1, cycles=1, log_every=2,
                save_every=2, num_evals=1,
            )  # fmt: skip
        run.pretrain.clip.text_layers, run.pretrain.clip.vision_layers = 2, 1
        run.pretrain.clip.width, run.pretrain.clip.whole_from = 32, 2
        run.pretrain.vae.widths = (8, 8, 16)
        run.pretrain.unet.widths, run.pretrain.unet.heads = (8, 8, 16, 16), (1, 1, 2, 2)
        run.pretrain.unet.captions_per_image = 1
    else:
        run.model = "embedded"
    if run.prune:
        run.prune.calibration = _tiny(run.prune.calibration)
    if run.router:
        data = dataclasses.replace(run.router.data, num_images=64, captions_per_image=1)
        run.router = dataclasses.replace(
            run.router, num_codes=2, num_steps=4, warmup_steps=2, batch_size=8, ramp_steps=1,
            log_every=2, save_every=2, num_evals=1, data=data,
        )  # fmt: skip
    if run.finetune:
        run.finetune.training = dataclasses.replace(
            run.finetune.training, num_steps=2, batch_size=8, warmup_steps=1, cycles=1,
            log_every=1, save_every=2, num_evals=1,
        )  # fmt: skip
    if run.generate:
        run.generate = dataclasses.replace(
            run.generate, prompts="embedded", num_prompts=2, batch_size=2, num_steps=2,
            height=None, width=None,
        )  # fmt: skip
    if run.evaluate:
        run.evaluate = dataclasses.replace(
            run.evaluate, protocol="embedded", num_images=8, batch_size=8, num_resamples=10
        )
    if run.sweep:
        points = run.sweep.points
        run.sweep = dataclasses.replace(
            run.sweep,
            points=points[:: -(-len(points) // 3) or 1],  # three
            num_seeds=1, num_steps=2, cliff=None,
            calibration=_tiny(run.sweep.calibration),
            measure=dataclasses.replace(
                run.sweep.measure, protocol="embedded", num_images=8, batch_size=8
            ),
        )  # fmt: skip
    return run


def _tiny(section: Calibration) -> Calibration:
    return dataclasses.replace(
        section, prompts="embedded", num_prompts=8, batch_size=8, num_steps=2
    )
