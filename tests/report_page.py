"""A finished run to report on, and a reader of the page: for the tests of the report."""

import base64
import dataclasses
import html.parser
import io
import json
import re

import numpy as np
from PIL import Image

from sdprune_jax import config
from sdprune_jax.stages import report

_VOID = {"img", "meta", "rect", "path", "line"}  # elements that nothing is inside of


class Page(html.parser.HTMLParser):
    """The elements of a page, checked to be closed in order, and the text between them."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID or (tag == "rect" and self.get_starttag_text()[-2:] != "/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def prune_json():
    layers = [
        {
            "name": f"down_blocks.0.attentions.{i}.to_q",
            "shape": [8, 16],
            "weights": 128,
            "zeros": 44,
            "threshold": 0.0125,
        }
        for i in range(2)
    ]
    edges = [-2.0, -1.0, 0.0, 1.0, 2.0]
    part = {
        "requested": 0.35,
        "scope": "linear",
        "threshold": "exact",
        "parameters": 1000,
        "prunable": 256,
        "zeros": 88,
        "underflow_zeros": 3,
        "of_prunable": 88 / 256,
        "of_component": 0.088,
        "of_pipeline": 0.0352,
        "layers": layers,
        "histogram": {"edges": edges, "dense": [2, 100, 90, 3], "pruned": [2, 10, 0, 3]},
    }
    return {
        "made_from": "0123",
        "model": "embedded",
        "directory": "pruned",
        "save_dtype": "float16",
        "seconds": {"load": 1.5, "select": 0.25},
        "pipeline_parameters": 2_500_000,
        "of_pipeline": 0.0352,
        "components": {"unet": part},
        "bytes": {"dense": 2000, "pruned": 2000, "dense_gzip": 1800, "pruned_gzip": 1500},
    }


def images_json():
    def model(name, found):
        return {
            "directory": name,
            "files": [f"{name}/{i}.png" for i in range(3)],
            "found": found,
            "seconds": 6.0,
            "first_batch_seconds": 4.0,
            "scores": {
                "clip_embedded_r_at_1": 1 / 3,
                "clip_embedded_r_at_10": sum(found) / 3,
                "num": 3,
            },
        }

    pruned = model("pruned", [True, False, True]) | {"psnr_to_dense": [31.4, 22.7, 126.0]}
    return {
        "protocol": {"prompts": "embedded:train", "num_steps": 25, "negative_prompt": ""},
        "prompts": ["a flat emoji of red apple", "a 3d emoji of cat", "a noto emoji of dog"],
        "models": {"dense": model("dense", [True, True, True]), "pruned": pruned},
        "chance": {"clip_embedded_r_at_1": 1 / 1914, "clip_embedded_r_at_10": 10 / 1914},
    }


def write(tmp_path, prune=None, images=None):
    """A finished run: three pictures of 8 x 8 a model, the last the same in both."""
    run = config.Run(workdir=str(tmp_path), report=config.Report(title="Tiny"))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(run)))
    (tmp_path / "prune.json").write_text(json.dumps(prune or prune_json()))
    for name in ("dense", "pruned"):
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            pixels = np.full((8, 8, 3), 100 + 3 * (name == "pruned" and i < 2), np.uint8)
            pixels[0, 0] = 50
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "generate.json").write_text(json.dumps(images or images_json()))
    return run


def read(run):
    return Page(report.run(run).read_text(encoding="utf-8"))


def decode(img):
    kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", img["src"]).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format.lower() == kind
    return np.asarray(image)
