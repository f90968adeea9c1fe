"""Builds clients/java with Maven, only if something has changed."""

from __future__ import annotations

import functools
import shutil
from functools import partial

from tools.clients.commands import CLIENTS, ROOT, once, run

SOURCE = CLIENTS / "java"
TARGET = SOURCE / "target"
MAVEN_REPOSITORY = ROOT / ".tools/maven"
SHORT_LIVED = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
"""JVM options that shorten the start, for programs that run for seconds."""
NO_PROXY = ("-Dhttps.proxyHost=127.0.0.1", "-Dhttps.proxyPort=9", "-Dhttp.nonProxyHosts=")
"""System properties that set a proxy that does not exist: see rule 10 of clients/CONFORMANCE.md."""


def is_here() -> bool:
    """Whether the machine has a JDK and Maven."""
    return shutil.which("javac") is not None and shutil.which("mvn") is not None


@functools.cache
def build() -> str:
    """Builds the client, its jars and its documentation, and runs its tests; returns Maven's output.

    Maven keeps what it downloads in the checkout and not in the home directory, so that a later build needs no network.
    """
    maven = ("mvn", "--batch-mode", "--no-transfer-progress", f"-Dmaven.repo.local={MAVEN_REPOSITORY}")
    goals = ("clean", "verify", "dependency:copy-dependencies", "-DoutputDirectory=target/lib")
    return once("java", TARGET / "lib", (SOURCE, ROOT / "proto"), partial(run, *maven, *goals, cwd=SOURCE))


def command(main: str, *options: str) -> list[str]:
    """The command line that runs a class or a source file with the built client."""
    classes = [TARGET / "test-classes", *TARGET.glob("safelight-client-*[0-9].jar"), TARGET / "lib/*"]
    return ["java", *options, *NO_PROXY, "-cp", ":".join(map(str, classes)), main]
