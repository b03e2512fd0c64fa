"""The users of Redis that the README gives to workers and to clients."""

import re
import shlex
from pathlib import Path

from worker.ops.rights import Role

README = (Path(__file__).parents[1] / "README.md").read_text()
ROLES: tuple[Role, ...] = ("worker", "client")


def acl(role: Role) -> list[str]:
    """The user that the README gives to workers or to clients."""
    found = re.search(rf"redis-cli ACL SETUSER ({role} .*?)\n(?:redis-cli|```)", README, re.DOTALL)
    assert found
    return shlex.split(found[1].replace("\\\n", ""))
