"""Renders and packs the embedded dataset, sdprune_jax/data/emoji64, from packages of npm.

Needs node's npm, a network and `pip install resvg-py==0.5.0`; 5 minutes on two cores. npm's
packages go to the folder given first, the index and the sheets to the one given second:

    python tools/render_emoji.py /tmp/npm sdprune_jax/data/emoji64
"""

import io
import json
import multiprocessing
import pathlib
import re
import subprocess
import sys
import unicodedata

import numpy as np
import resvg_py
from PIL import Image

TILE = 64  # pixels
TILES_PER_ROW = 32  # and rows of a sheet
LABELS = {"package": "emojibase-data", "version": "17.0.0", "licence": "MIT"}
STYLES = (  # word, package, version, licence
    ("glossy", "@iconify-json/fluent-emoji", "1.2.7", "MIT"),
    ("flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    ("3d", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT"),
    ("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0"),
    ("blob", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0"),
    ("firefox", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0"),
    ("twitter", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0"),
    ("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0"),
)

Concept = tuple[str, str, str, tuple[str, ...]]  # group, subgroup, label, tags


def main(npm_dir: pathlib.Path, out_dir: pathlib.Path) -> None:
    _install(npm_dir)
    modules = npm_dir / "node_modules"
    by_name = _concepts(modules / LABELS["package"] / "en")
    ids = {concept: row for row, concept in enumerate(sorted(set(by_name.values())))}
    tiles, styles = [], []
    with multiprocessing.Pool() as pool:
        for word, package, version, licence in STYLES:
            draw = _from_webp if word == "3d" else _from_svg
            sources = (_webp_files if word == "3d" else _svg_texts)(modules / package, by_name)
            tiles += pool.map(draw, sources.values(), chunksize=16)
            style = {"word": word, "package": package, "version": version, "licence": licence}
            styles.append({**style, "concepts": [ids[concept] for concept in sources]})
            print(f"{word}: {len(sources)} pictures", flush=True)
    _write_index(out_dir, styles, list(ids))
    _write_sheets(out_dir, tiles)


def _install(npm_dir: pathlib.Path) -> None:
    npm_dir.mkdir(parents=True, exist_ok=True)
    wanted = [f"{package}@{version}" for _, package, version, _ in STYLES]
    wanted.append(f"{LABELS['package']}@{LABELS['version']}")
    subprocess.run(["npm", "install", "--ignore-scripts", *wanted], cwd=npm_dir, check=True)


def _concepts(directory: pathlib.Path) -> dict[str, Concept]:
    """Returns the concepts by all the names an icon may have; skin tones are left out."""
    messages = json.loads((directory / "messages.json").read_text())
    groups = {group["order"]: group["message"] for group in messages["groups"]}
    subgroups = {group["order"]: group["message"] for group in messages["subgroups"]}
    by_name: dict[str, Concept] = {}
    for entry in json.loads((directory / "data.json").read_text()):
        if groups.get(entry.get("group"), "components") == "components":
            continue  # hair styles and letters, which are parts of other emoji
        label, tags = entry["label"], tuple(entry["tags"])
        concept = groups[entry["group"]], subgroups[entry["subgroup"]], label, tags
        slug = _slug(label)
        names = (_code_points(entry["hexcode"]), slug, slug.removeprefix("flag-"))
        for name in (*names, slug.replace("-", "")):
            by_name.setdefault(name, concept)
    return by_name


def _slug(label: str) -> str:
    for mark, word in {"&": "and", "#": "hash", "*": "asterisk"}.items():
        label = label.replace(mark, word)
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")


def _code_points(text: str) -> str:
    """Returns "1F468-2764" for "1f468-2764-fe0f": the request for colour is optional."""
    return "-".join(code for code in text.upper().split("-") if code != "FE0F")


def _svg_texts(package: pathlib.Path, by_name: dict[str, Concept]) -> dict[Concept, str]:
    """Returns the first picture of every concept in one of Iconify's packages."""
    icons = json.loads((package / "icons.json").read_text())
    codes: dict[str, list[str]] = {}
    for code, name in json.loads((package / "chars.json").read_text()).items():
        codes.setdefault(name, []).append(_code_points(code))
    texts: dict[Concept, str] = {}
    for name, icon in icons["icons"].items():
        names = [*codes.get(name, []), name, f"flag-{name}", name.replace("-", "")]
        concept = next((by_name[each] for each in names if each in by_name), None)
        if concept and not icon.get("hidden") and concept not in texts:
            left, top = icon.get("left", 0), icon.get("top", 0)
            width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
            texts[concept] = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
                f' viewBox="{left} {top} {width} {height}" width="{TILE}" height="{TILE}">'
                f"{icon['body']}</svg>"
            )
    return texts


def _webp_files(package: pathlib.Path, by_name: dict[str, Concept]) -> dict[Concept, pathlib.Path]:
    files: dict[Concept, pathlib.Path] = {}
    for path in sorted((package / "assets").glob("*.webp")):
        concept = by_name.get(_code_points(path.stem))
        if concept:
            files.setdefault(concept, path)
    return files


def _from_svg(text: str) -> np.ndarray:
    size = 2 * TILE  # supersampled
    png = resvg_py.svg_to_bytes(svg_string=text, width=size, height=size, skip_system_fonts=True)
    return _on_white(Image.open(io.BytesIO(bytes(png))))


def _from_webp(path: pathlib.Path) -> np.ndarray:
    return _on_white(Image.open(path))


def _on_white(picture: Image.Image) -> np.ndarray:
    picture = picture.convert("RGBA")
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    whole = picture.width % TILE == 0 and picture.height % TILE == 0
    filter_ = Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
    return np.asarray(canvas.convert("RGB").resize((TILE, TILE), filter_))


def _write_index(out_dir: pathlib.Path, styles: list[dict], concepts: list[Concept]) -> None:
    groups: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {}
    for group, subgroup, label, tags in concepts:
        groups.setdefault(group, {}).setdefault(subgroup, {})[label] = tags
    index = {"tile": TILE, "tiles_per_row": TILES_PER_ROW, "captions": LABELS}
    index |= {"styles": styles, "groups": groups}
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "index.json").write_text(text + "\n", encoding="utf-8")


def _write_sheets(out_dir: pathlib.Path, tiles: list[np.ndarray]) -> None:
    size = TILES_PER_ROW**2
    for number, first in enumerate(range(0, len(tiles), size)):
        batch = tiles[first : first + size]
        rows = -(-len(batch) // TILES_PER_ROW)
        sheet = np.full((rows * TILES_PER_ROW, TILE, TILE, 3), 255, np.uint8)
        sheet[: len(batch)] = batch
        sheet = sheet.reshape(rows, TILES_PER_ROW, TILE, TILE, 3).swapaxes(1, 2)
        image = Image.fromarray(sheet.reshape(rows * TILE, TILES_PER_ROW * TILE, 3))
        image.save(out_dir / f"sheet_{number:02d}.webp", lossless=True, quality=100, method=6)


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
