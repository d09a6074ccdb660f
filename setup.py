"""Package definition. OpenRLHF itself is an extra, because its hard flash-attn requirement needs CUDA to build."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in Path("pipa_openrlhf/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
MODULES = (
    "train_pipa",
    "train_dpo",
    "train_kto",
    "train_sft",
    "sample",
    "evaluate",
    "inspect_data",
    "make_problems",
    "objectives",
    "report",
)

setup(
    name="pipa-openrlhf",
    version=VERSION,
    description="PIPA (Prior-Informed Preference Alignment) as a plugin on OpenRLHF",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["pipa_openrlhf", "pipa_openrlhf.*"]),
    install_requires=[
        "torch",
        "deepspeed==0.19.6",
        "transformers==5.15.0",
        "peft",
        "accelerate",
        "datasets",
        "safetensors",
        "einops",
        "numpy",
        "tqdm",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "openrlhf": ["openrlhf==0.11.2"],
        "dev": ["pytest", "hypothesis", "ruff", "pyarrow", "trl==1.16.0"],
        "quickstart": ["gguf"],
        "wandb": ["wandb"],
    },
    entry_points={
        "console_scripts": [f"pipa-{module.replace('_', '-')} = pipa_openrlhf.cli.{module}:cli" for module in MODULES]
    },
)
