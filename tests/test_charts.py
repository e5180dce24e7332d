import re

import numpy as np
from report_page import Page, decode

from sdprune_jax.report import charts


def test_only_large_pictures_shrink():
    large = np.random.default_rng(0).integers(0, 256, (400, 800, 3), np.uint8)
    small = large[:64, :64]
    assert f'width="{384}" height="{192}"' in charts.picture(large, "large")
    page = Page(charts.picture(small, "small") + charts.picture(large, "large"))
    np.testing.assert_array_equal(decode(page.all("img")[0]), small)
    assert [img["class"] for img in page.all("img")] == ["small", ""]
    assert decode(page.all("img")[1]).shape == (192, 384, 3)


def test_layers_stand_in_the_order_of_the_network():
    names = [
        "conv_norm_out.x",
        "up_blocks.0.a",
        "time_embedding.linear_1",
        "mid_block.a",
        "down_blocks.10.a",
        "down_blocks.2.a",
    ]
    layers = [{"name": name, "weights": 4, "zeros": 1, "threshold": 0.5} for name in names]
    ordered = charts.in_depth_order(layers)
    assert [layer["name"] for layer in ordered] == [
        "time_embedding.linear_1",
        "down_blocks.2.a",
        "down_blocks.10.a",
        "mid_block.a",
        "up_blocks.0.a",
        "conv_norm_out.x",
    ]
    page = Page(charts.layer_bars(ordered, "UNet"))
    for words in ("time", "down 2", "down 10", "mid", "up 0", "conv", "25.0% of 4 weights zero"):
        assert words in page.text
    bars = [rect for rect in page.all("rect") if rect["class"] == "kept"]
    assert [bar["height"] for bar in bars] == ["25"] * 6 + ["100"] * 6  # thresholds: of the largest


def test_histogram_shows_the_hole():
    drawing = charts.histogram(
        [-2.0, -1.0, 0.0, 1.0, 2.0], [10, 1000, 1000, 10], [10, 0, 100, 10], ""
    )
    dense, kept = (
        [float(y) for y in re.findall(r"V([\d.e-]+)H", path["d"])]
        for path in Page(drawing).all("path")
    )
    assert dense[0] == dense[3] == kept[0] == kept[3]  # what was not removed is as it was
    assert dense[1:3] == [0, 0]  # the most is 10**3: the top of the axis
    assert kept[1] == 100  # nothing is left: the bottom
    np.testing.assert_allclose(kept[2], 100 / 2.3, atol=0.01)  # one of 3 - (1 - 0.3) decades down
