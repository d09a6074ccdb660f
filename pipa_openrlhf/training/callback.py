"""What may look into a run while it goes: benchmarks, notebooks, signals, tests that make something fail."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipa_openrlhf.training.trainer import PreferenceTrainer


class Callback:
    """Subclass it and override what is wanted; every method is called on every rank."""

    def on_train_begin(self, trainer: "PreferenceTrainer") -> None:
        """Before the first step: the model, the prior's log-probs and the data are ready."""

    def on_update_begin(self, trainer: "PreferenceTrainer") -> None:
        """In every step, before its update: the gradients are complete, their loss is finite on all ranks, the weights
        are still those of the step before. What is asked of :meth:`wants_stop` from here on is the next step's."""

    def on_step_end(self, trainer: "PreferenceTrainer", row: dict) -> None:
        """After an optimizer step, its evaluation and its checkpoint.

        Args:
            row: the step's metrics, as in ``metrics.jsonl``.
        """

    def on_export_begin(self, trainer: "PreferenceTrainer", folder: str) -> None:
        """Before the model is written, during training (``--ckpt.save_hf``) and after it.

        Args:
            folder: where to; it need not be there yet.
        """

    def on_train_end(self, trainer: "PreferenceTrainer") -> None:
        """After the last step, and after an error or an interrupt."""

    def wants_stop(self) -> bool:
        """Asked once a step; True on any rank ends the run after that step, with a checkpoint."""
        return False
