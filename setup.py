"""The build. ``patches/`` stands at the top of the repository and ships as ``megatron_rl.patches``."""

from pathlib import Path
from re import search

from setuptools import find_packages, setup

VERSION = search(r'__version__ = "(.+)"', Path("megatron_rl/__init__.py").read_text()).group(1)

RUNTIME = [
    "torch",
    "megatron-core>=0.16.1,<0.20",
    "numpy",
    "safetensors",
    "transformers>=5.12",
    "tokenizers",
    "psutil",  # megatron-core needs it without saying so
    "tqdm",  # likewise
    "omegaconf>=2.4",
    "pydantic>=2.14",
    "PyYAML",
    "typer",
    "math-verify==0.9.0",
    "antlr4-python3-runtime==4.13.2",  # math-verify's extra for it: pip warns of a name inside, and older ones leave it out
    "pebble>=5.2",
    "datasets>=5",
    "pyarrow",
    "aiohttp",
    "zstandard>=0.25",
    "rich",
    "matplotlib",
    "tensorboard",
]

# Agree with requirements/*.txt, says tests/house/test_requirements.py.
EXTRAS = {
    # Install torch and setuptools as in requirements/gpu.txt first, then this without build isolation: Transformer Engine's
    # bindings are compiled against them (make packages PLATFORM=gpu does so; docs/install.md).
    # NVIDIA Apex is used where it is installed from source; PyPI's `apex` is another project.
    "gpu": ["torch==2.11.0", "megatron-core==0.19.2", "transformer-engine[core-cu13,pytorch]==2.11.0"],
    "sglang": [
        "sglang==0.5.17"
    ],  # for the torch of `gpu`; on a CPU: requirements/sglang_cpu.txt, which needs --no-deps
    "nemo": ["nemo-toolkit>=2.7,<3"],  # readers of NeMo 2 checkpoints; 3.0 is speech only
    "wandb": ["wandb"],
    "mlflow": ["mlflow"],
    "dev": ["pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy", "pre-commit", "uv", "gguf"],
}

setup(
    name="megatron-rl",
    version=VERSION,
    description="Reinforcement-learning post-training of language models on Megatron-Core",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.13",
    packages=[
        *find_packages(include=["megatron_rl", "megatron_rl.*"]),
        "megatron_rl.patches",
        *(f"megatron_rl.patches.{name}" for name in find_packages("patches")),
    ],
    package_dir={"megatron_rl.patches": "patches"},
    package_data={
        "megatron_rl": ["py.typed"],
        "megatron_rl.config": ["eval.yaml", "other_names.yaml"],
        "megatron_rl.report": ["view.html", "view.css", "view.js"],
    },
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-rl = megatron_rl.commands.__main__:main"]},
)
