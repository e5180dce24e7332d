"""CC3M from its TSV and a folder of pictures, and the command that prepares datasets."""

import io

import numpy as np
import pytest
from PIL import Image

from sdprune_jax import UserError
from sdprune_jax.commands import prepare_data
from sdprune_jax.data import captioned, cc3m, sampling

TSV = "Validation_GCC-1.1.0-Validation.tsv"
URL = "http://example.com/{}.jpg"


def _write(directory, lines):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TSV).write_bytes(b"".join(line + b"\n" for line in lines))
    return directory


def _line(caption, i=0):
    return f"{caption}\t{URL.format(i)}".encode()


def _png(seed, height=4):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def _counts(dataset_or_source):
    return {reason: entry["count"] for reason, entry in dataset_or_source.skips.items()}


@pytest.fixture
def source(tmp_path):
    """Eight lines, and pictures of lines 0, 2, 5 and 7."""
    directory = _write(tmp_path / "source", [_line(f"caption {i} ", i) for i in range(8)])
    (directory / "validation/00001").mkdir(parents=True)
    (directory / "validation/2_3735928559").write_bytes(_png(2, 6))
    (directory / "validation/0_1.jpg").write_bytes(_png(0, 4))
    (directory / "validation/00001/000000005.jpg").write_bytes(_png(5, 9))
    (directory / "validation/00001/000000005.json").write_text("{}")
    (directory / "validation/7.png").write_bytes(_png(7, 11))
    return directory


def test_a_picture_gets_the_caption_of_the_line_in_its_name(source, tmp_path):
    cc3m.prepare(source, tmp_path / "data", "validation")
    dataset = cc3m.load(tmp_path / "data", "validation")
    rows = [captioned.row(dataset, i) for i in range(4)]
    assert [(row.position, row.image_id, *row.captions) for row in rows] == [
        (0, 0, "caption 0 "),
        (2, 2, "caption 2 "),
        (5, 5, "caption 5 "),
        (7, 7, "caption 7 "),
    ]
    assert rows[2].file_name == "00001/000000005.jpg"
    assert [captioned.image(dataset, i).shape[0] for i in range(4)] == [4, 6, 9, 11]
    assert np.array_equal(
        captioned.image(dataset, 1), np.asarray(Image.open(io.BytesIO(_png(2, 6))))
    )
    assert (dataset.positions.tolist(), dataset.num_positions) == ([0, 2, 5, 7], 8)


def test_dead_links_are_shown_but_are_no_mistake(source, tmp_path):
    dataset = cc3m.prepare(source, tmp_path / "data", "validation", max_skipped=0.0)
    assert dataset.skips == {
        "no picture was downloaded": {"count": 4, "examples": ["'line 1'", "'line 3'", "'line 4'"]}
    }


def test_a_folder_without_pictures_is_refused(source, tmp_path):
    for path in (source / "validation").rglob("*.*"):
        path.unlink()
    for path in (source / "validation").glob("*_*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"(?s)no row is left .* 8  no picture was downloaded"):
        cc3m.prepare(source, tmp_path / "data", "validation")


def test_captions_alone_are_of_all_lines(source, tmp_path):
    dataset = cc3m.prepare(source, tmp_path / "data", "validation", has_images=False)
    assert captioned.captions(dataset) == [f"caption {i} " for i in range(8)]
    assert captioned.row(dataset, 3).file_name == ""


def test_lines_that_cannot_be_used_are_counted_and_keep_their_numbers(tmp_path):
    lines = [
        _line("good"),
        b"no address",
        _line("one\ttoo many"),
        b"",
        _line(""),
        _line("x" * 10_000),
        _line("nul\0"),
        b"latin \xe9\t" + URL.encode(),
        b"path\t../../etc/passwd",
        b"file\tfile:///etc/passwd",
        b"broken\thttp://[",
        _line('a "quoted, caption\x85 \u2028') + b"\r",
    ]
    source = cc3m.read(_write(tmp_path, lines), "validation", has_images=False)
    assert [(row.position, row.captions[0]) for row in source.rows] == [
        (0, "good"),
        (11, 'a "quoted, caption\x85 \u2028'),
    ]
    assert source.num_positions == 12
    assert _counts(source) == {
        "line is not caption<TAB>address": 4,
        "caption is empty": 1,
        "caption is longer than 2,000 characters": 1,
        "caption has a NUL": 1,
        "address is not one of the web": 3,
    }


@pytest.mark.parametrize(
    ("heading", "line"),
    [(b"caption\turl", b"a cat\thttp://a.b/c"), (b"url\tcaption", b"http://a.b/c\ta cat")],
)
def test_a_heading_names_the_columns_and_is_not_counted(heading, line, tmp_path):
    source = cc3m.read(_write(tmp_path, [heading, line]), "validation", has_images=False)
    assert [(row.position, row.captions) for row in source.rows] == [(0, ("a cat",))]
    assert source.num_positions == 1


def test_pictures_that_cannot_be_used_are_counted(source, tmp_path):
    folder = source / "validation"
    (folder / "7.png").write_bytes(b"<html>404</html>")
    (folder / "2_another").write_bytes(_png(3))
    (folder / "9_1.jpg").write_bytes(_png(3))
    (folder / "cat.jpg").write_bytes(_png(3))
    (folder / "3cats.jpg").write_bytes(_png(3))
    (folder / ".DS_Store").write_bytes(b"")
    dataset = cc3m.prepare(source, tmp_path / "data", "validation", max_skipped=0.7)
    assert _counts(dataset) == {
        "line has two pictures": 1,
        "picture is of a line that is not there": 1,
        "file name does not begin with the number of a line": 2,
        "no picture was downloaded": 4,
        "picture cannot be decoded": 1,
    }
    assert (dataset.positions.tolist(), dataset.num_positions) == ([0, 2, 5], 8)
    with pytest.raises(
        ValueError, match=r"(?s)at least 50.0% of the source .*2  file name does not begin"
    ):
        cc3m.prepare(source, tmp_path / "other", "validation")


def test_missing_files_are_named_with_their_origin(tmp_path):
    data_dir = tmp_path / "data"
    with pytest.raises(ValueError, match=rf"needs .*{TSV}.*https://ai.google.com/research/Concep"):
        cc3m.prepare(tmp_path, data_dir, "validation")
    _write(tmp_path, [_line("a")])
    with pytest.raises(ValueError, match=r"need the folder .*validation/, and it is not there"):
        cc3m.prepare(tmp_path, data_dir, "validation")
    with pytest.raises(ValueError, match="one of train, validation, got 'val'"):
        cc3m.prepare(tmp_path, data_dir, "val")
    assert not data_dir.exists()


def test_a_changed_source_is_refused(source, tmp_path):
    cc3m.prepare(source, tmp_path / "data", "validation")
    (source / "validation/3_1.jpg").write_bytes(_png(3))
    with pytest.raises(ValueError, match="made from other files"):
        cc3m.prepare(source, tmp_path / "data", "validation")


def test_aptp_takes_fourteen_thousand_rows_of_those_with_pictures(tmp_path):
    directory = _write(tmp_path, [_line(f"caption {i}", i) for i in range(15_840)])
    found = cc3m.read(directory, "validation", has_images=False)
    assert len(found.rows) == 15_840
    (directory / "validation").mkdir()
    for i in range(15_840):
        if i % 9:  # every ninth link is dead
            (directory / f"validation/{i}_7").touch()
    found = cc3m.read(directory, "validation", has_images=True)
    positions = np.array([row.position for row in found.rows])
    assert len(positions) == 14_080
    drawn = sampling.aptp_cc3m(positions)
    assert drawn.tolist() == [i for i in range(15_840) if i % 9][:14_000]
    with pytest.raises(ValueError, match="14,000 rows, and the dataset has 13,999"):
        sampling.aptp_cc3m(positions[:13_999])


def test_the_command_shows_the_counts_and_what_was_skipped(source, tmp_path, capsys):
    data = str(tmp_path / "data")
    prepare_data.main(["cc3m", str(source), data, "--split", "validation"])
    shown = capsys.readouterr().out
    assert "4  rows of 8\n" in shown
    assert "4  no picture was downloaded: 'line 1', 'line 3', 'line 4', ...\n" in shown
    prepare_data.main(["cc3m", str(source), data, "--split", "validation", "--captions-only"])
    assert "8  rows of 8\n        0  skipped\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"COCO needs .*annotations"):
        prepare_data.main(["coco", str(source), data, "--split", "val2017"])
    with pytest.raises(UserError, match=r"max_skipped is a fraction in \[0, 1\), got 7.0"):
        prepare_data.main(
            ["cc3m", str(source), data, "--split", "validation", "--max-skipped", "7"]
        )
