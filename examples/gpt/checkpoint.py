"""Checkpoints: the train state, and beside it what the run was, so resuming is safe."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from gpt.settings import OptimizerSettings
from gpt.training import TrainState

_FOLDER = "checkpoints"


def set_aside(out_dir: pathlib.Path) -> pathlib.Path | None:
    """Moves an earlier run's checkpoints away; returns where they are now, if any."""
    folder = out_dir / _FOLDER
    if not folder.exists() or not any(folder.iterdir()):
        return None
    kept = out_dir / f"{_FOLDER}.previous"
    if kept.exists():
        shutil.rmtree(kept)
    return folder.rename(kept)


class Checkpoints:
    """The newest two checkpoints of a run, under `out_dir`."""

    def __init__(self, out_dir: pathlib.Path, settings, train: OptimizerSettings):
        self.folder = out_dir.absolute() / _FOLDER
        self.settings, self.train = settings, train
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True),
            item_names=("state", "run"),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, history: dict[str, Any]) -> None:
        step = int(state.step)
        if step == self.latest_step():
            return
        run = {
            "model": dataclasses.asdict(self.settings),
            "train": dataclasses.asdict(self.train),
            "history": history,
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run)
            ),
        )

    def restore(
        self, abstract_state: TrainState
    ) -> tuple[TrainState, dict[str, Any], list[str]]:
        """The newest state, its history, and the train settings that differ from it.

        Raises:
          ValueError: there is no checkpoint, or it holds another model.
        """
        step = self.latest_step()
        if step is None:
            raise ValueError(
                f"resume: no checkpoint in {self.folder}; start without --resume, or "
                "give the --out_dir of an earlier run"
            )
        run = self._manager.restore(
            step, args=ocp.args.Composite(run=ocp.args.JsonRestore())
        )["run"]
        differing = _differences(run["model"], dataclasses.asdict(self.settings))
        if differing:
            raise ValueError(
                f"resume: the checkpoint in {self.folder} holds another model: "
                f"{'; '.join(differing)}. Use its flags, or another --out_dir"
            )
        state = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)),
        )["state"]
        notes = _differences(run["train"], dataclasses.asdict(self.train))
        return state, run["history"], notes

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _differences(stored: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {stored.get(name)} in the checkpoint, {value} in the flags"
        for name, value in asked.items()
        if stored.get(name) != value
    ]


def abstract(state: TrainState) -> TrainState:
    """The shapes, dtypes and placement of a state, to restore one like it."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
