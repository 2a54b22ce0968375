"""Schedules, samplers and image-loss weights: steps by hand, exact cases, the recorded reference run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import fixture
from test_autoencoder import reference_autoencoder
from test_unet import nhwc, worst

from umm_jax.errors import ConfigError
from umm_jax.models.diffusion import Diffusion
from umm_jax.models.flow import Flow
from umm_jax.models.image_loss import block_weights, pool_weights, weighted_mse
from umm_jax.models.sampling import ScheduleConfig, guided, make_schedule

# --- reference runs -----------------------------------------------------------------------------------


def test_training_noise_and_loss_match_the_reference():
    data, model = fixture("g_train_forward"), reference_autoencoder()
    posterior = jax.jit(model.posterior)(nhwc(data["image_tensors_dec"]) * 2 - 1)
    moments = jnp.concatenate([posterior.mean, posterior.log_variance], axis=-1)
    assert worst(moments, nhwc(data["vae_moments"])) < 1e-5
    latents = (posterior.mean + jnp.exp(0.5 * posterior.log_variance) * nhwc(data["vae_eps"])) * 0.18215
    noise = nhwc(data["diffusion_noise"])
    noised = Diffusion().at(latents, noise, data["timesteps"].astype(np.int32))
    assert worst(noised.x_t, nhwc(data["noisy_latents"])) < 1e-5
    np.testing.assert_array_equal(noised.target, noise)
    # Images whose context is only <s> and the start-of-image token count in the mean with error zero.
    kept = (data["context_attention_mask"].sum(1) > 2).astype(np.float32)
    total, weight = weighted_mse(nhwc(data["unet_pred"]), noised.target)
    np.testing.assert_allclose(jnp.sum(total * kept) / jnp.sum(weight), data["loss_img"], rtol=1e-5)


def test_recorded_sampling_run_gives_the_reference_image():
    data, model = fixture("j_sample_image"), reference_autoencoder()
    schedule = Diffusion()
    timesteps = schedule.timesteps(5)
    np.testing.assert_array_equal(timesteps, data["timesteps"])
    recorded = jnp.asarray(nhwc(data["unet_pred"]))

    def predict(x, t):
        unconditional, conditional = jnp.split(recorded[jnp.argmax(timesteps == t[0])], 2)
        return guided(conditional, unconditional, 3.5)

    initial = nhwc(data["init_latents"])
    run = jax.jit(
        lambda: schedule.sample(
            predict, initial.shape, jax.random.key(0), 5, initial=initial, noise=nhwc(data["step_noise"])
        )
    )
    image = jnp.clip(jax.jit(model.decode)(run()) / 2 + 0.5, 0, 1)
    np.testing.assert_allclose(image, nhwc(data["image"]), atol=1e-4)


# --- diffusion ----------------------------------------------------------------------------------------


def test_timesteps_are_leading_with_offset():
    np.testing.assert_array_equal(Diffusion().timesteps(5), [801, 601, 401, 201, 1])
    np.testing.assert_array_equal(Diffusion(steps_offset=0).timesteps(4), [750, 500, 250, 0])
    with pytest.raises(ConfigError, match="sampling steps"):
        Diffusion().timesteps(0)
    with pytest.raises(ConfigError, match="steps_offset"):
        Diffusion().timesteps(1000)


def test_one_ancestral_step_by_hand():
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    cumulative = np.cumprod(1 - beta)
    a, a_before = cumulative[601], cumulative[401]
    x, eps, z = 0.7, -0.4, 1.3
    clean = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
    step = a / a_before
    mean = np.sqrt(a_before) * (1 - step) / (1 - a) * clean + np.sqrt(step) * (1 - a_before) / (1 - a) * x
    expected = mean + np.sqrt((1 - a_before) / (1 - a) * (1 - step)) * z
    c = {name: table[1] for name, table in Diffusion().coefficients(5).items()}
    ours = c["x0"] * (c["clean_x"] * x + c["clean_p"] * eps) + c["x_t"] * x + c["noise"] * z
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "velocity"])
def test_a_perfect_prediction_recovers_the_image(prediction):
    schedule = Diffusion(prediction=prediction)
    x0 = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    alphas = jnp.asarray(schedule.alphas, jnp.float32)

    def predict(x, t):
        a = alphas[t][:, None, None, None]
        eps = (x - jnp.sqrt(a) * x0) / jnp.sqrt(1 - a)
        return {"epsilon": eps, "x0": x0, "velocity": jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * x0}[prediction]

    ours = jax.jit(lambda key: schedule.sample(predict, x0.shape, key, 10))(jax.random.key(1))
    np.testing.assert_allclose(ours, x0, atol=2e-4)
    noised = jax.jit(schedule.noised)(x0, jax.random.key(2))
    np.testing.assert_allclose(noised.target, predict(noised.x_t, noised.t), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_signal_only_falls(kind):
    alphas = Diffusion(kind=kind, start=1e-4, end=2e-2).alphas
    assert 0.99 < alphas[0] < 1 and alphas[-1] < 0.05 and np.all(np.diff(alphas) < 0)


def test_steps_are_drawn_per_image_over_the_whole_range():
    noised = jax.jit(Diffusion(steps=10).noised)(jnp.zeros((400, 1, 1, 1)), jax.random.key(0))
    assert noised.t.dtype == jnp.int32 and sorted(set(np.asarray(noised.t))) == list(range(10))


# --- flow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["x0", "velocity"])
@pytest.mark.parametrize("steps", [1, 3])
def test_straight_paths_are_followed_exactly(prediction, steps):
    flow = Flow(prediction, shift=3.0)
    x0 = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    eps = jax.random.normal(jax.random.key(1), x0.shape)
    target = x0 if prediction == "x0" else eps - x0
    ours = flow.sample(lambda x, t: target, x0.shape, jax.random.key(2), steps, initial=eps)
    np.testing.assert_allclose(ours, x0, atol=1e-6)
    noised = flow.at(x0, eps, jnp.array([0.25, 1.0]))
    np.testing.assert_allclose(noised.x_t[0], 0.75 * x0[0] + 0.25 * eps[0], rtol=1e-6)
    np.testing.assert_allclose(noised.x_t[1], eps[1], atol=1e-6)
    np.testing.assert_array_equal(noised.target, target)


def test_times_and_grid_are_shifted_towards_noise():
    flow = Flow(shift=3.0)
    np.testing.assert_allclose(flow.timesteps(2), [1, 0.75, 0], rtol=1e-6)  # 3u / (1 + 2u) at u = 1/2
    np.testing.assert_allclose(Flow(shift=4.0, sample_shift=1.0).timesteps(2), [1, 0.5, 0], rtol=1e-6)
    key = jax.random.key(0)
    u = Flow().draw_times(key, 4000)
    np.testing.assert_allclose(flow.draw_times(key, 4000), 3 * u / (1 + 2 * u), rtol=1e-6)
    assert abs(float(jnp.mean(u)) - 0.5) < 0.02
    normal = Flow(times="logit_normal").draw_times(key, 4000)
    assert float(jnp.std(normal)) < float(jnp.std(u)) and abs(float(jnp.median(normal)) - 0.5) < 0.03


# --- the common interface -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_an_image_drawn_with_its_own_key_does_not_depend_on_its_batch(kind):
    schedule = make_schedule(ScheduleConfig(kind=kind))
    keys = jax.random.split(jax.random.key(0), 3)
    together = schedule.sample(lambda x, t: jnp.tanh(x), (3, 2, 2, 1), keys, 4)
    alone = schedule.sample(lambda x, t: jnp.tanh(x), (1, 2, 2, 1), keys[1:2], 4)
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-5, atol=1e-6)
    assert float(jnp.max(jnp.abs(together[0] - together[1]))) > 1e-3
    one_key = schedule.sample(lambda x, t: jnp.tanh(x), (3, 2, 2, 1), keys[0], 4)
    assert one_key.shape == (3, 2, 2, 1)


def test_schedule_defaults_and_errors():
    assert make_schedule(ScheduleConfig()).prediction == "epsilon"
    assert make_schedule(ScheduleConfig(kind="flow")).prediction == "x0"
    for wrong in (
        dict(kind="flow", prediction="epsilon"),
        dict(kind="flow", shift=0.0),
        dict(kind="euler"),
        dict(beta_kind="square"),
        dict(sample_steps=0),
        dict(kind="flow", times="normal"),
    ):
        with pytest.raises(ConfigError):
            ScheduleConfig(**wrong)


def test_guidance_moves_away_from_the_unconditional_prediction():
    np.testing.assert_allclose(guided(jnp.array(3.0), jnp.array(1.0), 2.5), 6.0)
    np.testing.assert_allclose(guided(jnp.array(3.0), jnp.array(1.0), 1.0), 3.0)


# --- image loss weights -------------------------------------------------------------------------------


def test_weights_mark_detail_and_change_by_block():
    #  target          previous        blocks of 2: detail in the upper right, change in both right ones
    target = np.zeros((1, 4, 4, 3), np.float32)
    target[0, 0, 3, 1] = 1.0
    target[0, 2:, 2:] = 0.5
    previous = np.zeros_like(target)
    weights = block_weights(target, previous, np.array([True]), block=2, detail=4, change=6)
    assert weights.shape == (1, 4, 4, 1)
    expected = [[1, 1, 11, 11], [1, 1, 11, 11], [1, 1, 7, 7], [1, 1, 7, 7]]
    np.testing.assert_array_equal(weights[0, :, :, 0], expected)
    first = block_weights(target, previous, np.array([False]), block=2, detail=4, change=6)
    np.testing.assert_array_equal(first[0, ::2, ::2, 0], [[1, 5], [1, 1]])
    np.testing.assert_array_equal(first, block_weights(target, block=2, detail=4, change=6))
    np.testing.assert_array_equal(pool_weights(weights, (2, 1))[0, :, :, 0], [[6], [4]])
    with pytest.raises(ValueError, match="tile"):
        block_weights(target, block=3)


def test_weighted_error_by_image():
    prediction, target = jnp.zeros((2, 2, 2, 2)), jnp.ones((2, 2, 2, 2)) * jnp.array([1.0, 3.0])
    weights = jnp.ones((2, 2, 2, 1)).at[0, 0, 0].set(7.0)
    total, weight = weighted_mse(prediction, target, weights)
    np.testing.assert_allclose(total, [5 * 10, 5 * 4])  # mean over channels of 1 and 9, weights 7 + 3
    np.testing.assert_allclose(weight, [10, 4])
