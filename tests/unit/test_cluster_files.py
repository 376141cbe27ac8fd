"""Files that launch clusters, checked by their readers: Ray, AWS as moto plays it, Kubernetes' client, linters."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import kubernetes
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME, TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE

from nsl_dist import __version__
from nsl_dist.commandline import parse_train_config
from nsl_dist.ray_internals import aws_nodes, checked_cluster_file, pack_working_dir

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
UP_FILES = ["ray_cluster.yaml", "cluster/gcp.yaml"]
MANIFESTS = sorted((ROOT / "cluster" / "kubernetes").glob("*.yaml"))
KUBERAY_FIELDS = json.loads((Path(__file__).parent / "kuberay_fields.json").read_text())


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def documents() -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


@pytest.mark.parametrize("name", UP_FILES)
def test_ray_up_files(name: str) -> None:
    config = checked_cluster_file(load(name))
    kinds = dict(config["available_node_types"])
    head = kinds.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert set(kinds) == {"gpu_spot", "gpu_on_demand", "data"}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in kinds.values())
    assert sum(kind["max_workers"] for kind in kinds.values()) == config["max_workers"]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert kinds["gpu_spot"]["priority"] > kinds["gpu_on_demand"].get("priority", 0)
    # What a user must change, and nothing but that, is above the first setting of the cluster.
    assert list(load(name))[:2] == ["metadata", "cluster_name"]
    above, below = (ROOT / name).read_text().split("\ncluster_name:")
    places = r"PROJECT|REGISTRY|BUCKET|\b(us|europe)-\w+\d|sg-0"
    assert re.search(places, above)
    assert not re.search(places, below)


@pytest.mark.parametrize("name", UP_FILES)
@pytest.mark.parametrize("place", [(), ("docker",), ("available_node_types", "data")])
def test_misspelt_fields_of_ray_up_files_are_refused(name: str, place: tuple[str, ...]) -> None:
    config = checked_cluster_file(load(name))
    inner = config
    for key in place:
        inner = inner[key]
    inner["max_wrokers"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        checked_cluster_file(config)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """An account with the stack of cluster/aws_access.yaml; and our file, with what that stack put out."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key to ~/.ssh
    monkeypatch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    config = load("ray_cluster.yaml")
    region = config["provider"]["region"]
    with mock_aws():
        vpc = boto3.client("ec2", region).describe_vpcs()["Vpcs"][0]["VpcId"]
        stacks = boto3.client("cloudformation", region)
        parameters = {"Vpc": vpc, "SshFrom": "203.0.113.7/32", "Bucket": "images"}
        stacks.create_stack(
            StackName="nsl-dist",
            TemplateBody=(ROOT / "cluster" / "aws_access.yaml").read_text(),
            Parameters=[{"ParameterKey": name, "ParameterValue": value} for name, value in parameters.items()],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        (stack,) = stacks.describe_stacks(StackName="nsl-dist")["Stacks"]
        (group,) = (each["OutputValue"] for each in stack["Outputs"] if each["OutputKey"] == "SecurityGroup")
        for kind in config["available_node_types"].values():
            assert kind["node_config"]["SecurityGroupIds"] == ["sg-00000000000000000"]
            kind["node_config"]["SecurityGroupIds"] = [group]
        yield config


def test_aws_starts_and_ends_every_kind_of_node(aws: dict[str, Any]) -> None:
    config, provider = aws_nodes(checked_cluster_file(copy.deepcopy(aws)))
    region = config["provider"]["region"]
    ec2 = boto3.client("ec2", region)
    for name, kind in config["available_node_types"].items():
        tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_NODE_NAME: name, TAG_RAY_USER_NODE_TYPE: name}
        provider.create_node(kind["node_config"], tags, 1)
    nodes = {provider.node_tags(node)[TAG_RAY_NODE_NAME]: node for node in provider.non_terminated_nodes({})}
    assert set(nodes) == {"head", "gpu_spot", "gpu_on_demand", "data"}
    profiles = {}
    for name, node in nodes.items():
        (reservation,) = ec2.describe_instances(InstanceIds=[node])["Reservations"]
        (instance,) = reservation["Instances"]
        asked = aws["available_node_types"][name]["node_config"]
        assert instance["InstanceType"] == asked["InstanceType"]
        assert [each["GroupId"] for each in instance["SecurityGroups"]] == asked["SecurityGroupIds"]
        assert {each["Key"]: each["Value"] for each in instance["Tags"]}[TAG_RAY_CLUSTER_NAME] == "nsl-dist"
        profiles[name] = instance["IamInstanceProfile"]["Arn"].rpartition("/")[2]
    assert profiles == {"head": "nsl-dist-head"} | dict.fromkeys(("gpu_spot", "gpu_on_demand", "data"), "nsl-dist-node")
    # Nothing but SSH is open, and that to one address; Ray added no group of its own.
    (group,) = ec2.describe_security_groups(GroupIds=asked["SecurityGroupIds"])["SecurityGroups"]
    outside = [rule for rule in group["IpPermissions"] if rule.get("IpRanges")]
    assert [(rule["FromPort"], rule["ToPort"], [each["CidrIp"] for each in rule["IpRanges"]]) for rule in outside] == [
        (22, 22, ["203.0.113.7/32"])
    ]
    provider.terminate_nodes(list(nodes.values()))
    states = [
        instance["State"]["Name"]
        for reservation in ec2.describe_instances(InstanceIds=list(nodes.values()))["Reservations"]
        for instance in reservation["Instances"]
    ]
    assert states == ["terminated"] * 4


def pod_templates(value: object) -> Iterator[dict[str, Any]]:
    """Find every pod template below a value."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "template":
                yield each
            yield from pod_templates(each)
    elif isinstance(value, list):
        for each in value:
            yield from pod_templates(each)


def as_kubernetes_reads(fields: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return what is left of `fields` once Kubernetes' client has read them: those that it does not know are not."""
    client = kubernetes.client.ApiClient()
    read = client.deserialize(json.dumps(fields), kind, "application/json")
    return client.sanitize_for_serialization(read)


def test_kubernetes_knows_every_field() -> None:
    templates = [template for document in documents() for template in pod_templates(document)]
    assert len(templates) == 5  # head, GPU and data nodes; MLflow and its database
    for template in templates:
        assert as_kubernetes_reads(template, "V1PodTemplateSpec") == template
    builtin = {"Service": "V1Service", "Deployment": "V1Deployment", "StatefulSet": "V1StatefulSet"}
    ours = [document for document in documents() if document["kind"] in builtin]
    assert len(ours) == 4
    for document in ours:
        assert as_kubernetes_reads(document, builtin[document["kind"]]) == document


def test_kubernetes_drops_misspelt_fields() -> None:
    template = copy.deepcopy(next(pod_templates(documents())))
    template["spec"]["containers"][0]["volumeMount"] = []
    assert as_kubernetes_reads(template, "V1PodTemplateSpec") != template


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_kuberay_knows_every_field(kind: str) -> None:
    (document,) = (document for document in documents() if document["kind"] == kind)
    jsonschema.validate(document["spec"], KUBERAY_FIELDS[kind])
    wrong = document["spec"] | {"enableAutoscaling": True}
    with pytest.raises(jsonschema.ValidationError, match="enableAutoscaling"):
        jsonschema.validate(wrong, KUBERAY_FIELDS[kind])


def test_the_operator_that_is_installed_knows_these_fields() -> None:
    asked = re.findall(r"--version (\S+)|KubeRay (\d\S+) or newer", (ROOT / "cluster" / "README.md").read_text())
    assert [version for pair in asked for version in pair if version] == [KUBERAY_FIELDS["version"]] * 2


def test_kuberay_cluster_grows_and_keeps_its_head_free() -> None:
    (cluster,) = (document["spec"] for document in documents() if document["kind"] == "RayCluster")
    (job,) = (document["spec"] for document in documents() if document["kind"] == "RayJob")
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in groups.values())
    limits = {name: group["template"]["spec"]["containers"][0]["resources"]["limits"] for name, group in groups.items()}
    assert "nvidia.com/gpu" in limits["gpu"]
    assert "nvidia.com/gpu" not in limits["data"]
    assert job["clusterSelector"] == {"ray.io/cluster": "nsl-dist"}


def test_the_trainings_that_are_shown_have_flags_that_fit() -> None:
    (job,) = (document["spec"] for document in documents() if document["kind"] == "RayJob")
    commands = [job["entrypoint"].partition(".py ")[2]]
    for name in ("README.md", "cluster/README.md", "Makefile"):
        found = re.findall(r'^ *make submit .*?ARGS="(.*?)"', (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
        commands += [each.replace("\\\n", "") for each in found if "..." not in each]
    assert len(commands) == 4
    for command in commands:
        assert parse_train_config(shlex.split(command), description="").num_workers is not None


def test_images_are_pinned_and_of_this_version() -> None:
    files = [ROOT / "ray_cluster.yaml", ROOT / "cluster" / "Dockerfile", *ROOT.glob("cluster/**/*.yaml")]
    files += ROOT.glob("cluster/**/*.md")
    for path in files:
        assert set(re.findall(r"/nsl_dist:(\S+)", path.read_text())) <= {__version__}, path
    bases = re.findall(r"^FROM (\S+)", (ROOT / "cluster" / "Dockerfile").read_text(), re.MULTILINE)
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", bases[0])


def test_login_shells_in_the_image_find_ray_and_the_token() -> None:
    """In these `ray up` and KubeRay start Ray: with Debian's PATH. `ray up` puts the token into the image's HOME."""
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    assert "uv pip install --system" in text
    assert "COPY --from=packages /usr/local /usr/local" in text
    assert re.search(r"^ENV HOME=/home/ray\b", text, re.MULTILINE)
    assert "PATH=/opt" not in text


@pytest.mark.parametrize(
    ("linter", "files"),
    [("shellcheck", ["cluster/slurm.sh", "cluster/spot_notice.sh", ".ci/run"]), ("hadolint", ["cluster/Dockerfile"])],
)
def test_linters(linter: str, files: list[str]) -> None:
    done = subprocess.run([BIN / linter, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_travels_with_a_job_is_small_and_code_alone(tmp_path: Path) -> None:
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("nsl_dist", "jobs", "tests", "cluster"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for heavy in ("left.parquet", "my_images/cup/1.jpg", ".venv/lib/torch.so", "runs/embedder.onnx"):
        (tmp_path / heavy).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / heavy).write_bytes(os.urandom(2**20))
    pack_working_dir(tmp_path, tmp_path / "package.zip")
    names = zipfile.ZipFile(tmp_path / "package.zip").namelist()
    assert {name.partition("/")[0] for name in names} == {"nsl_dist", "jobs"}
    assert "nsl_dist/retrieval/sharded_search.py" in names
    assert (tmp_path / "package.zip").stat().st_size < 2**20  # the bar is 5 MiB


def test_no_credentials_in_any_file() -> None:
    assigned = r"(secret|password|token)\w*['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9+/]{20,}"
    secret = re.compile(rf"AKIA[0-9A-Z]{{16}}|BEGIN [A-Z ]*PRIVATE KEY|{assigned}", re.IGNORECASE)
    example = "aws_secret_access_key = " + "wJalrXUtnFEMIK7MDENG" + "bPxRfiCYEXAMPLEKEY"
    assert secret.search(example)
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    assert len(paths) > 50
    found = {path.name: match[0] for path in paths if (match := secret.search(path.read_text(errors="replace")))}
    assert not found
