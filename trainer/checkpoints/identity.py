"""What says whose the checkpoints of a folder are: the run's recipe and what its corpora hold, kept beside them.

With them a run whose directory was lost, with the machine that it was on, goes on from checkpoints that are elsewhere;
and a run of another recipe that happens to have the same name is refused.
"""

from __future__ import annotations

from pathlib import Path

from tilewright.trainer.checkpoints.files import checkpoint_folder, committed_in
from tilewright.trainer.checkpoints.storage import write_whole
from tilewright.trainer.data import CORPUS
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.run_directory import RECIPE, refuse_another_recipe, write_atomically


def restore_identity(run: Path, recipe: Recipe) -> None:
    """Give a run directory that has no recipe yet the one of the checkpoints that are there under its name.

    Raises:
        TrainingError: they are of another recipe than `recipe`; nothing is written then.
        OSError: they cannot be read.
    """
    if not recipe.checkpoints.folder or (run / RECIPE).is_file():
        return
    folder = checkpoint_folder(run, recipe.checkpoints.folder)
    if not committed_in(folder) or not (folder / RECIPE).is_file():
        return
    refuse_another_recipe(folder, recipe)
    for name in (CORPUS, RECIPE):
        if (folder / name).is_file():
            write_atomically(run / name, (folder / name).read_text(encoding="utf-8"))


def keep_identity(run: Path, recipe: Recipe) -> None:
    """Keep recipe and corpora of a run beside its checkpoints, where they are not in its directory.

    Raises:
        TrainingError, OSError: they cannot be written.
    """
    if not recipe.checkpoints.folder:
        return
    folder = checkpoint_folder(run, recipe.checkpoints.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CORPUS, RECIPE):
        write_whole(folder / name, (run / name).read_text(encoding="utf-8"))
