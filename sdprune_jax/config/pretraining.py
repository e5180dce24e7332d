"""The section of stage `pretrain`."""

import dataclasses

from sdprune_jax.config.fields import within
from sdprune_jax.config.training import Training


@dataclasses.dataclass
class PretrainCLIP:
    """A small CLIP with a tokenizer of its own, learned from the captions."""

    vocab_size: int = within(2048, 515, 2**20)
    max_length: int = within(24, 4, 4096)  # tokens, marks included
    text_layers: int = within(4, 2, 100)  # the text encoder keeps all but the last
    vision_layers: int = within(4, 1, 100)
    width: int = within(128, 8, 8192)  # of both towers
    heads: int = within(4, 1, 256)
    patch_size: int = within(8, 1, 64)  # pixels
    hard_from: int = within(0, 0, 10**9)  # step from which batches are of a few subgroups
    whole_from: int = within(0, 0, 10**9)  # step from which images are read whole, not by half
    training: Training = dataclasses.field(default_factory=Training)
    # Of the variation of images, each of a tuned copy that is averaged with the CLIP; none: as is.
    soup_strengths: tuple[float, ...] | None = within(None, 0.0, 2.0)
    tuning_whole_from: int = within(0, 0, 10**9)  # as whole_from
    tuning: Training = dataclasses.field(default_factory=Training)


@dataclasses.dataclass
class PretrainVAE:
    """A KL autoencoder with 4 latent channels."""

    # Of each level; each but the first halves the size.
    widths: tuple[int, ...] = within((16, 32, 64), 1, 8192)
    layers_per_block: int = within(1, 1, 10)
    norm_num_groups: int = within(8, 1, 256)
    kl_weight: float = within(3e-4, 0.0, 1.0)  # of the mean divergence of a latent value
    training: Training = dataclasses.field(default_factory=Training)


@dataclasses.dataclass
class PretrainUNet:
    """A UNet of Stable Diffusion 2's skeleton on the other two."""

    widths: tuple[int, ...] = within((32, 64, 96, 96), 1, 8192)
    heads: tuple[int, ...] = within((1, 2, 3, 3), 1, 256)
    norm_num_groups: int = within(8, 1, 256)
    captions_per_image: int = within(4, 1, 1000)  # text states computed and cached
    caption_dropout: float = within(0.1, 0.0, 1.0)  # for classifier-free guidance
    timestep_skew: float = within(
        0.0, 0.0, 100.0
    )  # density of timesteps t is t ** skew; 0: uniform
    min_snr_gamma: float = within(5.0, 0.0, 1e9)  # 0: constant weights
    remat: bool = False  # recompute activations in the backward pass: less memory, more time
    training: Training = dataclasses.field(default_factory=Training)


@dataclasses.dataclass
class Pretrain:
    """Trains a model of Stable Diffusion 2's architecture from nothing, on the embedded data."""

    num_images: int = within(0, 0, 10**9)  # of the training split; 0: all
    clip: PretrainCLIP = dataclasses.field(default_factory=PretrainCLIP)
    vae: PretrainVAE = dataclasses.field(default_factory=PretrainVAE)
    unet: PretrainUNet = dataclasses.field(default_factory=PretrainUNet)

    def trainings(self) -> dict[str, Training]:
        """Every training that is asked for, by its name in the section."""
        tuning = {"clip.tuning": self.clip.tuning} if self.clip.soup_strengths else {}
        parts = {"clip": self.clip, "vae": self.vae, "unet": self.unet}
        return {f"{name}.training": part.training for name, part in parts.items()} | tuning

    def check(self, key: str) -> list[str]:
        """Returns what is wrong between fields; `key` is what messages call the section."""
        clip, vae, unet = self.clip, self.vae, self.unet
        problems = []
        for name, part in self.trainings().items():
            problems += part.check(f"{key}.{name}")
        for name, part in (("vae", vae), ("unet", unet)):
            if any(width % part.norm_num_groups for width in part.widths):
                problems.append(
                    f"{key}.{name}.widths={part.widths} are not all multiples of"
                    f" norm_num_groups={part.norm_num_groups}"
                )
        if len(unet.heads) != len(unet.widths):
            problems.append(f"{key}.unet.heads has not {len(unet.widths)} values, as widths has")
        elif any(width % heads for width, heads in zip(unet.widths, unet.heads, strict=True)):
            problems.append(f"{key}.unet.heads={unet.heads} do not divide widths={unet.widths}")
        if clip.width % clip.heads:
            problems.append(f"{key}.clip.heads={clip.heads} does not divide width={clip.width}")
        return problems

    def tiny(self) -> "Pretrain":
        """Returns the section shrunk to a minute of a CPU."""
        small = {"num_steps": 4, "batch_size": 16, "warmup_steps": 1, "cycles": 1}
        small |= {"log_every": 2, "save_every": 2, "num_evals": 1}
        shrunk = lambda training: dataclasses.replace(training, **small)
        clip = dataclasses.replace(
            self.clip,
            text_layers=2,
            vision_layers=1,
            width=32,
            whole_from=2,
            soup_strengths=self.clip.soup_strengths and self.clip.soup_strengths[:1],
            training=shrunk(self.clip.training),
            tuning=shrunk(self.clip.tuning),
        )
        vae = dataclasses.replace(self.vae, widths=(8, 8, 16), training=shrunk(self.vae.training))
        unet = dataclasses.replace(
            self.unet,
            widths=(8, 16),
            heads=(1, 2),
            captions_per_image=1,
            training=shrunk(self.unet.training),
        )
        return dataclasses.replace(self, num_images=64, clip=clip, vae=vae, unet=unet)
