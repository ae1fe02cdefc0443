"""Two hosts on one machine: network, mount, process and host-name namespaces, with sshd in each.

They see one another and this machine by addresses of their own. Folders are shared, as over a
network, but those that `Host.mount` replaces. A host that is killed takes its processes with it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

THIS_MACHINE = "10.77.9.1"  # as the hosts see it
PROGRAMS = ("unshare", "nsenter", "ip", "nft", "ssh-keygen", "/usr/sbin/sshd")
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
SECONDS_TO_START = 30

SSH_CONFIG = """\
Host *
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
"""
SSHD_CONFIG = """\
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
"""
# What a host begins with: a name, the keys of ssh, and a process that lives as long as it does.
BEGIN = """\
set -e
hostname {name}
mount --bind {ssh} /etc/ssh
mount -t tmpfs run /run
mkdir /run/sshd
ip link set lo up
exec sleep infinity
"""


@dataclass(frozen=True)
class Host:
    """One host: its name, its address on the link between the hosts, and its first process."""

    name: str
    address: str
    first_process: int

    def words(self, *command: str) -> list[str]:
        """The command line that runs a command on this host."""
        return ["nsenter", "--target", str(self.first_process), *NAMESPACES, "--", *command]

    def run(self, *command: str) -> str:
        """Run a command on this host, which must succeed; return what it prints."""
        done = subprocess.run(self.words(*command), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, cwd: Path, log: Path, *command: str) -> subprocess.Popen[bytes]:
        """Start a command on this host whose output goes to the end of a file."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self.words("env", "-C", str(cwd), *command), stdout=output, stderr=subprocess.STDOUT
            )

    def mount(self, source: Path, target: Path) -> None:
        """Have the host see the folder `source` where the others see `target`."""
        self.run("mount", "--bind", str(source), str(target))

    def drop_packets(self) -> None:
        """Drop all that comes from the other host or goes to it, without a word to either."""
        self.run("nft", "add table inet silence")
        for hook, way in (("input", "iifname"), ("output", "oifname")):
            chain = f"inet silence {hook}"
            self.run("nft", f"add chain {chain} {{ type filter hook {hook} priority 0; }}")
            self.run("nft", f"add rule {chain} {way} link0 drop")

    def let_packets_through(self) -> None:
        """Undo `drop_packets`."""
        self.run("nft", "delete table inet silence")

    def kill(self) -> None:
        """Switch the host off: each of its processes is killed."""
        os.kill(self.first_process, signal.SIGKILL)


def missing_for_hosts() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        names = ", ".join(missing)
        return f"{names} not installed: apt-get install iproute2 nftables openssh-server"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "ip", "link", "set", "lo", "up"],
        capture_output=True,
        text=True,
        check=False,
    )
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach one another by ssh without a password; both are gone afterwards."""
    ssh = folder / "ssh"
    ssh.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / "key"], check=True)
    (ssh / "ssh_config").write_text(SSH_CONFIG.format(folder=ssh))
    (ssh / "sshd_config").write_text(SSHD_CONFIG.format(folder=ssh))
    started = [_start_host(f"host-{letter}", ssh) for letter in "ab"]
    try:
        first, second = (
            Host(name, f"10.77.0.{number}", _child_of(process))
            for number, (name, process) in enumerate(started, 1)
        )
        _connect(first, second)
        for number, host in enumerate((first, second), 1):
            _connect_to_this_machine(host, f"10.77.9.{number + 10}")
            host.run("/usr/sbin/sshd", "-E", str(folder / f"sshd-{host.name}.log"))
        yield first, second
    finally:
        for name, process in started:
            process.kill()  # and with it the host, by --kill-child
            process.wait()
            link = ["ip", "link", "delete", f"nt-{name}"]
            subprocess.run(link, capture_output=True, check=False)  # the system may be first


def _start_host(name: str, ssh: Path) -> tuple[str, subprocess.Popen[bytes]]:
    begin = BEGIN.format(name=name, ssh=ssh)
    words = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", begin]
    return name, subprocess.Popen(words)


def _child_of(process: subprocess.Popen[bytes]) -> int:
    """The first process of a host, once it has set the host up."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        assert process.poll() is None
        assert time.monotonic() < deadline
        child = children.read_text().split()
        if child and Path(f"/proc/{child[0]}/comm").read_text() == "sleep\n":
            return int(child[0])
        time.sleep(0.05)


def _connect(first: Host, second: Host) -> None:
    ends = ("netns", str(first.first_process), "type", "veth", "peer", "link0")
    _ip("link", "add", "link0", *ends, "netns", str(second.first_process))
    for host in (first, second):
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "link0")
        host.run("ip", "link", "set", "link0", "up")


def _connect_to_this_machine(host: Host, address: str) -> None:
    """A link of its own, so that what is dropped between the hosts leaves the server in reach."""
    here = f"nt-{host.name}"
    end = ("type", "veth", "peer", "up0", "netns", str(host.first_process))
    _ip("link", "add", here, *end)
    _ip("address", "add", f"{THIS_MACHINE}/32", "dev", here)
    _ip("link", "set", here, "up")
    _ip("route", "add", address, "dev", here, "src", THIS_MACHINE)
    host.run("ip", "address", "add", f"{address}/32", "dev", "up0")
    host.run("ip", "link", "set", "up0", "up")
    host.run("ip", "route", "add", THIS_MACHINE, "dev", "up0", "src", address)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
