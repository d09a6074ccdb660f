"""What may look into a run while it goes: benchmarks, notebooks, signals."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipa_openrlhf.training.trainer import PreferenceTrainer


class Callback:
    """Subclass it and override what is wanted; every method is called on every rank."""

    def on_train_begin(self, trainer: "PreferenceTrainer") -> None:
        """Before the first step: the model, the prior's log-probs and the data are ready."""

    def on_step_end(self, trainer: "PreferenceTrainer", row: dict) -> None:
        """After an optimizer step, its evaluation and its checkpoint.

        Args:
            row: the step's metrics, as in ``metrics.jsonl``.
        """

    def on_train_end(self, trainer: "PreferenceTrainer") -> None:
        """After the last step, and after an error or an interrupt."""

    def wants_stop(self) -> bool:
        """Asked once a step; True on any rank ends the run after that step, with a checkpoint."""
        return False
