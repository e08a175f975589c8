"""Python processes that this one starts for work that must not be done here, and how they end: with all they started.

A child leads a session and a process group of its own. Ctrl-C in the parent's terminal does not reach it, and it can be
killed together with the compilers that it runs. Its standard input is a pipe that the parent never closes: however the
parent ends, the pipe's end tells.
"""

from __future__ import annotations

import importlib.util
import os
import re
import select
import signal
import site
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import IO, NoReturn

import psutil  # type: ignore[import-untyped]  # psutil ships no types

from esper.errors import EsperError
from esper.forking import no_forks

__all__ = [
    "ChildStartError",
    "describe_exit",
    "end_with_parent",
    "ended_with_this_process",
    "family",
    "kill_family",
    "read_tail",
    "start_child",
    "wait_for_family",
]

_TAIL = 4096
_SECRET_NAME = re.compile(
    r"(ESPER|AWS|AZURE|ARM|GOOGLE|GCP|GCLOUD|CLOUDSDK|FIREBASE|S3|MINIO|BOTO|OCI|ALIBABA|ALIYUN|TENCENT|IBM|DIGITALOCEAN"
    r"|CLOUDFLARE|HEROKU|PG|POSTGRES\w*|MYSQL|MARIADB|MONGO\w*|REDIS\w*|RABBITMQ|AMQP|KAFKA|DATABASE|DB|SQLALCHEMY"
    r"|HF|HUGGING\w*|WANDB|COMET|NEPTUNE|MLFLOW|CLEARML|DATABRICKS|SNOWFLAKE|KAGGLE|OPENAI|ANTHROPIC|MISTRAL|COHERE"
    r"|GEMINI|REPLICATE|LANGCHAIN|LANGSMITH|GITHUB|GH|GITLAB|BITBUCKET|CI|JENKINS|ACTIONS|CIRCLE\w*|TRAVIS|BUILDKITE"
    r"|VAULT|CONSUL|NOMAD|KUBE\w*|DOCKER|NPM|NODE_AUTH|PIP|UV|POETRY|TWINE|CONAN|CARGO|SSH|GPG|KRB5\w*|SLACK|DISCORD"
    r"|TELEGRAM|SENTRY|DATADOG|DD|NEW_RELIC|HONEYCOMB|OTEL|STRIPE|TWILIO|SENDGRID|SMTP|MAIL\w*|LDAP|FTP|NETRC)(_.*)?"
    r"|PG[A-Z]+|.*(TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|APIKEY|PRIVATE|CONNECTION_?STRING|CONN_STR|WEBHOOK|COOKIE).*"
    r"|(.*_)?(PASS|PWD|KEY|KEYS|KEYFILE|AUTH|DSN|SAS|CERT|PEM|JWT|PAT|XAUTHORITY)(_.*)?"
)
"""Names of the variables whose values may be secrets: what clouds, databases, model hubs, CI and registries use, and
whatever is called a secret."""
_NO_SECRETS = ("PWD", "OLDPWD")
_SECRET_VALUE = re.compile(r"://[^/\s]*:[^/\s]*@|-----BEGIN ")
"""An address with a password, or a key."""


class ChildStartError(EsperError):
    """A Python process cannot be started; the message says why."""


def start_child(
    module: str,
    arguments: Sequence[str] = (),
    *,
    log: IO[bytes],
    compile_threads: int = 1,
    nice: int = 0,
    secrets: bool = True,
    variables: Mapping[str, str] = MappingProxyType({}),
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `python -m module arguments...`, whose output goes to `log`, in a process group of its own.

    It imports the `esper` that this process has, computes on one thread, lets Inductor run `compile_threads` C++
    compilers at a time, and is as much nicer than this process as `nice` says, from its first instruction but a few on.
    Without `secrets` nothing that may be a secret is in its environment, and `variables` in any case. The child calls
    :func:`end_with_parent`. Raises :class:`ChildStartError`.
    """
    if not sys.executable:
        raise ChildStartError("the path of the Python interpreter, sys.executable, is not set; set it")
    environment = _environment(compile_threads)
    if not secrets:
        environment = {name: value for name, value in environment.items() if not _may_be_secret(name.upper(), value)}
    environment.update(variables)
    try:
        with no_forks():
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=pass_fds,
                start_new_session=True,
            )
    except OSError as cause:
        raise ChildStartError(f"{sys.executable} cannot be started: {cause}") from cause
    if nice and os.name == "posix":
        with suppress(ProcessLookupError):  # it has ended already, which its exit will tell
            os.setpriority(os.PRIO_PROCESS, process.pid, min(19, os.getpriority(os.PRIO_PROCESS, 0) + nice))
    return process


def end_with_parent(parent: int) -> None:
    """In a child: end as soon as the process `parent` does, and kill whatever this one started.

    Takes standard input over: from here on, whoever reads it finds it empty. Where the pipe does not tell, because a
    process that the parent forked holds it open, the parent's pid does (Linux 5.3 and later).
    """
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if sys.platform == "linux" and os.getpgrp() == os.getpid():
        _have_group_killed(lifeline)
    threading.Thread(target=_wait_for_end, args=(parent, lifeline), name="esper-parent-watch", daemon=True).start()


_WATCH = """
import os, signal, sys, time
pid = int(sys.argv[1])
while os.read(0, 4096):
    pass
try:
    os.kill(pid, signal.SIGTERM)
    for _ in range(200):
        time.sleep(0.1)
        os.kill(pid, 0)
    os.kill(pid, signal.SIGKILL)
except ProcessLookupError:
    pass
"""


@contextmanager
def ended_with_this_process(pid: int) -> Iterator[None]:
    """Have a process that knows nothing of us end when this one does, however that ends, until the block is left.

    A small process watches, since nobody else is left to do it after a SIGKILL. It asks with SIGTERM, and 20 seconds
    later it kills.
    """
    command = [sys.executable, "-I", "-S", "-c", _WATCH, str(pid)]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        watcher.kill()
        watcher.communicate()


def family(pid: int) -> list[psutil.Process]:
    """The process and its descendants, those that run."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_family(pid: int) -> None:
    """Kill a child of this process and everything that it started, also if it has ended itself. From any thread.

    Does nothing once somebody has waited for the child: its number may be another process's then.
    """
    try:
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return
    members = family(pid)
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):  # the second is what macOS says of a group of zombies
            os.killpg(pid, signal.SIGKILL)
    for each in members:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def wait_for_family(child: subprocess.Popen[bytes]) -> None:
    """Wait until a child of this process has ended, and kill whatever it has left running."""
    if hasattr(os, "waitid"):
        with suppress(ChildProcessError):  # the program waits for children that are not its own
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        kill_family(child.pid)
    child.wait()


def describe_exit(returncode: int) -> str:
    """What became of a process with this ``Popen.returncode``, for people: "was killed by SIGSEGV"."""
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"was killed by signal {-returncode}"


def read_tail(log: IO[bytes]) -> str:
    """The last 4 KiB of a child's log."""
    end = log.seek(0, os.SEEK_END)
    log.seek(max(0, end - _TAIL))
    return log.read().decode(errors="replace").strip()


def _environment(compile_threads: int) -> dict[str, str]:
    """One thread each for PyTorch's operators; and this process's `esper`, wherever it was imported from."""
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = "1"
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = str(compile_threads)
    installed = {os.path.realpath(folder) for folder in (*site.getsitepackages(), site.getusersitepackages())}
    roots = []
    for package in ("esper", "esper_passes"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations if spec is not None else None) or ():
            root = os.path.realpath(os.path.dirname(folder))
            if root not in installed and root not in roots:
                roots.append(root)
    if roots:
        environment["PYTHONPATH"] = os.pathsep.join([*roots, *filter(None, [environment.get("PYTHONPATH")])])
    return environment


def _may_be_secret(name: str, value: str) -> bool:
    if name in _NO_SECRETS:
        return False
    return _SECRET_NAME.fullmatch(name) is not None or _SECRET_VALUE.search(value) is not None


def _have_group_killed(lifeline: int) -> None:
    """By the kernel, when the pipe's other end closes. No thread can do it while C code keeps the interpreter lock."""
    import fcntl  # not on Windows

    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)


def _wait_for_end(parent: int, lifeline: int) -> NoReturn:
    if os.name == "posix":
        waiting = select.poll()
        waiting.register(lifeline, select.POLLIN)
        if sys.platform == "linux":
            with suppress(OSError):  # an older kernel, or a sandbox without it
                waiting.register(os.pidfd_open(parent), select.POLLIN)
        while os.getppid() == parent:
            if any(file == lifeline for file, _ in waiting.poll()) and not os.read(lifeline, 4096):
                break
    else:
        while os.read(lifeline, 4096):
            pass
    _end_family()


def _end_family() -> NoReturn:
    me = os.getpid()
    for each in family(me)[1:]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    if os.name == "posix" and os.getpgrp() == me:
        os.killpg(me, signal.SIGKILL)
    os._exit(1)
