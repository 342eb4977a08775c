"""What comes out of a fit, whoever fitted: one adapter through TRL, or one of many in a stack."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fitted:
    """How a fit ended, over all processes it took. `stopped` is done, early (patience), pruned (its crew let it go),
    failed (of one of many: its numbers ran away, or memory does not hold it), or asked (a signal: the same command goes
    on).
    """

    stopped: str
    steps: int
    best_step: int | None
    best_loss: float | None
    seconds: float
    n_tokens: int


def not_finite(step: int, value: float) -> str:
    """What is said when training ends because numbers ran away: where, what stays, what to try."""
    return (
        f"step {step}: the loss is {value}, so training stopped; the last good checkpoint is kept. Try a smaller"
        " train.learning_rate (a third of this one), train.max_grad_norm 1.0, or train.precision fp32; then run again"
        " with --fresh."
    )
