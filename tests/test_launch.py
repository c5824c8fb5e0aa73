"""The files in `launch/`, tried as far as one machine without a scheduler can."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
Write = Callable[..., Path]

# In the place of Slurm's commands: the job runs here, on one "machine"; a signal goes to all processes of its step, and
# a requeue leaves a note.
COMMANDS = {
    "srun": 'shift  # --kill-on-bad-exit\necho $$ > step\nexec "$@"',
    "scancel": 'kill -"${1#--signal=}" $(cat step) $(ps -o pid= --ppid $(cat step))',
    "scontrol": 'if [ "$1" = requeue ]; then touch requeued; else echo localhost; fi',
}


def job(folder: Path, recipe: Path) -> subprocess.Popen[str]:
    """The Slurm script with two processes on this machine."""
    commands = folder / "commands"
    commands.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    torchrun = binaries / "torchrun"
    # --standalone goes before what the script says of the rendezvous: this machine may not find itself by its name.
    run = f"{shlex.quote(sys.executable)} -m torch.distributed.run --standalone"
    torchrun.write_text(f'#!/bin/bash\nexec {run} "$@"\n')
    torchrun.chmod(0o755)
    shutil.copy(LAUNCH / "slurm.sbatch", folder / "job")
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"}
    slurm |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "2"}
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | slurm
    environment["PATH"] = f"{commands}:{environment['PATH']}"
    arguments = [str(recipe), "--run_directory", "runs/job"]
    return subprocess.Popen(
        ["bash", "job", *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_slurm_job_that_is_warned_checkpoints_and_goes_back_into_the_queue(
    tiny_recipe: Write, tmp_path: Path
) -> None:
    recipe = tiny_recipe(steps=100_000, evaluation__every=0, checkpoints__every=0)
    running = job(tmp_path, recipe)
    assert running.stdout is not None
    shown = []
    for line in running.stdout:
        shown.append(line)
        if "step 1/" in line:
            running.send_signal(signal.SIGUSR1)  # to the script, as --signal=B: has it
    running.wait(timeout=120)
    assert (tmp_path / "requeued").exists(), "".join(shown)[-3000:]
    assert list((tmp_path / "runs" / "job" / "checkpoints").glob("*/COMMITTED.json"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_slurm_job_that_finishes_stays_finished(tiny_recipe: Write, tmp_path: Path) -> None:
    running = job(tmp_path, tiny_recipe(steps=2))
    output, _ = running.communicate(timeout=200)
    assert running.returncode == 0, output[-3000:]
    assert (tmp_path / "runs" / "job" / "summary.json").exists()
    assert not (tmp_path / "requeued").exists()


def test_kubernetes_and_skypilot_start_torchrun_with_options_that_it_has() -> None:
    container = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = container["template"]["spec"]["containers"]
    sky = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    (line,) = [x for x in sky["run"].replace("\\\n", " ").splitlines() if "torchrun" in x]
    for name, number in (("NUM_NODES", "8"), ("NUM_GPUS_PER_NODE", "8"), ("TASK_ID", "job")):
        line = line.replace(f"$SKYPILOT_{name}", number)
    for command in ([*container["command"], *container["args"]], shlex.split(line)):
        parsed = get_args_parser().parse_args(command[1:])
        assert (parsed.module, parsed.training_script) == (True, "tilewright.cli")
        assert parsed.training_script_args[:2] == ["train", "my-recipe.yaml"]
        assert "--run_directory" in parsed.training_script_args
