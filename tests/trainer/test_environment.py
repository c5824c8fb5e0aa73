"""What is written down about the machine, and what optional packages turn out to be."""

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
import torch

from tilewright.trainer.record import environment as module
from tilewright.trainer.record.environment import environment, git_state, probe_apex, probe_flash_attn

CPU = torch.device("cpu")
FUSED_ADAM = "class FusedAdam: pass"
FUNCTION = "def flash_attn_func(): pass"
PROBED = ("apex", "amp_C", "flash_attn", "flash_attn_interface")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put modules (by path) and distributions (by name) where Python finds them first; no others of these names."""
    site = tmp_path / "site"
    site.mkdir()

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] in PROBED]:
            del sys.modules[name]

    def run(files=(), **versions):
        for path, text in dict(files).items():
            file = site / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        for name, version in versions.items():
            folder = site / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        return site

    forget()
    monkeypatch.syspath_prepend(str(site))
    yield run
    forget()


def repository(folder):
    """A git repository with one committed file, `code.py`."""
    folder.mkdir()
    (folder / "code.py").write_text("x = 1\n")
    who = ("-c", "user.name=Somebody", "-c", "user.email=somebody@example.com")
    for words in (("init", "-q"), ("add", "code.py"), (*who, "commit", "-q", "-m", "First")):
        subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)
    head = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return head.stdout.strip()


def test_the_environment_tells_machine_and_versions_and_is_json():
    facts = environment(CPU)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["device"] == "cpu"
    assert facts["world_size"] == 1
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["cpu"]["cores"] == os.cpu_count()
    assert 1 <= facts["cpu"]["cores_allowed"] <= os.cpu_count()
    assert 2**28 < facts["memory_bytes"] < 2**50
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert set(facts) == {
        "time", "device", "world_size", "versions", "os", "cpu", "memory_bytes", "gpus", "gpu_driver", "git",
    }  # fmt: skip


def test_the_time_is_now_in_utc():
    time = datetime.fromisoformat(environment(CPU)["time"])
    assert time.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - time) < timedelta(minutes=5)


def test_no_environment_variable_is_written_down(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "hunter2-hunter2")
    assert "hunter2" not in json.dumps(environment(CPU))


def test_nothing_found_out_is_no_failure(monkeypatch):
    def fail(*_, **__):
        raise OSError("not here")

    def not_installed(name):
        raise module.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.Path, "read_text", fail)
    monkeypatch.setattr(module.subprocess, "run", fail)
    monkeypatch.setattr(module.os, "sysconf", fail)
    monkeypatch.setattr(
        module.metadata, "version", lambda name: (_ for _ in ()).throw(module.metadata.PackageNotFoundError)
    )
    facts = environment(CPU)
    assert (facts["git"], facts["memory_bytes"], facts["gpu_driver"]) == (None, None, None)
    assert facts["versions"]["torch"] is None
    assert facts["cpu"]["flags"] == []
    assert facts["cpu"]["model"]


def test_the_cpu_is_read_as_linux_writes_it(tmp_path, monkeypatch):
    info = "processor\t: 0\nmodel name\t: A CPU @ 2.0GHz\nflags\t\t: fpu avx2 avx512f amx_bf16 amx_tile\n\n"
    monkeypatch.setattr(module, "_text", lambda path: info * 2)
    cpu = environment(CPU)["cpu"]
    assert (cpu["model"], cpu["flags"]) == ("A CPU @ 2.0GHz", ["avx2", "avx512f", "amx_bf16"])


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\nGCC version: gcc 12.2.0\n",
            "550.54.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release Build\n", "570.86"),
        ("", None),
    ],
)
def test_the_gpu_driver_is_read_as_it_writes_itself(monkeypatch, text, version):
    monkeypatch.setattr(module, "_text", lambda path: text)
    assert environment(CPU)["gpu_driver"] == version


def test_the_commit_of_a_checkout_and_whether_it_was_changed(tmp_path):
    commit = repository(tmp_path / "checkout")
    file = tmp_path / "checkout" / "code.py"
    assert git_state(file) == {"commit": commit, "dirty": False}
    (tmp_path / "checkout" / "notes.txt").write_text("tracked by nobody\n")
    assert git_state(file) == {"commit": commit, "dirty": False}
    file.write_text("x = 2\n")
    assert git_state(file) == {"commit": commit, "dirty": True}


def test_a_copy_installed_in_another_repository_has_no_commit(tmp_path):
    repository(tmp_path / "project")
    installed = tmp_path / "project" / "site-packages" / "code.py"
    installed.parent.mkdir()
    installed.write_text("x = 1\n")
    assert git_state(installed) is None
    (tmp_path / "elsewhere").mkdir()
    assert git_state(tmp_path / "elsewhere" / "code.py") is None


def test_a_git_hook_of_another_repository_does_not_mislead(tmp_path, monkeypatch):
    commit = repository(tmp_path / "checkout")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere" / ".git"))
    assert git_state(tmp_path / "checkout" / "code.py") == {"commit": commit, "dirty": False}


def test_no_apex(install):
    assert probe_apex()[:2] == (False, False)


def test_nvidias_apex(install):
    install(
        {"apex/__init__.py": "", "apex/optimizers/__init__.py": "class FusedAdam: pass", "amp_C.py": ""}, apex="0.1"
    )
    assert probe_apex() == (True, True, "apex 0.1")


def test_nvidias_apex_without_its_extensions_is_told(install):
    install({"apex/__init__.py": "", "apex/optimizers/__init__.py": FUSED_ADAM}, apex="0.1")
    probe = probe_apex()
    assert probe[:2] == (True, True)
    assert "without its CUDA extensions" in probe.detail


@pytest.mark.parametrize("files", [{"apex/__init__.py": "raise SystemExit"}, {"apex.py": "raise SystemExit"}])
def test_the_impostor_apex_is_refused_by_name_and_never_imported(install, files):
    install(files, apex="0.9.10.dev0")
    probe = probe_apex()
    assert probe[:2] == (True, False)
    for words in ("0.9.10.dev0", "not NVIDIA's", "Pyramid toolkit", "apex.optimizers.FusedAdam", "pip uninstall apex"):
        assert words in probe.detail
    assert "apex" not in sys.modules


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import amp_X", "ModuleNotFoundError: No module named 'amp_X'"),
        ("raise OSError('undefined symbol: _ZN3c10')", "OSError: undefined symbol: _ZN3c10"),
        ("class FusedLAMB: pass", "AttributeError: .*'FusedAdam'"),
    ],
)
def test_an_apex_that_cannot_be_imported_gives_its_reason(install, code, cause):
    install({"apex/__init__.py": "", "apex/optimizers/__init__.py": code}, apex="0.1")
    probe = probe_apex()
    assert probe[:2] == (True, False)
    assert re.search(f"apex 0.1 cannot be used: {cause}; build it again", probe.detail)


def test_a_half_made_module_is_no_crash(install, monkeypatch):
    for name in ("apex", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
        sys.modules[name].__spec__ = None
    assert probe_apex()[:2] == (False, False)
    assert probe_flash_attn()[:2] == (False, False)


@pytest.mark.parametrize(
    ("files", "versions", "found"),
    [
        ({"flash_attn/__init__.py": FUNCTION}, {"flash_attn": "2.8.3"}, "flash-attn 2 (2.8.3)"),
        ({"flash_attn_interface.py": FUNCTION}, {"flash_attn_3": "3.0.0"}, "flash-attn 3 (3.0.0)"),
        ({"flash_attn/cute/__init__.py": FUNCTION}, {"flash_attn_4": "4.0.0"}, "flash-attn 4 (4.0.0)"),
        ({"flash_attn_interface.py": FUNCTION}, {}, "flash-attn 3 (version unknown)"),
        (
            {"flash_attn/__init__.py": FUNCTION, "flash_attn/cute/__init__.py": FUNCTION},
            {"flash_attn": "2.8.3", "flash_attn_4": "4.0.0"},
            "flash-attn 2 (2.8.3); flash-attn 4 (4.0.0)",
        ),
        # The sources of 4 within 2, without what they need.
        (
            {"flash_attn/__init__.py": FUNCTION, "flash_attn/cute/__init__.py": "import cutlass_x"},
            {"flash_attn": "2.8.3"},
            "flash-attn 2 (2.8.3)",
        ),
    ],
)
def test_each_generation_of_flash_attn_is_told(install, files, versions, found):
    install(files, **versions)
    assert probe_flash_attn() == (True, True, found)


def test_no_flash_attn(install):
    assert probe_flash_attn()[:2] == (False, False)


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        (
            {"flash_attn/__init__.py": "import nothing_x"},
            "flash-attn 2 .*cannot be used: ModuleNotFoundError",
        ),
        ({"flash_attn/__init__.py": ""}, "flash-attn 2 .*cannot be used: AttributeError.*flash_attn_func"),
        ({"flash_attn/notes.txt": ""}, "no flash-attn that is known"),
    ],
)
def test_a_flash_attn_that_cannot_be_used_gives_its_reason(install, files, cause):
    install(files)
    probe = probe_flash_attn()
    assert probe[:2] == (True, False)
    assert re.search(cause, probe.detail)


def test_one_broken_generation_does_not_hide_a_usable_one(install):
    install({"flash_attn/__init__.py": "raise OSError('bad')", "flash_attn_interface.py": FUNCTION}, flash_attn="2.8.3")
    probe = probe_flash_attn()
    assert probe[:2] == (True, True)
    assert probe.detail.startswith("flash-attn 3 (version unknown); flash-attn 2 (2.8.3) cannot be used: OSError: bad")
