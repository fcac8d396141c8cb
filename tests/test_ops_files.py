"""The files an operator installs: units, image, manifests. What can be checked without them is."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from executor.cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent
OPS = ROOT / "ops"
UNITS = sorted((OPS / "systemd").glob("*.service"))
TIERS = ("edge", "fog", "cloud")
yaml = pytest.importorskip("yaml", reason="needs PyYAML (pip install -e '.[dev]')")


class Unit(configparser.ConfigParser):
    """A systemd unit: its keys are case-sensitive."""

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def unit(path: Path) -> Unit:
    # Keys may come twice (Environment=); the last one is enough here.
    parsed = Unit(strict=False, interpolation=None)
    parsed.read_string(path.read_text())
    return parsed


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_are_hardened_and_drain(path: Path) -> None:
    service = unit(path)["Service"]
    for key in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "ProtectKernelTunables",
                "RestrictNamespaces", "LockPersonality"):  # fmt: skip
        assert service[key] == "yes", key
    assert service["ProtectSystem"] == "strict" and service["CapabilityBoundingSet"] == ""
    assert service["Restart"] == "on-failure" and service["KillSignal"] == "SIGTERM"
    assert float(service["TimeoutStopSec"]) > 10  # longer than a node may drain
    assert service["User"] == "splitpilot"


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_the_units_commands_take_their_arguments(path: Path) -> None:
    """Each flag in ExecStart is one that the command has."""
    words = unit(path)["Service"]["ExecStart"].split()
    module = words[words.index("-m") + 1]
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    flags = [word for word in words if word.startswith("--")]
    assert len(flags) > 3 and all(flag in done.stdout for flag in flags)


def verify(path: Path, folder: Path, old: str = "", new: str = "") -> list[str]:
    """What systemd says of a unit, with a piece of it replaced."""
    # The installed python is not on this machine.
    for source in UNITS:
        text = source.read_text().replace("/opt/splitpilot/.venv/bin/python", sys.executable)
        (folder / source.name).write_text(text.replace(old, new) if old else text)
    name = path.name.replace("@", "@edge")
    if name != path.name:
        (folder / name).symlink_to(folder / path.name)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(folder / name)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return [line for line in done.stderr.splitlines() if "splitpilot" in line]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_accepts_the_units(path: Path, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    assert verify(path, tmp_path / "good") == []
    (tmp_path / "bad").mkdir()
    assert verify(path, tmp_path / "bad", "ProtectHome=yes", "ProtectHomes=yes") != []


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint on the path")
def test_hadolint_accepts_the_image_file() -> None:
    file = str(OPS / "Containerfile")
    done = subprocess.run(["hadolint", file], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_image_has_what_a_node_imports() -> None:
    text = (OPS / "Containerfile").read_text()
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY")]
    assert all((ROOT / source).exists() for sources in copied for source in sources)
    for package in ("torch", "torchvision", "numpy", "pyzmq", "prometheus-client"):
        assert f" {package}" in text
    assert "USER 10001" in text


def manifests() -> list[dict[str, Any]]:
    kustomization = yaml.safe_load((OPS / "kubernetes" / "kustomization.yaml").read_text())
    found = []
    for name in kustomization["resources"]:
        found += list(yaml.safe_load_all((OPS / "kubernetes" / name).read_text()))
    return found


def workloads() -> dict[str, dict[str, Any]]:
    return {
        m["metadata"]["name"]: m for m in manifests() if m["kind"] in ("DaemonSet", "Deployment")
    }


def test_manifests_match_kubernetes_schemas() -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="needs kubernetes-validate (pip install -e '.[dev]')"
    )
    found = manifests()
    assert [m["kind"] for m in found] == [
        "Namespace", "DaemonSet", "Deployment", "Service", "Deployment", "Service",
    ]  # fmt: skip
    for manifest in found:
        validate.validate(manifest, "1.29", strict=True)
    broken = {**found[1], "spec": {**found[1]["spec"], "replica": 1}}
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, "1.29", strict=True)


def test_what_the_pods_mount_is_generated_and_complete() -> None:
    kustomization = yaml.safe_load((OPS / "kubernetes" / "kustomization.yaml").read_text())
    secrets = {s["name"]: s["files"] for s in kustomization["secretGenerator"]}
    assert kustomization["configMapGenerator"] == [{"name": "cluster", "files": ["cluster.toml"]}]
    neighbours = {"edge": ("client", "fog"), "fog": ("edge", "cloud"), "cloud": ("fog",)}
    for tier in TIERS:
        spec = workloads()[tier]["spec"]["template"]["spec"]
        sources = {v["name"]: v for v in spec["volumes"]}
        assert sources["config"]["configMap"]["name"] == "cluster"
        name = sources["keys"]["secret"]["secretName"]
        assert sources["keys"]["secret"]["defaultMode"] == 0o440
        # Its own secret key, and of the others only the public ones that it needs.
        wanted = {f"keys/{tier}.key_secret", *(f"keys/{n}.key" for n in neighbours[tier])}
        assert set(secrets[name]) == wanted
        mounted = {m["name"] for m in spec["containers"][0]["volumeMounts"]}
        assert mounted == set(sources)


def test_the_pods_fit_the_cluster_file() -> None:
    cluster = Cluster.load(OPS / "kubernetes" / "cluster.toml")
    services = {m["metadata"]["name"]: m for m in manifests() if m["kind"] == "Service"}
    for tier, node in zip(TIERS, cluster.nodes, strict=True):
        template = workloads()[tier]["spec"]["template"]
        container = template["spec"]["containers"][0]
        assert node.name == tier and f"--role={tier}" in container["args"]
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        assert ports == {"frames": node.port, "metrics": node.metrics_port}
        for probe, path in (
            ("startup", "/livez"),
            ("liveness", "/livez"),
            ("readiness", "/readyz"),
        ):
            get = container[f"{probe}Probe"]["httpGet"]
            assert (get["path"], get["port"]) == (path, "metrics")
        assert container["resources"].keys() == {"requests", "limits"}
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        assert template["spec"]["terminationGracePeriodSeconds"] > 10
        labels = workloads()[tier]["spec"]["selector"]["matchLabels"]
        assert labels.items() <= template["metadata"]["labels"].items()
        if tier == "edge":
            assert workloads()[tier]["kind"] == "DaemonSet" and template["spec"]["hostNetwork"]
            continue
        service = services[node.connect_host]["spec"]
        assert service["selector"] == labels
        assert service["ports"][0]["port"] == node.connect_port
