"""The sections of the stages that look at models: generate, evaluate, sweep, report."""

import dataclasses

from sdprune_jax.config.fields import of, within
from sdprune_jax.config.pruning import Calibration, PruneComponent

SAMPLERS = ("pndm", "ddim", "dpm++")
PROTOCOLS = ("embedded", "sd2prune-paper", "aptp-cc3m", "aptp-coco", "bksdm")


@dataclasses.dataclass
class Generate:
    """The same prompts and noise through every model of the run."""

    prompts: str = "embedded"  # `embedded`: captions of the embedded data; or a text file
    num_prompts: int = within(16, 1, 10**7)
    split: str = of("train", "train", "val", "test")  # of the embedded captions
    batch_size: int = within(16, 1, 2**16)  # images over all devices
    sampler: str | None = of(None, None, *SAMPLERS)  # None: what the model's scheduler says
    num_steps: int = within(25, 1, 1000)
    guidance_scale: float = within(7.5, 0.0, 100.0)
    negative_prompt: str = ""
    height: int | None = within(None, 8, 8192)  # pixels; None: the model's own
    width: int | None = within(None, 8, 8192)  # pixels

    def tiny(self) -> "Generate":
        """Returns the section shrunk to seconds of a CPU."""
        own = {"height": None, "width": None}
        return dataclasses.replace(
            self, prompts="embedded", num_prompts=2, batch_size=2, num_steps=2, **own
        )


@dataclasses.dataclass
class Evaluate:
    """Every model of the run under one published protocol, or under ours."""

    protocol: str = of("embedded", *PROTOCOLS)
    num_images: int = within(0, 0, 10**7)  # of each model; 0: as many as the protocol says
    batch_size: int = within(16, 1, 2**16)  # images over all devices
    networks: str = ""  # directory that tools/convert_metric_weights.py wrote
    data: str = ""  # directory that sdprune prepare-data wrote
    # Statistics of the reference pictures, .npz with mu and sigma; empty: computed from `data`.
    references: str = ""
    # Of the bootstrap; 0: no intervals. One of an FID takes a minute.
    num_resamples: int = within(200, 0, 10**5)

    def tiny(self) -> "Evaluate":
        """Returns the section shrunk to seconds of a CPU."""
        resamples = min(self.num_resamples, 10)
        return dataclasses.replace(
            self,
            protocol="embedded",
            references="",
            num_images=8,
            batch_size=8,
            num_resamples=resamples,
        )


@dataclasses.dataclass
class SweepPoint:
    """One configuration of a sweep; a component without a section stays dense."""

    text_encoder: PruneComponent | None = None
    unet: PruneComponent | None = None


@dataclasses.dataclass
class Cliff:
    """Where quality breaks, by bisecting series: points that differ in one sparsity alone."""

    limit: float = within(0.5, 0.01, 0.99)  # of the way from dense to chance; broken above it
    tolerance: float = within(0.0125, 1e-4, 1.0)  # of sparsity
    highest: float = within(0.95, 0.0, 0.999999)  # tried where no point of a series is broken


@dataclasses.dataclass
class Sweep:
    """Many pruned models, each in memory alone: the same prompts and noise, one table."""

    points: tuple[SweepPoint, ...] = ()
    num_seeds: int = within(1, 1, 1000)  # from config.seed on: of noise, calibration, random scores
    num_steps: int = within(0, 0, 1000)  # of the sampler; 0: as the protocol says
    num_kept: int = within(4, 0, 10**6)  # pictures of each point to keep, for the report
    cliff: Cliff | None = None
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    measure: Evaluate = dataclasses.field(default_factory=lambda: Evaluate(num_resamples=0))

    def check(self, key: str) -> list[str]:
        """Returns what is wrong between fields; `key` is what messages call the section."""
        problems = []
        for i, point in enumerate(self.points):
            where = f"{key}.points[{i}]"
            if point.text_encoder:
                problems += point.text_encoder.check_texts(f"{where}.text_encoder")
            if not (point.text_encoder or point.unet):
                problems.append(
                    f"{where} prunes no component; leave it out: dense is measured without being"
                    " asked for"
                )
        return problems

    def tiny(self) -> "Sweep":
        """Returns three points, each shrunk to seconds of a CPU."""
        points = self.points[:: -(-len(self.points) // 3) or 1]
        return dataclasses.replace(
            self,
            points=points,
            num_seeds=1,
            num_steps=2,
            cliff=None,
            calibration=self.calibration.tiny(),
            measure=self.measure.tiny(),
        )


@dataclasses.dataclass
class Report:
    """One self-contained HTML file."""

    title: str = "Pruned Stable Diffusion 2"
    num_images: int = within(12, 0, 1000)  # prompts in the grid
