"""Runs prompts through a component as it is at the time, and keeps what its layers read."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int32

from sdprune_jax.data import tokenizer
from sdprune_jax.files import convert, model_directory
from sdprune_jax.models import clip
from sdprune_jax.scoring import calibrate, gradients, inputs
from sdprune_jax.scoring.recorder import Stat
from sdprune_jax.scoring.settings import CalibrationSettings


@dataclasses.dataclass
class Calibration:
    """Runs prompts through a component as it is at the time.

    Attributes:
        settings: prompts at once, sampler, guidance and weights.
        model: the dense model, whose directory holds the tokenizer and the text encoder.
        component: "text_encoder" or "unet".
        mesh: batches are split over all of its axes.
        prompts: texts to run; gradients are of pictures instead.
        seed: draws noise, positions and pictures.
        variant: which files of the model are read, such as "fp16".
        text_params: parameters of the text encoder; None reads those of the model's directory.
        seconds: time taken so far.
    """

    settings: CalibrationSettings
    model: model_directory.ModelConfig
    component: str
    mesh: Mesh
    prompts: Sequence[str]
    seed: int = 0
    variant: str | None = None
    text_params: Any = None
    seconds: float = 0.0

    def parts(
        self, flat: Mapping[str, Any], layers: list[str], statistic: str
    ) -> Iterator[tuple[list[str], Mapping[str, Stat]]]:
        """Yields layers whose statistics fit in memory together, and those statistics.

        Args:
            flat: arrays of the component by path, read anew for every part.
            layers: paths of the kernels in scope.
            statistic: see `stats`.
        """
        for names in self.packages(layers, statistic):
            yield names, self.stats(flat, names, statistic)

    def packages(self, layers: list[str], statistic: str) -> list[list[str]]:
        """The layers of each part; gradients make one, as they are of all layers together."""
        if statistic == "gradient":
            return [layers]
        limit = int(self.settings.max_gigabytes * 1e9)
        return inputs.packages(getattr(self.model, self.component), layers, statistic, limit)

    def stats(
        self, flat: Mapping[str, Any], paths: Sequence[str], statistic: str
    ) -> Mapping[str, Stat]:
        """What the layers at `paths` read in the component whose arrays are `flat`.

        Args:
            flat: arrays of the component by path.
            paths: kernels of the layers.
            statistic: "moments" or "gram" of the inputs; "weighted_gram", where the sampler's
                calls count as `timestep_weights` says and not all the same; or "gradient", the
                sums of the loss's gradients by the kernels.
        """
        start, model, settings = time.perf_counter(), self.model, self.settings
        params = convert.unflatten(
            {path: jnp.asarray(x, jnp.float32) for path, x in flat.items()},
            model_directory.param_shapes(model, self.component),
        )
        plain: Any = statistic.removeprefix("weighted_")
        stats: Mapping[str, Stat]
        if statistic == "gradient":
            grads = convert.flatten(self.gradient_sums(params).grads)
            stats = {path: grads[path] for path in paths}
        elif self.component == "text_encoder":
            rest = (params, self.mesh, self._ids(self.prompts), paths, plain, settings)
            stats = calibrate.text_statistics(model.text_encoder, *rest)
        else:
            if statistic != "weighted_gram":
                settings = dataclasses.replace(settings, timestep_weights="uniform")
            rest = (self.text_states(), paths, plain, jax.random.key(self.seed), settings)
            stats = calibrate.unet_statistics(model, params, self.mesh, *rest)
        jax.block_until_ready(stats)
        self.seconds += time.perf_counter() - start
        return stats

    def gradient_sums(self, params: Any) -> gradients.Sums:
        """The gradients of the loss of embedded pictures by the UNet's parameters."""
        assert self.component == "unet", "no other component has a denoising loss"
        rest = (self.settings.gradients, self.seed, self.variant)
        return gradients.of_pictures(self.model, params, self.mesh, *rest)

    def text_states(self) -> Float[np.ndarray, "rows n d"]:
        """Last hidden states of the prompts and, in the last row, of no text."""
        text_config = self.model.text_encoder
        params = self.text_params or model_directory.load(
            self.model, "text_encoder", dtype=np.float32, variant=self.variant
        )
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
        encode = jax.jit(clip.TextTower(text_config).apply)
        return np.asarray(encode({"params": params}, self._ids([*self.prompts, ""])))

    def _ids(self, texts: Sequence[str]) -> Int32[np.ndarray, "rows n"]:
        length = self.model.text_encoder.max_position_embeddings
        return tokenizer.encode(tokenizer.load(self.model.directory / "tokenizer"), texts, length)
