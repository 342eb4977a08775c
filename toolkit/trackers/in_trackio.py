"""trackio's local store.

Its rows can only be added. So a run that goes on takes its trackio run out of the store, and writes another one with
all that stays.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from toolkit import disk
from toolkit.trackers.contract import About, Cells, numbers_of

PROJECT = "maltu"
RUN_ID = "trackio/run_id"  # in the run folder: the trackio run that is this run


def _say_nothing(*_: object, **__: object) -> None:
    """What trackio prints goes nowhere; what it warns of does not come here."""


class Trackio:
    """Keeps the promises of Tracker."""

    def __init__(self, about: About) -> None:
        import trackio
        import trackio.run
        import trackio.utils

        self._trackio = trackio
        for module in (
            trackio,
            trackio.run,
            trackio.utils,
        ):  # trackio 0.43 greets on standard output and has no word to stop it
            vars(module)["print"] = _say_nothing
        config = {key: of for key, of in about.config.items() if not key.startswith("_")}  # trackio's own begin so
        own = about.path / RUN_ID
        if own.exists():
            self._forget(own.read_text(encoding="utf-8").strip())
        run = trackio.init(
            project=PROJECT,
            name=about.path.name,
            group=about.group,
            config=config,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        disk.make_folder(own.parent)
        disk.write_text(own, run.id)
        for line in about.told:
            self.log(int(line["step"]), numbers_of(line))

    def _forget(self, run_id: str) -> None:
        """Take a trackio run out of the store, where it is still there."""
        with contextlib.suppress(ValueError):  # there is no such project any more
            for run in self._trackio.Api().runs(PROJECT):
                if run.id == run_id:
                    run.delete()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._trackio.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text as Markdown."""
        self._trackio.log({name: self._trackio.Markdown(text)}, step=step)

    def table(self, step: int, name: str, cells: Cells) -> None:
        """A table as Markdown: trackio's own wants pandas."""
        self.text(step, name, cells.markdown())

    def files(self, name: str, folder: Path) -> None:
        """trackio is told none."""

    def close(self) -> None:
        """End the run."""
        self._trackio.finish()
