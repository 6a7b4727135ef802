"""Maps the rooms of the repository to their import names; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["dnp", "dnp.cli", "dnp.engine", "dnp.runtime", "dnp.export"],
    package_dir={"dnp": "dnp", "dnp.engine": "engine", "dnp.runtime": "runtime", "dnp.export": "export"},
    package_data={"dnp": ["py.typed", "default/*", "default/*/*"]},
)
