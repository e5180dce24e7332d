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

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
from PIL import Image, ImageDraw

from sdprune_jax import checkpoint, pipeline, sharding
from sdprune_jax.data import captions, emoji, tokenizer
from sdprune_jax.metrics import embedded

GUIDANCE, STEPS, SEED = 3.0, 25, 0
GRIDS = {"train": 48, "val": 24, "test": 24}  # images of each split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=pathlib.Path, help="working directory of stage `pretrain`")
    run = parser.parse_args().run
    target = checkpoint.directory_of("embedded")
    shutil.rmtree(target, ignore_errors=True)  # with `report.png` of the README: make it anew
    shutil.copytree(run / "model", target)
    logs = {
        name: _log(run / "pretrain" / name / "metrics.jsonl") for name in ("clip", "vae", "unet")
    }
    recalls = {split: _sample(target, split, count) for split, count in GRIDS.items()}
    for name, values in (
        ("clip", ("loss", "val_r_at_1")),
        ("vae", ("absolute", "test_psnr")),
        ("unet", ("mse", "train_mse", "val_mse")),
    ):
        (target / f"curves_{name}.svg").write_text(_curves(logs[name], values))
    settings = json.loads((run / "config.json").read_text())["pretrain"]
    notes = run / "NOTES.md"
    history = notes.read_text() if notes.exists() else ""
    (target / "README.md").write_text(_card(target, logs, recalls, settings, history))
    total = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {total / 1e6:.1f} MB")


def _log(path: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _last(log: list[dict[str, float]], key: str) -> float:
    return [line[key] for line in log if key in line][-1]


def _sample(target: pathlib.Path, split: str, count: int) -> dict[str, float]:
    """Draws a grid of generated images; returns how many find their concept, and of real ones."""
    model = checkpoint.open_model(target)
    mesh = sharding.make_mesh()
    params = pipeline.load(model, mesh)
    texts, concept, style = captions.drawn(split, count, SEED)
    sample = pipeline.make_sample(model, mesh, sampler=None, num_steps=STEPS, guided=True)
    size = (model.unet.sample_size * model.vae.downscale,) * 2
    batches = pipeline.render(
        model, params, sample, texts, range(count), size=size, seed=SEED,
        guidance_scale=GUIDANCE, negative_prompt="", batch_size=count,
    )  # fmt: skip
    got = next(batches).images
    _grid(got, texts).save(target / f"samples_{split}.png", optimize=True)
    scorer = embedded.load_scorer(target / "clip", tokenizer.load(target / "tokenizer"))
    pairs = emoji.load(split)
    row_of = {pair: row for row, pair in enumerate(zip(pairs.concept, pairs.style, strict=True))}
    real = pairs.images[[row_of[pair] for pair in zip(concept, style, strict=True)]]
    found = scorer.recall(np.asarray(pipeline.to_float(got)), concept, style)
    of_real = scorer.recall(np.asarray(pipeline.to_float(real)), concept, style)
    found |= {f"real_{name}": hits for name, hits in of_real.items()}
    return {name: float(hits.mean()) for name, hits in found.items()}


def _grid(images: np.ndarray, texts: list[str], columns: int = 8, scale: int = 2) -> Image.Image:
    edge = images.shape[1] * scale
    cell = (edge + 12, edge + 34)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = i % columns * cell[0] + 6, i // columns * cell[1] + 4
        sheet.paste(Image.fromarray(image).resize((edge, edge), Image.Resampling.NEAREST), (x, y))
        words, lines = text.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > 21:
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
    recalls: dict[str, dict[str, float]],
    settings: dict[str, dict],
    history: str,
) -> str:
    sizes = {path.parent.name: path.stat().st_size / 1e6 for path in target.glob("*/*.safetensors")}
    counts = {name: int(size * 1e6) // 2 for name, size in sizes.items()}
    rows = []
    for name, part in (("clip", "clip"), ("vae", "vae"), ("unet", "unet")):
        training, log = settings[name]["training"], logs[name]
        # A resumed run counts its seconds anew: add up the pieces.
        seconds = sum(
            before["seconds"]
            for before, after in zip(log, [*log[1:], {"seconds": -1}], strict=True)
            if after["seconds"] < before["seconds"]
        )
        samples = training["num_steps"] * training["batch_size"]
        rows.append(
            f"| {name} | {counts[part]:,} | {training['num_steps']:,} x {training['batch_size']} |"
            f" {samples / 10178:.0f} | {seconds / 60:.0f} min | {samples / seconds:.0f} |"
        )
    clip_log, vae_log, unet_log = logs["clip"], logs["vae"], logs["unet"]
    found = "\n".join(
        f"| {split} | {GRIDS[split]} | {values['r_at_1']:.2f} | {values['r_at_10']:.2f} |"
        f" {values['real_r_at_1']:.2f} | {values['real_r_at_10']:.2f} |"
        for split, values in recalls.items()
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

CLIP: R@1 {_last(clip_log, "val_r_at_1"):.3f}, R@10 {_last(clip_log, "val_r_at_10"):.3f} on `val` \
(526 held-out pairs of concept and style), among the captions of all 1,914 concepts in the \
picture's style. Autoencoder: PSNR {_last(vae_log, "val_psnr"):.2f} dB on `val`, \
{_last(vae_log, "test_psnr"):.2f} dB on `test` (held-out concepts). UNet: mean squared error of \
the velocity {_last(unet_log, "train_mse"):.4f} on training images, \
{_last(unet_log, "val_mse"):.4f} on `val`, same noise.

![CLIP](curves_clip.svg)
![autoencoder](curves_vae.svg)
![UNet](curves_unet.svg)

Generated images (PNDM {STEPS}, guidance {GUIDANCE:g}, seed {SEED}) that this CLIP finds among all \
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

## Data and licence

Emoji of Fluent (MIT), Noto and Firefox (Apache-2.0), Twemoji and EmojiOne (CC-BY-4.0), named by \
Unicode's CLDR; credits in `NOTICE` at the root of the repository. The weights are under the MIT \
licence of sdprune_jax.
"""


if __name__ == "__main__":
    main()
