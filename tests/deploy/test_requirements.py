"""The locked requirements of the image against those of the package."""

import re
import tomllib

from manifests import DEPLOY
from packaging.requirements import Requirement

LINES = (DEPLOY / "requirements.txt").read_text().replace("\\\n", "").splitlines()
LOCKED = [line for line in LINES if line.strip() and not line.lstrip().startswith("#")]


def test_every_locked_requirement_is_exact_and_has_hashes() -> None:
    assert LOCKED
    for line in LOCKED:
        assert re.match(r"[a-z0-9-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", line), line


def test_the_image_has_a_version_of_each_dependency_that_the_package_allows() -> None:
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    locked = {line.partition("==")[0]: line.partition("==")[2].split()[0] for line in LOCKED}
    for text in [*project["dependencies"], *extras["gateway"], *extras["otel"], *extras["top"]]:
        wanted = Requirement(text)
        assert locked[wanted.name] in wanted.specifier, text
