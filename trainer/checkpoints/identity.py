"""What says whose the checkpoints of a folder are: the run's recipe and what its corpora hold, kept beside them.

With them a run whose directory was lost, with the machine that it was on, goes on from checkpoints that are elsewhere;
and a run of another recipe that happens to have the same name is refused.
"""

from __future__ import annotations

from pathlib import Path

from tilewright.trainer.checkpoints.files import checkpoint_folder, committed_in
from tilewright.trainer.checkpoints.storage import write_whole
from tilewright.trainer.data import CORPUS, TrainingData, check_same_data
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.run_directory import RECIPE, refuse_another_recipe


def check_identity(run: Path, recipe: Recipe, data: TrainingData) -> None:
    """Raise if a run is of other data, or one whose directory was lost of another recipe than its checkpoints.

    The recipe of a directory that has one was compared when it was chosen.

    Raises:
        TrainingError: they are; nothing has been written then.
        OSError: they cannot be read.
    """
    check_same_data(run, data)
    if not recipe.checkpoints.folder or all((run / name).is_file() for name in (RECIPE, CORPUS)):
        return
    folder = checkpoint_folder(run, recipe.checkpoints.folder)
    if committed_in(folder) and (folder / RECIPE).is_file():
        refuse_another_recipe(folder, recipe)
        check_same_data(folder, data)


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
