"""Losses of the router. Numbers with eight digits are those of the authors' code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aptp_toy import PROMPTS, TOY

from sdprune_jax import sites
from sdprune_jax.aptp import layout, losses, router
from sdprune_jax.models import noise_schedule, unet
from sdprune_jax.sites import macs
from sdprune_jax.training import distillation

SD2 = layout.layout_of(sites.table(unet.UNetConfig()))
KEPT = [0.5, 0.55, 0.7, 0.6]


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def costs():
    return macs.by_site(unet.UNetConfig(), (32, 32), 77, "paper")


def _pattern(keep, drop=()):
    """Keeps the first gates of every width site, and all blocks but some."""
    vector = np.ones((1, SD2.size))
    for start, units in zip(SD2.starts, SD2.units, strict=True):
        vector[0, start + max(1, int(keep * units)) : start + units] = 0
    vector[0, [SD2.num_width + i for i in drop]] = 0
    return jnp.asarray(vector)


def _close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("keep", "drop", "kept", "total", "loss"),
    [
        (1, [6], 0.99416475, 0.99496484, 0.61694813),
        (1, [6, 7], 0.98477604, 0.98686343, 0.60745943),
        (0.5, [], 0.49884428, 0.56755909, 0.07266082),
        (0.5, [4, 5, 6, 7], 0.46367757, 0.53721418, 0.14576538),
        (1, range(14), 0.61354292, 0.66653109, 0.13429541),
    ],
)
def test_kept_macs_are_those_of_the_published_code(costs, keep, drop, kept, total, loss):
    found = losses.kept_macs(_pattern(keep, drop), SD2, losses.site_shares(costs, SD2))
    _close(found, [kept])
    _close(losses.total_share(found, costs), [total])
    _close(losses.resource(found, losses.removable_budget(costs, 0.6)), loss)


@pytest.mark.usefixtures("double")
def test_gradient_of_the_resource_loss_is_that_of_the_published_code(costs):
    shares, budget = losses.site_shares(costs, SD2), losses.removable_budget(costs, 0.6)
    loss = lambda gates: losses.resource(losses.kept_macs(gates, SD2, shares), budget)
    slope = jax.grad(loss)(_pattern(0.5, [6]))[0]
    tight = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-8)
    tight(slope[:32], np.full(32, -1.466656954e-3))
    assert not slope[556:588].any()  # in the removed block
    tight(slope[SD2.num_width], -2.348279262e-2)
    tight(slope[SD2.num_width + 6], -5.883687258e-3)


def test_budgets_are_shares_of_what_can_be_removed():
    config = unet.UNetConfig()
    published = {(32, 77): (0.53644005, 0.76822002), (96, 1): (0.56339253, 0.78169627)}
    for (size, tokens), budgets in published.items():
        costs = macs.by_site(config, (size, size), tokens, "paper")
        _close([losses.removable_budget(costs, share) for share in (0.6, 0.8)], budgets)
        kept = jnp.array([losses.removable_budget(costs, 0.6)])
        np.testing.assert_allclose(losses.total_share(kept, costs), [0.6], rtol=1e-6)
    for budget in (0.05, 1.2):
        with pytest.raises(ValueError, match=r"at most 1, and more than 0\.0838"):
            losses.removable_budget(costs, budget)


def test_budget_of_all_macs_is_met_exactly_by_slicing():
    # The exact counter is additive: what it says of gates is what the sliced UNet costs.
    config = unet.UNetConfig()
    exact = macs.by_site(config, (32, 32))
    keep = np.random.default_rng(0).random(SD2.size) < 0.6
    keep[SD2.starts] = True
    kept = losses.kept_macs(
        jnp.asarray(keep[None], jnp.float32), SD2, losses.site_shares(exact, SD2)
    )
    units = {name: int(part.sum()) for name, part in layout.to_architecture(keep, SD2).items()}
    sliced = dataclasses.replace(config, kept_units=tuple(units.items()))
    total = sum(macs.of_unet(sliced, (32, 32)))
    np.testing.assert_allclose(losses.total_share(kept, exact), [total / exact.total], rtol=1e-6)


@pytest.mark.usefixtures("double")
def test_spread_of_costs_is_rewarded_as_published():
    kept = jnp.array(KEPT)
    _close(losses.resource(kept, 0.53644), 0.09092153)
    _close(losses.resource(kept, 0.53644, "absolute"), 0.5875 - 0.53644)
    _close(losses.resource(kept, 0.53644, "squared"), (0.5875 - 0.53644) ** 2)
    _close(losses.highest(kept), 0.3)
    _close(losses.spread(kept), -0.08539126)
    same = jax.grad(losses.spread)(jnp.full(4, 0.5))
    np.testing.assert_array_equal(same, np.zeros(4))


@pytest.mark.usefixtures("double")
def test_contrastive_loss_is_that_of_the_published_code():
    texts = jnp.array([[1, 0, 0], [0.9, 0.1, 0], [0, 1, 0.2]])
    found = router.features(jnp.array(PROMPTS[:3]), TOY)
    _close(losses.contrastive(found, texts), 2.161878572966429)
    _close(losses.contrastive(found, texts, 1.0), 0.6379842865483256)
    _close(losses.contrastive(texts, texts), 0.3057681770030787)
    _close(losses.contrastive(found, texts, scale=0.5), 2.161878572966429 / 2)


def test_contrastive_loss_of_certain_pairs_has_a_finite_gradient():
    apart = jnp.eye(4)  # each is like itself alone: softmaxes of 1 in float32
    value, slope = jax.value_and_grad(losses.contrastive)(apart + 1e-3, jnp.flip(apart, 0) + 0.1)
    assert jnp.isfinite(value)
    assert jnp.isfinite(slope).all()


@pytest.mark.usefixtures("double")
def test_denoising_weights_are_those_of_the_published_code():
    steps = np.array([0, 100, 250, 500, 999])
    alpha = jnp.asarray(noise_schedule.alphas_cumprod(noise_schedule.Schedule())[steps])
    _close(alpha, [0.99915, 0.89422348, 0.67379263, 0.27633268, 0.0046601])
    target = jnp.zeros((1, 2, 2, 1))
    published = [
        distillation.denoising(target + 2, target, alpha[i : i + 1], "v_prediction") / 4
        for i in range(5)
    ]
    _close(published, [0.00425, 0.52888261, 1, 1, 1])
    snr = alpha / (1 - alpha)
    for kind, name, weight in (
        ("v_prediction", "min_snr", jnp.minimum(snr, 5) / (snr + 1)),
        ("epsilon", "published", jnp.minimum(snr, 5) / snr),
    ):
        batch = jnp.broadcast_to(target, (5, 2, 2, 1))
        found = distillation.denoising(batch + 2, batch, alpha, kind, snr_weight=name)
        _close(found, 4 * weight.mean())
    assert distillation.denoising(batch + 2, batch, alpha, "epsilon", gamma=0.0) == 4


def test_distillation_is_the_mean_of_the_blocks_and_spares_the_teacher():
    student, teacher = [jnp.ones((2, 4, 4, 3)), jnp.ones((2, 2, 2, 5))], [jnp.zeros((2, 4, 4, 3))]
    teacher.append(3 * jnp.ones((2, 2, 2, 5)))
    assert distillation.block_distillation(student, teacher) == (1 + 4) / 2
    assert distillation.output_distillation(student[1], teacher[1]) == 4
    slope = jax.grad(lambda t: distillation.output_distillation(student[1], t))(teacher[1])
    assert not slope.any()


def test_losses_are_summed_by_weights():
    parts, weights = {"a": jnp.float32(3), "b": jnp.float32(0.5)}, {"a": 0.2, "b": 100.0, "c": 1.0}
    np.testing.assert_allclose(distillation.weighted_sum(parts, weights), 50.6, rtol=1e-6)
    with pytest.raises(KeyError, match="another"):
        distillation.weighted_sum(parts | {"another": jnp.float32(1)}, weights)


def test_codes_are_pulled_toward_their_prompts_alone():
    prompts, codes = jnp.array([[1.0, 0], [0, 1]]), jnp.array([[1.0, 1], [5, 0], [0, -1]])
    assignment = jnp.array([0, 1])
    _close(losses.code_pull(prompts, codes, assignment), 1 - 0.5 * 0.5**0.5)
    slope = jax.grad(losses.code_pull, argnums=1)(prompts, codes, assignment)
    assert slope[0, 0] < 0 < slope[0, 1]
    assert slope[1].any()
    assert not slope[2].any()
    assert not jax.grad(losses.code_pull)(prompts, codes, assignment).any()
