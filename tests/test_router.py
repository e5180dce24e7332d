"""The router's mathematics. Numbers with eight digits are those of the authors' code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aptp_toy import CODES, PROMPTS, TOY
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdprune_jax import sites
from sdprune_jax.aptp import gates, layout, losses, router
from sdprune_jax.models import unet

SD2 = layout.layout_of(sites.table(unet.UNetConfig()))
UNIFORM = [0.5, 0.9, 0.1, 0.3]
FOUR = layout.Layout(("a",), (4,), tuple("wxyz"), (-1,), (3, 2, 0, 1))


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def _close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 if np.shape(want) else 1e-8)


def _noise(rows):
    return jnp.broadcast_to(gates.gumbel(jnp.array(UNIFORM)), (rows, 4))


def test_layout_of_stable_diffusion_2_is_that_of_aptp():
    assert (len(SD2.width), len(SD2.depth), SD2.num_width, SD2.size) == (70, 14, 1606, 1620)
    published = [-1, -2, 0, 1, -3, -4, 2, 3, -5, -6, 4, 5, -7, 6]
    assert list(SD2.depth_order) == [i % 14 for i in published]
    blocks = [name.removesuffix("depth") for name in SD2.depth]
    for name, owner in zip(SD2.width, SD2.depth_of, strict=True):
        inside = [i for i, block in enumerate(blocks) if f"{name}.".startswith(block)]
        assert inside == [owner] * (owner >= 0)
    assert sum(owner >= 0 for owner in SD2.depth_of) == 26  # 8 ResNets, 6 transformers of three


def test_vectors_split_into_the_units_of_sites():
    keep = np.random.default_rng(0).random(SD2.size) < 0.5
    found = layout.to_architecture(keep, SD2)
    assert list(found) == [site.name for site in sites.table(unet.UNetConfig())]
    assert found["down_blocks.0.resnets.1"].tolist() == keep[32:64].tolist()
    assert found[SD2.depth[3]].tolist() == keep[1609:1610].tolist()
    split = layout.to_gates(jnp.asarray(keep[None], jnp.float32), SD2)
    assert all((split[name][0] == part).all() for name, part in found.items())


@pytest.mark.usefixtures("double")
def test_noise_of_a_gate_is_gumbel():
    _close(gates.gumbel(jnp.array(UNIFORM)), [0.36651292, 2.25036733, -0.83403245, -0.18562676])
    _close(gates.MEDIAN_NOISE, 0.36651292058)
    assert jnp.isfinite(gates.gumbel(jnp.array([0.0, 1 - 2**-24]))).all()


def test_published_noise_is_the_stream_of_pytorch():
    stream = [0.4962566, 0.7682218, 0.08847743, 0.13203049, 0.30742282, 0.6340787, 0.4900934]
    stream += [0.89644474, 0.45562798, 0.6323063, 0.34889346, 0.4017173, 0.02232575, 0.16885895]
    noise = gates.published_noise(3, TOY)
    wanted = [np.reshape(stream[: 3 * n], (3, n)) for n in (2, 3, 2, 2, 2)]
    _close(noise, -np.log(-np.log(np.concatenate(wanted, axis=1))))


@pytest.mark.usefixtures("double")
def test_width_gates_are_those_of_the_published_code():
    logits = jnp.array([[-3, -2, -4, 0.5], [-6.0] * 4])
    soft = gates.width_gates(logits, _noise(2), FOUR)
    # No gate of the second row is open, so that the first is lifted.
    published = [
        [0.71428399, 0.99970431, 0.01009987, 0.99974803],
        [0.50138079, 0.13307014, 0.00006874, 0.00034762],
    ]
    _close(soft, published)
    np.testing.assert_array_equal(gates.hard(soft), [[1, 1, 0, 1], [1, 0, 0, 0]])


@pytest.mark.usefixtures("double")
def test_depth_gates_are_those_of_the_published_code():
    soft = gates.depth_gates(jnp.array([[0.0, 1, -1, 2], [0.0] * 4]), _noise(2), FOUR)
    published = [
        [0.97279066, 0.76195513, 0.99999124, 1.0],
        [0.99557001, 0.98647248, 0.99999987, 1.0],
    ]
    _close(soft, published)


def test_untrained_depth_gates_open_as_often_as_published():
    noise = gates.gumbel(jax.random.uniform(jax.random.key(0), (200_000, 14)))
    soft = gates.depth_gates(jnp.zeros(noise.shape), noise, SD2)
    often = (soft >= 0.5).mean(axis=0)[np.array(SD2.depth_order)]
    published = [*[1] * 9, 0.9999858, 0.9996758, 0.9958219, 0.9648317, 0.7867012]
    np.testing.assert_allclose(often, published, rtol=0, atol=4e-3)


def test_hard_gates_have_the_gradient_of_soft_ones():
    x = jnp.array([0.2, 0.5, 0.7])
    value, gradient = jax.value_and_grad(lambda x: (gates.hard(x) * jnp.arange(3.0)).sum())(x)
    assert (value, gradient.tolist()) == (3, [0, 1, 2])
    assert gates.forward_gates(x[None], "soft").tolist() == x[None].tolist()
    assert gates.forward_gates(x[None], "hard").tolist() == [[0, 1, 1]]
    logit_slope = jax.grad(lambda l: gates.width_gates(l, jnp.zeros((1, 4)), FOUR)[0, 1])
    soft = jax.nn.sigmoid(0.5)
    slope = logit_slope(jnp.full((1, 4), -2.8))
    np.testing.assert_allclose(slope, [[0, soft * (1 - soft) / 0.4, 0, 0]], rtol=1e-5)


@pytest.mark.usefixtures("double")
def test_features_and_cosines_are_those_of_the_published_code():
    codes, prompts = jnp.array(CODES), jnp.array(PROMPTS)
    _close(router.features(codes, TOY), [
        [0.70710678, 0, 0.46765372, 0.41569219, 0.05196152, 0.47022601, 0.40305087, 0.13435029,
         0.6045763, 1, 1],
        [0, 0.70710678, 0.09237604, 0.41569219, 0.41569219, 0.04242641, 0.12727922, 0.12727922,
         0.01414214, 1, 0],
        [0.70710678] * 2 + [0.46765372] * 3 + [0.57275649] * 4 + [1, 1],
    ])  # fmt: skip
    similarity = router.cosines(prompts, codes, TOY)
    _close(similarity[0], [0.99429083, 0.53199102, 0.90763112])
    _close(similarity[1], [0.52149077, 0.99773, 0.70673595])
    _close(similarity[2], [0.9017945, 0.69933733, 0.99462495])
    assert similarity.argmax(axis=1).tolist() == [0, 1, 2, 2, 2, 2]
    plan = router.sinkhorn(similarity)
    _close(plan[0], [0.95603926, 0.00065946, 0.04330127])
    _close(plan[2], [0.36160485, 0.04507268, 0.59332247])
    _close(plan.sum(axis=0), [2.41723097, 1.14612291, 2.43664612])


@pytest.mark.usefixtures("double")
def test_sinkhorn_is_that_of_the_published_code():
    similarity = jnp.array([[0.90, 0.80], [0.85, 0.60], [0.70, 0.65], [0.95, 0.50]])
    first_column = {  # rows sum to 1
        1: 4 * np.array([0.05171833, 0.20992924, 0.02188844, 0.24912903]),
        2: 4 * np.array([0.04655645, 0.20532856, 0.01941233, 0.24900776]),
        3: [0.17422309, 0.80907516, 0.07202523, 0.99569649],
    }
    for iterations, want in first_column.items():
        plan = router.sinkhorn(similarity, iterations=iterations)
        _close(plan[:, 0], want)
        _close(plan.sum(axis=1), np.ones(4))
    np.testing.assert_array_equal(plan, router.sinkhorn(similarity))
    assert similarity.argmax(axis=1).tolist() == [0, 0, 0, 0]
    assert plan.argmax(axis=1).tolist() == [1, 0, 1, 0]
    balanced = router.sinkhorn(similarity, iterations=300)
    _close(balanced.sum(axis=0), [2, 2])


def test_sinkhorn_needs_no_large_numbers():
    similarity = jnp.array([[0.9, -0.9], [0.8, -0.8], [0.7, -0.9]])
    plan = router.sinkhorn(similarity, epsilon=1e-3)  # exp(900) is infinite
    assert jnp.isfinite(plan).all()
    np.testing.assert_allclose(plan.sum(axis=1), np.ones(3), rtol=1e-6)


def test_potentials_of_a_batch_balance_prompts_one_by_one():
    similarity = jax.random.uniform(jax.random.key(1), (64, 4)) * jnp.array([[1.0, 0.5, 0.8, 0.7]])
    balance = router.potentials(similarity, iterations=100)
    plan = router.sinkhorn(similarity, iterations=100)
    alone = [int((row / router.EPSILON + balance).argmax()) for row in similarity]
    assert alone == plan.argmax(axis=1).tolist()
    counts = np.bincount(alone, minlength=4)
    assert counts.min() > 8 > np.bincount(similarity.argmax(axis=1), minlength=4).min()


def test_parameters_start_as_published():
    params = router.init_params(SD2, 768, 8, 0)
    kernel, bias = params["predictor"]["heads"]["kernel"], params["predictor"]["heads"]["bias"]
    assert kernel.size + bias.size == 1_245_780
    assert not bias.any()
    for start, stop in ((0, 32), (96, 101), (1606, 1620)):
        head = kernel[:, start:stop]
        np.testing.assert_allclose(head.T @ head, np.eye(stop - start), rtol=0, atol=1e-5)
    assert np.abs(kernel[:, :32].T @ kernel[:, 32:64]).max() > 0.01  # but each on its own
    np.testing.assert_allclose(params["codes"] @ params["codes"].T, np.eye(8), rtol=0, atol=1e-6)
    narrow = router.init_params(SD2, 16, 8, 0)["predictor"]["heads"]["kernel"][:, :32]
    np.testing.assert_allclose(narrow @ narrow.T, np.eye(16), rtol=0, atol=1e-5)


def _params(seed=0):
    params = router.init_params(TOY, 6, 3, seed)
    return jax.tree.map(lambda x: jnp.asarray(x) - 3, params)  # where gates waver


EMBEDDINGS = np.random.default_rng(5).normal(size=(8, 6)).astype(np.float32)


def test_unet_gets_the_gates_of_prompts_and_then_of_their_codes():
    params = _params()
    routed = functools.partial(router.route, params, jnp.asarray(EMBEDDINGS), jax.random.key(0))
    warm, later = routed(TOY, warms_up=True), routed(TOY, warms_up=jnp.array(False))
    np.testing.assert_array_equal(warm.gates, warm.prompt_gates)
    np.testing.assert_array_equal(later.gates, later.code_gates[later.assignment])
    np.testing.assert_array_equal(
        later.assignment, router.sinkhorn(later.similarity).argmax(axis=1)
    )
    nearest = routed(TOY, warms_up=False, optimal_transport=False)
    np.testing.assert_array_equal(nearest.assignment, nearest.similarity.argmax(axis=1))
    # Matching has noise of its own.
    assert np.abs(router.cosines(warm.prompt_gates, warm.code_gates, TOY) - warm.similarity).max()


@pytest.mark.parametrize("warms_up", [True, False])
def test_each_loss_reaches_the_parameters_that_the_published_code_trains(warms_up):
    def gradients(loss):
        def total(params):
            embeddings = jnp.asarray(EMBEDDINGS)
            routing = router.route(params, embeddings, jax.random.key(0), TOY, warms_up=warms_up)
            return loss(routing, embeddings)

        grads = jax.grad(total)(_params())
        return {name for name, part in grads.items() if any(map(jnp.any, jax.tree.leaves(part)))}

    features = lambda routing: router.features(routing.prompt_gates, TOY)
    task = gradients(lambda routing, _: (routing.gates**2).sum())
    contrast = gradients(lambda routing, x: losses.contrastive(features(routing), x))
    assert task == ({"predictor"} if warms_up else {"codes"})
    assert contrast == {"predictor"}


def test_routing_is_the_same_however_the_batch_is_sharded():
    @jax.jit
    def loss(params, embeddings):
        found = router.route(params, embeddings, jax.random.key(3), TOY, warms_up=False)
        return (found.gates * jnp.arange(1.0, 12)[None]).sum(), found.assignment

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    results = []
    for devices in (1, 8):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        sharded = jax.device_put(EMBEDDINGS, NamedSharding(mesh, PartitionSpec("data")))
        results.append(step(_params(), sharded))
    (want, gradients), (got, sharded_gradients) = results
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_array_equal(got[1], want[1])
    assert len(set(want[1].tolist())) > 1
    for a, b in zip(*map(jax.tree.leaves, (gradients, sharded_gradients)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_matching_without_noise_depends_on_the_prompt_alone():
    params = _params()
    together = router.match(params, jnp.asarray(EMBEDDINGS), TOY)
    order = np.random.default_rng(0).permutation(8)
    shuffled = router.match(params, jnp.asarray(EMBEDDINGS[order]), TOY)
    np.testing.assert_allclose(shuffled, together[order], rtol=1e-6)
    published = functools.partial(
        router.match, params, code_gates=jnp.array(CODES), noise=gates.published_noise(8, TOY)
    )
    moved = published(jnp.asarray(EMBEDDINGS[order]), TOY)
    assert np.abs(moved - published(jnp.asarray(EMBEDDINGS), TOY)[order]).max() > 1e-3


def test_final_gates_are_open_iff_noise_opens_them_more_often_than_not():
    logits = jnp.array([[-3.36, -3.37, 0.0, -9.0]])
    soft = gates.width_gates(logits, jnp.full((1, 4), gates.MEDIAN_NOISE), FOUR)
    assert gates.hard(soft).tolist() == [[1, 0, 1, 0]]
    noise = gates.gumbel(jax.random.uniform(jax.random.key(0), (100_000, 4)))
    many = jnp.broadcast_to(logits, noise.shape)
    often = (gates.width_gates(many, noise, FOUR) >= 0.5).mean(axis=0)
    np.testing.assert_allclose(often[:2], 1 - np.exp(-np.exp(logits[0, :2] + 3)), atol=5e-3)
