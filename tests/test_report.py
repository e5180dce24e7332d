import json
import shutil

import numpy as np
import pytest
from PIL import Image
from report_page import decode, images_json, prune_json, read, write

from sdprune_jax.report import files, pictures
from sdprune_jax.stages import report


def test_page_says_the_numbers_of_the_files(tmp_path):
    text = read(write(tmp_path)).text
    for words in (
        "Tiny",
        "34.4% of the linear weights of the UNet (35.0% requested)",
        "2.50 million parameters of the pipeline, that is 3.5%",
        "Stored as float16 these components keep their 2.00 kB",
        "about 1.50 kB, the dense ones to 1.80 kB",
        "this saves compressed size, not time",
        "100.0% of the dense and 66.7% of the pruned pictures (3 each; 1 lost and 0 gained,",
        "captions of all 1,914 concepts",
        "compares with no other CLIP's",
        "from the training split",
        "34.38%",  # of the weights in scope
        "8.80%",  # of the component
        "3.52%",  # of the pipeline
        "made 3 zeros more",
        "-16.7%",  # gzip
        "31.4 dB",
        "0.250 s",
        "195 of the 256 weights in scope are drawn",
        "from_pretrained('pruned')",
        '"workdir"',
    ):
        assert words in text, words


def test_sparsity_that_is_as_requested_is_said_to_be(tmp_path):
    prune = prune_json()
    prune["components"]["unet"]["requested"] = 88 / 256
    assert "of the UNet (as requested)" in read(write(tmp_path, prune)).text


def test_page_is_accessible_and_loads_and_runs_nothing(tmp_path):
    run = write(tmp_path)
    page = read(run)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    for _, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("href", "srcset")]
    assert all(img["src"].startswith("data:image/") and img["alt"] for img in page.all("img"))
    assert len(page.all("img")) == 3 * 3
    assert all(svg["aria-label"] for svg in page.all("svg"))
    assert all(th["scope"] in ("row", "col") for th in page.all("th"))
    assert "lang" in page.all("html")[0]
    assert "url(" not in report.run(run).read_text()
    assert "default-src 'none'" in page.all("meta")[-1]["content"]


def test_text_from_outside_stays_text(tmp_path):
    evil = "</style></code><script>alert(1)</script>\"'><img src=x onerror=alert(1)>$body"

    def poisoned(tree):
        if isinstance(tree, dict):
            fixed = {"files", "found", "scores"}
            return {k: v if k in fixed else poisoned(v) for k, v in tree.items()}
        if isinstance(tree, list):
            return [poisoned(item) for item in tree]
        return evil + tree if isinstance(tree, str) else tree

    prune, images = poisoned(prune_json()), poisoned(images_json())
    for tree, key in ((prune, "components"), (images, "models"), (images, "protocol")):
        tree[key] |= {evil + name: value for name, value in tree[key].items()}
    images["chance"][evil] = 0.5
    run = write(tmp_path, prune, images)
    (tmp_path / "config.json").write_text(json.dumps({evil: evil}))
    assert run.report
    run.report.title = evil
    page = read(run)
    assert "script" not in {tag for tag, _ in page.elements}
    assert all("onerror" not in attrs for _, attrs in page.elements)
    assert evil in page.text
    assert any(evil in img["alt"] for img in page.all("img"))


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("images", [True, False])
def test_what_is_missing_is_left_out(tmp_path, prune, images):
    run = write(tmp_path)
    if not prune:
        (tmp_path / "prune.json").unlink()
    if not images:
        shutil.rmtree(tmp_path / "images")
    (tmp_path / "config.json").unlink()
    page = read(run)
    assert ("Nothing was pruned" in page.text) != prune
    assert ("Layer by layer" in page.text) == prune
    assert bool(page.all("svg")) == prune
    assert bool(page.all("img")) == images
    assert ("by chance" in page.text) == images
    assert "whole config" not in page.text


def test_pictures_without_scores_or_marks_are_shown(tmp_path):
    images = images_json()
    images["chance"] = {}
    for model in images["models"].values():
        model |= {"scores": {}, "found": []}
        model.pop("psnr_to_dense", None)
    run = write(tmp_path, images=images)
    assert run.report
    run.report.num_images = 2
    page = read(run)
    assert len(page.all("img")) == 2 * 3
    assert "CLIP" not in page.text
    assert "dB" not in page.text.replace("PSNR in dB", "")
    run.report.num_images = 0
    assert not read(run).all("img")


def test_difference_is_that_of_the_pixels_times_the_scale_said(tmp_path):
    page = read(write(tmp_path))
    dense, pruned, difference = (decode(img) for img in page.all("img")[:3])
    assert (dense[1, 1] == 100).all()
    assert (pruned[1, 1] == 103).all()
    want = np.full((8, 8, 3), 3 * 32, np.uint8)  # 32: the last power of two with 4 * it below 256
    want[0, 0] = 0
    np.testing.assert_array_equal(difference, want)
    assert "from dense, times 32" in page.all("img")[2]["alt"]
    assert page.text.count("32\N{MULTIPLICATION SIGN} difference") == 3
    assert page.text.count("no difference") == 1  # of the third
    assert not decode(page.all("img")[8]).any()


def test_scale_shrinks_until_almost_all_differences_fit(tmp_path):
    run = write(tmp_path)
    bright = np.full((8, 8, 3), 100 + 60, np.uint8)
    Image.fromarray(bright).save(tmp_path / "images/pruned/0.png")
    assert "times 4;" in read(run).text  # 4 * 60 is below 256, 8 * 60 is not


def test_same_files_make_the_same_bytes_and_nothing_else(tmp_path):
    run = write(tmp_path)
    before = report.run(run).read_bytes()
    assert report.run(run).read_bytes() == before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "prune.json", "images", "report.html"}


def test_all_that_is_wrong_in_the_form_is_named_at_once(tmp_path):
    prune, images = prune_json(), images_json()
    del prune["of_pipeline"]
    prune["pipeline_parameters"] = True
    prune["components"]["unet"]["layers"][1]["zeros"] = "44"
    images["prompts"][0] = 7
    images["models"]["dense"]["found"] = [1, 0, 1]
    images["models"]["pruned"]["scores"] = []
    run = write(tmp_path, prune, images)
    with pytest.raises(ValueError, match="run the stage again") as caught:
        report.run(run)
    for words in (
        "prune.json: of_pipeline is missing",
        "prune.json: pipeline_parameters is True, expected a number",
        "unet: layers[1]: zeros is '44', expected a number",
        "generate.json: prompts[0] is 7, expected text",
        "dense: found[2] is 1, expected true or false",
        "pruned: scores is [], expected an object",
    ):
        assert words in str(caught.value), words
    assert not (tmp_path / "report.html").exists()


def test_all_that_is_wrong_in_the_contents_is_named_at_once(tmp_path):
    prune, images = prune_json(), images_json()
    prune["bytes"]["dense_gzip"] = 0
    prune["components"]["unet"]["layers"][0]["zeros"] = 129
    prune["components"]["unet"]["histogram"]["dense"].append(1)
    images["models"]["pruned"]["psnr_to_dense"].append(1.0)
    images["models"]["dense"]["files"].pop()
    images["models"]["dense"]["scores"]["clip_embedded_r_at_10"] = 80.0
    with pytest.raises(ValueError, match="dense_gzip is 0") as caught:
        report.run(write(tmp_path, prune, images))
    for words in (
        "to_q has 129 zeros among 128 weights",
        "histogram has 5 edges for 5 dense and 4 pruned counts",
        "pruned: psnr_to_dense has 4 values for 3 prompts",
        "dense: files has 2 values for 3 prompts",
        "dense: clip_embedded_r_at_10 is 80.0, expected 0 to 1",
    ):
        assert words in str(caught.value), words


def test_pictures_that_cannot_be_shown_are_named(tmp_path):
    run = write(tmp_path)
    (tmp_path / "images/dense/0.png").unlink()
    (tmp_path / "images/dense/1.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(tmp_path / "images/pruned/2.png")
    with pytest.raises(ValueError, match=r"dense/0\.png cannot be read") as caught:
        report.run(run)
    assert "dense/1.png cannot be read" in str(caught.value)
    assert "pruned/2.png does not compare: the sizes are 8 x 4 and 8 x 8" in str(caught.value)


def test_a_run_without_directory_or_with_broken_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no directory"):
        files.read(tmp_path / "nowhere", 1)
    (tmp_path / "prune.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"prune\.json is not JSON"):
        files.read(tmp_path, 1)


def test_uncertainty_is_that_of_the_textbook():
    images = images_json()
    found = {"dense": [True] * 10 + [False], "pruned": [False] * 6 + [True] * 5}
    for name, values in found.items():
        images["models"][name]["found"] = values
    # 6 lost, 1 gained: 2 * (1 + 7) / 2**7 = 0.125
    [change] = pictures._changes(images).values()
    assert change == (6, 1, 0.125)
    images["models"]["dense"]["scores"] = {"clip_embedded_r_at_10": 0.8, "num": 10}
    table = pictures.retrieval(images).replace("\N{NO-BREAK SPACE}", " ")
    assert "80.0% (49% to 94%)" in table  # Wilson's interval for 8 of 10


def test_many_models_are_each_compared_with_dense(tmp_path):
    images = images_json()
    images["models"]["expert <2>"] = images["models"]["pruned"]
    page = read(write(tmp_path, images=images))
    assert len(page.all("img")) == 3 * 5
    assert "difference of expert <2> from dense" in page.all("img")[4]["alt"]
    only = {**images, "models": {"pruned": images["models"]["pruned"]}}
    assert len(read(write(tmp_path, images=only)).all("img")) == 3
