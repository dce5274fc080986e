"""Versions of what made a result."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("evopress", "torch", "transformers", "safetensors", "datasets", "lm-eval", "numpy", "pandas", "snakemake")


def versions() -> dict[str, str]:
    """Version of Python and of each package that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
