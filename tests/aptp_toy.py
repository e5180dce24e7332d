"""Gates of three codes and six prompts, on a UNet of three blocks; every gate is soft."""

from sdprune_jax.aptp import layout

# Three blocks, of which the last two can be removed.
WIDTH, DEPTH = ("a", "b", "c.x", "c.y"), ("b.depth", "c.depth")
TOY = layout.Layout(WIDTH, (2, 3, 2, 2), DEPTH, depth_of=(-1, 0, 1, 1), depth_order=(1, 0))
CODES = [
    [0.9, 0.2, 0.9, 0.8, 0.1, 0.7, 0.6, 0.2, 0.9, 0.9, 0.95],
    [0.1, 0.9, 0.2, 0.9, 0.9, 0.3, 0.9, 0.9, 0.1, 0.8, 0.2],
    [0.9] * 11,
]
PROMPTS = [
    [0.8, 0.1, 0.7, 0.9, 0.3, 0.8, 0.7, 0.1, 0.8, 0.9, 0.9],
    [0.2, 0.8, 0.1, 0.8, 0.8, 0.4, 0.9, 0.7, 0.2, 0.9, 0.3],
    [0.9, 0.8, 0.9, 0.7, 0.8, 0.9, 0.8, 0.9, 0.7, 0.9, 0.8],
    [0.7, 0.9, 0.8, 0.9, 0.9, 0.9, 0.9, 0.8, 0.8, 0.8, 0.9],
    [0.9, 0.9, 0.9, 0.9, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9],
    [0.6, 0.7, 0.9, 0.8, 0.9, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9],
]
