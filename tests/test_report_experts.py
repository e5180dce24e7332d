"""The report's part on experts: what is said of them, and what of their files is refused."""

import json
import re

import pytest
from report_page import decode, images_json, read, write

from sdprune_jax.report import experts
from sdprune_jax.stages import report

_RESNET, _NEXT = "down_blocks.0.resnets.0", "down_blocks.0.resnets.1"
_CROSS = "mid_block.attentions.0.transformer_blocks.0.attn2"
_UNITS = {_RESNET: 32, _NEXT: 32, _CROSS: 3, f"{_NEXT}.depth": 1}


def _experts_json():
    def row(index, prompts, **kept):
        return {
            "directory": f"{index:02d}",
            "macs": 60_000_000 + index,
            "share_of_macs": 0.6,
            "parameters": 1_500_000,
            "share_of_parameters": 0.75,
            "prompts": {"train": prompts, "val": 2, "test": 0},
            "kept": {_RESNET: 8, _NEXT: 31, _CROSS: 2, f"{_NEXT}.depth": 1} | kept,
        }

    rows = [row(0, 30), row(1, 10, **{f"{_NEXT}.depth": 0}), row(2, 0, **{_RESNET: 32})]
    del rows[2]["kept"][_CROSS]  # the UNet of a list of blocks has no such site
    return {
        "mac_counter": "exact",
        "latent_size": [8, 8],
        "experts": rows,
        "dense": {"macs": 100_000_000, "parameters": 2_000_000, "units": _UNITS},
    }


def _assign_json():
    split = {
        "prompts": [30, 10, 0],
        "dead": [2],
        "largest_share": 0.75,
        "smallest_share": 0.0,
        "macs": 0.612,
        "macs_over_budget": 0.02,
        "information_style": 0.9,
        "information_style_shuffled": 0.03,
        "information_group": 0.5,
        "information_group_shuffled": 0.04,
    }
    unseen = split | {"macs": 0.597, "macs_over_budget": -0.005, "dead": []}
    return {
        "macs_budget": 0.6,
        "units_that_differ": 0.31,
        "macs_of_experts": [0.6, 0.6, 0.6],
        "splits": {"train": split, "val": unseen, "test": split},
    }


def _write(tmp_path, cut=None, **more):
    """A run of three experts: the last had no prompts; pictures by the first two."""
    images = images_json()
    images["models"]["routed"] = images["models"]["pruned"] | {"expert": [1, 0, 1]}
    run = write(tmp_path, images=images)
    (tmp_path / "prune.json").unlink()
    losses = {"before": {"val_loss": 0.5}, "after": {"val_loss": 0.4125}}
    files = {
        "experts/experts.json": cut or _experts_json(),
        "assign/assign.json": _assign_json(),
        "finetuned/finetune.json": {
            "experts": [{"directory": f"{i:02d}"} | losses for i in range(2)],
            "skipped": ["02"],
        },
        "experts/00/prompts.json": {"train": ["an owl"] * 30, "val": ["a <red> apple", "a cat"]},
        "experts/01/prompts.json": {"train": ["a dog"] * 10, "val": []},
        "experts/02/prompts.json": {"train": [], "val": []},
    } | more
    for name, values in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if values is not None:
            path.write_text(json.dumps(values))
    return run


def test_page_says_who_draws_what_and_what_it_costs(tmp_path):
    page = read(_write(tmp_path))
    for words in (
        "drawn by one of 3 experts, smaller UNets that keep 60.0% to 60.0%",
        "average unseen prompt keeps 59.7% (60.0% asked)",
        "beside the dense UNet's 100.0 M",
        "a <red> apple",
        "a dog",  # no unseen prompt: one to learn from
        "60.0 M, 60.0%",
        "1.5 M, 75.0%",
        "0.4125",
        "for want of prompts: 2.",
        "-0.50%",
        "+2.00%",
        "differ in 31.0% of all units",
        "33.3% of the prompts",
        "0.900 nats",
        "0.040 nats",
        "66.7% of the routed pictures",
    ):
        assert words in page.text, words
    assert "an owl" not in page.text  # unseen prompts come first
    assert "Nothing was pruned" not in page.text
    shares = [attrs["style"] for attrs in page.all("span") if attrs.get("class") == "bar"]
    assert shares[::3] == ["--share:75.0%", "--share:25.0%", "--share:0.0%"]
    assert set(shares[1::3] + shares[2::3]) == {"--share:60.0%", "--share:75.0%"}


def test_pictures_stand_with_the_expert_that_drew_them(tmp_path):
    page = read(_write(tmp_path))
    alts = [img["alt"] for img in page.all("img") if img["alt"].startswith("expert ")]
    assert alts == [
        "expert 0: a 3d emoji of cat",
        "expert 1: a flat emoji of red apple",
        "expert 1: a noto emoji of dog",
    ]
    assert [decode(img)[1, 1, 0] for img in page.all("img") if img["alt"] in alts] == [
        103,
        103,
        100,
    ]
    assert {"Experts, routed: a 3d emoji of cat"} < {img["alt"] for img in page.all("img")}


def test_heat_map_has_a_row_a_site_and_a_column_an_expert(tmp_path):
    page = read(_write(tmp_path))
    tables = [table["aria-label"] for table in page.all("table") if table.get("class") == "heat"]
    assert tables == [f"units kept in {name}, by expert, in percent" for name in ("down 0", "mid")]
    cells = {td["title"]: td["style"] for td in page.all("td") if "--share" in td.get("style", "")}
    assert cells == {
        f"expert 0, {_RESNET}: 8 of 32": "--share:25%",
        f"expert 1, {_RESNET}: 8 of 32": "--share:25%",
        f"expert 2, {_RESNET}: 32 of 32": "--share:100%",
        f"expert 0, {_NEXT}: 31 of 32": "--share:97%",
        f"expert 1, {_NEXT}: 0 of 32": "--share:0%",  # the whole block is gone
        f"expert 2, {_NEXT}: 31 of 32": "--share:97%",
        f"expert 0, {_CROSS}: 2 of 3": "--share:67%",
        f"expert 1, {_CROSS}: 2 of 3": "--share:67%",
        f"expert 2, {_CROSS}: 0 of 3": "--share:0%",
    }
    for words in ("ResNet 0", "ResNet 1", "cross-attention 0"):
        assert words in page.text, words


def test_names_of_sites_are_words():
    block = "up_blocks.1.attentions.2.transformer_blocks.0"
    assert experts._site(f"{block}.attn1") == "self-attention 2"
    assert experts._site(f"{block}.ff") == "feed-forward 2"


def test_one_expert_for_all_prompts_is_no_router(tmp_path):
    cut = _experts_json()
    cut["experts"] = cut["experts"][:1]
    none = dict.fromkeys(("assign/assign.json", "finetuned/finetune.json"))
    run = _write(tmp_path, cut, **none)
    images = images_json()
    images["models"]["routed"] = images["models"]["pruned"]
    (tmp_path / "images" / "generate.json").write_text(json.dumps(images))
    page = read(run)
    assert "One smaller UNet for all prompts keeps 60.0% of the UNet's MACs" in page.text
    assert "nats" not in page.text
    assert "loss" not in page.text
    assert len(re.findall(r"Expert \d", page.text)) == 1
    assert not [img for img in page.all("img") if img["alt"].startswith("expert ")]


def test_a_run_without_experts_says_nothing_of_them(tmp_path):
    page = read(write(tmp_path))
    assert "Expert" not in page.text


def test_all_that_is_wrong_with_experts_is_named_at_once(tmp_path):
    cut, assigned = _experts_json(), _assign_json()
    cut["experts"][1]["kept"][_CROSS] = "2"
    del cut["dense"]["macs"]
    assigned["splits"]["val"]["dead"] = None
    prompts = {"train": [3]}
    run = _write(
        tmp_path, cut, **{"assign/assign.json": assigned, "experts/02/prompts.json": prompts}
    )
    with pytest.raises(ValueError, match="dense: macs is missing") as caught:
        report.run(run)
    for words in (
        "experts[1]: kept: mid_block",
        "is '2', expected a number",
        "val: dead is None, expected a list",
        "02/prompts.json: train[0] is 3, expected text",
    ):
        assert words in str(caught.value), words


def test_contents_that_contradict_each_other_are_refused(tmp_path):
    cut = _experts_json()
    cut["experts"][1]["kept"][_CROSS] = 4
    images = images_json()
    images["models"]["routed"] = images["models"]["pruned"] | {"expert": [1, 0, 3]}
    images["models"]["dense"]["expert"] = [0]
    run = _write(tmp_path, cut, **{"images/generate.json": images})
    with pytest.raises(ValueError, match=r"01: .*attn2 keeps 4 of 3 units") as caught:
        report.run(run)
    assert r"routed: of the 3 experts, [3] drew pictures" in str(caught.value)
    assert "dense: expert has 1 values for 3 prompts" in str(caught.value)
