"""What importing the kernels costs and needs."""

import subprocess
import sys

WITHOUT_TRITON = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "triton" else find_spec(name, *rest)

import torch
import tilewright.kernels as kernels
x = torch.randn(3, 8, requires_grad=True)
kernels.rms_norm(x).sum().backward()
kernels.swiglu(x).sum().backward()
kernels.cross_entropy(x, torch.tensor([1, 2, 3])).backward()
q = torch.randn(1, 4, 2, 8, requires_grad=True)
kernels.attention(q, q, q).sum().backward()
print(kernels.choose(torch.device("cuda"), torch.float32).reason)
try:
    with kernels.use("triton"):
        kernels.rms_norm(x)
except ValueError as error:
    print(error)
"""

HEAVY = """
import sys
import tilewright.kernels
print(sorted({name.split(".")[0] for name in sys.modules} & {"transformers", "tokenizers", "tensorboard", "rich"}))
print(sorted(name for name in sys.modules if name.startswith("tilewright.") and name.split(".")[1] != "kernels"))
"""


def output_of(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_without_triton_the_reference_serves_and_a_demand_for_triton_says_how_to_mend_it() -> None:
    reason, error = output_of(WITHOUT_TRITON)
    assert reason == "triton is not installed"
    assert error.endswith("triton is not installed: pip install triton")


def test_importing_the_kernels_imports_nothing_heavy_and_nothing_else_of_tilewright() -> None:
    assert output_of(HEAVY) == ["[]", "[]"]
