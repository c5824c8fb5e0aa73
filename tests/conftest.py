"""Settings that must stand before anything imports triton, and a tiny corpus and recipe to train with."""

import os

# Kernels run on CPU tensors in Triton's interpreter. The variable is read when a kernel is defined, so it is set before
# the first import; tests that compile for a GPU start a process of their own without it.
os.environ["TRITON_INTERPRET"] = "1"
# The interpreter works on many small arrays, which threads only slow down; and test workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "juggle",
    "boxes",
    "of",
    "liquor",
    "near",
    "the",
    "old",
    "stone",
    "bridge",
]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built corpus of 40 short documents with a vocabulary of 320."""
    import random

    from tilewright.corpus import build_corpus

    source = tmp_path_factory.mktemp("source")
    random.seed(0)
    for number in range(40):
        words = random.choices(WORDS, k=random.randint(60, 160))
        (source / f"{number:02d}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    output = tmp_path_factory.mktemp("corpus") / "tiny"
    build_corpus(source, output, suffixes=[".txt"], vocab_size=320, held_out_fraction=0.2)
    return output


@pytest.fixture
def tiny_recipe(tiny_corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe that trains in about a second; keyword arguments are dotted keys with ``__`` for the dot."""

    def write(**changes: Any) -> Path:
        values: dict[str, Any] = {
            "name": "tiny",
            "model": {
                "preset": "llama-10m", "vocab_size": 320, "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1,
                "head_dim": 16, "intermediate_size": 48, "max_sequence_length": 32,
            },
            "data": {"corpus": str(tiny_corpus), "sequence_length": 32},
            "batch": {"sequences": 8, "micro_batch": 2},
            "steps": 6,
            "optimizer": {"learning_rate": 1e-2},
            "schedule": {"kind": "cosine", "warmup_steps": 2},
            "evaluation": {"every": 3, "windows": 4},
            "checkpoints": {"every": 2, "keep": 2},
            "sample": {"prompt": "the quick", "tokens": 4},
            "compute_dtype": "float32",
            "compile": False,
            "runs": str(tmp_path / "runs"),
        }  # fmt: skip
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            section = values
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


class Page(HTMLParser):
    """A page as a browser reads it: elements that are open and closed in order, their attributes, the text."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self, source):
        super().__init__()
        self.source = source
        self.elements = []
        self.open = []
        self.pieces = []
        self.feed(source)
        self.close()
        self.text = " ".join("".join(self.pieces).split())
        self.plots = [dict(attributes)["aria-label"] for tag, attributes in self.elements if tag == "svg"]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.pieces.append(data)
            self.pieces.append(" " if self.open[-1] != "b" else "")

    @property
    def ids(self):
        """Of every element that has one."""
        return [value for _, attributes in self.elements for name, value in attributes if name == "id"]

    @property
    def colours(self):
        """The variables that the plots are drawn in."""
        return set(re.findall(r"var\((--[a-z]+)\)", "".join(self.drawings())))

    def drawings(self):
        """The source of each plot."""
        return re.findall(r"<svg.*?</svg>", self.source, flags=re.DOTALL)

    def check(self):
        """Whole, asks nothing of the network, runs nothing, and is drawn in colours that it sets, light and dark."""
        assert self.open == []
        tags = {tag for tag, _ in self.elements}
        assert tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form"})
        for tag, attributes in self.elements:
            for name, value in attributes:
                assert not name.startswith("on"), (tag, name)
                if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                    within = "data:image/png;base64," if tag == "image" else "#"
                    assert value.startswith(within), (tag, name, value)
        assert set(re.findall(r"url\((.)", self.source)) <= {"#"}
        assert "@import" not in self.source
        assert not re.search(r"https?://(?!www\.w3\.org/(1999/xlink|2000/svg)\")", self.source)
        assert len(self.ids) == len(set(self.ids))
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', self.source)) <= set(self.ids)
        assert not any(re.search(r"#[0-9a-fA-F]{6}\b", drawing) for drawing in self.drawings())
        light, dark = self.source.split("@media (prefers-color-scheme: dark)")
        for name in self.colours:
            assert f"{name}:" in light
            assert f"{name}:" in dark


@pytest.fixture(scope="session")
def read_page() -> Callable[[Path], Page]:
    """Reads an HTML file as a browser does."""
    return lambda path: Page(path.read_text(encoding="utf-8"))
