"""The sections of APTP's stages, and of the baselines that it is compared with."""

import dataclasses

from sdprune_jax.config.fields import DTYPES, of, within
from sdprune_jax.config.pruning import Calibration
from sdprune_jax.config.training import Training

# What `sdprune prepare-data` can write: each a module of this name in sdprune_jax/data.
DATASETS = ("cc3m", "coco")


@dataclasses.dataclass
class RouterData:
    """What the router and the experts are trained on."""

    # cc3m, coco: Conceptual Captions, COCO 2014, as sdprune prepare-data wrote them to directory.
    dataset: str = of("embedded", "embedded", *DATASETS)
    directory: str = ""
    image_size: int = within(256, 8, 8192)  # pixels; of the embedded ones, 64 always
    num_images: int = within(0, 0, 10**9)  # of each split; 0: all
    captions_per_image: int = within(4, 1, 1000)  # one for val and test
    flips: bool = False  # train on mirrored pictures too, as published
    # Of the prompts that are routed: `text_encoder`, the model's own, pooled at the end of the
    # text; or a directory of sentence-transformers. Published: all-mpnet-base-v2.
    encoder: str = "text_encoder"

    def tiny(self) -> "RouterData":
        """Returns the section with few embedded pictures."""
        return dataclasses.replace(
            self, dataset="embedded", encoder="text_encoder", num_images=64, captions_per_image=1
        )


@dataclasses.dataclass
class RouterLosses:
    """Weights, as published unless the comment says what that is; code_pull is ours."""

    denoising: float = within(1.0, 0.0, 1e6)
    output: float = within(0.2, 0.0, 1e6)  # distillation
    block: float = within(0.2, 0.0, 1e6)  # distillation
    resource: float = within(2.0, 0.0, 1e6)
    contrastive: float = within(100.0, 0.0, 1e6)
    # Two rewards for experts that differ in cost, of the authors' code alone; published: 0.1.
    highest: float = within(0.0, 0.0, 1e6)
    spread: float = within(0.0, 0.0, 1e6)
    code_pull: float = within(0.0, 0.0, 1e6)  # of codes to the prompts assigned to them


@dataclasses.dataclass
class Router:
    """APTP: learns the architectures of some experts, and which prompt goes to which.

    Where our default is not what the published code does, the comment says what that is.
    """

    num_codes: int = within(8, 1, 1024)  # experts
    macs_budget: float = within(0.8, 0.0, 1.0)  # share of the UNet's MACs to keep
    mac_counter: str = of("exact", "exact", "paper")  # published: paper
    latent_size: int | None = within(None, 1, 1024)  # of the budget; None: of the training
    # As published, soft gates before a norm are all but invisible to the UNet, so that ResNets are
    # cut first and transformers kept: fine-tuning mends that better (docs/results.md).
    gate_position: str = of("pre_norm", "post_norm", "pre_norm")
    forward_gates: str = of("soft", "soft", "hard")
    optimal_transport: bool = True  # balance the assignment of every batch
    epsilon: float = within(0.05, 1e-6, 1e3)  # of the balance
    code_seeds: str = of("prompts", "random", "prompts")  # published: random
    contrastive_scale: float = within(1.0, 0.0, 1e6)  # published: one over the number of devices
    resource_kind: str = of("log", "log", "absolute", "squared")
    min_snr_gamma: float = within(5.0, 0.0, 1e9)  # 0: constant weights
    snr_weight: str = of("min_snr", "published", "min_snr")  # of velocities; published: published
    num_steps: int = within(5000, 1, 10**9)
    warmup_steps: int = within(500, 0, 10**9)  # of the predictor alone
    batch_size: int = within(64, 2, 2**20)  # prompts over all devices
    learning_rate: float = within(2e-3, 0.0, 1.0)  # published: 2e-4 sqrt(batch_size)
    ramp_steps: int = within(100, 0, 10**9)  # of the learning rate, which is constant then
    ema_decay: float = within(0.0, 0.0, 1.0)
    remat: bool = False  # recompute activations in the backward pass: less memory, more time
    log_every: int = within(50, 1, 10**9)  # steps
    save_every: int = within(500, 1, 10**9)  # steps
    num_evals: int = within(5, 1, 10**6)  # of routing on unseen prompts, the last one at the end
    data: RouterData = dataclasses.field(default_factory=RouterData)
    losses: RouterLosses = dataclasses.field(default_factory=RouterLosses)

    def check(self, key: str) -> list[str]:
        """Returns what is wrong between fields; `key` is what messages call the section."""
        problems = []
        if self.num_steps <= self.warmup_steps:
            problems.append(
                f"{key} has num_steps={self.num_steps}, and codes learn only after"
                f" warmup_steps={self.warmup_steps}"
            )
        if self.batch_size < self.num_codes:
            problems.append(
                f"{key} has batch_size={self.batch_size}, fewer prompts than the"
                f" {self.num_codes} codes that are to share them"
            )
        return problems

    def tiny(self) -> "Router":
        """Returns the section shrunk to seconds of a CPU."""
        small = {"num_codes": 2, "num_steps": 4, "warmup_steps": 2, "batch_size": 8}
        small |= {"ramp_steps": 1, "log_every": 2, "save_every": 2, "num_evals": 1}
        return dataclasses.replace(self, **small, learning_rate=1e-2, data=self.data.tiny())


@dataclasses.dataclass
class Assign:
    """APTP: gives every prompt its expert, and every expert its architecture."""

    route_noise: str = of("none", "none", "published")  # published: depends on the batch
    # Of the noise: its median, or one draw, as published; stored: of a converted router, its own.
    final_codes: str = of("median", "median", "draw", "stored")
    balance: str = of("optimal_transport", "none", "optimal_transport")  # published: none
    # Open or close further width gates, by what the noise needs for it, until the budget is kept:
    # by the average of the training prompts, or by each expert. Published: none.
    fit_budget: str = of("each", "none", "average", "each")


@dataclasses.dataclass
class Materialise:
    """APTP: cuts every expert out of the dense UNet."""

    zero_padded: bool = False  # also write each in the dense shape, which other programs can run
    save_dtype: str = of("float32", *DTYPES)


@dataclasses.dataclass
class Slice:
    """One smaller UNet for all prompts, cut at once: what APTP's experts are compared with."""

    # uniform: the same share of every site, drawn. norm, taylor and diff-pruning: units by score.
    # obs: heads and neurons, compensated. operators: whole ResNets and transformers, LD-Pruner's.
    # bksdm-*: fixed lists of blocks.
    criterion: str = of(
        "norm",
        "uniform",
        "random",
        "norm",
        "taylor",
        "diff-pruning",
        "obs",
        "operators",
        "bksdm-base",
        "bksdm-small",
        "bksdm-tiny",
    )
    # Share of the UNet's MACs to keep, within a unit; of bksdm-* it is not read.
    macs_budget: float = within(0.8, 0.0, 1.0)
    mac_counter: str = of("exact", "exact", "paper")
    latent_size: int | None = within(None, 1, 1024)  # of the budget; None: of the training
    # Of obs, and for operators the prompts, steps and guidance.
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    damping: float = within(0.01, 1e-6, 1.0)  # of obs: of the Gram matrix, as in `prune`
    data: RouterData = dataclasses.field(default_factory=RouterData)  # that it is trained on next
    save_dtype: str = of("float32", *DTYPES)

    def tiny(self) -> "Slice":
        """Returns the section shrunk to seconds of a CPU."""
        return dataclasses.replace(self, data=self.data.tiny(), calibration=self.calibration.tiny())


@dataclasses.dataclass
class Finetune:
    """APTP: trains every expert on its own prompts, with the dense UNet as its teacher."""

    denoising: float = within(1.0, 0.0, 1e6)  # weight of the loss; published: 0.01, and 1 for COCO
    output: float = within(0.5, 0.0, 1e6)  # of distillation; published: 0.5, and 0.2 for COCO
    block: float = within(0.5, 0.0, 1e6)  # of distillation; published: 0.5, and 0.2 for COCO
    min_snr_gamma: float = within(5.0, 0.0, 1e9)  # 0: constant weights
    snr_weight: str = of("min_snr", "published", "min_snr")  # of velocities; published: published
    caption_dropout: float = within(0.1, 0.0, 1.0)  # for classifier-free guidance; published: 0
    schedule: str = of("cosine", "constant", "cosine")  # of the learning rate; published: constant
    remat: bool = False  # recompute activations in the backward pass: less memory, more time
    save_dtype: str = of("float32", *DTYPES)
    training: Training = dataclasses.field(default_factory=Training)  # of each expert

    def check(self, key: str) -> list[str]:
        """Returns what is wrong between fields; `key` is what messages call the section."""
        return self.training.check(f"{key}.training")

    def tiny(self) -> "Finetune":
        """Returns the section shrunk to seconds of a CPU."""
        small = {"num_steps": 2, "batch_size": 8, "warmup_steps": 1, "cycles": 1}
        small |= {"log_every": 1, "save_every": 2, "num_evals": 1}
        training = dataclasses.replace(self.training, **small, ema_decay=0.5)
        return dataclasses.replace(self, training=training)
