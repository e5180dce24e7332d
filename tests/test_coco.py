"""COCO captions from the official layout, and the published samplings of them."""

import io
import json
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from sdprune_jax.data import captioned, coco, images, sampling, sources, tokenizer
from sdprune_jax.files import model_directory

NAME = "COCO_val2014_{:012d}.jpg"


def _contents(captions, name=NAME):
    """The annotations of images 1, 2, ...; `captions` has those of each."""
    listed = [{"id": i, "file_name": name.format(i)} for i, _ in enumerate(captions, 1)]
    annotations = [
        {"image_id": i, "id": 100 * i + j, "caption": caption}
        for i, of_image in enumerate(captions, 1)
        for j, caption in enumerate(of_image)
    ]
    return {"info": {}, "licenses": [], "images": listed, "annotations": annotations}


def _write(directory, contents, split="val2014"):
    (directory / "annotations").mkdir(parents=True, exist_ok=True)
    (directory / f"annotations/captions_{split}.json").write_text(json.dumps(contents))
    return directory


def _jpeg(seed, size=(6, 5)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


def _counts(dataset_or_source):
    return {reason: entry["count"] for reason, entry in dataset_or_source.skips.items()}


def _files(directory):
    return sorted(p.name for p in directory.rglob("*") if p.is_file() and p.parent.name[:1] != ".")


@pytest.fixture
def source(tmp_path):
    """Four images with pictures; annotations come in another order than images."""
    contents = _contents([["one\n", "first"], ["two"], ["Drei \u00fc\U0001f600"], ["four"]])
    contents["annotations"].sort(key=lambda entry: (-entry["image_id"], entry["id"]))
    directory = _write(tmp_path / "source", contents)
    (directory / "val2014").mkdir()
    for i in range(1, 5):
        (directory / "val2014" / NAME.format(i)).write_bytes(_jpeg(i, (5 + i, 4)))
    return directory


def test_rows_follow_the_first_annotation_and_keep_captions_as_they_are(source, tmp_path):
    dataset = coco.prepare(source, tmp_path / "data", "val2014")
    rows = [captioned.row(dataset, i) for i in range(4)]
    assert [row.image_id for row in rows] == [4, 3, 2, 1]
    assert [row.position for row in rows] == dataset.positions.tolist() == [0, 1, 2, 3]
    assert rows[3].captions == ("one\n", "first")
    assert rows[3].file_name == "COCO_val2014_000000000001.jpg"
    assert captioned.captions(dataset) == ["four", "Drei \u00fc\U0001f600", "two", "one\n"]
    assert (dataset.num_positions, dataset.skips) == (4, {})


def test_a_picture_is_read_when_it_is_asked_for(source, tmp_path):
    coco.prepare(source, tmp_path / "data", "val2014")
    dataset = coco.load(tmp_path / "data", "val2014")
    image = captioned.image(dataset, 1)
    assert (image.dtype, image.shape) == (np.uint8, (8, 4, 3))
    expected = Image.open(source / "val2014" / NAME.format(3))
    assert np.array_equal(image, np.asarray(expected))


def test_zip_files_give_the_same_rows_as_folders(source, tmp_path):
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    with zipfile.ZipFile(zipped / "annotations_trainval2014.zip", "w") as archive:
        name = "annotations/captions_val2014.json"
        archive.write(source / name, name)
    with zipfile.ZipFile(zipped / "val2014.zip", "w") as archive:
        for path in sorted((source / "val2014").iterdir()):
            archive.write(path, f"val2014/{path.name}")
    ours = coco.prepare(zipped, tmp_path / "ours", "val2014")
    theirs = coco.prepare(source, tmp_path / "theirs", "val2014")
    assert len(ours.records) == 4
    for i in range(4):
        assert captioned.row(ours, i) == captioned.row(theirs, i)
        assert np.array_equal(captioned.image(ours, i), captioned.image(theirs, i))


def test_captions_alone_need_no_pictures(tmp_path):
    source = _write(tmp_path, _contents([["a"], ["b"]], name="{:012d}.jpg"), "train2017")
    dataset = coco.prepare(source, tmp_path / "data", "train2017", has_images=False)
    assert captioned.captions(dataset) == ["a", "b"]
    with pytest.raises(ValueError, match="no pictures: prepare it with them"):
        captioned.image(dataset, 0)
    with pytest.raises(ValueError, match=r"train2017_captions.* is there, with no pictures"):
        coco.load(tmp_path / "data", "train2017")


def test_reading_needs_neither_source_nor_tensorflow(source, tmp_path):
    coco.prepare(source, tmp_path / "data", "val2014")
    (source / "annotations/captions_val2014.json").unlink()
    code = f"""
import sys
from sdprune_jax.data import captioned, coco
dataset = coco.load({str(tmp_path / "data")!r}, "val2014")
assert captioned.captions(dataset)[0] == "four"
assert captioned.image(dataset, 0).shape == (9, 4, 3)
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_asks_the_network(source, tmp_path, monkeypatch):
    asked = lambda *_, **__: pytest.fail("asked the network")
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.setattr(socket.socket, "connect", asked)
    coco.prepare(source, tmp_path / "data", "val2014")
    dataset = coco.load(tmp_path / "data", "val2014")
    assert captioned.image(dataset, 0).shape == (9, 4, 3)
    tokenizer.load(model_directory.directory_of("embedded") / "tokenizer")
    with pytest.raises(ValueError, match="stabilityai/stable-diffusion-2"):
        model_directory.open_model(model_directory.directory_of("stabilityai/stable-diffusion-2"))


def test_what_cannot_be_used_is_counted_by_reason(tmp_path):
    captions = [
        [None, 7, "  \n", "x" * 10_000, "nul\0", "half \ud83d", "good"],
        [""],
        ["no such picture in the list"],
        ["bad name"],
        ["twice"],
        ["same file"],
        [],
        ["whole"],
    ]
    contents = _contents(captions)
    images, annotations = contents["images"], contents["annotations"]
    images[3]["file_name"] = "../../etc/passwd"
    images[5]["file_name"] = images[4]["file_name"]
    del images[2]
    images += [{"id": 5, "file_name": "other.jpg"}, "no image", {"id": True}]
    annotations += [annotations[-1], {"id": 1}, {"image_id": -1, "id": 2, "caption": "x"}, None]
    source = coco.read(_write(tmp_path, contents), "val2014", has_images=False)
    assert [(row.image_id, row.captions) for row in source.rows] == [
        (1, ("good",)),
        (5, ("twice",)),
        (8, ("whole",)),
    ]
    assert [row.position for row in source.rows] == [0, 4, 6]
    assert source.num_positions == 7
    assert _counts(source) == {
        "file name leads out of its folder": 1,
        "file name is there twice": 1,
        "image id is there twice": 1,
        "image has no id": 2,
        "caption is no text": 2,
        "caption is empty": 2,
        "caption is longer than 2,000 characters": 1,
        "caption has a NUL": 1,
        "caption is not Unicode": 1,
        "annotation id is there twice": 1,
        "annotation has no id or image_id": 3,
        "image has no caption that can be used": 1,
        "annotated image is not listed": 1,
        "image has no annotation": 1,
    }
    assert "1  file name leads out of its folder: '../../etc/passwd'" in sources.table(source.skips)


def test_unusual_captions_are_kept(tmp_path):
    texts = ["\u05e9\u05dc\u05d5\u05dd", "<|endoftext|>", "!!!", "tab\tand\nline", "x" * 2000]
    source = coco.read(_write(tmp_path, _contents([[t] for t in texts])), "val2014", False)
    assert [row.captions for row in source.rows] == [(text,) for text in texts]


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "a/b.jpg", "..", "..\\a.jpg", "C:a.jpg", "nul\0.jpg", "", None, 3]
)
def test_a_name_that_is_no_plain_file_name_is_not_opened(name):
    assert sources.name_problem(name)
    assert not sources.name_problem(NAME.format(9))


def test_pictures_that_cannot_be_used_are_skipped_and_keep_their_positions(source, tmp_path):
    folder = source / "val2014"
    (folder / NAME.format(4)).write_bytes(b"<html>404</html>")
    (folder / NAME.format(3)).unlink()
    whole = (folder / NAME.format(2)).read_bytes()
    (folder / NAME.format(2)).write_bytes(whole[: len(whole) // 2])
    dataset = coco.prepare(source, tmp_path / "data", "val2014", max_skipped=0.75)
    assert _counts(dataset) == {"picture cannot be decoded": 2, "picture is missing": 1}
    assert (dataset.positions.tolist(), dataset.num_positions) == ([3], 4)
    assert captioned.captions(dataset) == ["one\n"]
    assert captioned.image(dataset, 0).shape == (6, 4, 3)
    again = coco.load(tmp_path / "data", "val2014")
    assert (again.skips, again.positions.tolist()) == (dataset.skips, [3])


def test_a_folder_without_pictures_is_refused(source, tmp_path):
    for path in (source / "val2014").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"(?s)100.0% of the source .* 4  picture is missing"):
        coco.prepare(source, tmp_path / "data", "val2014", max_skipped=0.99)
    assert _files(tmp_path / "data") == []


def test_pictures_of_any_kind_come_out_of_the_dataset_as_they_are_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
    rgba, turned = Image.fromarray(pixels), Image.Exif()
    turned[0x112] = 6  # held upright
    rgb, gray = rgba.convert("RGB"), rgba.convert("L")
    kinds = [
        (rgb, "jpeg", {"exif": turned}),
        (gray, "jpeg", {}),
        (rgb.convert("CMYK"), "jpeg", {}),
        (rgb.convert("P"), "gif", {}),
        (rgb, "webp", {}),
        (rgba.convert("LA"), "png", {}),
        (rgba, "png", {}),
        (gray.convert("I;16"), "png", {}),
    ]
    source = _write(tmp_path / "source", _contents([["a"]] * len(kinds)))
    paths = [source / "val2014" / NAME.format(i) for i, _ in enumerate(kinds, 1)]
    paths[0].parent.mkdir()
    for path, (picture, form, how) in zip(paths, kinds, strict=True):
        picture.save(path, form, **how)  # whatever its name says
    dataset = coco.prepare(source, tmp_path / "data", "val2014")
    assert dataset.skips == {}
    for i, path in enumerate(paths):
        found = captioned.image(dataset, i)
        assert found.shape == ((6, 5, 3) if i else (5, 6, 3))
        assert np.array_equal(found, images.load(path))


def test_too_much_skipped_ends_with_the_table_and_leaves_no_dataset(source, tmp_path):
    (source / "val2014" / NAME.format(2)).write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)25.0% .* max_skipped=5.0%.* 1  picture cannot be"):
        coco.prepare(source, tmp_path / "data", "val2014")
    assert _files(tmp_path / "data") == []
    assert len(coco.prepare(source, tmp_path / "data", "val2014", max_skipped=0.25).records) == 3
    with pytest.raises(ValueError, match=r"25.0% of the source"):  # the dataset is there now
        coco.prepare(source, tmp_path / "data", "val2014")
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"fraction in \[0, 1\)"):
            coco.prepare(source, tmp_path / "other", "val2014", max_skipped=share)


def test_a_source_with_nothing_to_use_is_refused(tmp_path):
    source = _write(tmp_path, _contents([]))
    with pytest.raises(ValueError, match="no row is left"):
        coco.prepare(source, tmp_path / "data", "val2014", has_images=False)


def test_a_dataset_is_reused_unless_its_source_changed(source, tmp_path):
    coco.prepare(source, tmp_path / "data", "val2014")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.*")}
    coco.prepare(source, tmp_path / "data", "val2014")
    assert {path: path.stat().st_mtime_ns for path in written} == written
    (source / "val2014" / NAME.format(2)).write_bytes(_jpeg(9, (99, 99)))
    with pytest.raises(ValueError, match="made from other files: delete it"):
        coco.prepare(source, tmp_path / "data", "val2014")


def test_missing_files_are_named_with_their_origin(tmp_path):
    data_dir = tmp_path / "data"
    with pytest.raises(
        ValueError,
        match=r"annotations/captions_val2014.json or .*annotations_trainval2014.zip.*neither is"
        r" there; it is from http://images.cocodataset.org/annotations/annotations_trainval2014",
    ):
        coco.prepare(tmp_path, data_dir, "val2014")
    _write(tmp_path, _contents([["a"]]))
    with pytest.raises(ValueError, match=r"val2014.zip, and none.*cocodataset.org/zips/val2014"):
        coco.prepare(tmp_path, data_dir, "val2014")
    with pytest.raises(ValueError, match=r"no dataset .*val2014.*sdprune prepare-data"):
        coco.load(data_dir, "val2014")
    with pytest.raises(ValueError, match=r"one of train2014, .*, got 'test'"):
        coco.load(data_dir, "test")
    assert not data_dir.exists()


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", '{"images": []}', "\ufeff\ud83d"])
def test_damaged_annotations_are_refused(text, tmp_path):
    path = _write(tmp_path, {}) / "annotations/captions_val2014.json"
    path.write_text(text, errors="surrogatepass")
    with pytest.raises(ValueError, match=r"captions_val2014.json (is no JSON|has no lists)"):
        coco.read(tmp_path, "val2014", has_images=False)


def test_damaged_zip_files_are_refused(source, tmp_path):
    archive = tmp_path / "annotations_trainval2014.zip"
    archive.write_bytes(b"PK\3\4 half a download")
    with pytest.raises(ValueError, match=r"2014.zip is no zip file .*download it again"):
        coco.read(tmp_path, "val2014", has_images=False)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("annotations/instances_val2014.json", "{}")
    with pytest.raises(ValueError, match=r"2014.zip has no annotations/captions_val2014.json"):
        coco.read(tmp_path, "val2014", has_images=False)
    name = "annotations/captions_val2014.json"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(source / name, name)
    damaged = bytearray(archive.read_bytes())
    damaged[80] ^= 255
    archive.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"captions_val2014.json is damaged"):
        coco.read(tmp_path, "val2014", has_images=False)


def test_a_picture_damaged_in_its_zip_file_is_counted(tmp_path):
    archive = tmp_path / "val2014.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("val2014/a.jpg", _jpeg(1))
        file.writestr("val2014/b.jpg", _jpeg(2))
    contents = bytearray(archive.read_bytes())
    contents[100] ^= 255
    archive.write_bytes(contents)
    read = sources.from_zip(archive, "val2014/")
    assert sources.picture(read, "a.jpg") == (b"", "picture cannot be read")
    assert sources.picture(read, "b.jpg") == (_jpeg(2), None)
    assert sources.picture(read, "c.jpg") == (b"", "picture is missing")


def test_a_file_that_is_too_large_is_not_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("val2014/a.jpg", bytes(1001))
    (source / "val2014/a.jpg").write_bytes(bytes(1001))
    folder, bomb = sources.from_folder(source / "val2014"), tmp_path / "bomb.zip"
    for read in (folder, sources.from_zip(bomb, "val2014/")):
        with pytest.raises(ValueError, match=r"a.jpg has 1,001 bytes, more than 1,000"):
            read("a.jpg")
        assert sources.picture(read, "a.jpg") == (b"", "picture cannot be read")
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 10)
    with pytest.raises(ValueError, match=r"captions_val2014.json has .* bytes, more than 10"):
        coco.read(source, "val2014", has_images=False)


def _annotated(num_images, num_captions):
    """Annotations whose images appear in descending order."""
    order = range(num_images, 0, -1)
    return {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(1, num_images + 1)],
        "annotations": [
            {"image_id": i, "id": 10 * i + j, "caption": f"{i} {j}"}
            for j in range(num_captions)
            for i in order
        ],
    }


def test_sd2_pruning_draws_ten_thousand_first_captions_of_train2017(tmp_path):
    source = _write(tmp_path, _annotated(118_287, 1), "train2017")
    found = coco.read(source, "train2017", has_images=False)
    assert len(found.rows) == found.num_positions == 118_287
    drawn = sampling.sd2_pruning(found.num_positions)
    assert drawn[:5].tolist() == [31048, 25996, 61513, 100785, 111404]
    assert np.array_equal(drawn, sampling.sd2_pruning(found.num_positions))
    prompts = [found.rows[position].captions[0] for position in drawn]
    assert prompts[0] == f"{118_287 - 31048} 0"
    assert len(prompts) == len(set(prompts)) == 10_000


def test_aptp_draws_thirty_thousand_images_of_val2014(tmp_path):
    found = coco.read(_write(tmp_path, _annotated(40_504, 2)), "val2014", has_images=False)
    drawn = sampling.aptp_coco(found.num_positions)
    assert drawn[:5].tolist() == [17315, 2331, 31451, 30416, 38675]
    prompts = {found.rows[position].captions[0] for position in drawn}
    assert len(drawn) == len(prompts) == 30_000


def test_draws_leave_the_global_generator_alone():
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    sampling.sd2_pruning(118_287)
    assert np.array_equal(np.random.random(3), expected)


def test_a_draw_from_another_number_of_images_is_refused():
    with pytest.raises(ValueError, match=r"train2017 has 118,287 .* this source has 118,286"):
        sampling.sd2_pruning(118_286)
    with pytest.raises(ValueError, match=r"val2014 has 40,504 .* this source has 5,000"):
        sampling.aptp_coco(5_000)


def test_select_follows_the_draw_and_leaves_out_what_was_skipped(source, tmp_path):
    (source / "val2014" / NAME.format(3)).unlink()
    dataset = coco.prepare(source, tmp_path / "data", "val2014", max_skipped=0.25)
    drawn = captioned.select(dataset, np.array([3, 0]))
    assert captioned.captions(drawn) == ["one\n", "four"]
    assert captioned.image(drawn, 0).shape == (6, 4, 3)
    assert captioned.captions(captioned.select(drawn, np.array([0]))) == ["four"]
    some = captioned.select(dataset, np.array([2, 1, 0]), max_skipped=0.34)
    assert (some.positions.tolist(), captioned.captions(some)) == ([2, 0], ["two", "four"])
    with pytest.raises(ValueError, match=r"(?s)1 of the 3 rows .*1  picture is missing"):
        captioned.select(dataset, np.array([2, 1, 0]))
    with pytest.raises(ValueError, match="1 of the 1 rows"):
        captioned.select(dataset, np.array([99]))


def test_bksdm_reads_the_list_of_its_authors(tmp_path):
    path = tmp_path / "metadata.csv"
    names = [NAME.format(i) for i in range(30_000)]
    lines = [f'{name},"a ""{i}"", quoted"' for i, name in enumerate(names)]
    path.write_text("\n".join(["file_name,text", *lines]))
    prompts = sampling.bksdm(path)
    assert len(prompts) == 30_000
    assert prompts[7] == (names[7], 'a "7", quoted')
    path.write_text("\n".join(["file_name,text", *lines[1:], "../a.jpg,x", f"{names[2]},"]))
    with pytest.raises(ValueError, match=r"1 rows have no name .*30001; 1 rows no caption.*30002"):
        sampling.bksdm(path)
    path.write_text("\n".join(["file_name,text", *lines[1:]]))
    with pytest.raises(ValueError, match="29,999 rows of 29,999 pictures, expected 30,000"):
        sampling.bksdm(path)
    with pytest.raises(ValueError, match=r"needs its list .*nothing.csv.*https://netspresso"):
        sampling.bksdm(tmp_path / "nothing.csv")
