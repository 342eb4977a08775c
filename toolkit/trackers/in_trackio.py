"""trackio's local store."""

from collections.abc import Mapping
from pathlib import Path

from toolkit.trackers.contract import About, Cells


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
        trackio.init(
            project="maltu",
            name=about.path.name,
            group=about.group,
            config=config,
            resume="allow" if about.from_step > 0 else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

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
