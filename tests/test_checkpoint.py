import json
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from sdprune_jax.files import convert, model_directory, weights

SHAPES = {"a.0": {"kernel": jax.ShapeDtypeStruct((4, 6), jnp.float32)}}
TENSORS = {"a.0.weight": np.arange(24, dtype=np.float32).reshape(6, 4)}


def _random_params(seed: int = 0) -> dict:
    shapes = {
        "conv.0": {"kernel": (3, 3, 8, 16), "bias": (16,)},
        "attn": {"to_out.0": {"kernel": (8, 16)}},
        "embeddings": {"token_embedding": {"embedding": (24, 8)}},
        "logit_scale": (),
    }
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def _shapes(params: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)


def _assert_equal(got: dict, want: dict):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 1000])
def test_saved_parameters_load_as_they_were(tmp_path: pathlib.Path, dtype, max_shard_bytes):
    params = jax.tree.map(lambda x: x.astype(dtype), _random_params())
    model_directory.save_params(
        tmp_path, params, dtype=None, name="model", max_shard_bytes=max_shard_bytes
    )
    loaded = model_directory.load_params(tmp_path, _shapes(params))
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype(dtype)}
    _assert_equal(loaded, params)
    files = {path.name for path in tmp_path.iterdir()}
    if max_shard_bytes > 1000:
        assert files == {"model.safetensors"}
    else:
        shards = sorted(files - {"model.safetensors.index.json"})
        assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        num_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
        assert index["metadata"]["total_size"] == num_bytes


def test_each_device_reads_only_its_part(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    params = _random_params()
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = lambda x: P(*[None] * (x.ndim - 1), "fsdp") if x.ndim > 1 else P()
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), params)
    model_directory.save_params(
        tmp_path, jax.device_put(params, shardings), dtype=jnp.float32, name="model"
    )
    sizes = []
    count = weights._num_nonfinite
    monkeypatch.setattr(weights, "_num_nonfinite", lambda x: sizes.append(x.size) or count(x))
    loaded = model_directory.load_params(tmp_path, _shapes(params), sharding=shardings)
    _assert_equal(loaded, params)
    assert loaded["conv.0"]["kernel"].addressable_shards[3].data.shape == (3, 3, 8, 2)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings
    assert sorted(set(sizes)) == [1, 16, 24, 144]  # the embedding and to_out have 24 and 16 of 8


def test_dtypes_are_converted_as_asked(tmp_path: pathlib.Path):
    x = np.random.default_rng(0).normal(size=(6, 4))
    save_file({"a.0.weight": x}, tmp_path / "model.safetensors")
    (loaded,) = jax.tree.leaves(model_directory.load_params(tmp_path, SHAPES))
    assert loaded.dtype == jnp.float32
    np.testing.assert_array_equal(loaded, x.T.astype(np.float32))
    (loaded,) = jax.tree.leaves(model_directory.load_params(tmp_path, SHAPES, dtype=jnp.bfloat16))
    np.testing.assert_array_equal(loaded, x.T.astype(jnp.bfloat16))


def test_float64_must_fit_into_float32(tmp_path: pathlib.Path):
    save_file({"a.0.weight": np.full((6, 4), 1e300)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a\.0\.weight: 24 values"):
        model_directory.load_params(tmp_path, SHAPES)


def test_variant_is_read_only_when_named(tmp_path: pathlib.Path):
    save_file(TENSORS, tmp_path / "model.fp16.safetensors")
    with pytest.raises(ValueError, match=r"it holds model\.fp16\.safetensors"):
        model_directory.load_params(tmp_path, SHAPES)
    loaded = model_directory.load_params(tmp_path, SHAPES, variant="fp16")
    np.testing.assert_array_equal(loaded["a.0"]["kernel"], TENSORS["a.0.weight"].T)


def test_misfit_lists_every_tensor(tmp_path: pathlib.Path):
    many = {f"new.{i}.weight": np.zeros(1, np.float32) for i in range(30)}
    bad = {"b.weight": np.zeros((2, 2), np.float32), "c.weight": np.zeros(2, np.int64)}
    save_file(many | bad, tmp_path / "model.safetensors")
    vector = lambda n: jax.ShapeDtypeStruct((n,), jnp.float32)
    shapes = SHAPES | {"b": {"scale": vector(2)}, "c": {"scale": vector(2)}}
    with pytest.raises(ValueError, match="does not hold this model") as error:
        model_directory.load_params(tmp_path, shapes)
    text = str(error.value)
    assert "1 missing:\n  a.0.weight\n" in text
    assert "30 unexpected:\n  new.0.weight\n" in text
    assert "... and 10 more" in text
    assert "b.weight: F32 (2, 2), expected (2,)" in text
    assert "c.weight: I64 (2,), expected (2,)" in text


def test_nonfinite_weights_are_refused(tmp_path: pathlib.Path):
    x = TENSORS["a.0.weight"].copy()
    x[0, :2], x[1, 1] = np.nan, np.inf
    save_file({"a.0.weight": x}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a\.0\.weight: 3 values"):
        model_directory.load_params(tmp_path, SHAPES)
    loaded = model_directory.load_params(tmp_path, SHAPES, allow_nonfinite=True)
    np.testing.assert_array_equal(loaded["a.0"]["kernel"], x.T)


def test_overflow_is_refused_when_loading_and_when_saving(tmp_path: pathlib.Path):
    save_file({"a.0.weight": TENSORS["a.0.weight"] * 3000}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a\.0\.weight: 2 values"):  # 66,000 and 69,000
        model_directory.load_params(tmp_path, SHAPES, dtype=jnp.float16)
    params = model_directory.load_params(tmp_path, SHAPES)
    with pytest.raises(ValueError, match=r"a\.0\.weight: 2 values"):
        model_directory.save_params(tmp_path, params, dtype=jnp.float16, name="model")


def _damage(tmp_path: pathlib.Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    good = path.read_bytes()
    header = lambda text, body=b"": struct.pack("<Q", len(text)) + text + body
    entry = b'"a.0.weight":{"dtype":"F32","shape":[6,4],"data_offsets":[0,96]}'
    contents = {
        "empty": b"",
        "short": good[:5],
        "truncated": good[:-1],
        "cut header": good[:20],
        "trailing": good + b"\0",
        "long header": struct.pack("<Q", 2**40) + good[8:],
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3463726498\n",
        "html": b"<!DOCTYPE html><html>404</html>",
        "message": b'{"error": "Repository not found"}',
        "pickle": b"PK\x03\x04" + bytes(100),
        "twice": header(b"{" + entry + b"," + entry + b"}", bytes(96)),
        "list": header(b"[1]"),
        "not json": header(b"{'a': 1}"),
        "nested": header(b'{"a":' * 20000),
        "not utf-8": header(b'{"\xff": 1}'),
        "overlap": header(b"{" + entry + b',"b":' + entry.split(b":", 1)[1] + b"}", bytes(96)),
        "negative": header(b"{" + entry.replace(b"6,4", b"-6,-4") + b"}", bytes(96)),
        "float8": header(
            b"{" + entry.replace(b"F32", b"F8_E4M3").replace(b"96", b"24") + b"}", bytes(24)
        ),
    }
    if kind == "directory":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(contents[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "cut short"),
        ("short", "cut short"),
        ("truncated", "damaged"),
        ("cut header", "cut short"),
        ("trailing", "damaged"),
        ("long header", "cut short"),
        ("pointer", "Git LFS pointer"),
        ("html", "web page"),
        ("message", "a message"),
        ("pickle", "zip archive or a pickle"),
        ("twice", r"keys occur twice: a\.0\.weight"),
        ("list", "expected an object"),
        ("not json", "is not JSON"),
        ("nested", "is not JSON"),
        ("not utf-8", "is not JSON"),
        ("overlap", "damaged"),
        ("negative", "damaged"),
        ("float8", "F8_E4M3"),
        ("directory", "is a directory"),
    ],
)
def test_damaged_file_is_named_and_explained(tmp_path: pathlib.Path, kind: str, message: str):
    _damage(tmp_path, kind)
    with pytest.raises(ValueError, match=message) as error:
        model_directory.load_params(tmp_path, SHAPES)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.0.weight": "../one.safetensors"}, "not beside it"),
        ({"a.0.weight": "/one.safetensors"}, "not beside it"),
        ({"a.0.weight": "x\\one.safetensors"}, "not beside it"),
        ({"a.0.weight": "one.bin"}, "not beside it"),
        ({"a.0.weight": 1}, "not beside it"),
        ({"a.0.weight": "two.safetensors"}, r"two\.safetensors is no file"),
        ({"b": "one.safetensors"}, r"lacks b\n.*has a\.0\.weight unlisted"),
        ({}, "no weight_map"),
    ],
)
def test_index_must_tell_the_truth(tmp_path: pathlib.Path, weight_map: dict, message: str):
    save_file(TENSORS, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        model_directory.load_params(tmp_path, SHAPES)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model.bin"], "pickles are not read"),
        (["flax_model.msgpack"], "sdprune convert"),
        (["model.safetensors", "diffusion_pytorch_model.safetensors"], "more than once"),
        ([], "empty or missing"),
    ],
)
def test_only_one_set_of_safetensors_is_read(tmp_path: pathlib.Path, names: list, message: str):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        model_directory.load_params(tmp_path, SHAPES)


def test_export_is_readable_by_numpy_alone(tmp_path: pathlib.Path):
    params = _random_params()
    model_directory.save_params(tmp_path, params, dtype=jnp.float16, name="model")
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == {convert.torch_key(path) for path in convert.flatten(params)}
    want = np.asarray(params["conv.0"]["kernel"]).transpose(3, 2, 0, 1).astype(np.float16)
    np.testing.assert_array_equal(stored["conv.0.weight"], want)


def test_a_save_killed_at_its_end_does_not_stop_the_next(tmp_path: pathlib.Path):
    for name in ("model", "model.old", "model.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name.txt").write_text(name)
    with model_directory.replacing(tmp_path / "model") as new:
        new.mkdir()
        (new / "name.txt").write_text("new")
    assert (tmp_path / "model" / "name.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
