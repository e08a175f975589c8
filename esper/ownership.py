"""Ownership checks of paths: nobody but the user and root may decide what is found there.

Looked at is every folder from the root of the path on, through symbolic links. A folder may be written to by its owner
only, who is this user or root; by others too if it is sticky, as `/tmp` is, and what is used in it is this user's or
root's. What counts as nobody else:

- a group that is one person's: it has the name of this user or of root, is that one's first group and lists nobody else
  (the umask 002 of many distributions relies on such groups); or a number that no user and no group is known by (the
  `fsGroup` of a Kubernetes pod). An access list makes either of them count as others.
- the owner of `/` itself, whoever it is: Python and the C library lie there too.
- within a user namespace (rootless containers), owners from outside of it, of folders on the way.

Windows keeps its rights elsewhere; nothing is looked at there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from esper.errors import EsperError

__all__ = ["UnsafePathError", "check_own", "make_own_folder"]

_MOST_LINKS = 40
_ALL_USERS = 2**32 - 1
_Entry = TypeVar("_Entry")


class UnsafePathError(EsperError):
    """Somebody else could put something of their own there. The message names the folder or file, and the remedy."""


def check_own(path: str | os.PathLike[str], what: str) -> None:
    """Raise :class:`UnsafePathError` unless `path` is this user's own; `what` names it for the message.

    Of what does not exist yet, the part that does is looked at.
    """
    if os.name != "posix":
        return
    whole = os.path.join(os.getcwd(), os.fspath(path))
    _check_entry("/", os.lstat("/"), what, is_last=False)
    place, shared, links, pending = "/", False, 0, whole.split("/")[::-1]
    while pending:
        name = pending.pop()
        if name in ("", "."):
            continue
        if name == "..":
            place, shared = os.path.dirname(place), False  # looked at before
            continue
        entry = os.path.join(place, name)
        try:
            status = os.lstat(entry)
            if stat.S_ISLNK(status.st_mode):
                if shared:  # elsewhere nobody else could have made it
                    _check_owner(entry, status, what, is_last=True)
                links += 1
                if links > _MOST_LINKS:
                    raise UnsafePathError(f"{what} {whole} is not used: its symbolic links have no end; correct them")
                target = os.readlink(entry)
                place, shared = ("/", False) if target.startswith("/") else (place, shared)
                pending += target.split("/")[::-1]
                continue
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as cause:
            raise UnsafePathError(
                f"{what} {whole} is not used: {entry} cannot be looked at: {cause.strerror}"
            ) from cause
        is_last = not any(part not in ("", ".") for part in pending)
        _check_entry(entry, status, what, is_last)
        place, shared = entry, bool(status.st_mode & stat.S_ISVTX)


def make_own_folder(path: Path, what: str) -> None:
    """Make the folder if need be, with those it lies in, for this user alone.

    Raises :class:`UnsafePathError` if it is not this user's own, and ``OSError`` if it cannot be made.
    """
    check_own(path, what)
    for folder in (*reversed(path.parents), path):
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
    check_own(path, what)  # in a folder like /tmp somebody may have been faster


def _check_entry(entry: str, status: os.stat_result, what: str, is_last: bool) -> None:
    if entry != "/":
        _check_owner(entry, status, what, is_last)
    if not _others_write(entry, status) or (status.st_mode & stat.S_ISVTX and not is_last):
        return
    raise UnsafePathError(
        f"{what} is not used: {entry} has mode {stat.S_IMODE(status.st_mode):04o}, so others can write to it; keep "
        f"them out (chmod go-w {entry}) after a look at what they may have put there, or choose another place"
    )


def _check_owner(entry: str, status: os.stat_result, what: str, is_last: bool) -> None:
    me = os.geteuid()
    if status.st_uid in (0, me) or (not is_last and _is_from_outside(status.st_uid)):
        return
    raise UnsafePathError(
        f"{what} is not used: {entry} belongs to {_user(status.st_uid)}, and this process runs as {_user(me)}; "
        "choose a place of your own, or run as that user"
    )


def _others_write(entry: str, status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and (_has_access_list(entry) or not _is_personal(status.st_gid))


def _has_access_list(entry: str) -> bool:
    if not hasattr(os, "getxattr"):  # only Linux has it
        return False
    try:
        os.getxattr(entry, "system.posix_acl_access")
    except OSError:  # there is none, or the file system has no such thing
        return False
    return True


def _known(look: Callable[[int], _Entry], number: int) -> Iterator[_Entry]:
    """The entry for `number` in a list of users or groups, if there is one."""
    with suppress(KeyError):
        yield look(number)


def _is_personal(gid: int) -> bool:
    """Whether nobody but this user or root is in the group."""
    import grp  # not on Windows
    import pwd

    people = {user.pw_name: user for uid in (os.geteuid(), 0) for user in _known(pwd.getpwuid, uid)}
    for group in _known(grp.getgrgid, gid):
        named_after = people.get(group.gr_name)
        return named_after is not None and named_after.pw_gid == gid and set(group.gr_mem) <= set(people)
    return all(user.pw_gid != gid or user.pw_name in people for user in pwd.getpwall())


def _is_from_outside(uid: int) -> bool:
    """Whether files of `uid` are those of users that this user namespace does not have."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            known = sum(int(line.split()[2]) for line in file)
        with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
            return known < _ALL_USERS and uid == int(file.read())
    except (OSError, ValueError, IndexError):  # not Linux
        return False


def _user(uid: int) -> str:
    import pwd  # not on Windows

    return next((f"{user.pw_name} (user {uid})" for user in _known(pwd.getpwuid, uid)), f"user {uid}")
