"""The part of a report on a sweep: what is drawn is what was measured."""

import json

import numpy as np
import pytest
from PIL import Image
from report_page import Page, decode, read

from sdprune_jax import config
from sdprune_jax.report import charts

_AGREEMENT, _DISTANCE = "cosine_clip_embedded", "latent_mse_to_dense"
_EVIL = "<script>alert(1)</script>"


def _figures(agreement, distance):
    values = {_AGREEMENT: agreement, "fd_clip_embedded": 0.5, _DISTANCE: distance}
    return {name: {"value": value, "num": 2} for name, value in values.items()}


def _row(number, sparsity, agreement, distance, seed=0):
    part = {"method": f"magnitude{_EVIL}", "sparsity": sparsity}
    return {
        "key": f"{number}",
        "seed": seed,
        "zeros": 7,
        "nominal": 0.7 * sparsity,
        "true": 0.1,
        "components": {"unet": part},
        "figures": _figures(agreement, distance),
        "images": f"sweep/{number}/images",
    }


def _write(tmp_path):
    dense = {
        "seed": 0,
        "images": "sweep/dense-0/images",
        "figures": _figures(0.3, 0.0),
        "chance": {_AGREEMENT: 0.1, _DISTANCE: 1.0},
    }
    both = _row(3, 0.4, 0.2, 0.3) | {"images": "gone"}
    both["components"] = {"text_encoder": {"method": "wanda", "sparsity": 0.6}} | both["components"]
    failed = _row(4, 0.9, 0.0, 0.0) | {"figures": {}, "failed": "images are not finite"}
    del failed["images"]
    cliffs = [
        {
            "component": "unet",
            "method": f"magnitude{_EVIL}",
            "criterion": _AGREEMENT,
            "limit": 0.5,
            "whole": 0.4,
            "broken": 0.45,
            "whole_again": [],
        },
        {
            "component": "unet",
            "method": f"magnitude{_EVIL}",
            "criterion": _DISTANCE,
            "limit": 0.5,
            "why_not": "no break between sparsity 0.5 and 0.95",
        },
    ]
    table = {
        "made_from": "x",
        "agreement": _AGREEMENT,
        "prompts": ["a red apple", f"a cat{_EVIL}"],
        "protocol": {"name": "embedded", "evaluated": 2},
        "dense": [dense],
        "rows": [_row(1, 0.2, 0.29, 0.1), _row(2, 0.5, 0.15, 0.4), both, failed],
        "cliffs": cliffs,
    }
    (tmp_path / "sweep.json").write_text(json.dumps(table))
    for i, name in enumerate(("dense-0", "1", "2")):
        folder = tmp_path / "sweep" / name / "images"
        folder.mkdir(parents=True)
        for j in range(2):
            pixels = np.full((8, 8, 3), 10 * i + j, np.uint8)
            Image.fromarray(pixels).save(folder / f"{j:06d}.png")
    return config.Run(workdir=str(tmp_path), report=config.Report())


def test_the_page_says_where_it_breaks_and_shows_it(tmp_path):
    page = read(_write(tmp_path))
    for words in (
        "4 pruned models were measured on 2 prompts and one seed",
        "on the UNet at 45.0%",
        "more than 50% of the way from dense to chance",
        "no break between sparsity 0.5 and 0.95",
        "wanda and magnitude",
        "dense 0.3",
        "chance 0.1",
        "at 50.0%: 0.15",
        "60.0% wanda",
    ):
        assert words in page.text, words
    assert "script" not in {tag for tag, _ in page.elements}
    assert "Nothing was pruned" not in page.text
    assert len([path for path in page.all("path") if path["class"].startswith("cliff")]) == 1
    shades = [int(decode(img)[0, 0, 0]) for img in page.all("img")]
    assert shades == [0, 10, 20, 1, 11, 21]  # prompt by prompt: dense, 20 %, 50 %
    marked = [attrs for tag, attrs in page.elements if tag == "span" and attrs == {"class": "lost"}]
    assert len(marked) == 2  # at 50 % alone


def test_methods_scopes_and_seeds_are_told_apart(tmp_path):
    run = _write(tmp_path)
    table = json.loads((tmp_path / "sweep.json").read_text())
    table["dense"] += [table["dense"][0] | {"seed": seed} for seed in (1, 2)]
    table["cliffs"], table["rows"] = [], []
    found = {  # distances of three seeds at 20 % and at 50 %
        ("linear", "wanda"): ([0.1, 0.2, 0.3], [0.5, 0.6, 0.1]),
        ("linear", "sparsegpt"): ([0.2, 0.2, 0.2], [0.2, 0.3, 0.4]),
        ("linear+conv", "wanda, linear+conv"): ([0.4, 0.5, 0.6], [0.7, 0.7, None]),
    }
    for (scope, method), distances in found.items():
        for sparsity, values in zip((0.2, 0.5), distances, strict=True):
            for seed, value in enumerate(values):
                row = _row("1", sparsity, 0.2, value, seed)
                part = {"method": method, "scope": scope, "sparsity": sparsity}
                row["components"] = {"unet": part}
                if value is None:
                    row |= {"figures": {}, "failed": "images are not finite"}
                table["rows"].append(row)
    (tmp_path / "sweep.json").write_text(json.dumps(table))
    page = read(run)
    for words in (
        "6 pruned models were measured on 2 prompts and 3 seeds",
        "Nearest to dense's latents at a sparsity of 50%: sparsegpt on the UNet, linear layers"
        " (0.3, the nearest in 2 of 3 seeds).",
        "wanda at 20.0%: 0.2, 0.1 to 0.3 in 3 seeds",
        "0.2 (0.1 to 0.3)",
        "0.7 (0.7 to 0.7) 1 of 3 failed",
        "A dot is the mean of 3 seeds",
        "UNet, linear layers and convolutions: wanda, linear+conv",
    ):
        assert words in page.text, words
    lines = [path["class"] for path in page.all("path") if path["class"].startswith("line")]
    assert lines == ["line s0", "line s1"] * 3 + ["line s0"] * 3  # of three figures each


def test_a_table_of_another_form_is_refused(tmp_path):
    run = _write(tmp_path)
    table = json.loads((tmp_path / "sweep.json").read_text())
    table["rows"][1]["true"] = "half"
    del table["agreement"]
    (tmp_path / "sweep.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="cannot be reported") as error:
        read(run)
    assert "sweep.json: rows[1]: true is 'half', expected a number" in str(error.value)
    assert "sweep.json: agreement is missing" in str(error.value)


def test_lines_stand_where_their_values_are():
    series = {"one": [(0.2, [1.0, 3.0]), (0.4, [4.0])], "two": [(0.3, [0.0])]}
    drawing = charts.lines(series, "label", levels={"dense": 5.0}, marks={"one": 0.25})
    page = Page(drawing)
    paths = {path["class"]: path["d"] for path in page.all("path")}
    at = lambda y: f"{100 * (5.3 - y) / 5.6:.4g}"  # 6 % of margin at either end
    assert paths["line s0"] == f"M0 {at(2)}L100 {at(4)}"
    assert paths["dot s1"] == f"M50 {at(0)}h0"
    assert paths["cliff s0"] == "M25 0V100"
    ranges = [path["d"] for path in page.all("path") if path["class"] == "range s0"]
    assert ranges[0] == f"M0 {at(1)}V{at(3)}"
    assert "one at 20.0%: 2, 1 to 3 in 2 seeds" in page.text
    assert "dense 5" in page.text
    apart = Page(charts.lines(series, "", levels={}, marks={}, is_joined=False))
    assert not [path for path in apart.all("path") if path["class"].startswith("line")]
    flat = charts.lines({"one": [(0.5, [1.0])]}, "", levels={}, marks={})  # one point alone
    assert "nan" not in flat
