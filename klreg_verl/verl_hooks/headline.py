"""Whether a run's headline is accuracy or the mean score: decided by its first responses, kept in its folder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from klreg_verl.experiment.store import RunFolder


class Headline:
    """Accuracy until a response of the task has neither 0 nor 1; the score from then on, for good.

    A graded reward may begin with zeros alone. The means of what was logged until then are the same under either name,
    so that readers take the earlier lines for scores, too.
    """

    def __init__(self, folder: RunFolder | None) -> None:
        self._folder = folder
        self.is_graded: bool | None = None if folder is None else folder.is_graded()
        """None: no response has been seen."""

    def saw(self, right: Sequence[bool] | Tensor | None) -> bool:
        """Whether the run is graded, once these responses are known; `right` is None where they are graded."""
        if right is not None and not len(right):
            return bool(self.is_graded)
        graded = right is None or bool(self.is_graded)
        if graded != self.is_graded and self._folder is not None:
            self._folder.set_graded(graded)
        self.is_graded = graded
        return graded
