"""Maps the rooms of the repository to their import names; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

ROOMS = {
    "dnp": "dnp",
    "dnp.engine": "engine",
    "dnp.runtime": "runtime",
    "dnp.export": "export",
    "dnp.serving": "serving",
}

setup(
    packages=[
        package
        for name, folder in ROOMS.items()
        for package in (name, *(f"{name}.{inner}" for inner in find_packages(folder)))
    ],
    package_dir=ROOMS,
    package_data={"dnp": ["py.typed", "default/*", "default/*/*"], "dnp.serving": ["static/*"]},
)
