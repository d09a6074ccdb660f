"""What weights, gradients and optimizer take on one rank under DeepSpeed's ZeRO, and the peak with a step on top."""

from dataclasses import dataclass

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from memory_steps import StepBytes

from pipa_openrlhf.cli.args import parse_args
from pipa_openrlhf.distributed.strategy import Strategy

HALF, FLOAT = 2, 4  # bytes of a bf16 and a float32 number


@dataclass(frozen=True)
class States:
    """Bytes on one rank.

    Attributes:
        weights: bf16, of all models; under ZeRO-3 this rank's share and the layers gathered at a time.
        optimizer: float32 master weights and Adam's two moments.
        bucket: where DeepSpeed collects gradients; held from the first gradient to the end of the backward pass.
        gradients: beyond those that lie in the bucket.
        update: float32 and flattened gradients, alive in the update only.
        bucket_stays: ZeRO-3 never frees the bucket.
    """

    weights: int
    optimizer: int
    bucket: int
    gradients: int
    update: int
    bucket_stays: bool

    def peak(self, step: StepBytes) -> int:
        """Most bytes at any time of a step of one micro-batch."""
        kept_bucket = self.bucket if self.bucket_stays else 0
        moments = (
            step.before_gradients + kept_bucket,
            step.after_gradients + self.bucket + self.gradients,
            self.gradients + self.update + kept_bucket,
        )
        return self.weights + self.optimizer + max(moments)


def our_bucket(trained: int) -> int:
    """Elements of the gradient bucket that our strategy asks DeepSpeed for, with ``trained`` of them to train."""
    strategy = Strategy(parse_args("train_pipa", []))
    strategy.world_size = 1
    strategy.num_trained = trained
    return int(strategy.get_ds_train_config()["zero_optimization"]["reduce_bucket_size"])


def upstream_bucket() -> int:
    """Elements of DeepSpeed's own bucket, which OpenRLHF leaves as it is."""
    return DeepSpeedZeroConfig().reduce_bucket_size


def states(step: StepBytes, stage: int, ranks: int, bucket: int, touched_only: bool = False) -> States:
    """The states of a step's models.

    Args:
        bucket: elements.
        touched_only: count of the bucket what is written to, as resident memory on CPU does.
    """
    parameters = step.frozen + step.trained + step.other
    if stage == 3:
        gathered = min(DeepSpeedZeroConfig().max_live_parameters, parameters)
        weights = HALF * (parameters // ranks + gathered)
    else:
        weights = HALF * parameters
    share = step.trained // (ranks if stage >= 1 else 1)
    gradients = HALF * step.trained // (ranks if stage >= 2 else 1)
    bucket = (min(bucket, step.trained) if touched_only else bucket) if stage >= 1 else 0
    return States(
        weights=weights,
        optimizer=3 * FLOAT * share,
        bucket=HALF * bucket,
        # As long as one bucket takes all gradients, they are copied out of it only after the backward pass.
        gradients=0 if step.trained <= bucket else gradients,
        update=(FLOAT + HALF) * share if 1 <= stage <= 2 else FLOAT * share,
        bucket_stays=stage == 3,
    )
