"""Prune Stable Diffusion 2 in JAX."""


class UserError(ValueError):
    """What the user of the package can mend; its message says what, where, why and how."""


class NotFiniteError(UserError, FloatingPointError):
    """A computation gave NaN or infinity; its message says which and what may help."""
