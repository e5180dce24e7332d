"""The section of stage `prune`, whose parts a sweep varies."""

import dataclasses

from sdprune_jax.config.fields import DTYPES, of, within

TIMESTEP_WEIGHTS = (
    "uniform",
    "linear_increasing",
    "linear_decreasing",
    "log_increasing",
    "log_decreasing",
)


@dataclasses.dataclass
class Override:
    """A sparsity for some of a component's layers."""

    layers: str = "*"  # shell pattern of their names as in prune.json, such as *.attn2.to_k
    sparsity: float = within(0.0, 0.0, 0.999999)  # 0: they stay as they are


@dataclasses.dataclass
class PruneComponent:
    """Post-training pruning of one component."""

    sparsity: float = within(0.5, 0.0, 0.999999)  # fraction of the prunable weights removed
    scope: str = of("linear", "linear", "linear+conv", "obsdiff", "all")
    # obsdiff is sparsegpt with the sampler's calls weighted. It and taylor are of the UNet alone.
    method: str = of(
        "magnitude",
        "random",
        "magnitude",
        "wanda",
        "sparsegpt",
        "obsdiff",
        "alps",
        "taylor",
    )
    # What scores are compared with; none is as the method's paper does. normalised: the whole
    # component, every layer in units of its norm.
    group: str | None = of(None, None, "layer", "output", "component", "normalised")
    # n:m removes n of every m inputs.
    pattern: str = of("unstructured", "unstructured", "1:2", "1:4", "2:4", "4:8")
    allocation: str = of("uniform", "uniform", "owl")  # of sparsity to layers
    owl_multiple: float = within(5.0, 1.0, 1e6)  # of the mean score, above which one is an outlier
    owl_lambda: float = within(0.08, 0.0, 0.49)  # half the range of the layers' sparsities
    threshold: str = of("exact", "exact", "rz")  # rz: Ramesh & Zhao's; overshoots on ties
    damping: float = within(0.01, 1e-6, 1.0)  # of the Gram matrix, a fraction of its mean diagonal
    # Of a layer that several match, the first counts. The other layers make up for all of these:
    # `sparsity` is of all in scope. With an n:m pattern, these lose weights anywhere instead.
    overrides: tuple[Override, ...] | None = None
    # Analysis: remove the weights whose scores lie between two quantiles, `sparsity` apart. What
    # scores are compared with is as in `group`, layer or output.
    band: tuple[float, float] | None = within(None, 0.0, 1.0)

    def check_texts(self, key: str) -> list[str]:
        """Returns what is wrong if this is the section of a text encoder."""
        if self.method not in ("obsdiff", "taylor"):
            return []
        return [
            f"{key}.method is {self.method}, which is of the UNet alone: the text encoder has no"
            " timesteps; use another of its methods"
        ]


@dataclasses.dataclass
class Gradients:
    """Of the denoising loss, which taylor reads: of the same pictures and noise at all timesteps.

    Timesteps are evenly spaced, the least noise first.
    """

    num_images: int = within(64, 1, 10**9)  # embedded ones to train on, drawn by the seed
    batch_size: int = within(16, 1, 2**20)  # pictures over all devices
    num_timesteps: int = within(100, 1, 1000)
    # Of the largest loss so far: the first timestep below it ends the sum, as in Diff-Pruning.
    loss_threshold: float = within(0.05, 0.0, 1.0)


@dataclasses.dataclass
class Calibration:
    """What wanda and the solvers see of the layers' inputs. The defaults are OBS-Diff's."""

    prompts: str = "embedded"  # `embedded`: captions of the embedded data; or a text file
    num_prompts: int = within(100, 1, 10**7)
    batch_size: int = within(4, 1, 2**16)  # prompts over all devices
    num_steps: int = within(25, 1, 1000)  # of the model's own sampler
    guidance_scale: float = within(7.0, 0.0, 100.0)
    timestep_weights: str = of("log_decreasing", *TIMESTEP_WEIGHTS)  # of obsdiff
    position_fraction: float = within(0.125, 1e-6, 1.0)  # of an image, for Gram matrices of convs
    mask_pads: bool = True  # Ramesh & Zhao count the padding of texts too
    # Of statistics at once. What needs more is done in parts, each on the model that those before
    # it left; layers are then compared within a part.
    max_gigabytes: float = within(8.0, 1e-3, 1e6)
    gradients: Gradients = dataclasses.field(default_factory=Gradients)

    def tiny(self) -> "Calibration":
        """Returns the section shrunk to seconds of a CPU."""
        return dataclasses.replace(
            self,
            prompts="embedded",
            num_prompts=8,
            batch_size=8,
            num_steps=2,
            gradients=Gradients(num_images=8, batch_size=8, num_timesteps=2),
        )


@dataclasses.dataclass
class Prune:
    """Post-training pruning; a component without a section is left alone."""

    text_encoder: PruneComponent | None = None
    unet: PruneComponent | None = None
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    save_dtype: str = of("float32", *DTYPES)  # of what is written

    def check(self, key: str) -> list[str]:
        """Returns what is wrong between fields; `key` is what messages call the section."""
        if not (self.text_encoder or self.unet):
            return [f"{key} has no component; set {key}.unet or .text_encoder"]
        texts = self.text_encoder
        return texts.check_texts(f"{key}.text_encoder") if texts else []

    def tiny(self) -> "Prune":
        """Returns the section shrunk to seconds of a CPU."""
        return dataclasses.replace(self, calibration=self.calibration.tiny())
