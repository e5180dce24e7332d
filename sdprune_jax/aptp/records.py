"""The records of APTP's stages: what `artefacts` writes beside their outputs, and reads again."""

import dataclasses
from typing import Any

from sdprune_jax.data.pictures import PictureSource


@dataclasses.dataclass(frozen=True)
class RouterRecord:
    """Stage `router`."""

    model: str  # the model whose experts are routed, as the config names it
    variant: str  # variant of that model's files; empty for none
    seed: int  # seed of the training and of the draw of prompts
    embedding_dim: int  # width of the vectors that the router reads of prompts
    latent_size: tuple[int, int]  # height and width of the latents that MACs are counted at
    num_codes: int
    macs_budget: float  # share of the UNet's MACs that was asked for
    mac_counter: str  # how MACs are counted: one of `macs.COUNTERS`
    data: PictureSource  # pictures and prompts that it was trained on
    # How unseen prompts are routed at the end; see `router_training.evaluate`.
    figures: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SplitRecord:
    """How the prompts of one split are shared among the experts."""

    prompts: list[int]  # number of prompts of every expert
    largest_share: float  # share of the prompts that the busiest expert has
    smallest_share: float  # share of the prompts that the least busy expert has
    dead: list[int]  # experts without a prompt
    macs: float  # share of the UNet's MACs that the average prompt keeps
    macs_over_budget: float  # how far that is above the budget, as a share of the budget
    # Nats that the expert of a prompt tells of its drawing style.
    information_style: float | None = None
    # The same with styles shuffled, which is what chance gives.
    information_style_shuffled: float | None = None
    information_group: float | None = None  # nats that the expert of a prompt tells of its subject
    information_group_shuffled: float | None = None  # the same with subjects shuffled


@dataclasses.dataclass(frozen=True)
class AssignRecord:
    """Stage `assign`."""

    route_noise: str  # noise of the gates of prompts: one of `assignment.ROUTE_NOISES`
    macs_budget: float  # share of the UNet's MACs that was asked for
    mac_counter: str  # how MACs are counted: one of `macs.COUNTERS`
    latent_size: tuple[int, int]  # height and width of the latents that MACs are counted at
    logit_shift: list[float]  # what was added to the logits of width gates to keep the budget
    macs_of_codes: list[float]  # share of MACs that each code keeps before that
    macs_of_experts: list[float]  # share of MACs that each expert keeps
    units_that_differ: float  # share of all gates in which two experts differ, over all pairs
    splits: dict[str, SplitRecord]


@dataclasses.dataclass(frozen=True)
class DenseRow:
    """The dense UNet that experts are cut from."""

    macs: int  # MACs of one call
    parameters: int
    # Number of units of every site, and of every block that can go.
    units: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ExpertRow:
    """One expert."""

    directory: str  # name of its diffusers directory
    macs: int  # MACs of one call of its UNet
    share_of_macs: float  # the same as a share of the dense UNet's
    parameters: int  # number of its UNet's parameters
    share_of_parameters: float  # the same as a share of the dense UNet's
    prompts: dict[str, int]  # number of its prompts, by split
    kept: dict[str, int]  # units that are left, by site of the dense UNet


@dataclasses.dataclass(frozen=True)
class ExpertsRecord:
    """Stages `materialise` and `slice`."""

    model: str  # the model that experts are cut from, as the config names it
    data: PictureSource  # pictures and prompts that the experts share
    seed: int  # seed of the draw of these prompts
    variant: str  # variant of the model's files; empty for none
    mac_counter: str  # how MACs are counted: one of `macs.COUNTERS`
    latent_size: tuple[int, int]  # height and width of the latents that MACs are counted at
    cache: str  # directory within the run where latents and text states are kept
    text_tokens: int  # tokens of a prompt, for MACs
    dense: DenseRow  # the UNet that experts are cut from
    experts: list[ExpertRow]  # one row an expert, in their order
    slice: dict[str, Any] | None = None  # criterion, budget and figures of stage `slice`


@dataclasses.dataclass(frozen=True)
class FinetuneRow:
    """One fine-tuned expert."""

    directory: str  # name of its diffusers directory
    prompts: dict[str, int]  # number of its prompts, by split
    before: dict[str, float]  # losses on unseen prompts as it was cut; empty if there are none
    after: dict[str, float]  # the same after fine-tuning


@dataclasses.dataclass(frozen=True)
class FinetuneRecord:
    """Stage `finetune`."""

    experts: list[FinetuneRow]  # one row an expert that was trained
    skipped: list[str]  # directories of experts that have no prompt to learn from
