"""The sizes of a UNet of Stable Diffusion 2, as diffusers writes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdprune_jax import UserError

FF_UNITS = 32  # groups of neurons in a feed-forward network that are gated together

_MID_BLOCK = "UNetMidBlock2DCrossAttn"

# Keys of diffusers' config.json that SD2 fixes: any other value is another architecture.
_FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "mid_block_scale_factor": 1,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
    "use_linear_projection": True,
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Architecture of the UNet, under the names of diffusers' `config.json`.

    Attributes:
        attention_head_dim: heads (diffusers' misnomer) of each level.
        kept_units: `(site, units)` of every site that was sliced; the others are whole. A depth
            site with 0 units is a block that was removed.
        mid_block_type: None for a UNet without a middle block.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    layers_per_block: int = 2
    attention_head_dim: tuple[int, ...] = (5, 10, 20, 20)
    cross_attention_dim: int = 1024
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    upcast_attention: bool = False
    kept_units: tuple[tuple[str, int], ...] = ()
    mid_block_type: str | None = _MID_BLOCK

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "UNetConfig":
        """Reads the values of a diffusers `unet/config.json`.

        Raises:
            ValueError: naming every value that is not Stable Diffusion 2's architecture.
        """
        problems = [
            f"{key} is {values[key]!r}, expected {want!r}"
            for key, want in _FIXED.items()
            if key in values
            and values[key] != want
            and not (key == "act_fn" and values[key] == "swish")
        ]
        if not values.get("use_linear_projection", False):
            problems.append("use_linear_projection is not set: this looks like Stable Diffusion 1")
        known = {field.name for field in dataclasses.fields(cls)}
        found = {key: _tuple(value) for key, value in values.items() if key in known}
        levels = len(found.get("block_out_channels", cls.block_out_channels))
        heads = found.get("attention_head_dim", cls.attention_head_dim)
        found["attention_head_dim"] = heads if isinstance(heads, tuple) else (heads,) * levels
        config = cls(**found)
        problems += config.problems()
        if problems:
            raise UserError(
                "unet/config.json is not a Stable Diffusion 2 UNet:\n  " + "\n  ".join(problems)
            )
        return config

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self) | _FIXED
        if not self.kept_units:
            del values["kept_units"]
        if self.mid_block_type:  # readers of the past do not know the key
            del values["mid_block_type"]
        return {"_class_name": "UNet2DConditionModel"} | dict(sorted(values.items()))

    def problems(self) -> list[str]:
        """Why these values cannot be a UNet; empty when they can."""
        levels = len(self.block_out_channels)
        found = [
            f"{name} has {len(getattr(self, name))} entries for {levels} levels"
            for name in ("down_block_types", "up_block_types", "attention_head_dim")
            if len(getattr(self, name)) != levels
        ]
        for name, legal in (
            ("down_block_types", ("CrossAttnDownBlock2D", "DownBlock2D")),
            ("up_block_types", ("CrossAttnUpBlock2D", "UpBlock2D")),
        ):
            found += [
                f"{name}: {t!r}, expected one of {legal}"
                for t in getattr(self, name)
                if t not in legal
            ]
        for channels, heads in zip(self.block_out_channels, self.attention_head_dim, strict=False):
            if channels < 1 or channels % self.norm_num_groups:
                found.append(
                    f"{channels} channels do not divide into {self.norm_num_groups} groups"
                )
            if heads < 1 or channels % heads:
                found.append(f"{channels} channels do not divide into {heads} heads")
            if 4 * channels % FF_UNITS:
                found.append(f"{4 * channels} neurons do not divide into {FF_UNITS} units")
        if self.mid_block_type not in (_MID_BLOCK, None):
            found.append(f"mid_block_type is {self.mid_block_type!r}, expected {_MID_BLOCK!r}")
        if self.in_channels != 4:
            kind = {9: "an inpainting model", 5: "a depth model"}.get(
                self.in_channels, "another model"
            )
            found.append(f"in_channels is {self.in_channels}, expected 4: this looks like {kind}")
        return found

    def units(self, site: str, dense: int) -> int:
        """Units of `site` that are left of `dense`."""
        return dict(self.kept_units).get(site, dense)


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list | tuple) else value
