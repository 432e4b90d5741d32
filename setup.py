"""One distribution, two import roots: megapoly and megapoly_kernels (which lies in kernels/); one extension in C++.

The extension is optional: without a compiler or pybind11 (--no-build-isolation) the installation succeeds, numpy does
the same work, and a run says so.
"""

import sys

from setuptools import Extension, find_packages, setup

try:
    import pybind11

    extensions = [
        Extension(
            "megapoly.data._sampler",
            ["megapoly/data/_sampler.cpp"],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden"],
            language="c++",
            optional=True,
        )
    ]
except ImportError:
    print("no pybind11: megapoly is installed without its extension in C++", file=sys.stderr)
    extensions = []

setup(
    name="megapoly",
    version="0.1.0",
    description="3D-parallel pretraining of multilingual language models, from raw text to a Hugging Face checkpoint",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["megapoly", "megapoly.*"]),
        *find_packages("kernels", include=["megapoly_kernels", "megapoly_kernels.*"]),
    ],
    ext_modules=extensions,
    package_dir={"megapoly_kernels": "kernels/megapoly_kernels"},
    package_data={"megapoly": ["presets/*.yaml", "data/clean/*.yaml"], "megapoly_kernels": ["measured.json"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6",
        "numpy>=1.26",
        "PyYAML>=6",
        "regex",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboard>=2.18",
        "tokenizers>=0.22",
        "py3langid>=0.4",
        "tqdm",
        "zlib-ng",
        "zstandard",
    ],
    extras_require={
        "hf": ["transformers>=5"],
        "plot": ["matplotlib>=3.9"],
        "parquet": ["pyarrow>=20"],
        "clean": ["datatrove>=0.10.1", "rensa>=0.5", "orjson"],  # orjson: what datatrove reads JSONL with
        "fast": ["gigatoken==0.10.0"],  # its ids are verified, its inner functions are used: one version
        "test": [
            *("gigatoken==0.10.0", "pyarrow>=20", "datatrove>=0.10.1", "rensa>=0.5", "orjson"),
            *(
                "hypothesis",
                "matplotlib>=3.9",
                "mypy",
                "pytest",
                "pytest-timeout",
                "ruff",
                "types-PyYAML",
                "types-tqdm",
            ),
        ],
    },
)
