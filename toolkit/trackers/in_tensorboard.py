"""TensorBoard event files in the run folder: scalars, texts, and hparams with what came out.

A process that is killed leaves steps that are taken again, and keeps others back that it had not written yet. So a run
that goes on begins a new file, which hides all that earlier ones hold and says again what stays of it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.trackers.contract import OF_THE_END, About, Cells, numbers_of

OUTCOMES = (OF_THE_END, "valid_loss", "search/loss")  # what the hparams page may sort by


class TensorBoard:
    """Keeps the promises of Tracker."""

    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = about.path / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=0 if any(folder.glob("events.*")) else None)
        self._config = dict(about.config)
        self._last: dict[str, float] = {}
        for line in about.told:
            self._add(int(line["step"]), numbers_of(line), line.get("time"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a name."""
        self._add(step, values, None)

    def _add(self, step: int, values: Mapping[str, float], time: float | None) -> None:
        """time: in seconds, None for now."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time)
            if name.startswith(OUTCOMES):
                self._last[name] = value

    def text(self, step: int, name: str, text: str) -> None:
        """A Markdown text."""
        self._writer.add_text(name, text, step)

    def table(self, step: int, name: str, cells: Cells) -> None:
        """A Markdown table as a text."""
        self.text(step, name, cells.markdown())

    def files(self, name: str, folder: Path) -> None:
        """Event files hold none."""

    def close(self) -> None:
        """Write the recipe as hparams beside the last outcomes, and flush."""
        from torch.utils.tensorboard import summary

        values = {key: of if isinstance(of, bool | int | float | str) else str(of) for key, of in self._config.items()}
        outcomes: dict[str, Any] = dict(self._last)
        if values:
            made: Any = summary.hparams  # torch leaves it untyped
            writer: Any = self._writer.file_writer
            for part in made(values, outcomes):
                writer.add_summary(part)
        self._writer.flush()
        self._writer.close()
