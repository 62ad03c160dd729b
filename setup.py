"""The recipes lie beside the package in the repository, and inside it when it is installed."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sparsellm_lightning*"]), "sparsellm_lightning.recipes"],
    package_dir={"sparsellm_lightning.recipes": "recipes"},
    package_data={"sparsellm_lightning": ["py.typed"], "sparsellm_lightning.recipes": ["*.yaml", "*/*.yaml"]},
)
