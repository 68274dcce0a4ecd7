"""PostgreSQL in Docker: the official image, or one made of the embedded wheel where that can't be pulled.

For the faults that need a machine of its own: one that freezes as a whole, has a small disk, or has few
connections to give.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import os
import re
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dbop_raw.testing import Server, ServerError, ServerUnavailable
from dbop_raw.testing.binaries import embedded_folder
from dbop_raw.testing.folders import free_port
from dbop_raw.testing.server import StopMode, run_sql

__all__ = ["DockerServer", "docker_server"]

IMAGE_VARIABLE = "DBOP_RAW_DOCKER_IMAGE"
IMAGE = "postgres:18"
DAEMON = "/var/run/docker.sock"
EMBEDDED_IMAGE = "dbop-raw-embedded-postgres"
START_TIMEOUT = 60.0
INNER_PORT = 5432
SIGNALS: Mapping[StopMode, str] = {"smart": "SIGTERM", "fast": "SIGINT", "immediate": "SIGQUIT"}

# What the official image's entry does, as far as a test needs it: make the data directory once, then be the
# server.
ENTRY = """#!/bin/sh
set -e
bin=/opt/embedded_postgres/pginstall/bin
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    "$bin"/initdb -D "$PGDATA" -U postgres -A trust -E UTF8 --no-locale --no-sync
    echo "host all all all trust" >> "$PGDATA/pg_hba.conf"
fi
shift
exec "$bin"/postgres -D "$PGDATA" -c listen_addresses='*' "$@"
"""
POSTGRES_ID = 999
# Counted up when `image_tar` changes: an image of another layout is not the same image.
LAYOUT = 2


class DockerServer(Server):
    """A server in a container: it can be stopped, crashed and paused, but has no standby."""

    kind = "the server in Docker"

    def __init__(self, container: Any, port: int) -> None:
        super().__init__("127.0.0.1", port, "postgres")
        self._container = container

    def start(self) -> None:
        """Start it and wait until it takes connections; nothing where it runs already.

        Raises:
            ServerError: It was not ready within 60 seconds.

        """
        self._container.start()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until it takes connections.

        Raises:
            ServerError: It ended, or took longer than 60 seconds.

        """
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                # The image's first start runs a server of its own, which listens at no TCP port: ask over
                # TCP.
                run_sql(self.dsn, "SELECT 1", wait=5)
            except Exception as exc:
                self._container.reload()
                if self._container.status == "exited" or time.monotonic() > deadline:
                    raise ServerError(
                        self._told(f"the container is {self._container.status}: {exc}")
                    ) from exc
                time.sleep(0.05)
            else:
                return

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the container's server and wait until it is gone.

        Args:
            mode: As for any server.

        Raises:
            ServerError: It was not gone within 30 seconds.

        """
        self._container.reload()
        if self._container.status == "paused":
            self._container.unpause()
        elif self._container.status != "running":
            return
        self._container.kill(SIGNALS[mode])
        try:
            self._container.wait(timeout=30)
        except Exception as exc:
            raise ServerError(self._told(f"the container was not gone after a stop ({mode}): {exc}")) from exc

    def crash(self) -> None:
        """Kill the container's server (SIGKILL): its next start recovers from the WAL."""
        self._container.kill()
        self._container.wait(timeout=30)

    def pause(self) -> None:
        """Freeze every process of the container."""
        self._container.pause()

    def resume(self) -> None:
        """Let a paused server go on; nothing where it is not paused."""
        self._container.reload()
        if self._container.status == "paused":
            self._container.unpause()

    def kill_backend(self, pid: int, signal: int) -> None:
        """Send a signal to one process of the server, by its process id *inside* the container."""
        code, output = self._container.exec_run(["/bin/sh", "-c", f"kill -{int(signal)} {int(pid)}"])
        if code != 0:
            raise ServerError(self._told(f"kill in the container failed: {output.decode(errors='replace')}"))

    def log_tail(self, n: int = 20) -> str:
        """Return the last `n` lines of the container's log."""
        return str(self._container.logs(tail=n).decode("utf-8", "replace"))


@contextmanager
def docker_server(
    settings: Mapping[str, str], *, tmpfs: Mapping[str, str] | None = None
) -> Iterator[DockerServer]:
    """Give a server in a new container, which is removed at the end of the block.

    Args:
        settings: For its command line; they win over ours, which turn fsync and full_page_writes off.
        tmpfs: Small disks to mount in it, each with its options: ``{"/small": "size=8m"}``; the server owns
            them.

    Raises:
        ServerUnavailable: There is no Docker, or no image.
        ServerError: The server did not start; the message has its log.

    """
    ours = {"fsync": "off", "full_page_writes": "off"}
    options = [part for name, value in (ours | dict(settings)).items() for part in ("-c", f"{name}={value}")]
    client = _client()
    try:
        # Fixed by us: a port that Docker chose would change with each start.
        port = free_port()
        container = client.containers.run(
            _image(client),
            ["postgres", *options],
            detach=True,
            environment={"POSTGRES_HOST_AUTH_METHOD": "trust"},
            ports={f"{INNER_PORT}/tcp": ("127.0.0.1", port)},
            tmpfs={path: f"{wanted},uid={POSTGRES_ID},mode=0700" for path, wanted in (tmpfs or {}).items()},
            labels={"dbop_raw": "testing"},
        )
        try:
            server = DockerServer(container, port)
            server.wait_ready()
            yield server
        finally:
            container.remove(force=True, v=True)
    finally:
        client.close()


def _client() -> Any:
    if importlib.util.find_spec("docker") is None:
        raise ServerUnavailable("the package docker is not installed")
    docker = importlib.import_module("docker")
    _probe()
    try:
        client = docker.from_env(timeout=60)
        client.ping()
    except Exception as exc:
        raise ServerUnavailable(f"no Docker daemon answers: {exc}") from exc
    return client


def _probe() -> None:
    """See that somebody listens where a daemon does: the package leaks a socket where nobody does."""
    if "DOCKER_HOST" in os.environ:
        return
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(DAEMON)
    except OSError as exc:
        raise ServerUnavailable(f"no Docker daemon at {DAEMON} ({exc}), and DOCKER_HOST is not set") from exc


def _image(client: Any) -> str:
    """Return an image that is there: the wanted one, pulled if need be, else one of the embedded wheel."""
    errors = importlib.import_module("docker.errors")
    wanted = os.environ.get(IMAGE_VARIABLE, IMAGE)
    with suppress(errors.ImageNotFound):
        client.images.get(wanted)
        return wanted
    try:
        client.images.pull(wanted)
    except errors.APIError as exc:
        try:
            return _embedded_image(client, errors)
        except ServerUnavailable as missing:
            raise ServerUnavailable(f"no image {wanted} ({exc}), and none can be made: {missing}") from exc
    return wanted


def _embedded_image(client: Any, errors: Any) -> str:
    # An image that another version of this module made is not the same image.
    folder = embedded_folder()
    tag = hashlib.sha256(f"{LAYOUT}{ENTRY}{folder}{folder.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    name = f"{EMBEDDED_IMAGE}:{tag}"
    with suppress(errors.ImageNotFound):
        client.images.get(name)
        return name
    changes = ['ENTRYPOINT ["/entry"]', f"USER {POSTGRES_ID}", "ENV PGDATA=/data", "ENV PATH=/bin"]
    client.api.import_image_from_data(image_tar(folder), repository=EMBEDDED_IMAGE, tag=tag, changes=changes)
    return name


def image_tar(folder: Path) -> bytes:
    """Return a root file system that runs the programs of `folder`: them, a shell, and the libraries of both.

    Raises:
        ServerUnavailable: There is no ldd here to name the libraries.

    """
    package = folder.parent.parent
    buffer = io.BytesIO()
    shell = Path("/bin/sh").resolve()
    libraries = sorted(_libraries([shell, folder / "postgres", folder / "initdb", *package.glob("**/*.so")]))
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        # A folder that is only implied is made by some daemons so that nobody but root may enter it.
        above = {parent for library in libraries for parent in library.parents if parent != Path("/")}
        for path in sorted({Path("/bin"), Path("/etc"), Path("/opt")} | above):
            _add_folder(tar, str(path).lstrip("/"), mode=0o755, owner=0)
        for path in (package, package.with_name(f"{package.name}.libs")):
            if path.exists():
                tar.add(path, f"opt/{path.name}")
        tar.add(shell, "bin/sh")
        for library in libraries:
            tar.add(library.resolve(), str(library).lstrip("/"))
        _add_text(tar, "entry", ENTRY, mode=0o755)
        _add_text(tar, "etc/passwd", f"postgres:x:{POSTGRES_ID}:{POSTGRES_ID}::/data:/bin/sh\n", mode=0o644)
        for name, mode in (("data", 0o700), ("tmp", 0o1777)):
            _add_folder(tar, name, mode=mode, owner=POSTGRES_ID)
    return buffer.getvalue()


def _libraries(programs: list[Path]) -> set[Path]:
    """Return the shared libraries outside the wheel that programs need, and their loader."""
    try:
        command = ["ldd", *map(str, programs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except OSError as exc:
        raise ServerUnavailable(f"ldd is needed to find the libraries for an image: {exc}") from exc
    found = {Path(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", done.stdout, re.MULTILINE)}
    return {path for path in found if "embedded_postgres" not in str(path)}


def _add_folder(tar: tarfile.TarFile, name: str, *, mode: int, owner: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, mode, owner, owner
    tar.addfile(entry)


def _add_text(tar: tarfile.TarFile, name: str, text: str, *, mode: int) -> None:
    data = text.encode()
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    tar.addfile(entry, io.BytesIO(data))
