"""What every training has in its section."""

import dataclasses

from sdprune_jax.config.fields import within


@dataclasses.dataclass
class Training:
    """One training: AdamW, linear warm-up, cosine decay to zero, once or in equal cycles."""

    num_steps: int = within(1000, 1, 10**9)
    batch_size: int = within(64, 1, 2**20)  # samples over all devices
    learning_rate: float = within(1e-3, 0.0, 1.0)  # at the end of the warm-up
    warmup_steps: int = within(100, 0, 10**9)  # of every cycle
    cycles: int = within(1, 1, 1000)
    weight_decay: float = within(0.01, 0.0, 10.0)
    clip_norm: float = within(1.0, 1e-6, 1e6)  # of the global gradient
    ema_decay: float = within(0.999, 0.0, 1.0)
    log_every: int = within(50, 1, 10**9)  # steps
    save_every: int = within(500, 1, 10**9)  # steps
    num_evals: int = within(8, 0, 10**6)  # of the averaged parameters, the last at the end; 0: none

    def check(self, key: str) -> list[str]:
        """Returns what is wrong between fields; `key` is what messages call the section."""
        if self.warmup_steps < (length := self.num_steps // self.cycles):
            return []
        return [
            f"{key} has warmup_steps={self.warmup_steps}, not fewer than the {length} steps of a"
            " cycle"
        ]
