import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pruning_golden import W, digits

from sdprune_jax.pruning import scores
from sdprune_jax.scoring import masks

W_REMOVED = ["01001101", "00110110", "00101011"]  # by hand: the tie goes to the lower index


def _stable_lowest(tensor, k):
    """The slow definition: sort by magnitude, ties by index, drop the first k."""
    order = np.argsort(np.abs(tensor.astype(np.float32)).ravel(), kind="stable")
    keep = np.ones(tensor.size, bool)
    keep[order[:k]] = False
    return keep.reshape(tensor.shape)


def _awkward_tensors(dtype):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
    pair = normal(20, 30)
    return {
        "matrix": normal(33, 101),
        "conv": normal(3, 3, 8, 5),
        "vector": normal(97),
        "one": normal(1, 1),
        "one_row_of_a_batch": normal(8192),
        "one_more": normal(8193),
        "several_rows": normal(150, 160),
        "all_equal": np.full((40, 50), -0.25, dtype),
        "all_zero": np.zeros((40, 50), dtype),
        "both_signs": np.concatenate([pair, -pair]),
        "signed_zeros": np.where(normal(30, 30) > 0, 0.0, -0.0).astype(dtype),
        "few_levels": np.round(normal(64, 64).astype(np.float32)).astype(dtype),
        "denormal": (np.arange(-40, 40) * float(jnp.finfo(dtype).smallest_subnormal))
        .astype(dtype)
        .reshape(8, 10),
        "wide": (normal(50, 40).astype(np.float32) ** 5).astype(dtype),
    }


@pytest.mark.parametrize(
    ("size", "sparsity", "expected"),
    [
        (20, 0.35, 7),  # 6.999... in floats
        (24, 0.5, 12),
        (1000, 0.475, 475),
        (100, 0.29, 29),  # 28.999... in floats
        (3, 0.3, 0),
        (7, 0.0, 0),
        (1, 0.999, 0),
        (4194304, 0.475, 1992294),
        (1000000, 1e-6, 1),
    ],
)
def test_num_removed_is_the_floor_of_the_decimal_product(size, sparsity, expected):
    assert masks.num_removed(size, sparsity) == expected


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        masks.num_removed(10, sparsity)


def test_sparsity_that_looks_like_a_percentage_gets_a_hint():
    with pytest.raises(ValueError, match=r"for 35 percent write 0\.35"):
        masks.num_removed(10, 35.0)


def test_half_of_the_golden_matrix_is_removed_with_the_tie_by_index():
    keep = masks.lowest(scores.magnitude(jnp.asarray(W)), 12)
    assert digits(keep) == W_REMOVED


def test_the_published_threshold_rule_removes_the_tie_too():
    score = scores.magnitude(W)
    ordered = np.sort(np.abs(W), axis=None)
    for k in (11, 12):  # of Ramesh and Zhao; of Wanda's repository
        keep = masks.without_ties(score, np.asarray(masks.lowest(jnp.asarray(score), k + 1)))
        assert np.count_nonzero(~keep) == 13
        np.testing.assert_array_equal(keep, np.abs(W) > ordered[k])


def test_each_output_of_the_golden_matrix_loses_half():
    assert digits(masks.lowest_of_rows(W, 4)) == W_REMOVED


@pytest.mark.parametrize("shape", [(16, 24), (8, 72)])
def test_each_row_loses_its_lowest(shape):
    tensor = np.round(np.random.default_rng(0).standard_normal(shape) * 8).astype(np.float32)
    for k in (0, 7, shape[1] - 1):
        expected = np.stack([_stable_lowest(row, k) for row in tensor])
        np.testing.assert_array_equal(masks.lowest_of_rows(tensor, k), expected)


def _lowest(tensor, k):
    return masks.lowest_of_rows(tensor.reshape(1, -1), k).reshape(tensor.shape)


def test_the_published_threshold_rule_removes_nothing_at_zero():
    assert np.all(masks.without_ties(np.zeros((4, 5), np.float32), np.ones((4, 5), bool)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_every_tensor_of_the_host_loses_exactly_its_lowest(dtype):
    tensors = _awkward_tensors(dtype)
    for fraction in (0.0, 0.35, 0.5, 1.0):
        for name, tensor in tensors.items():
            k = int((tensor.size - 1) * fraction)
            expected = _stable_lowest(tensor, k)
            np.testing.assert_array_equal(_lowest(tensor, k), expected, err_msg=name)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("matrix", jnp.float32),
        ("conv", jnp.bfloat16),
        ("vector", jnp.float16),
        ("few_levels", jnp.float32),
        ("denormal", jnp.bfloat16),
    ],
)
def test_one_tensor_loses_exactly_its_lowest(name, dtype):
    tensor = _awkward_tensors(dtype)[name]
    for k in (0, 1, tensor.size // 3, tensor.size - 1):
        keep = masks.lowest(jnp.asarray(tensor), k)
        np.testing.assert_array_equal(keep, _stable_lowest(tensor, k))


@pytest.mark.parametrize(
    "spec",
    [PartitionSpec("fsdp", None), PartitionSpec(None, "fsdp"), PartitionSpec("data", "fsdp")],
)
def test_a_sharded_tensor_gets_the_same_mask_and_is_never_gathered(spec):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    tensor = np.round(np.random.default_rng(0).standard_normal((64, 96)) * 8).astype(np.float32)
    k = 2000  # the boundary falls among many ties
    sharded = jax.device_put(tensor, NamedSharding(mesh, spec))
    keep = masks.lowest(sharded, k)
    np.testing.assert_array_equal(keep, _stable_lowest(tensor, k))
    assert keep.sharding.is_equivalent_to(sharded.sharding, 2)
    compiled = masks.lowest.lower(sharded, k).compile().as_text()
    collectives = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert set(re.findall(collectives, compiled)) == {"all-reduce"}


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_equal_scores_go_by_index_on_any_number_of_devices(num_devices):
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("fsdp",))
    half = np.random.default_rng(0).standard_normal((8, 30)).astype(np.float32)
    pairs = np.concatenate([half, -half])
    for tensor in (pairs, np.zeros_like(pairs), np.full_like(pairs, -0.25)):
        sharded = jax.device_put(tensor, NamedSharding(mesh, PartitionSpec("fsdp")))
        for k in (1, 241, 479):  # an odd number parts a weight from its negative
            np.testing.assert_array_equal(masks.lowest(sharded, k), _stable_lowest(tensor, k))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("stored", ["as it is", "transposed"])
def test_zeroed_tensors_keep_every_other_bit_and_hold_positive_zeros(dtype, stored):
    tensor = _awkward_tensors(dtype)["matrix"]
    if stored == "transposed":
        tensor = tensor.copy(order="F")
    zeroed, keep = tensor.copy(order="K"), _stable_lowest(tensor, 1000)
    masks.zero(zeroed, keep)
    expected = np.where(keep, tensor, np.zeros_like(tensor))
    assert zeroed.tobytes() == expected.tobytes()


def test_a_sparsity_of_zero_or_below_one_weight_leaves_every_bit():
    tensors = _awkward_tensors(np.float32)
    zeroed = {name: t.copy() for name, t in tensors.items()}
    for sparsity in (0.0, 1e-6):  # the floor is zero, and zero weights are not all weights
        for name, tensor in tensors.items():
            keep = _lowest(tensor, masks.num_removed(tensor.size, sparsity))
            masks.zero(zeroed[name], keep)
            assert zeroed[name].tobytes() == tensor.tobytes()


def test_pruning_what_is_pruned_already_changes_nothing():
    tensor = _awkward_tensors(np.float32)["matrix"]
    before = None
    for k in (1500, 1500, 700):  # a lower number revives nothing
        masks.zero(tensor, _lowest(tensor, k))
        assert np.count_nonzero(tensor == 0) == 1500
        before = tensor.copy() if before is None else before
        np.testing.assert_array_equal(tensor, before)


@pytest.mark.parametrize(
    ("dtype", "k", "message"),
    [
        (np.float32, 4, "cannot remove 4 of 4"),
        (np.float64, 1, "are float64"),
        (np.int8, 1, "are int8"),
    ],
)
def test_what_cannot_be_selected_is_refused(dtype, k, message):
    with pytest.raises(ValueError, match=message):
        masks.lowest_of_rows(np.ones((2, 4), dtype), k)


def test_a_read_only_tensor_is_refused():
    tensor = np.ones(4, np.float32)
    tensor.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        masks.zero(tensor, np.zeros(4, bool))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_zeros_survive_a_cast_and_no_others_appear_in_the_kept(dtype):
    kernel, keep = W.copy(), np.asarray(masks.lowest(scores.magnitude(jnp.asarray(W)), 12))
    masks.zero(kernel, keep)
    stored = kernel.astype(dtype)
    np.testing.assert_array_equal(stored != 0, keep)
    assert not np.any(np.signbit(stored.astype(np.float32)[~keep]))
