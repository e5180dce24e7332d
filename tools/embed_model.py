"""Puts a pretrained model into the package, with its model card, curves and sample grids.

    python tools/embed_model.py runs/pretrain_embedded

Every figure of the card is read from the run: `metrics.jsonl` of each training, and images that
are generated here. What else there is to say of the run, say in its `NOTES.md`: the card quotes it.
Look at the pictures before you commit them.
"""

import argparse
import json
import pathlib
import platform
import shutil
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
from PIL import Image, ImageDraw

from sdprune_jax import pipeline, sharding
from sdprune_jax.data import captions, emoji, tokenizer
from sdprune_jax.files import model_directory
from sdprune_jax.metrics import embedded

STEPS, SEED, BATCH = 25, 0, 24
GUIDANCES, NUM_TRIED = (2.0, 3.0, 4.0, 5.0, 7.5), 120  # the best of these on so many of `val`
_CURVES = {  # of each training, in order
    "clip": ("loss", "val_r_at_1"),
    "vae": ("absolute", "test_psnr"),
    "unet": ("mse", "train_mse", "val_mse"),
}
GRIDS = {"train": 48, "val": 24, "test": 24}  # images of each split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=pathlib.Path, help="working directory of stage `pretrain`")
    run = parser.parse_args().run
    target = model_directory.directory_of("embedded")
    shutil.rmtree(target, ignore_errors=True)  # with `report.png` of the README: make it anew
    shutil.copytree(run / "model", target)
    logs = {name: _log(run / "pretrain" / name) for name in _CURVES}
    scorer = embedded.load_scorer(target / "clip", tokenizer.load(target / "tokenizer"))
    draw = _drawer(target)
    val = emoji.load("val")
    of_clip = _means(scorer, val.images, val.concept, val.style)
    tried = {scale: _recall(scorer, draw, "val", NUM_TRIED, scale) for scale in GUIDANCES}
    guidance = max(tried, key=lambda scale: sum(tried[scale].values()))
    recalls = {}
    for split, count in GRIDS.items():
        images, texts, concept, style = draw(split, count, guidance)
        _grid(images, texts).save(target / f"samples_{split}.png", optimize=True)
        real = _pictures(split, concept, style)
        found, of_real = (_means(scorer, x, concept, style) for x in (images, real))
        recalls[split] = found | {f"real_{name}": mean for name, mean in of_real.items()}
    for name, log in logs.items():
        curves = _curves(log, _CURVES[name])
        (target / f"curves_{name}.svg").write_text(curves)
    settings = json.loads((run / "config.json").read_text())["pretrain"]
    notes = run / "NOTES.md"
    history = notes.read_text() if notes.exists() else ""
    images, texts, concept, style = draw("val", GRIDS["val"], guidance)
    nearest, cosine = _nearest(scorer, images)
    pairs = np.concatenate([images, nearest], axis=2)
    _grid(pairs, texts, columns=4).save(target / "nearest.png", optimize=True)
    _, cosine_of_real = _nearest(scorer, _pictures("val", concept, style))
    likeness = (float(np.median(cosine)), float(np.median(cosine_of_real)))
    card = _card(target, logs, of_clip, tried, guidance, recalls, likeness, settings, history)
    (target / "README.md").write_text(card)
    total = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {total / 1e6:.1f} MB")


def _log(directory: pathlib.Path) -> list[dict[str, float]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _last(log: list[dict[str, float]], key: str) -> float:
    return [line[key] for line in log if key in line][-1]


def _drawer(target: pathlib.Path) -> Callable[[str, int, float], tuple]:
    """From split, count and guidance to images, captions, concepts and styles."""
    model = model_directory.open_model(target)
    mesh = sharding.make_mesh()
    params = pipeline.load(model, mesh)
    sample = pipeline.make_sample(model, mesh, sampler=None, num_steps=STEPS, guided=True)
    size = (model.unet.sample_size * model.vae.downscale,) * 2

    def draw(split: str, count: int, guidance: float) -> tuple:
        texts, concept, style = captions.drawn(split, count, SEED)
        batches = pipeline.render(
            model,
            params,
            sample,
            texts,
            range(count),
            size=size,
            seed=SEED,
            guidance_scale=guidance,
            negative_prompt="",
            batch_size=BATCH,
        )
        return np.concatenate([batch.images for batch in batches]), texts, concept, style

    return draw


def _recall(
    scorer: embedded.Scorer, draw: Callable, split: str, count: int, guidance: float
) -> dict[str, float]:
    images, _, concept, style = draw(split, count, guidance)
    return _means(scorer, images, concept, style)


def _means(
    scorer: embedded.Scorer, images: np.ndarray, concept: np.ndarray, style: np.ndarray
) -> dict[str, float]:
    """How many are found among all concepts."""
    found = scorer.recall(np.asarray(pipeline.to_float(images)), concept, style)
    return {name: float(hits.mean()) for name, hits in found.items()}


def _pictures(split: str, concept: np.ndarray, style: np.ndarray) -> np.ndarray:
    pairs = emoji.load(split)
    row_of = {pair: row for row, pair in enumerate(zip(pairs.concept, pairs.style, strict=True))}
    return pairs.images[[row_of[pair] for pair in zip(concept, style, strict=True)]]


def _nearest(scorer: embedded.Scorer, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The training picture most like each image to the CLIP, and their cosine."""
    pictures = emoji.load("train").images
    mine, theirs = (
        scorer.embed_images(np.asarray(pipeline.to_float(x))) for x in (images, pictures)
    )
    cosine = mine @ theirs.T
    return pictures[cosine.argmax(axis=1)], cosine.max(axis=1)


def _grid(images: np.ndarray, texts: list[str], columns: int = 8, scale: int = 2) -> Image.Image:
    edge, width = images.shape[1] * scale, images.shape[2] * scale
    cell = (width + 12, edge + 34)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = i % columns * cell[0] + 6, i // columns * cell[1] + 4
        sheet.paste(Image.fromarray(image).resize((width, edge), Image.Resampling.NEAREST), (x, y))
        words, lines = text.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > width // 6:
                lines.append("")
            lines[-1] += f"{word} "
        draw.multiline_text((x, y + edge + 1), "\n".join(lines[:2]), fill="black", spacing=1)
    return sheet


def _curves(log: list[dict[str, float]], keys: tuple[str, ...]) -> str:
    """One panel a figure over the optimizer steps, as SVG."""
    width, height, panels = 300, 130, []
    for i, key in enumerate(keys):
        points = [(line["step"], line[key]) for line in log if key in line]
        low, high = min(v for _, v in points), max(v for _, v in points)
        last = max(line["step"] for line in log)
        path = " ".join(
            f"{10 + step / last * (width - 20):.1f},"
            f"{height - 20 - (value - low) / ((high - low) or 1) * (height - 45):.1f}"
            for step, value in points
        )
        panels.append(
            f'<g transform="translate({i * width},0)"><text x="10" y="14">{key}: last '
            f"{points[-1][1]:.4g} at step {points[-1][0]}, range {low:.4g} to {high:.4g}</text>"
            f'<polyline points="{path}" fill="none" stroke="#2563eb" stroke-width="1.5"/></g>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(keys)}" height="{height}" '
        f'font-family="sans-serif" font-size="10"><rect width="100%" height="100%" fill="white"/>'
        + "".join(panels)
        + "</svg>\n"
    )


def _card(
    target: pathlib.Path,
    logs: dict[str, list[dict[str, float]]],
    of_clip: dict[str, float],
    tried: dict[float, dict[str, float]],
    guidance: float,
    recalls: dict[str, dict[str, float]],
    likeness: tuple[float, float],
    settings: dict[str, dict],
    history: str,
) -> str:
    sizes = {path.parent.name: path.stat().st_size / 1e6 for path in target.glob("*/*.safetensors")}
    counts = {name: int(size * 1e6) // 2 for name, size in sizes.items()}
    rows = []
    for name, log in logs.items():
        training = settings[name]["training"]
        # A resumed run counts its seconds anew: add up the pieces.
        seconds = sum(
            before["seconds"]
            for before, after in zip(log, [*log[1:], {"seconds": -1}], strict=True)
            if after["seconds"] < before["seconds"]
        )
        samples = training["num_steps"] * training["batch_size"]
        rows.append(
            f"| {name} | {counts[name]:,} | {training['num_steps']:,} x {training['batch_size']} |"
            f" {samples / 10178:.0f} | {seconds / 60:.0f} min | {samples / seconds:.0f} |"
        )
    vae_log, unet_log = logs["vae"], logs["unet"]
    curves = "\n".join(f"![{name}](curves_{name}.svg)" for name in logs)
    found = "\n".join(
        f"| {split} | {GRIDS[split]} | {values['r_at_1']:.2f} | {values['r_at_10']:.2f} |"
        f" {values['real_r_at_1']:.2f} | {values['real_r_at_10']:.2f} |"
        for split, values in recalls.items()
    )
    scales = "\n".join(
        f"| {scale:g} | {values['r_at_1']:.3f} | {values['r_at_10']:.3f} |"
        for scale, values in tried.items()
    )
    return f"""# The embedded model

A Stable Diffusion 2 of {sum(v for k, v in counts.items() if k != "clip") / 1e6:.1f} M parameters: \
SD2's architecture with small widths, trained from nothing on 10,178 emoji and their names. It is \
for studying pruning on a laptop; it knows nothing but emoji of 64x64 pixels on white.

Trained on {platform.processor() or platform.machine()}, 2 cores, on {time.strftime("%Y-%m-%d")}.

| training | parameters | steps x batch | epochs | time | samples a second |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Other work ran on the same two cores during parts of it, so the times are upper bounds.

    python -m sdprune_jax.main --config=configs/pretrain_embedded.py
    python tools/embed_model.py runs/pretrain_embedded

{history}
## Figures

CLIP: R@1 {of_clip["r_at_1"]:.3f}, R@10 {of_clip["r_at_10"]:.3f} on `val` \
(526 held-out pairs of concept and style), among the captions of all 1,914 concepts in the \
picture's style. Autoencoder: PSNR {_last(vae_log, "val_psnr"):.2f} dB on `val`, \
{_last(vae_log, "test_psnr"):.2f} dB on `test` (held-out concepts). UNet: mean squared error of \
the velocity {_last(unet_log, "train_mse"):.4f} on training images, \
{_last(unet_log, "val_mse"):.4f} on `val`, same noise, at timesteps as they are trained on.

{curves}

Guidance was chosen on {NUM_TRIED} captions of `val`:

| guidance | R@1 | R@10 |
|---|---|---|
{scales}

Generated images (PNDM {STEPS}, guidance {guidance:g}, seed {SEED}) that this CLIP finds among all \
1,914 concepts; chance is 0.0005 and 0.005. These scores compare with no other CLIP's.

| captions of | images | R@1 | R@10 | R@1 of the real pictures | R@10 |
|---|---|---|---|---|---|
{found}

Training captions:
![](samples_train.png)
Held-out pairs of concept and style:
![](samples_val.png)
Held-out concepts:
![](samples_test.png)

Is it memory? Left the samples of held-out pairs, right the training picture that is most like it \
to the CLIP. The median cosine of the two is {likeness[0]:.3f}; of the real held-out pictures and \
the training pictures most like them it is {likeness[1]:.3f}.
![](nearest.png)

## Data and licence

Emoji of Fluent (MIT), Noto and Firefox (Apache-2.0), Twemoji and EmojiOne (CC-BY-4.0), named by \
Unicode's CLDR; credits in `NOTICE` at the root of the repository. The weights are under the MIT \
licence of sdprune_jax.
"""


if __name__ == "__main__":
    main()
