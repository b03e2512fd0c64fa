"""The locked requirements of the image against those of the package."""

import re
import tomllib

import pytest
from manifests import DEPLOY
from packaging.requirements import Requirement

PROJECT = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
WANTED = {
    "requirements.txt": [*PROJECT["project"]["dependencies"], *EXTRAS["gateway"], *EXTRAS["otel"], *EXTRAS["top"]],
    "build-requirements.txt": PROJECT["build-system"]["requires"],
}
FILES = pytest.mark.parametrize("file", WANTED)


def locked(file: str) -> list[str]:
    """The requirements of a file of `deploy/`, a line for each."""
    lines = (DEPLOY / file).read_text().replace("\\\n", "").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


@FILES
def test_every_locked_requirement_is_exact_and_has_hashes(file: str) -> None:
    assert locked(file)
    for line in locked(file):
        assert re.match(r"[a-z0-9-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", line), line


@FILES
def test_the_image_has_a_version_of_each_dependency_that_the_package_allows(file: str) -> None:
    versions = {line.partition("==")[0]: line.partition("==")[2].split()[0] for line in locked(file)}
    for text in WANTED[file]:
        wanted = Requirement(text)
        assert versions[wanted.name] in wanted.specifier, text


def test_the_build_of_the_image_downloads_no_package_without_its_hash() -> None:
    steps = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "")
    commands = re.findall(r"-m pip (.*?)(?:&&|\n)", steps)
    sources = [re.findall(r"--require-hashes -r \S+|--no-index", command) for command in commands]
    assert sources == [*([f"--require-hashes -r {file}"] for file in WANTED), ["--no-index"], ["--no-index"]]
