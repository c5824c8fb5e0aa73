"""Memory that is freed on CPU and serves again: each case in a process of its own, whose allocator it changes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator, and Linux's mremap")

SETTING = """
import os, re, sys
import torch
from tilewright.trainer import host_memory
from tilewright.trainer.host_memory import allocated_bytes, keep_freed_memory

def resident(which="VmRSS"):
    return int(re.search(which + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
"""


def output_of(script: str, **environment: str) -> str:
    command = [sys.executable, "-c", SETTING + script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_stays_with_the_process(kept: bool) -> None:
    returned = output_of(f"""
if {kept}: keep_freed_memory()
x = torch.ones(50_000_000)
before = resident()
del x
print(before - resident())
""")
    assert (int(returned) < 2**20) is kept


def test_buffers_of_other_sizes_are_made_of_freed_ones() -> None:
    """A heap would take the 8 buffers of 24 MB from beyond the gaps that every other one of 16 MB has left."""
    script = """
if {kept}: keep_freed_memory()
small = [torch.ones(4 * 2**20) for _ in range(24)]
most = resident()
kept = small[::2]
del small
large = [torch.ones(6 * 2**20) for _ in range(8)]
assert all(bool((x == 1).all()) for x in kept + large)
print(resident("VmHWM") - most)
"""
    assert int(output_of(script.format(kept=True))) < 2**24
    heap = "import ctypes; ctypes.CDLL(None).mallopt(-4, 0)\n"  # without a compiler, this is all there is
    assert int(output_of(heap + script.format(kept=False))) > 2**27


def test_no_buffer_changes_another() -> None:
    """Buffers of random sizes come and go in two threads; each holds a number of its own, to its last byte."""
    output_of("""
import random, threading
keep_freed_memory()
problems = []
def churn(seed):
    choose, held = random.Random(seed), {}
    for number in range(300):
        if len(held) > 12 or (held and choose.random() < 0.4):
            key, x = held.popitem() if choose.random() < 0.5 else (k := next(iter(held)), held.pop(k))
            if not bool((x == key).all()):
                problems.append(key)
            del x
        key = seed * 1000 + number
        held[key] = torch.full((choose.choice([100, 300_000, 600_000, 1_000_000, 1_310_720, 3_300_001]),), key)
    problems.extend(key for key, x in held.items() if not bool((x == key).all()))
threads = [threading.Thread(target=churn, args=(seed,)) for seed in (1, 2)]
[t.start() for t in threads]
[t.join() for t in threads]
sys.exit(f"overwritten: {problems}" if problems else 0)
""")


def test_what_is_in_use_is_counted_as_asked_for() -> None:
    grown, left = map(
        int,
        output_of("""
keep_freed_memory()
before = allocated_bytes()
x = torch.empty(2_500_000)
grown = allocated_bytes() - before
del x
print(grown, allocated_bytes() - before)
""").split(),
    )
    assert abs(grown - 10_000_000) < 2**16
    assert abs(left) < 2**16


def test_more_than_there_is_ends_as_with_pytorch() -> None:
    said = output_of("""
keep_freed_memory()
try:
    torch.empty(2**58, dtype=torch.int8)
except RuntimeError as error:
    print(error)
x = torch.ones(10_000_000)
print(int(x.sum()))
""")
    assert "you tried to allocate 288230376151711744 bytes" in said
    assert said.endswith("10000000")


def test_a_forked_child_allocates() -> None:
    assert (
        output_of("""
keep_freed_memory()
x = torch.ones(1_000_000)
child = os.fork()
y = torch.full((1_000_000,), 2.0 if child else 3.0)
assert bool((x == 1).all()) and bool((y == (2 if child else 3)).all())
if child == 0: os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
        == "7"
    )


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_large_buffers_stay_with_malloc(compiler: str, tmp_path: Path) -> None:
    said = output_of(
        "keep_freed_memory(); x = torch.ones(10_000_000); print(host_memory._pool(), int(x.sum()))",
        CXX=compiler,
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert said == "None 10000000"
    assert not list(tmp_path.rglob("*.so"))


def test_it_is_compiled_once(tmp_path: Path) -> None:
    script = "keep_freed_memory(); print(host_memory._installed)"
    assert output_of(script, XDG_CACHE_HOME=str(tmp_path)) == "True"
    (library,) = (path for path in tmp_path.rglob("*") if path.is_file())
    made = library.stat().st_mtime_ns
    assert output_of(script, XDG_CACHE_HOME=str(tmp_path)) == "True"
    assert library.stat().st_mtime_ns == made


def test_what_the_system_refuses_leaves_the_freed_memory_usable() -> None:
    said = output_of("""
import resource
keep_freed_memory()
x = torch.ones(16 * 2**20)
del x
writable = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (writable + 2**23,) * 2)
for count in (12, 64, 15):
    try:
        x = torch.full((count * 2**20,), float(count))
        print(count, bool((x[:10] == count).all()))
        del x
    except RuntimeError as error:
        print(count, "allocate" in str(error))
""")
    assert said.split() == ["12", "True", "64", "True", "15", "True"]


def test_memory_moved_from_buffer_to_buffer_stays_in_few_mappings() -> None:
    said = output_of("""
keep_freed_memory()
mappings = lambda: sum(1 for _ in open("/proc/self/maps"))
x = torch.ones(128 * 2**20)
before = mappings()
del x
for less in range(1, 40):
    x = torch.ones(128 * 2**20 - less * 2**19)
    del x
print(mappings() - before)
""")
    assert int(said) < 20


def test_a_process_with_all_the_mappings_it_may_have_goes_on_and_leaks_none() -> None:
    said = output_of("""
import ctypes
keep_freed_memory()
limit = int(open("/proc/sys/vm/max_map_count").read())
mappings = lambda: sum(1 for _ in open("/proc/self/maps"))
size = lambda: int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) // 1024
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
x = torch.ones(64 * 2**20)
del x
count = limit - mappings() - 10
pages = libc.mmap(None, count * 4096, 0, 0x22, -1, 0)
for page in range(0, count, 2):
    if libc.mprotect(pages + page * 4096, 4096, 1):
        break
before = size()
for less in range(30):
    x = torch.full((64 * 2**20 - less % 7 * 2**19,), float(less))
    assert bool((x == less).all())
    del x
print(size() - before < 600)
""")
    assert said == "True"


def test_training_on_a_cpu_does_without_triton(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The command itself, in a process that has imported nothing of Tilewright before."""
    script = f"""
from tilewright.cli.main import main
status = main(["train", {str(tiny_recipe())!r}, "--run_directory", {str(tmp_path / "run")!r}])
torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
print(status, sorted(name for name in sys.modules if name.split(".")[0] == "triton" and sys.modules[name]))
"""
    assert output_of(script, TRITON_INTERPRET="0").endswith("0 []")


def test_a_plan_for_gpus_has_the_triton_that_training_on_a_cpu_does_without() -> None:
    script = """
from tilewright.cli.main import main
print(main(["train", "--dry-run", "--as-if", "64xH100", "large"]))
"""
    assert output_of(script, TRITON_INTERPRET="0").endswith("0")


@pytest.mark.parametrize(
    "asked_for", [{"TRITON_INTERPRET": "1"}, {"TRITON_INTERPRET": "0", "TILEWRIGHT_KERNELS": "triton"}]
)
def test_triton_stays_where_it_is_asked_for(asked_for: dict[str, str]) -> None:
    script = "host_memory.spare_triton(); from tilewright.kernels import dispatch; print(dispatch.HAS_TRITON)"
    assert output_of(script, **asked_for) == "True"
