"""Packaging of umm_jax. Requirements live in requirements.txt; what only some users need is an extra."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def requirements() -> list[str]:
    lines = (line.partition("#")[0].strip() for line in (HERE / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


def version() -> str:
    return re.search(r'__version__ = "([^"]+)"', (HERE / "umm_jax" / "__init__.py").read_text())[1]


DATA = ["pyarrow>=15.0"]
TFDS = ["tensorflow-datasets>=4.9.7"]  # reads ArrayRecord without TensorFlow
LAUNCH = ["google-cloud-tpu>=1.23"]
EVAL = ["pycocoevalcap>=1.2", "pycocotools>=2.0.8"]
TEST = ["pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.6", "scipy>=1.11", *DATA, *TFDS, *LAUNCH, *EVAL]
TORCH = ["torch>=2.13", "transformers>=5.24", "diffusers>=0.42"]
# The tests' torch is the CPU build that Python 3.11 can have. Newer Pythons would get gigabytes of CUDA from
# the default index: there the tests that need torch are skipped, unless somebody installs the torch extra.
OLD = '; python_version < "3.12"'
TEST_TORCH = [f"torch==2.13.0{OLD}", *(name + OLD for name in TORCH[1:])]


setup(
    name="umm_jax",
    version=version(),
    description="Train, evaluate and convert conversational unified multimodal models in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["umm_jax", "umm_jax.*"]),
    python_requires=">=3.11",
    install_requires=requirements(),
    extras_require={
        # `make test` installs torch first, so that the CPU build can be chosen; where there is no torch to be
        # had it installs test-core, and the tests that need torch are skipped.
        "test": TEST + TEST_TORCH,
        "test-core": TEST,
        # Reading .bin files, and the stock classes that exports of parts are tested against.
        "torch": TORCH,
        # Importing parquet and arrow files.
        "data": DATA,
        "tfds": TFDS,
        # Caption metrics, and masks from polygons, as the official evaluators have them.
        "eval": EVAL,
        # Features of pictures by the Inception network of published Fréchet distances; brings torch.
        "fid": ["clean-fid>=0.1.35", *TORCH],
        # umm data ... --beam; best in an environment of its own, for it pins much.
        "beam": ["apache-beam>=2.60"],
        # The TPU compiler without a TPU: ahead-of-time compilation and memory estimates on any Linux host.
        "plan": ["libtpu"],
        # Asking Cloud TPU for queued resources.
        "launch": LAUNCH,
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda12": ["jax[cuda12]>=0.10.2"],
    },
    entry_points={
        "console_scripts": ["umm = umm_jax.cli:main"],
        # Where lmms-eval is installed too, it finds our models there.
        "lmms_eval.models": ["umm_jax = umm_jax.evaluate.plugs:manifest"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
