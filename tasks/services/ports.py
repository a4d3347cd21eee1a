"""Which ports the services get: the wanted ones where they are free, any free one for 0."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from contextlib import ExitStack

from tasks.titles.errors import ConfigError


def choose_ports(host: str, wanted: Mapping[str, int], titles: Mapping[str, str]) -> dict[str, int]:
    """Return a port for each service of `wanted`, all of which are free now.

    Raises `ConfigError` that names each port that cannot be had, who holds it where that can be seen, and the way out.
    """
    problems = []
    ports: dict[str, int] = {}
    # All stay open until the last is chosen, so that none is given twice.
    with ExitStack() as stack:
        for name, port in sorted(wanted.items(), key=lambda item: item[1] == 0):
            try:
                family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
                listener = stack.enter_context(socket.create_server((host, port), family=family))
                ports[name] = listener.getsockname()[1]
            except socket.gaierror as error:
                raise ConfigError(
                    f"'{host}' is no address of this machine: {error.strerror}. Change --host."
                ) from error
            except OSError as error:
                problems.append(_problem(name, titles[name], host, port, error, dict(wanted)))
    if problems:
        raise ConfigError("\n".join([*problems, "Port 0 takes any free one."]))
    return {name: ports[name] for name in wanted}


def _problem(name: str, title: str, host: str, port: int, error: OSError, wanted: Mapping[str, int]) -> str:
    way_out = f"Choose another one with --port-{name} or HN_TITLES_PORT_{name.upper()}"
    if error.errno == errno.EADDRINUSE:
        twin = next((other for other, its in wanted.items() if its == port and other != name), None)
        by = f"wanted for '{twin}' too" if twin else f"taken{holder(port)}"
        return f"Port {port} for the {title} is {by}. {way_out}, or stop what holds it."
    return f"The {title} cannot listen on {host}:{port}: {error.strerror or error}. {way_out}, or another --host."


def holder(port: int) -> str:
    """Say which process listens on the port, as far as this user may see that."""
    import psutil

    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return ""
