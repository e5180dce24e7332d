"""Runs prompts through a component as it is at the time, and keeps what its layers read."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int32

from sdprune_jax import config
from sdprune_jax.data import captions, tokenizer
from sdprune_jax.files import convert, model_directory
from sdprune_jax.models import clip
from sdprune_jax.scoring import calibrate, gradients, inputs, recorder
from sdprune_jax.scoring.trajectory import Trajectory


class Calibration:
    """Runs prompts through a component as it is at the time.

    Attributes:
        seconds: that it has taken so far.
    """

    def __init__(
        self,
        section: config.Calibration,
        model: model_directory.Model,
        component: str,
        mesh: Mesh,
        *,
        seed: int,
        variant: str,
    ):
        self.seconds = 0.0
        self._section, self._seed, self._variant = section, seed, variant or None
        self._model, self._component, self._mesh = model, component, mesh

    def parts(
        self, flat: Mapping[str, np.ndarray], layers: list[str], statistic: str | None
    ) -> Iterator[tuple[list[str], Mapping[str, recorder.Stat]]]:
        """Yields layers whose statistics fit in memory together, and those statistics.

        Args:
            flat: arrays of the component by path, read anew for every part.
            layers: paths of the kernels in scope.
            statistic: None makes one part, without any.
        """
        for names in self.packages(layers, statistic) if statistic else [layers]:
            yield names, self.stats(flat, names, statistic) if statistic else {}

    def packages(self, layers: list[str], statistic: str) -> list[list[str]]:
        """The layers of each part; gradients make one, as they are of all layers together."""
        if statistic == "gradient":
            return [layers]
        configs = {"unet": self._model.unet, "text_encoder": self._model.text_encoder}
        limit = int(self._section.max_gigabytes * 1e9)
        return inputs.packages(configs[self._component], layers, statistic, limit)

    def stats(
        self, flat: Mapping[str, np.ndarray], paths: Sequence[str], statistic: str
    ) -> Mapping[str, recorder.Stat]:
        """What the layers at `paths` read in the component whose arrays are `flat`.

        Or, as "gradient", the sums of the loss's gradients by their kernels. In "weighted_gram" the
        sampler's calls count as `calibration.timestep_weights` says; else all count the same.
        """
        start = time.perf_counter()
        section, model = self._section, self._model
        params = convert.unflatten(
            {path: jnp.asarray(x, jnp.float32) for path, x in flat.items()},
            model_directory.param_shapes(model, self._component),
        )
        if statistic == "gradient":
            assert self._component == "unet"  # checks.py refuses others
            sums = gradients.of_pictures(
                model, params, self._mesh, section.gradients, self._seed, self._variant
            )
            grads = convert.flatten(sums.grads)
            self.seconds += time.perf_counter() - start
            return {path: grads[path] for path in paths}
        if self._component == "text_encoder":
            found = calibrate.text_statistics(
                model.text_encoder, params, self._mesh, self._ids(()), paths, statistic,
                batch_size=section.batch_size, mask_pads=section.mask_pads,
            )  # fmt: skip
        else:
            text, walk = self.text_states(), self.trajectory()
            if statistic != "weighted_gram":
                walk = dataclasses.replace(walk, timestep_weights="uniform")
            found = calibrate.unet_statistics(
                model, params, self._mesh, text[:-1], text[-1:], paths,
                statistic.removeprefix("weighted_"), jax.random.key(self._seed), walk,
            )  # fmt: skip
        jax.block_until_ready(found)
        self.seconds += time.perf_counter() - start
        return found

    def text_states(self) -> Float[np.ndarray, "rows n d"]:
        """Of the prompts and, the last row, of no text."""
        model = self._model
        params = model_directory.load(
            model, "text_encoder", dtype=np.float32, variant=self._variant
        )
        encode = jax.jit(clip.TextTower(model.text_encoder).apply)
        return np.asarray(encode({"params": params}, self._ids([""])))

    def trajectory(self) -> Trajectory:
        section = self._section
        return Trajectory(
            num_steps=section.num_steps, guidance_scale=section.guidance_scale,
            batch_size=section.batch_size, timestep_weights=section.timestep_weights,
            position_fraction=section.position_fraction,
        )  # fmt: skip

    def _ids(self, more: Sequence[str]) -> Int32[np.ndarray, "rows n"]:
        """Tokens of the prompts and then of `more`."""
        section, model = self._section, self._model
        prompts = captions.prompts(section.prompts, "train", section.num_prompts, self._seed)
        words = tokenizer.load(model.directory / "tokenizer")
        length = model.text_encoder.max_position_embeddings
        return tokenizer.encode(words, [*prompts, *more], length)
