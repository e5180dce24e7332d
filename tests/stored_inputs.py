"""What layers read, stored whole, and statistics of it by definition."""

import flax.linen as nn
import numpy as np


def stored(apply, params, *args):
    """The output of a model, and what each of its layers read, by path of the kernel."""
    found = {}

    def keep(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dense | nn.Conv):
            found[".".join((*context.module.path, "kernel"))] = args[0]
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(keep):
        out = apply({"params": params}, *args)
    return out, found


def patches(x, kernel, stride, padding):
    """Rows of every sample, cut out one position at a time."""
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    kh, kw = kernel[:2]
    tops = range(0, x.shape[1] - kh + 1, stride[0])
    lefts = range(0, x.shape[2] - kw + 1, stride[1])
    cut = [x[:, i : i + kh, j : j + kw].reshape(len(x), -1) for i in tops for j in lefts]
    return np.stack(cut, axis=1)


def gram(x, weight):
    x = np.asarray(x, np.float64).reshape(len(x), -1, x.shape[-1])
    return np.einsum("b,bni,bnj->ij", np.asarray(weight, np.float64), x, x)


def assert_close(got, want, name=""):
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0, err_msg=name)
