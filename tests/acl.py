"""The users of Redis that deploy/README.md gives to workers, clients and gateways."""

import re
import shlex

from documents import DEPLOY

from worker.ops.rights import Role

ROLES: tuple[Role, ...] = ("worker", "client", "gateway")


def acl(role: Role) -> list[str]:
    """The user that deploy/README.md gives to one of them."""
    found = re.search(rf"redis-cli ACL SETUSER ({role} .*?)\n(?:redis-cli|```)", DEPLOY.text, re.DOTALL)
    assert found
    return shlex.split(found[1].replace("\\\n", ""))
