"""What the README shows works as it stands."""

import re
from pathlib import Path

import torch

from tilewright.kernels import use

README = Path(__file__).parent.parent / "README.md"


def test_the_kernel_example_gives_the_sum_and_its_norm() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict[str, type[torch.nn.Module]] = {}
    exec(code, scope)
    x, residual = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16)
    block = scope["Block"](16)
    with use("triton"):
        y, summed = block(x, residual)
    torch.testing.assert_close(summed, x + residual)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x + residual, (16,), eps=1e-6))
    y.sum().backward()
    assert block.weight.grad is not None
    assert x.grad is not None


def test_the_first_screen_names_the_two_commands_and_the_makefile_has_them() -> None:
    first_screen = "\n".join(README.read_text(encoding="utf-8").splitlines()[:30])
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in ("train", "test"):
        assert f"make {target}" in first_screen
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
