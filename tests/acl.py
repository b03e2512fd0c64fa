"""The users of Redis that deploy/README.md gives to workers and to clients."""

import re
import shlex

from documents import DEPLOY

from worker.ops.rights import Role

ROLES: tuple[Role, ...] = ("worker", "client")


def acl(role: Role) -> list[str]:
    """The user that deploy/README.md gives to workers or to clients."""
    found = re.search(rf"redis-cli ACL SETUSER ({role} .*?)\n(?:redis-cli|```)", DEPLOY.text, re.DOTALL)
    assert found
    return shlex.split(found[1].replace("\\\n", ""))
