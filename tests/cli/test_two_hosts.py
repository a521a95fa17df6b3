"""Two hosts, which are network namespaces of this machine with 1 Gbit/s between them (as root)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.cli.test_processes import RUN, SHORT, finished, network, variables

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def root() -> bool:
    tools = shutil.which("ip") and shutil.which("tc")
    return sys.platform == "linux" and os.geteuid() == 0 and bool(tools)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not root(), reason="needs root, ip and tc"),
]


def do(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces, which are those of their ends of the link as well."""
    names = (f"one{os.getpid()}", f"two{os.getpid()}")
    try:
        for name in names:
            do("ip", "netns", "add", name)
        one, other = ((name, "netns", name) for name in names)
        do("ip", "link", "add", *one, "type", "veth", "peer", "name", *other)
        for name, address in zip(names, ADDRESSES, strict=True):
            do("ip", "-n", name, "addr", "add", f"{address}/24", "dev", name)
            for end in ("lo", name):
                do("ip", "-n", name, "link", "set", end, "up")
            shape = ("tbf", "rate", "1gbit", "burst", "512k", "latency", "100ms")
            do("tc", "-n", name, "qdisc", "add", "dev", name, "root", *shape)
        yield names
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                do("ip", "netns", "del", name)


def trained(folder: Path, hosts: tuple[str, str], *words: str) -> int:
    """Train on both hosts; bytes that went between them, in both directions."""
    (folder / "tmp").mkdir(parents=True)
    processes = []
    for number, (name, address) in enumerate(zip(hosts, ADDRESSES, strict=True)):
        inside = ("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run")
        meeting = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
        where = ("--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--local-addr", address)
        leads = ("--rdzv-conf", f"is_host={int(number == 0)}")
        processes.append(
            subprocess.Popen(
                [*inside, *meeting, *where, *leads, "--module", "acktr", "train", *words],
                cwd=folder,
                env=variables(folder / "tmp", GLOO_SOCKET_IFNAME=name),
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        _, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
    inside = ("ip", "netns", "exec", hosts[0], "cat", "/proc/net/dev")
    told = subprocess.run(inside, capture_output=True, text=True, check=True).stdout
    for line in told.splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == hosts[0]:
            return int(counts.split()[0]) + int(counts.split()[8])
    raise AssertionError


def test_two_hosts_are_two_processes(tmp_path: Path, hosts: tuple[str, str]) -> None:
    trained(tmp_path / "hosts", hosts, *SHORT)
    (tmp_path / "here").mkdir()
    assert finished(tmp_path / "here", "--nproc", "2", *SHORT).returncode == 0
    wanted, found = (network(tmp_path / name)["network"] for name in ("here", "hosts"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (tmp_path / "hosts" / RUN / "eval.csv").exists()


def test_bytes_are_those_of_the_plan(tmp_path: Path, hosts: tuple[str, str]) -> None:
    """Gradients in every update, sums of factors and decompositions at their intervals.

    Two processes send one another all of a sum, and a decomposition goes one way.
    """
    words = ("--env", "CartPole-v1", "--eval-freq", "0", "--eval-episodes", "1")
    words += ("--network.shared", "--network.hidden", "512", "512")
    words += ("--acktr.actor.stat-interval", "2", "--acktr.actor.refresh-interval", "10")
    few = trained(tmp_path / "few", hosts, *words, "--total-timesteps", str(10 * 256))
    both = trained(tmp_path / "many", hosts, *words, "--total-timesteps", str(30 * 256))
    state = network(tmp_path / "many")
    assert state["updates"] == 30
    parameters = sum(tensor.numel() for tensor in state["network"].values())
    factors = sum(side**2 for side in (5, 512, 513, 512, 513, 2, 513, 1))
    wanted = 4 * (2 * (20 * parameters + 10 * factors) + 2 * factors)
    assert both - 2 * few == pytest.approx(wanted, rel=0.05)
