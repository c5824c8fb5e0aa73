"""Package definition: dependencies, extras, the folder-to-import-name map and the ``tilewright`` command.

The folders stand at the root of the repository and are imported under ``tilewright.``; a top-level package called
``kernels`` would shadow the ``kernels`` package that ``transformers`` uses.
"""

from setuptools import setup

TRAINER = ("checkpoints", "health", "optimization", "parallel", "plan", "recipe", "record")
FOLDERS = (
    *("kernels", "kernels.nn", "kernels.huggingface", "model", "corpus", "cli", "recipes", "trainer"),
    *(f"trainer.{folder}" for folder in TRAINER),
)

setup(
    name="tilewright",
    version="0.1.0",
    description="A kernel-centric trainer: custom Triton kernels, a lean Transformer and an FSDP trainer",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[f"tilewright.{folder}" for folder in FOLDERS],
    package_dir={f"tilewright.{folder}": folder.replace(".", "/") for folder in FOLDERS},
    package_data={
        **{f"tilewright.{folder}": ["py.typed"] for folder in FOLDERS},
        # C++ is compiled where it is used; tables are launch configurations as measured on GPUs.
        "tilewright.kernels": ["py.typed", "*.cpp", "*.h", "tables/*.json"],
        "tilewright.recipes": ["*.yaml", "py.typed"],
        "tilewright.trainer": ["py.typed", "*.cpp"],
    },
    install_requires=[
        "torch>=2.13",
        # The kernels need triton only where they run on a GPU; elsewhere the plain PyTorch reference serves.
        "triton>=3.7; platform_system == 'Linux'",
        "numpy>=2.0",
        "tokenizers>=0.22",
        "jsonargparse>=4.49",
        "pyyaml>=6.0",
        "rich>=14.0",
        "tensorboard>=2.20",
        "matplotlib>=3.10",
    ],
    extras_require={
        "dev": [
            "pytest>=9.0",
            "pytest-xdist>=3.8",
            "pytest-benchmark>=5.3",
            "ruff>=0.17",
            "mypy>=2.4",
            "import-linter>=2.16",
            "types-PyYAML>=6.0",
            "transformers>=5.23",
            "accelerate>=1.15",  # the Trainer of transformers needs it
        ],
        # What `tilewright audit --against` compares with.
        "peers": ["liger-kernel>=0.8.5", "flash-linear-attention>=0.6"],
        # Where a run's figures can be sent to as well: the recipe's `tracking`.
        "wandb": ["wandb>=0.22"],
        "mlflow": ["mlflow>=3.5"],
        # The recipe's `float8`.
        "float8": ["torchao>=0.18"],
        # To put the kernels into models of transformers: tilewright.kernels.patch and register_attention.
        "transformers": ["transformers>=5.23"],
    },
    entry_points={"console_scripts": ["tilewright = tilewright.cli.main:main"]},
)
