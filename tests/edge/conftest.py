"""The fixtures of this part. They are in a module with a name of its own, because mypy knows one `conftest` only."""

from edge_fixtures import *  # noqa: F403
