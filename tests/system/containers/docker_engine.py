"""A Docker engine of the tests' own: Debian's, in a network namespace, so that nothing else on the machine changes."""

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from tests.support.programs import debootstrap

ROOT = Path(__file__).parents[3]
"""The repository: what images are built of."""
NAMESPACE = "expertd-image-test"
PACKAGES = (
    "docker.io",
    "debootstrap",
    "iproute2",
    "iptables",
    "busybox-static",
    "prometheus",
    "prometheus-alertmanager",
)
PROGRAMS = ("dockerd", "debootstrap", "ip", "iptables", "busybox", "prometheus", "prometheus-alertmanager")
DOCKER = "/usr/bin/docker"
"""Debian's client, which can build without plugins, whatever else is installed."""
WHEELS_PORT = 18995
"""Fixed, because it is an argument of the build, which is repeated when its arguments change."""


class NoEngine(Exception):
    """Why a Docker engine cannot be had here, and what would help."""


def check_programs() -> None:
    """Raise `NoEngine` unless everything is here that an engine needs."""
    if os.geteuid() != 0:
        raise NoEngine("needs root, to start a Docker engine in a network namespace of its own")
    if not all(map(shutil.which, PROGRAMS)):
        raise NoEngine(f"needs Debian's packages {' '.join(PACKAGES)}")


class Engine:
    """One engine with all its state under `root`; images stay there for the next run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = os.environ | {"DOCKER_HOST": f"unix://{root}/docker.sock", "DOCKER_BUILDKIT": "1"}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process has this engine to itself; then have it."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def running(self, *, bridged: bool) -> Iterator[None]:
        """With bridges and published ports in the namespace, or to build: on the machine's own network.

        Raises `NoEngine` with the end of its log when it does not start.
        """
        command = ["dockerd", "--host", self.environment["DOCKER_HOST"], "--storage-driver", "overlay2"]
        for option, folder in (("--data-root", "data"), ("--exec-root", "exec"), ("--pidfile", "dockerd.pid")):
            command += [option, str(self.root / folder)]
        if bridged:
            _add_namespace()
            command = self.inside(*command)
            command += ["--bip", "10.203.0.1/24", "--default-address-pool", "base=10.203.128.0/17,size=24"]
        else:
            command += ["--bridge", "none", "--iptables=false", "--ip-forward=false"]
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "dockerd.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            self._until_ready(process)
            yield
        finally:
            process.terminate()
            process.wait(60)
            if bridged:
                subprocess.run(["ip", "netns", "delete", NAMESPACE], check=True)

    def docker(self, *arguments: str, timeout: float = 120) -> str:
        """Standard output of a `docker` command. Raises `AssertionError` with everything it printed when it fails."""
        done = self.run(DOCKER, *arguments, timeout=timeout)
        assert done.returncode == 0, f"docker {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    def run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """A command that talks to this engine; its standard output has both of its outputs."""
        return _capture(*command, environment=self.environment, timeout=timeout)

    @staticmethod
    def inside(*command: str) -> list[str]:
        """`command` in the network namespace of the bridges, where containers can be reached by their addresses."""
        # Not `ip netns exec`, which would hide the cgroups.
        return ["nsenter", f"--net=/run/netns/{NAMESPACE}", *command]

    def network_tool(self, *command: str) -> str:
        """What `iptables`, `tc` or `ip` prints in that namespace. Raises `AssertionError` when it fails."""
        done = self.run(*self.inside(*command))
        assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}: {done.stdout}"
        return done.stdout

    def build(self, context: Path, tag: str, *options: str) -> None:
        """Build an image on the machine's network; wheels in the folder PIP_FIND_LINKS are offered to pip."""
        with _serve_wheels() as arguments:
            self.docker("build", "--network=host", "--tag", tag, *arguments, *options, str(context), timeout=900)

    def base_image(self, tag: str) -> None:
        """Debian's smallest system with Python and its headers: stands in for a registry's slim Python image."""
        if self.docker("image", "ls", "--quiet", tag):
            return
        rootfs = self.root / "rootfs"
        shutil.rmtree(rootfs, ignore_errors=True)
        debootstrap(rootfs, "ca-certificates,libpython3-dev,python3,python3-venv,python3-pip")
        for folder in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(rootfs / folder)
        authorities = Path("etc/ssl/certs/ca-certificates.crt")
        shutil.copy("/" / authorities, rootfs / authorities)
        archive = self.root / "rootfs.tar"
        subprocess.run(["tar", "--numeric-owner", "-C", str(rootfs), "-cf", str(archive), "."], check=True)
        self.docker("import", "--change", f"ENV PIP_CERT=/{authorities}", str(archive), tag)
        archive.unlink()
        shutil.rmtree(rootfs)

    def _until_ready(self, process: subprocess.Popen[bytes]) -> None:
        for _ in range(240):
            if process.poll() is None and self.run(DOCKER, "info").returncode == 0:
                return
            time.sleep(0.25)
        log = (self.root / "dockerd.log").read_text(errors="replace")
        raise NoEngine(f"dockerd does not start here: {log[-500:]}")


def _capture(
    *command: str, environment: Mapping[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        timeout=timeout,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _add_namespace() -> None:
    """In place of one that a run which was killed has left, with nobody in it."""
    left = _capture("ip", "netns", "pids", NAMESPACE)
    if left.returncode == 0 and not left.stdout.strip():
        _capture("ip", "netns", "delete", NAMESPACE)
    for command in (["ip", "netns", "add", NAMESPACE], ["ip", "-n", NAMESPACE, "link", "set", "lo", "up"]):
        done = _capture(*command)
        if done.returncode:
            raise NoEngine(f"no network namespace can be made here: {done.stdout}")


@contextmanager
def _serve_wheels() -> Iterator[list[str]]:
    """Arguments of a build by which pip finds the wheels of this machine, or an index that is asked beside its own."""
    wheels, index = os.environ.get("PIP_FIND_LINKS", ""), os.environ.get("EXPERTD_CPU_INDEX", "")
    if not Path(wheels or "/nowhere").is_dir():
        yield ["--build-arg", f"PIP_EXTRA_INDEX_URL={index}"]
        return
    handler = partial(_QuietHandler, directory=wheels)
    with ThreadingHTTPServer(("127.0.0.1", WHEELS_PORT), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield ["--build-arg", f"PIP_FIND_LINKS=http://127.0.0.1:{WHEELS_PORT}/"]
        server.shutdown()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass
