"""Weights & Biases: online with a key, else offline in the run folder, from where `sync` sends it later."""

import netrc
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit import disk
from toolkit.trackers.contract import END_SECONDS, LOSS_OF, OF_GATE, VALID_LOSS_OF, About, Cells, last_steps

RUN_ID = "wandb/run_id"  # in the run folder: the wandb run that this run goes on in
START_SECONDS = 10.0
UPLOAD_SECONDS = 300.0  # how long a run that sends an artifact may take to end
SERVER = "https://api.wandb.ai"
OWN_STEP = "own step"  # the x axis of the curves of several that learn at once
OF_SEVERAL = (LOSS_OF, VALID_LOSS_OF, OF_GATE)


class Wandb:
    """Keeps the promises of Tracker. A run that goes on keeps its wandb run, and what that was told: it is not told
    again.
    """

    def __init__(self, about: About) -> None:
        import wandb

        self._wandb, self._about = wandb, about
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        settings = wandb.Settings(
            init_timeout=START_SECONDS,
            finish_timeout=end_seconds(about.options),
            silent=True,
            console="off",
            disable_git=True,
            disable_job_creation=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=about.options.get("project") or "maltu",
            group=about.options.get("group") or about.group,
            job_type=about.job,
            name=about.path.name,
            dir=str(about.path),
            config=dict(about.config),
            id=_run_id(about.path),
            resume="allow",
            mode=mode,
            settings=settings,
        )
        self._has_own_steps = False
        self._known = last_steps(about.gone)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row of history. wandb's steps only grow, while of several that learn each counts its own: theirs stand
        beside the numbers."""
        values = {name: of for name, of in values.items() if step > self._known.get(name, -1)}
        if not values:
            return
        if not any(name.startswith(OF_SEVERAL) for name in values):
            self._run.log(dict(values), step=self._at(step))
            return
        if not self._has_own_steps:
            self._has_own_steps = True
            for name in OF_SEVERAL:
                self._run.define_metric(f"{name}*", step_metric=OWN_STEP)
        self._run.log({**values, OWN_STEP: step})

    def text(self, step: int, name: str, text: str) -> None:
        """A text as HTML."""
        import html

        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=self._at(step))

    def table(self, step: int, name: str, cells: Cells) -> None:
        """A table as wandb's."""
        rows = [list(row) for row in cells.rows]
        self._run.log({name: self._wandb.Table(columns=list(cells.columns), data=rows)}, step=self._at(step))

    def files(self, name: str, folder: Path) -> None:
        """What was trained, as an artifact of type model, where the recipe asks for it."""
        if not self._about.options.get("artifact"):
            return
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "adapter"  # wandb knows no other signs
        artifact = self._wandb.Artifact(f"{plain}-{self._run.id}", type="model", metadata={"name": name})
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact)

    def _at(self, step: int) -> int:
        """A step that wandb takes: with own steps beside numbers its own is the number of rows so far."""
        return max(step, self._run.step) if self._has_own_steps else step

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def end_seconds(options: Mapping[str, Any]) -> float:
    """How long a run may take to end: longer where it has files to send."""
    return UPLOAD_SECONDS if options.get("artifact") else END_SECONDS


def _run_id(run_path: Path) -> str:
    """The id of the run's wandb run; made once a run folder."""
    file = run_path / RUN_ID
    if not file.exists():
        disk.make_folder(file.parent)
        disk.write_text(file, uuid.uuid4().hex[:8])
    return file.read_text(encoding="utf-8").strip()


def has_key() -> bool:
    """Whether a key lies where `wandb login` puts it, or in the environment; asks nobody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    host = os.environ.get("WANDB_BASE_URL", SERVER).split("//")[-1].split("/")[0]
    return host in hosts
