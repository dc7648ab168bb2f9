"""Which packages there are; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# `tools` would collide with everybody's, so the programs install as tbq_tools.
setup(
    packages=[*find_packages(include=["tbq*", "gguf_io*", "cuda_port*"]), "tbq_tools"],
    package_dir={"tbq_tools": "tools"},
)
