import math
from fractions import Fraction

import jax
import numpy as np
import pytest

from sdprune_jax import sites
from sdprune_jax.files import convert
from sdprune_jax.models import clip, unet
from sdprune_jax.pruning import allocate

OUTLIERS = {"a": 0.5, "b": 1.0, "c": 2.0, "d": 4.5}  # percent
NAMES = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
    "down_blocks.0.resnets.0.conv1",
    "mid_block.attentions.0.proj_in",
    "time_embedding.linear_1",
]


def _total(sizes, sparsities):
    return sum(sizes[name] * Fraction(str(s)) for name, s in sparsities.items())


def test_sd21_layers_lose_the_published_number_of_weights():
    trees = {
        "unet": unet.param_shapes(unet.UNetConfig()),
        "text_encoder": clip.text_param_shapes(clip.TextConfig()),
    }
    totals = {n: sum(math.prod(x.shape) for x in jax.tree.leaves(t)) for n, t in trees.items()}
    assert totals == {"unet": 865_910_724, "text_encoder": 340_387_840}
    zeros, floored = {}, {}
    for component, sparsity in [("unet", 0.35), ("text_encoder", 0.475)]:
        flat = convert.flatten(trees[component])
        layers = sites.prunable(trees[component], component, "linear")
        sizes = {path: math.prod(flat[path].shape) for path in layers}
        zeros[component] = sum(allocate.uniform(sizes, sparsity).values())
        floored[component] = sum(allocate.each_floored(sizes, sparsity).values())
    assert zeros == {"unet": 105_426_944, "text_encoder": 137_468_313}
    assert floored == {"unet": 105_426_944, "text_encoder": 137_468_240}  # 73 roundings
    nominal = 0.475 * totals["text_encoder"] + 0.35 * totals["unet"]
    np.testing.assert_allclose(nominal / sum(totals.values()), 0.38527193, rtol=0, atol=5e-9)
    true = sum(zeros.values()) / sum(totals.values())
    np.testing.assert_allclose(true, 0.20135584, rtol=0, atol=5e-9)


def test_owl_has_the_golden_sparsities():
    for size in (1, 12_582_912):  # published, and of the text encoder's equal layers
        sizes = dict.fromkeys(OUTLIERS, size)
        found = allocate.owl(OUTLIERS, sizes, 0.6, 0.08)
        np.testing.assert_allclose(
            [float(s) for s in found.values()], [0.66, 0.64, 0.60, 0.50], rtol=0, atol=1e-6
        )
        assert _total(sizes, found) == Fraction("0.6") * 4 * size
        assert sum(allocate.counts(sizes, found).values()) == Fraction("0.6") * 4 * size // 1


def test_owl_of_unlike_layers_removes_exactly_what_is_asked():
    sizes = {"a": 7, "b": 1000, "c": 123_457, "d": 40}
    for sparsity in (0.0, 0.001, 0.35, 0.475, 0.97, 0.999):
        found = allocate.owl(OUTLIERS, sizes, sparsity, 0.2)
        total = int(sum(sizes.values()) * Fraction(str(sparsity)))
        assert sum(allocate.counts(sizes, found).values()) == total
        assert _total(sizes, found) == sum(sizes.values()) * Fraction(str(sparsity))
        in_order = [float(s) for s in found.values()]
        assert in_order == sorted(in_order, reverse=True)  # more outliers, less sparsity
    found = allocate.owl(OUTLIERS, sizes, 0.5, 0.08)
    assert found["a"] - found["d"] == Fraction("0.16")


def test_owl_holds_groups_within_their_bounds():
    ratios = {"a": 0.0, "b": 0.0, "c": 10.0}
    found = allocate.owl(ratios, dict.fromkeys(ratios, 100), 0.9, 0.25)
    # The plain form would ask for 1.07, 1.07 and 0.57; two at 0.99 leave 0.72 for the third.
    assert {name: float(s) for name, s in found.items()} == {"a": 0.99, "b": 0.99, "c": 0.72}
    assert set(allocate.owl(ratios, dict.fromkeys(ratios, 100), 0.0).values()) == {0}


def test_owl_without_differences_is_uniform():
    sizes = {"a": 10, "b": 10, "c": 7, "d": 1}
    for ratios, lam in [(dict.fromkeys(sizes, 3.0), 0.08), (OUTLIERS, 0.0)]:
        assert set(allocate.owl(ratios, sizes, 0.475, lam).values()) == {Fraction("0.475")}


def test_owl_refuses_what_cannot_be_ranked():
    sizes = dict.fromkeys(OUTLIERS, 10)
    with pytest.raises(ValueError, match=r"not finite.*\['b'\]"):
        allocate.owl(OUTLIERS | {"b": float("nan")}, sizes, 0.5)
    with pytest.raises(ValueError, match=r"got 0\.5"):
        allocate.owl(OUTLIERS, sizes, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"for 60 percent write 0\.6"):
        allocate.owl(OUTLIERS, sizes, 60.0)


def test_outliers_are_counted_over_all_layers_of_a_group():
    first, second = np.ones((10, 10), np.float32), np.ones((5, 20), np.float32)
    first[0, 0], second[0, :3] = 100, 14  # the mean of all 200 is 1.69
    assert allocate.outlier_ratio([first, second]) == 2.0
    assert allocate.outlier_ratio([first, second], 10.0) == 0.5
    assert allocate.outlier_ratio([first], 7.0) == 1.0
    assert allocate.outlier_ratio([np.zeros((4, 4), np.float32)]) == 0.0


def test_counts_round_once_over_all_layers():
    sizes = {"a": 10, "b": 10, "c": 7, "d": 1}
    counts = allocate.counts(sizes, {"a": 0.35, "b": 0.45, "c": 0.5, "d": 0.0})
    assert counts == {"a": 3, "b": 5, "c": 3, "d": 0}
    assert set(allocate.counts(sizes, dict.fromkeys(sizes, 0.0)).values()) == {0}
    with pytest.raises(ValueError, match=r"for 35 percent write 0\.35"):
        allocate.uniform(sizes, 35.0)


def test_blocks_of_stable_diffusion_2_are_those_of_the_published_allocation():
    shapes = clip.text_param_shapes(clip.TextConfig())
    layers = sites.prunable(shapes, "text_encoder", "linear")
    found = allocate.blocks(layers)
    assert found.keys() == {f"text_model.encoder.layers.{i}" for i in range(23)}
    assert [len(paths) for paths in found.values()] == [6] * 23
    shapes = unet.param_shapes(unet.UNetConfig())
    names = [convert.torch_key(path) for path in sites.prunable(shapes, "unet", "all")]
    found = allocate.blocks(names)
    # 22 ResNets, 16 transformers, 3 + 3 samplers, and 4 layers of their own.
    assert len(found) == 22 + 16 + 6 + 4
    assert sorted(name for paths in found.values() for name in paths) == sorted(names)
    assert len(found["mid_block.attentions.0"]) == 12
    assert len(found["up_blocks.3.resnets.0"]) == 4
    assert found["conv_in.weight"] == ["conv_in.weight"]


def test_the_first_pattern_that_matches_a_layer_counts():
    rules = [("*.attn2.*", 0.0), ("*.attn?.*", 0.2), ("time_*", 0.9)]
    found = allocate.matched(rules, NAMES)
    assert found == {NAMES[0]: 0.2, NAMES[1]: 0.0, NAMES[5]: 0.9}
    assert allocate.matched([], NAMES) == {}


def test_patterns_that_match_nothing_are_named_with_what_is_close():
    rules = [("*.atn2.*", 0.2), ("time_*", 90.0), ("xyz", 0.5), ("*.to_q.weight", 0.5)]
    with pytest.raises(ValueError, match="cannot be used") as error:
        allocate.matched(rules, NAMES)
    lines = str(error.value).splitlines()[1:]
    assert lines[0].strip() == (
        "*.atn2.* matches none of the 6 layers in scope: did you mean attn2 or attn1?"
    )
    assert lines[1].strip().startswith("time_*: sparsity is the fraction removed")
    assert lines[1].endswith("for 90 percent write 0.9")
    assert lines[2].endswith("xyz matches none of the 6 layers in scope: nothing is close to it")
    assert "*.to_q.weight matches none" in lines[3]


def test_a_pattern_that_comes_too_late_to_count_is_refused():
    with pytest.raises(
        ValueError, match="to_q matches only what others before it do: put it first"
    ):
        allocate.matched([("*.attn?.*", 0.2), ("*.to_q", 0.0)], NAMES)


def test_the_other_layers_make_up_for_those_with_their_own_sparsity():
    sizes = {"a": 60, "b": 30, "c": 10}
    fixed = {"a": 0.15, "c": 0.0}
    rest = allocate.remaining(sizes, 0.3, fixed)
    assert rest == Fraction(21, 30)
    removed = allocate.counts(sizes, {"b": rest, **fixed})
    assert removed == {"a": 9, "b": 21, "c": 0}
    assert allocate.remaining(sizes, 0.35, {}) == Fraction("0.35")
    assert allocate.remaining(sizes, 0.09, fixed) == 0


@pytest.mark.parametrize("sparsity", [0.08, 0.39, 0.9])
def test_a_sparsity_out_of_reach_is_refused_with_what_can_be_reached(sparsity):
    sizes = {"a": 60, "b": 30, "c": 10}
    reach = r"0\.0900 is the lowest of all 100 weights together and 0\.3900 more than the highest"
    with pytest.raises(ValueError, match=f"{sparsity:g} is out of reach: 2 of 3 .*{reach}"):
        allocate.remaining(sizes, sparsity, {"a": 0.15, "c": 0.0})
