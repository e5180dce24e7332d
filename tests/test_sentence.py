"""Sentence encoders against transformers: all parameters random, padding and long texts too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax.files import convert, json_files, weights
from sdprune_jax.models import sentence

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 150, "hidden_act": "gelu"}
MODELS = {
    "mpnet": (transformers.MPNetConfig, transformers.MPNetModel),
    "bert": (transformers.BertConfig, transformers.BertModel),
}


def _reference(kind):
    make_config, make_model = MODELS[kind]
    model = make_model(make_config(**SIZES)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        is_scale = "LayerNorm.weight" in name
        is_table = "embedding" in name or "relative" in name
        fan_in = 1 if is_table else tensor[0].numel() if tensor.ndim > 1 else 10
        tensor.data.copy_(1 + 0.3 * noise if is_scale else noise / fan_in**0.5)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_encoder_read_from_its_directory_equals_transformers(kind, tmp_path):
    reference = _reference(kind)
    reference.save_pretrained(tmp_path)
    config = sentence.SentenceConfig.from_json(json_files.read_json(tmp_path / "config.json"))
    params = weights.load_params(tmp_path, sentence.param_shapes(config))
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 50, size=(3, 140)).astype(np.int32)
    lengths = np.array([140, 9, 1])
    mask = np.arange(140)[None] < lengths[:, None]
    ids[~mask] = config.pad_token_id

    @jax.jit
    def embed(params, ids, mask):
        states = sentence.SentenceEncoder(config).apply({"params": params}, ids, mask)
        return states, sentence.pool(states, mask), sentence.pool(states, mask, normalize=True)

    states, mean, normalized = embed(params, ids, mask)
    with torch.no_grad():
        want = reference(torch.from_numpy(ids).long(), torch.from_numpy(mask).long())
    want = want.last_hidden_state.numpy()
    bound = 1e-5 * np.abs(want).max()
    np.testing.assert_allclose(states[mask], want[mask], rtol=0, atol=bound)
    means = np.stack([row[:n].mean(axis=0) for row, n in zip(want, lengths, strict=True)])
    np.testing.assert_allclose(mean, means, rtol=0, atol=bound)
    np.testing.assert_allclose(np.linalg.norm(normalized, axis=1), np.ones(3), rtol=1e-5)
    assert np.abs(mean - states.mean(axis=1))[1:].max() > 0.1


def test_relative_positions_fall_into_the_buckets_of_transformers():
    ahead = torch.arange(512)[None] - torch.arange(512)[:, None]
    encoder = transformers.models.mpnet.modeling_mpnet.MPNetEncoder
    want = encoder.relative_position_bucket(ahead)
    np.testing.assert_array_equal(sentence.relative_buckets(512), want)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (sentence.SentenceConfig(), 109_486_464),
        (
            sentence.SentenceConfig("bert", 30522, 384, 1536, 6, 12, 512, layer_norm_eps=1e-12),
            22_713_216,
        ),
    ],
)
def test_full_size_names_are_those_of_transformers(config, count):
    flat = convert.flatten(sentence.param_shapes(config))
    assert sum(leaf.size for leaf in flat.values()) == count
    make_config, make_model = MODELS[config.model_type]
    sizes = {name: getattr(config, name) for name in SIZES}
    with torch.device("meta"):
        wanted = {
            name: list(p.shape) for name, p in make_model(make_config(**sizes)).named_parameters()
        }
    found = {}
    for path, leaf in flat.items():
        shape = [leaf.shape[axis] for axis in convert.torch_axes(path, len(leaf.shape))]
        found[convert.torch_key(path)] = shape
    assert found == wanted


def test_other_encoders_are_refused_with_all_problems():
    values = {"model_type": "roberta", "hidden_act": "relu", "hidden_size": 10}
    with pytest.raises(ValueError, match="not a sentence encoder") as error:
        sentence.SentenceConfig.from_json(values | {"position_embedding_type": "relative_key"})
    lines = str(error.value).splitlines()[1:]
    assert [line.split()[0] for line in lines] == [
        "position_embedding_type",
        "model_type",
        "hidden_act",
        "hidden_size",
    ]


@pytest.mark.parametrize("kind", MODELS)
def test_keys_that_a_file_leaves_out_are_those_of_transformers(kind):
    ours, theirs = sentence.SentenceConfig.from_json({"model_type": kind}), MODELS[kind][0]()
    for field in dataclasses.fields(ours):
        assert getattr(ours, field.name) == getattr(theirs, field.name, 2), field.name


def test_bfloat16_keeps_the_output_in_float32():
    config = sentence.SentenceConfig(**SIZES)
    shapes = sentence.param_shapes(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.2, shapes)
    ids, mask = jnp.full((1, 4), 7), jnp.ones((1, 4), bool)
    states = sentence.SentenceEncoder(config, jnp.bfloat16).apply({"params": params}, ids, mask)
    assert states.dtype == jnp.float32
    assert sentence.SentenceConfig().max_tokens == 512
