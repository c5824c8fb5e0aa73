"""The kernels inside models of ``transformers``: `patch` for a built model, `register_attention` for the registry.

    from transformers import AutoModelForCausalLM
    from tilewright.kernels import patch, unpatch
    model = AutoModelForCausalLM.from_pretrained(…)
    print(patch(model))     # what was replaced, by what, and what was left alone and why
    unpatch(model)

Nothing here touches a class: `patch` sets the ``forward`` of instances, so that other models in the process stay as
they are, and neither parameters nor state-dict keys change. It knows no family by name. A module is recognised by what
it computes: its forward is run on a few random numbers next to the kernel's reference, and only a match is replaced.
"""

from tilewright.kernels.huggingface.attention_registry import register_attention
from tilewright.kernels.huggingface.patching import PatchReport, patch, unpatch

__all__ = ["PatchReport", "patch", "register_attention", "unpatch"]
