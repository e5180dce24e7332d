"""sparse-bitmask and sparse-24 by hand and by round trips, and sdprune pack end to end."""

import json
import os
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from sdprune_jax import UserError
from sdprune_jax.commands import pack, sparse_files
from sdprune_jax.files import bitmask, model_directory, tensors

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
SHAPES = ((1,), (13,), (3, 10), (8, 8), (5, 1), (7, 17), (4, 3, 3, 3), (2, 3, 4), (0, 5), (3, 0))


def _random(shape: tuple[int, ...], sparsity: float = 0.5, dtype=np.float32, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = np.where(rng.random(shape) < sparsity, 0, rng.normal(size=shape))
    return x.astype(dtype)


def _assert_same_bits(found, expected):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


def _random24(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    rows = _random((shape[0], int(np.prod(shape[1:]))), 0.2, dtype, seed)
    keep = rng.permuted(np.arange(rows.size).reshape(-1, 4) % 4 < 2, axis=1)
    return np.where(keep.reshape(rows.shape), rows, np.zeros_like(rows)).reshape(shape)


def test_bitmask_by_hand():
    x = np.zeros((3, 10), np.float16)
    x[0, [0, 3, 6, 9]] = [1.5, -2, 0.25, 3]
    x[2, [1, 2, 4, 8, 9]] = [1, 2, -1, 4, -8]
    parts = bitmask.to_bitmask(x)
    _assert_same_bits(parts.shape, np.array([3, 10]))
    _assert_same_bits(parts.bitmask, np.array([[73, 2], [0, 0], [22, 3]], np.uint8))
    values = np.array([1.5, -2, 0.25, 3, 1, 2, -1, 4, -8], np.float16)
    _assert_same_bits(parts.compressed, values)
    _assert_same_bits(parts.row_offsets, np.array([0, 4, 4]))
    _assert_same_bits(bitmask.from_bitmask(parts), x)


def test_sparse24_by_hand():
    x = np.array([[1, 0, -3, 0, 0, 5, 0, 2], [0, 0, 0.5, 0, 7, 0, 0, -1]], np.float16)
    parts = bitmask.to_sparse24(x)
    _assert_same_bits(parts.shape, np.array([[2], [8]]))
    _assert_same_bits(parts.compressed, np.array([[1, -3, 5, 2], [0.5, 0, 7, -1]], np.float16))
    _assert_same_bits(parts.bitmask, np.array([[165], [156]], np.uint8))
    _assert_same_bits(bitmask.from_sparse24(parts), x)


def test_sparse24_of_another_choice_of_zeros_decodes_alike():
    x = np.array([[0, 0, 0.5, 0]], np.float16)  # ties of the top two have no order of their own
    bits = np.array([[0b0101]], np.uint8)
    parts = bitmask.to_sparse24(x)._replace(
        compressed=np.array([[0, 0.5]], np.float16), bitmask=bits
    )
    _assert_same_bits(bitmask.from_sparse24(parts), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_bitmask_returns_every_bit(shape, dtype, sparsity):
    x = _random(shape, sparsity, dtype)
    if len(shape) > 1 and shape[0] > 1:
        x[1] = 0
    parts = bitmask.to_bitmask(x)
    assert len(parts.compressed) == np.count_nonzero(x)
    rows, columns = (1, *shape) if len(shape) == 1 else (shape[0], int(np.prod(shape[1:])))
    assert parts.bitmask.shape == (rows, (columns + 7) // 8)
    _assert_same_bits(bitmask.from_bitmask(parts), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", [(3, 4), (5, 12), (4, 4, 3, 3), (2, 0), (0, 4)], ids=str)
def test_sparse24_returns_every_bit(shape, dtype):
    x = _random24(shape, dtype)
    parts = bitmask.to_sparse24(x)
    assert parts.compressed.size == x.size // 2
    _assert_same_bits(bitmask.from_sparse24(parts), x)


def test_sparse24_takes_one_axis_and_zeros_alone():
    for x in (np.zeros(8, np.float16), np.array([0, 2, 3, 0], np.float32)):
        _assert_same_bits(bitmask.from_sparse24(bitmask.to_sparse24(x)), x)


def test_negative_zero_nan_and_subnormal_survive():
    for dtype, quiet, least in ((np.float16, 0x7E01, 1), (np.float32, 0x7FC01234, 1)):
        bits = np.array([[0, 1 << (np.dtype(dtype).itemsize * 8 - 1), 0, 0], [quiet, 0, least, 0]])
        x = bits.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)
        assert np.signbit(x[0, 1])
        assert np.isnan(x[1, 0])
        parts = bitmask.to_bitmask(x)
        assert len(parts.compressed) == 3
        _assert_same_bits(bitmask.from_bitmask(parts), x)
        _assert_same_bits(bitmask.from_sparse24(bitmask.to_sparse24(x)), x)


def test_strided_array_is_packed_as_it_reads():
    x = _random((6, 10)).T
    _assert_same_bits(bitmask.from_bitmask(bitmask.to_bitmask(x)), np.ascontiguousarray(x))


def test_half_the_weights_take_nine_sixteenths():
    dense = _random((64, 1280), 0.0, np.float16)
    dense[:, ::2] = 0
    size = sum(part.nbytes for part in bitmask.to_bitmask(dense))
    assert size == dense.nbytes * 9 // 16 + 8 * 64 + 16


BAD_BITMASKS = {
    "offset": ({"row_offsets": np.array([0, 5, 4])}, r"row_offsets\[1\] is 5, expected 4"),
    "offsets": ({"row_offsets": np.array([0, 4])}, r"row_offsets is int64 \(2,\)"),
    "offset dtype": ({"row_offsets": np.zeros(3, np.int32)}, "expected int64"),
    "values": ({"compressed": np.ones(8, np.float16)}, r"compressed has shape \(8,\), .*\(9,\)"),
    "width": ({"bitmask": np.zeros((3, 3), np.uint8)}, r"uint8 \(3, 3\), expected uint8 \(3, 2\)"),
    "mask dtype": ({"bitmask": np.zeros((3, 2), np.int8)}, "bitmask is int8"),
    "tail": ({"bitmask": np.full((3, 2), 4, np.uint8)}, "after column 9 of row 0"),
    "huge": ({"shape": np.array([10**6, 10**6])}, r"expected uint8 \(1000000, 125000\)"),
    "negative": ({"shape": np.array([-3, -10])}, r"shape is int64 \[-3, -10\]"),
    "no axes": ({"shape": np.array([], np.int64)}, "expected the int64 sizes"),
    "shape dtype": ({"shape": np.array([3, 10], np.int32)}, "shape is int32"),
}


@pytest.mark.parametrize("case", BAD_BITMASKS)
def test_malformed_bitmask_is_refused(case):
    change, message = BAD_BITMASKS[case]
    x = np.zeros((3, 10), np.float16)
    x[0, :4], x[2, :5] = 1, 2
    parts = bitmask.to_bitmask(x)._replace(**change)
    with pytest.raises(ValueError, match=message):
        bitmask.from_bitmask(parts)


def test_all_that_is_wrong_is_said_at_once():
    parts = bitmask.to_bitmask(_random((3, 10)))
    parts = parts._replace(compressed=parts.compressed[1:], row_offsets=parts.row_offsets + 1)
    with pytest.raises(ValueError, match=r"(?s)compressed has.*row_offsets\[0\] is 1"):
        bitmask.from_bitmask(parts)


def test_number_has_no_rows():
    with pytest.raises(ValueError, match="without axes"):
        bitmask.to_bitmask(np.array(1.0, np.float32))


def test_arrays_that_are_not_2_of_4_are_refused():
    x = np.zeros((2, 8), np.float16)
    x[1, 4:7] = 1
    with pytest.raises(ValueError, match=r"1 runs of 4 hold .* row 1, columns 4 to 7"):
        bitmask.to_sparse24(x)
    with pytest.raises(ValueError, match="rows of 10, expected a multiple of 4"):
        bitmask.to_sparse24(np.zeros((4, 10), np.float16))


BAD_SPARSE24 = {
    "three": ({"bitmask": np.array([[0x57], [0x33]], np.uint8)}, "3 bits set in row 0, columns 0"),
    "one": ({"bitmask": np.array([[0x33], [0x13]], np.uint8)}, "1 bits set in row 1, columns 4 to"),
    "values": ({"compressed": np.ones((2, 3), np.float16)}, r"\(2, 3\), expected \(2, 4\)"),
    "width": ({"bitmask": np.array([[0x33, 0]] * 2, np.uint8)}, r"expected uint8 \(2, 1\)"),
    "flat shape": ({"shape": np.array([2, 8])}, r"itself of shape \(2,\)"),
    "columns": ({"shape": np.array([[2], [6]])}, "rows of 6"),
}


@pytest.mark.parametrize("case", BAD_SPARSE24)
def test_malformed_sparse24_is_refused(case):
    change, message = BAD_SPARSE24[case]
    parts = bitmask.to_sparse24(_random24((2, 8), np.float16))
    with pytest.raises(ValueError, match=message):
        bitmask.from_sparse24(parts._replace(**change))


@pytest.fixture
def source(tmp_path) -> pathlib.Path:
    """A directory as diffusers lays it out, with shards, a file of no zeros, and -0.0."""
    root = tmp_path / "pruned"
    for name in ("text_encoder", "unet", "vae", "tokenizer"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps({"of": name}))
    (root / "model_index.json").write_text("{}")
    text = {
        "fc.weight": _random((64, 60), 0.5, np.float16),
        "fc.bias": np.zeros(600, np.float16),
        "norm.weight": np.ones(64, np.float16),
        "small.weight": _random((8, 8), 0.9, np.float16),
        "position_ids": np.arange(77)[None],
        "scale.weight": np.array(2.0, np.float16),
        "empty.weight": np.zeros((0, 4), np.float16),
    }
    text["fc.weight"][0, :2] = [-0.0, np.nan]
    save_file(text, root / "text_encoder" / "model.safetensors", {"format": "pt"})
    shards = {
        f"diffusion_pytorch_model-{i:05}-of-00002.safetensors": {
            f"conv{i}.weight": _random((32, 16, 3, 3), 0.4 * i, np.float32, seed=i),
            f"conv{i}.bias": _random((32,), 0.0, ml_dtypes.bfloat16),
            f"gone{i}.weight": np.zeros((32, 32), ml_dtypes.bfloat16),
        }
        for i in (1, 2)
    }
    for name, held in shards.items():
        save_file(held, root / "unet" / name)
    index = {"weight_map": {key: name for name, held in shards.items() for key in held}}
    path = root / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    dense = {"conv.weight": _random((32, 32), 0.0, np.float16)}
    save_file(dense, root / "vae" / "diffusion_pytorch_model.safetensors")
    return root


def _run(*arguments) -> None:
    pack.main([str(argument) for argument in arguments])


def _contents(root: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_directory_packs_smaller_and_unpacks_alike(source, tmp_path, capsys):
    packed, again = tmp_path / "deep" / "packed", tmp_path / "again"
    _run(source, packed)
    said = capsys.readouterr().out
    held, before = (
        load_file(packed / "text_encoder" / "model.sparse.safetensors"),
        _contents(source),
    )
    assert {"fc.compressed", "fc.bitmask", "fc.shape", "fc.row_offsets"} <= held.keys()
    assert {"fc.bias", "norm.weight", "small.weight", "position_ids", "scale.weight"} <= held.keys()
    assert len(held) == 10
    after = _contents(packed)
    assert "vae/diffusion_pytorch_model.safetensors" in after  # nothing to gain
    assert (
        after["unet/diffusion_pytorch_model.safetensors.index.json"]
        == before["unet/diffusion_pytorch_model.safetensors.index.json"]
    )
    totals = [sum(map(len, files.values())) for files in (before, after)]
    assert totals[1] < 0.8 * totals[0]
    assert [f"{n:,}" for n in totals] == said.splitlines()[-1].split()[1:3]
    with pytest.raises(ValueError, match=r"neither .* it holds config.json, model.sparse.safe"):
        tensors.find_weights(packed / "text_encoder")  # nothing loads it half
    _run("--unpack", packed, again)
    assert _contents(again).keys() == before.keys()
    for path in sorted(source.rglob("*.safetensors")):
        here = again / path.relative_to(source)
        want, found = load_file(path), load_file(here)
        assert want.keys() == found.keys()
        for name in want:
            _assert_same_bits(found[name], want[name])
        with safetensors.safe_open(path, "np") as a, safetensors.safe_open(here, "np") as b:
            assert a.metadata() == b.metadata()
            assert a.offset_keys() == b.offset_keys()
    assert not list(tmp_path.rglob("*.tmp"))


def test_packed_tensors_are_aligned_and_described(source, tmp_path):
    _run(source, tmp_path / "packed")
    for path in (tmp_path / "packed").rglob("*.sparse.safetensors"):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        record = json.loads(header.pop("__metadata__")[sparse_files.KEY])
        assert (record["version"], record["format"]) == (1, "sparse-bitmask")
        assert set(record["packed"]) & {"fc.weight", "gone1.weight", "gone2.weight"}
        assert all(len(digest) == 64 for digest in record["sha256"].values())
        item = {"I64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
        for tensor in header.values():
            assert (8 + length + tensor["data_offsets"][0]) % item[tensor["dtype"]] == 0


def test_names_that_are_taken_and_places_inside_are_refused(source, tmp_path):
    (tmp_path / "there").mkdir()
    for target, message in ((tmp_path / "there", "exists"), (source / "packed", "is inside")):
        with pytest.raises(UserError, match=message):
            _run(source, target)
    with pytest.raises(UserError, match=r"has no \*\.safetensors in text_encoder/, unet/, vae/"):
        _run(tmp_path, tmp_path.with_name("new"))
    with pytest.raises(UserError, match="there is nothing to unpack"):
        _run("--unpack", source, tmp_path / "new")
    _run(source, tmp_path / "packed")
    with pytest.raises(UserError, match="is packed: unpack it"):
        _run(tmp_path / "packed", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_dtype_that_numpy_lacks_is_refused(source, tmp_path):
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    text = json.dumps({"x.weight": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}})
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(8))
    with pytest.raises(UserError, match=r"dtypes other than F16[^\n]*\n  x\.weight: F8_E4M3"):
        _run(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def _rewrite(path: pathlib.Path, change) -> None:
    """Changes the tensors and the record of a packed file, which stays intact as such."""
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    held, record = load_file(path), json.loads(metadata[sparse_files.KEY])
    change(held, record)
    save_file(held, path, metadata | {sparse_files.KEY: json.dumps(record)})


DAMAGE = {
    "value": (
        lambda held, _: held["fc.compressed"].__setitem__(5, 9),
        r"fc.weight is damaged: sha",
    ),
    "dense": (lambda held, _: held["norm.weight"].__setitem__(5, 9), r"norm.weight is damaged"),
    "bits": (lambda held, _: held["fc.bitmask"].__setitem__((0, 0), 0), r"fc.weight: .*fit each"),
    "missing": (lambda held, _: held.pop("fc.row_offsets"), "missing fc.row_offsets"),
    "unlisted": (lambda held, _: held.update(new=np.ones(1)), "unlisted new"),
    "shape": (lambda held, _: held.update({"fc.shape": np.array([-1])}), r"fc.weight: shape is"),
    "version": (lambda _, record: record.update(version=2), "version 2, expected 1"),
    "record": (lambda _, record: record.pop("version"), "does not say"),
    "sums": (lambda _, record: record.update(sha256=[], packed=None), "packed and sha256 of"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_file_is_refused_and_nothing_is_left(case, source, tmp_path):
    change, message = DAMAGE[case]
    _run(source, tmp_path / "packed")
    _rewrite(tmp_path / "packed" / "text_encoder" / "model.sparse.safetensors", change)
    with pytest.raises(UserError, match=rf"(?s)model.sparse.safetensors.*{message}"):
        _run("--unpack", tmp_path / "packed", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "pruned"]


def test_wrong_packing_is_noticed_while_packing(source, tmp_path, monkeypatch):
    honest = bitmask.to_bitmask

    def forget_one(x):
        parts = honest(x)
        parts.compressed[:1] = 7
        return parts

    monkeypatch.setattr(bitmask, "to_bitmask", forget_one)
    with pytest.raises(UserError, match="is damaged: sha256"):
        _run(source, tmp_path / "packed")
    assert sorted(os.listdir(tmp_path)) == ["pruned"]


def test_embedded_model_packed_and_unpacked_is_loaded_alike(tmp_path):
    model = model_directory.open_model(model_directory.directory_of("embedded"))
    params = model_directory.load(model, "text_encoder", dtype=np.float16)
    pruned, again = tmp_path / "pruned", tmp_path / "again"

    def prune(x):
        x = np.asarray(x)
        return np.where(np.abs(x) < np.median(np.abs(x)), np.zeros_like(x), x)

    params = jax.tree.map(prune, params)
    model_directory.save(model, {"text_encoder": params}, pruned, dtype=np.float16)
    _run(pruned, tmp_path / "packed")
    _run("--unpack", tmp_path / "packed", again)
    assert _contents(again) == _contents(pruned)  # our own files return byte for byte
    loaded = model_directory.load(model_directory.open_model(again), "text_encoder")
    jax.tree.map(lambda a, b: _assert_same_bits(np.asarray(a), b), loaded, params)
