"""The users of Redis in deploy/redis/users.acl, as the file has them."""

import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from documents import REDIS, ROOT

FILE = ROOT / "deploy/redis/users.acl"
PASSWORD = "PASSWORD"
_UNSET = "#" + 64 * "0"


def _users() -> dict[str, list[str]]:
    lines = [line.split() for line in FILE.read_text().splitlines()]
    assert all(words[:1] == ["user"] and words[2:4] == ["on", _UNSET] for words in lines)
    return {words[1]: words[4:] for words in lines}


USERS = _users()
"""The rules of each user, without its password."""
ADMIN = "default"
ROLES = tuple(user for user in USERS if user != ADMIN)


def acl(user: str) -> list[str]:
    """The words of ACL SETUSER for a user of the file, in the form that Redis 6.2 takes too.

    `client` is a user with the rights of two lines, for programs that add requests and follow them.
    """
    lines = ("producer", "reader") if user == "client" else (user,)
    rules = [rule.replace("%R~", "~") for line in lines for rule in USERS[line]]
    return setuser(user, ["resetchannels", *(rule for rule in rules if rule != "resetchannels")])


def setuser(user: str, rules: list[str]) -> list[str]:
    """The words of ACL SETUSER for a user with rules."""
    return [user, "reset", "on", f">{PASSWORD}", *rules]


def rights(role: str) -> list[str]:
    """What the rules of a user give: commands, keys and channels."""
    return [rule for rule in USERS[role] if re.match(r"\+|~|&|%R~", rule)]


def without(role: str, right: str) -> list[str]:
    """The rules of a user without one right."""
    return [rule for rule in USERS[role] if rule != right]


def file_with_passwords(folder: Path, *, is_old: bool) -> tuple[Path, dict[str, str]]:
    """Run the example of deploy/redis.md that gives each user a password; returns the new file and the passwords.

    The administrator then needs none. For Redis 6.2 (`is_old`) the file has the change that deploy/redis.md states.
    """
    for source in FILE.parent.iterdir():
        copy = folder / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
    command = ["bash", "-euo", "pipefail", "-c", REDIS.example("passwords")]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    urls = [urlsplit(file.read_text()) for file in (folder / "secrets").glob("redis-url-*")]
    text = re.sub(rf"^user {ADMIN} on #\w+", f"user {ADMIN} on nopass", (folder / "secrets" / FILE.name).read_text())
    changed = folder / FILE.name
    changed.write_text(text.replace("%R~", "~") if is_old else text)
    return changed, {str(url.username): str(url.password) for url in urls}
