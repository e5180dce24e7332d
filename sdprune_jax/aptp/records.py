"""The records of APTP's stages: what `artefacts` writes beside their outputs, and reads again."""

import dataclasses
from typing import Any

from sdprune_jax.data.pictures import PictureSource


@dataclasses.dataclass(frozen=True)
class RouterRecord:
    """Stage `router`.

    Attributes:
        model: the model whose experts are routed, as the config names it.
        variant: variant of that model's files; empty for none.
        seed: seed of the training and of the draw of prompts.
        embedding_dim: width of the vectors that the router reads of prompts.
        latent_size: height and width of the latents that MACs are counted at.
        num_codes: number of experts.
        macs_budget: share of the UNet's MACs that was asked for.
        mac_counter: how MACs are counted: one of `macs.COUNTERS`.
        data: pictures and prompts that it was trained on.
        figures: how unseen prompts are routed at the end; see `router_training.evaluate`.
    """

    model: str
    variant: str
    seed: int
    embedding_dim: int
    latent_size: tuple[int, int]
    num_codes: int
    macs_budget: float
    mac_counter: str
    data: PictureSource
    figures: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SplitRecord:
    """How the prompts of one split are shared among the experts.

    Attributes:
        prompts: number of prompts of every expert.
        largest_share: share of the prompts that the busiest expert has.
        smallest_share: share of the prompts that the least busy expert has.
        dead: experts without a prompt.
        macs: share of the UNet's MACs that the average prompt keeps.
        macs_over_budget: how far that is above the budget, as a share of the budget.
        information_style: nats that the expert of a prompt tells of its drawing style.
        information_style_shuffled: the same with styles shuffled, which is what chance gives.
        information_group: nats that the expert of a prompt tells of its subject.
        information_group_shuffled: the same with subjects shuffled.
    """

    prompts: list[int]
    largest_share: float
    smallest_share: float
    dead: list[int]
    macs: float
    macs_over_budget: float
    information_style: float | None = None
    information_style_shuffled: float | None = None
    information_group: float | None = None
    information_group_shuffled: float | None = None


@dataclasses.dataclass(frozen=True)
class AssignRecord:
    """Stage `assign`.

    Attributes:
        route_noise: noise of the gates of prompts: one of `assignment.ROUTE_NOISES`.
        macs_budget: share of the UNet's MACs that was asked for.
        mac_counter: how MACs are counted: one of `macs.COUNTERS`.
        latent_size: height and width of the latents that MACs are counted at.
        logit_shift: what was added to the logits of width gates to keep the budget.
        macs_of_codes: share of MACs that each code keeps before that.
        macs_of_experts: share of MACs that each expert keeps.
        units_that_differ: share of all gates in which two experts differ, over all pairs.
        splits: the prompts of every split.
    """

    route_noise: str
    macs_budget: float
    mac_counter: str
    latent_size: tuple[int, int]
    logit_shift: list[float]
    macs_of_codes: list[float]
    macs_of_experts: list[float]
    units_that_differ: float
    splits: dict[str, SplitRecord]


@dataclasses.dataclass(frozen=True)
class DenseRow:
    """The dense UNet that experts are cut from.

    Attributes:
        macs: MACs of one call.
        parameters: number of parameters.
        units: number of units of every site, and of every block that can go.
    """

    macs: int
    parameters: int
    units: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ExpertRow:
    """One expert.

    Attributes:
        directory: name of its diffusers directory.
        macs: MACs of one call of its UNet.
        share_of_macs: the same as a share of the dense UNet's.
        parameters: number of its UNet's parameters.
        share_of_parameters: the same as a share of the dense UNet's.
        prompts: number of its prompts, by split.
        kept: units that are left, by site of the dense UNet.
    """

    directory: str
    macs: int
    share_of_macs: float
    parameters: int
    share_of_parameters: float
    prompts: dict[str, int]
    kept: dict[str, int]


@dataclasses.dataclass(frozen=True)
class ExpertsRecord:
    """Stages `materialise` and `slice`.

    Attributes:
        model: the model that experts are cut from, as the config names it.
        data: pictures and prompts that the experts share.
        seed: seed of the draw of these prompts.
        variant: variant of the model's files; empty for none.
        mac_counter: how MACs are counted: one of `macs.COUNTERS`.
        latent_size: height and width of the latents that MACs are counted at.
        cache: directory within the run where latents and text states are kept.
        text_tokens: tokens of a prompt, for MACs.
        dense: the UNet that experts are cut from.
        experts: one row an expert, in their order.
        slice: criterion, budget and figures of stage `slice`.
    """

    model: str
    data: PictureSource
    seed: int
    variant: str
    mac_counter: str
    latent_size: tuple[int, int]
    cache: str
    text_tokens: int
    dense: DenseRow
    experts: list[ExpertRow]
    slice: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class FinetuneRow:
    """One fine-tuned expert.

    Attributes:
        directory: name of its diffusers directory.
        prompts: number of its prompts, by split.
        before: losses on unseen prompts as it was cut; empty if there are none.
        after: the same after fine-tuning.
    """

    directory: str
    prompts: dict[str, int]
    before: dict[str, float]
    after: dict[str, float]


@dataclasses.dataclass(frozen=True)
class FinetuneRecord:
    """Stage `finetune`.

    Attributes:
        experts: one row an expert that was trained.
        skipped: directories of experts that have no prompt to learn from.
    """

    experts: list[FinetuneRow]
    skipped: list[str]
