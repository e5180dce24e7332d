import numpy as np
import pytest

from sdprune_jax.files import convert


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("down_blocks.0.resnets.0.conv1.kernel", "down_blocks.0.resnets.0.conv1.weight"),
        ("conv_norm_out.scale", "conv_norm_out.weight"),
        ("conv_norm_out.bias", "conv_norm_out.bias"),
        ("text_model.embeddings.token_embedding.embedding",) * 1
        + ("text_model.embeddings.token_embedding.weight",),
        ("vision_model.embeddings.class_embedding", "vision_model.embeddings.class_embedding"),
        ("logit_scale", "logit_scale"),
    ],
)
def test_only_the_last_word_of_a_name_changes(path: str, key: str):
    assert convert.torch_key(path) == key


def test_linear_kernels_are_transposed():
    kernel = np.array([[1, 2, 3], [4, 5, 6]])  # 2 inputs, 3 outputs
    np.testing.assert_array_equal(convert.to_torch("a.kernel", kernel), [[1, 4], [2, 5], [3, 6]])


def test_convolutions_go_from_hwio_to_oihw():
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    weight = convert.to_torch("a.kernel", kernel)
    assert weight.shape == (5, 4, 2, 3)
    assert weight[3, 2, 1, 0] == kernel[1, 0, 2, 3]


@pytest.mark.parametrize("leaf", ["kernel", "scale", "bias", "embedding"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5)])
def test_from_torch_is_the_inverse(leaf: str, shape: tuple[int, ...]):
    x = np.arange(np.prod(shape)).reshape(shape)
    y = convert.to_torch(f"a.{leaf}", x)
    np.testing.assert_array_equal(convert.from_torch(f"a.{leaf}", y), x)
    assert (y.shape == shape) == (leaf != "kernel")


def test_nesting_survives_names_with_dots():
    params = {"blocks.0": {"to_out.0": {"kernel": 1}, "norm": {"scale": 2}}, "logit_scale": 3}
    flat = convert.flatten(params)
    expected = {"blocks.0.to_out.0.kernel": 1, "blocks.0.norm.scale": 2, "logit_scale": 3}
    assert flat == expected
    assert convert.unflatten(flat, params) == params


def test_names_of_other_versions_are_matched():
    expected = {"text_model.final_layer_norm.weight", "mid.attentions.0.to_out.0.weight"}
    names = [
        "final_layer_norm.weight",
        "embeddings.position_ids",
        "mid.attentions.0.proj_attn.weight",
        "other.query.weight",
    ]
    assert convert.match_names(names, expected) == {
        "text_model.final_layer_norm.weight": "final_layer_norm.weight",
        "mid.attentions.0.to_out.0.weight": "mid.attentions.0.proj_attn.weight",
        "other.query.weight": "other.query.weight",
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["d.attentions.0.query.weight", "d.attentions.0.to_k.weight"], "mixed"),
        (["a.weight", "text_model.a.weight"], r"a\.weight and text_model\.a\.weight are both"),
    ],
)
def test_ambiguous_names_are_refused(names: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        convert.match_names(names, {"text_model.a.weight", "d.attentions.0.to_q.weight"})
