"""The files for `ray up`: taken by Ray's own schema and preparation, shut to the world, and doing what they promise."""

from __future__ import annotations

import copy
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from jobs import cluster
from mmagent.roles import LABEL as ROLE_LABEL

FOLDER = cluster.CHECKOUT / "cluster"
CLOUDS = ("aws", "gcp")
FILES = (*CLOUDS, "on_prem")
ROLES = {"data", "train", "serve"}
# What `docker run` may be told here, and what may follow it.
OPTIONS = {
    "--ulimit": r"nofile=\d+:\d+",
    "--cap-drop": "ALL",
    "--security-opt": "no-new-privileges",
    "--env": r"[A-Za-z_]+=\S+",
    "--volume": r"/\S+:/[^:\s]+(:ro)?",
}


def text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text()


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text(name))
    return found


def prepared(name: str) -> dict[str, Any]:
    """As `ray up` has it before it speaks to the cloud."""
    found: dict[str, Any] = prepare_config(read(name))
    return found


# ---- what Ray takes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FILES)
def test_ray_takes_it(name: str) -> None:
    config = prepared(name)
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]
    for node_type in config["available_node_types"].values():
        assert 0 <= node_type["min_workers"] <= node_type["max_workers"] <= config["max_workers"]


@pytest.mark.parametrize("name", FILES)
def test_nothing_of_rays_defaults_slips_in(name: str) -> None:
    """What a file leaves out, Ray fills in from its own: installing Ray, and start commands without a token."""
    given, config = read(name), prepared(name)
    for key in ("head_start_ray_commands", "worker_start_ray_commands", "setup_commands", "available_node_types"):
        if name != "on_prem" or key != "available_node_types":
            assert config[key] == given[key], key
    assert config["head_setup_commands"] == config["worker_setup_commands"] == given["setup_commands"]


@pytest.mark.parametrize("name", CLOUDS)
def test_a_mistake_is_found(name: str) -> None:
    import jsonschema

    change: dict[str, Any]
    for change in ({"max_worker": 3}, {"docker": {"imag": "x"}}, {"available_node_types": {"x": {"resources": {}}}}):
        with pytest.raises(jsonschema.ValidationError):
            validate_config({**prepared(name), **change})


# ---- nobody else gets in ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FILES)
def test_nothing_is_open_to_the_world(name: str) -> None:
    assert "0.0.0.0" not in text(name)
    assert "::/0" not in text(name)
    config = read(name)
    for command in config["head_start_ray_commands"]:
        if "--head" in command:
            assert "--dashboard-host=127.0.0.1" in command
    if name == "on_prem":
        assert "default deny incoming" in text(name)
        return
    assert config["provider"]["use_internal_ips"] is True
    assert config["auth"]["ssh_proxy_command"]
    assert config["auth"]["ssh_proxy_use_node_id"] is True
    for node_type in config["available_node_types"].values():
        node = node_type["node_config"]
        if name == "aws":
            assert node["SecurityGroupIds"], "without one Ray makes its own, which opens SSH to every address"
            assert node["SubnetIds"]
            assert node["MetadataOptions"]["HttpTokens"] == "required"
            assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
        else:
            assert all("accessConfigs" not in interface for interface in node["networkInterfaces"])
            assert node["tags"] == {"items": ["mmagent"]}


def test_the_commands_open_only_what_is_inside() -> None:
    aws, gcp = commands("aws"), commands("gcp")
    [rule] = [each for each in aws if "authorize-security-group-ingress" in each]
    words = shlex.split(rule)
    assert words[words.index("--group-id") + 1] == words[words.index("--source-group") + 1]
    [group] = {node["node_config"]["SecurityGroupIds"][0] for node in read("aws")["available_node_types"].values()}
    assert group in words
    rules = [shlex.split(each) for each in gcp if "firewall-rules create" in each]
    sources = {word for rule in rules for word in rule if word.startswith("--source")}
    assert sources == {"--source-tags=mmagent", "--source-ranges=35.235.240.0/20"}, "the second is Google's proxy"
    assert all("--target-tags=mmagent" in rule for rule in rules)


@pytest.mark.parametrize("name", FILES)
def test_the_token_travels_as_a_file_that_only_its_owner_reads(name: str) -> None:
    config = read(name)
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert config["setup_commands"][0] == "chmod 600 ~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN" not in text(name)
    assert not re.search(r"\b[0-9a-f]{32,}\b", text(name))
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for command in starts:
        assert "ray start" not in command or command.startswith("export RAY_AUTH_MODE=token ")
    assert "RAY_AUTH_MODE=disabled" not in text(name)


# ---- machines --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CLOUDS)
def test_machines_have_roles_and_the_head_has_no_work(name: str) -> None:
    config = read(name)
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert not head.get("labels")
    assert {each["labels"][ROLE_LABEL] for each in types.values()} == ROLES
    for each in types.values():
        assert ("GPU" in each["resources"]) == (each["labels"][ROLE_LABEL] == "train")
        assert each["min_workers"] == 0, "nothing is paid for when nobody works"
    assert sum(each["max_workers"] for each in types.values()) >= config["max_workers"]


@pytest.mark.parametrize("name", CLOUDS)
def test_spot_and_on_demand_are_the_same_machine(name: str) -> None:
    types = read(name)["available_node_types"]
    spot, sure = types["train-spot"], types["train-on-demand"]
    assert spot["resources"] == sure["resources"]
    assert spot["labels"]["ray.io/market-type"] == "spot"
    assert sure["labels"]["ray.io/market-type"] == "on-demand"
    assert spot["priority"] > sure["priority"]
    cheap = {"aws": "InstanceMarketOptions", "gcp": "scheduling"}[name]
    others = [copy.deepcopy(each["node_config"]) for each in (spot, sure)]
    for each in others:
        each.pop(cheap, None)
    assert others[0] == others[1]
    assert "SPOT" in str(spot["node_config"][cheap]).upper()


@pytest.mark.parametrize("name", CLOUDS)
def test_the_autoscaler_takes_spot_first_then_on_demand_and_keeps_to_labels(name: str) -> None:
    """Ray's own scheduler of machines, asked with this file's types."""
    asked = [({"GPU": 1.0}, {ROLE_LABEL: "train"})]
    assert launched(name, asked) == {"train-spot": 1}
    assert launched(name, asked, {"train-spot": 0.1}) == {"train-on-demand": 1}, "EC2 or Google had no spot machine"
    assert launched(name, [({"CPU": 1.0}, {ROLE_LABEL: "data"})] * 3) == {"data": 1}
    assert launched(name, [({"CPU": 2.0}, {ROLE_LABEL: "serve"})]) == {"serve": 1}
    assert launched(name, [({"CPU": 8.0}, {ROLE_LABEL: "data"})] * 99) == {"data": 6}, "the bound"
    assert launched(name, [({"CPU": 1.0}, {ROLE_LABEL: "elsewhere"})]) == {}


def launched(
    name: str, asked: list[tuple[dict[str, float], dict[str, str]]], availability: Mapping[str, float] | None = None
) -> dict[str, int]:
    """The machines that Ray's autoscaler starts for tasks, each with its resources and its selector of labels."""
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated import common_pb2, instance_manager_pb2

    common: Any = common_pb2
    instances: Any = instance_manager_pb2

    config = AutoscalingConfig(read(name), skip_content_hash=True)
    requests = []
    for resources, labels in asked:
        selector = [(key, common.LabelSelectorOperator.LABEL_OPERATOR_IN, [value]) for key, value in labels.items()]
        requests.append(ResourceRequestUtil.make(resources, label_selectors=[selector]))
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_worker_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(requests),
        current_instances=[],
        cloud_resource_availabilities=dict(availability or {}),
        recoverable_resource_availabilities=dict(availability or {}),
    )
    reply = ResourceDemandScheduler(None).schedule(request)
    found: dict[str, int] = {}
    for each in reply.to_launch:
        assert isinstance(each, instances.LaunchRequest)
        if each.instance_type != config.get_head_node_type():
            found[each.instance_type] = found.get(each.instance_type, 0) + each.count
    return found


def test_machines_of_ones_own_say_their_role_themselves() -> None:
    [start] = [each for each in read("on_prem")["worker_start_ray_commands"] if "ray start" in each]
    assert f'--labels="{ROLE_LABEL}=$role"' in start
    role = re.search(r"role=\$\((.*?)\)\s+&& ray start", start)
    assert role
    script = f"echo $({role[1]})"
    said = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert len(said) == 1
    assert said[0] in ROLES
    written = script.replace("/etc/mmagent/role", "/dev/stdin")
    said = subprocess.run(
        ["sh", "-c", written], check=True, capture_output=True, text=True, input="serve\n"
    ).stdout.split()
    assert said == ["serve"]


@pytest.mark.parametrize("name", FILES)
def test_ray_knows_the_flags_of_its_start(name: str) -> None:
    from ray.scripts.scripts import cli

    known = {option for each in cli.commands["start"].params for option in each.opts}
    config = read(name)
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        for flag in re.findall(r"(--[a-z-]+)", command.partition("ray start")[2]):
            assert flag in known, flag


@pytest.mark.parametrize("name", FILES)
def test_docker_is_told_only_what_is_known(name: str) -> None:
    docker = read(name)["docker"]
    found: dict[str, list[str]] = {}
    for option in docker["run_options"]:
        flag, value = re.split(r"[ =]", option, maxsplit=1)
        assert re.fullmatch(OPTIONS[flag], value), option
        found.setdefault(flag, []).append(value)
    assert found["--cap-drop"] == ["ALL"]
    assert "RAY_AUTH_MODE=token" in found["--env"]
    root = next(each for each in found["--env"] if each.startswith("MMAGENT_STORAGE=")).partition("=")[2]
    assert f"{root}:{root}" in found["--volume"], "what a container writes elsewhere goes with it"
    assert "privileged" not in str(docker)
    assert not re.search(r":latest$|/[^:]*$", docker["image"]), "a version is wanted"


# ---- the words at the top --------------------------------------------------------------------------------------------
def commands(name: str) -> list[str]:
    """The commands in a file's comment: lines indented behind the #, continued by a backslash."""
    comment = "\n".join(line for line in text(name).splitlines() if line.startswith("#"))
    lines = re.sub(r"\\\n#\s*", "", comment).splitlines()
    found = [line[1:].strip() for line in lines if line.startswith("#   ")]
    return [re.sub(r"\s{2,}#.*$", "", line) for line in found]


def ray_commands(name: str) -> Iterator[list[str]]:
    for line in commands(name):
        words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
        if words[0] == "ray":
            yield words


@pytest.mark.parametrize("name", FILES)
def test_its_commands_exist(name: str) -> None:
    from ray.scripts.scripts import cli

    seen = set()
    for words in ray_commands(name):
        assert words[1] in cli.commands, words
        seen.add(words[1])
        for word in words:
            if word.startswith("cluster/"):
                assert word == f"cluster/{name}.yaml", word
    assert {"up", "down", "dashboard", "get-auth-token", "job", "exec"} <= seen
    for module in re.findall(r"python -m ([\w.]+)", text(name)):
        assert importlib.util.find_spec(module), module
    for file in re.findall(r"(?:cluster|jobs)/[\w/]+\.(?:yaml|txt)", text(name)):
        assert (cluster.CHECKOUT / file).is_file(), file
    programs = {shlex.split(line)[0] for line in commands(name)} - {"RAY_AUTH_MODE=token"}
    assert programs <= {"ray", "pip", "aws", "gcloud", "sudo", "echo"}, programs


# ---- the clouds' own words -------------------------------------------------------------------------------------------
def test_amazon_knows_these_fields() -> None:
    """The parameters of RunInstances, checked against Amazon's own description of its service."""
    session = pytest.importorskip("botocore.session", reason="no botocore: pip install --no-deps -r cluster/vms.txt")
    from botocore.validate import ParamValidator

    model = session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    for name, each in read("aws")["available_node_types"].items():
        # As Ray's provider changes them: one subnet of several, tags, the count.
        node = {key: value for key, value in each["node_config"].items() if key != "SubnetIds"}
        node |= {"SubnetId": each["node_config"]["SubnetIds"][0], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(node, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"


def test_google_knows_these_fields() -> None:
    """The fields of an instance, checked against Google's own description of its service."""
    import json

    found = importlib.util.find_spec("googleapiclient")
    if found is None or found.origin is None:
        pytest.skip("no googleapiclient: pip install --no-deps -r cluster/vms.txt")
    file = Path(found.origin).parent / "discovery_cache/documents/compute.v1.json"
    schemas = json.loads(file.read_text())["schemas"]

    def check(value: Any, schema: Mapping[str, Any], where: str) -> None:
        schema = schemas[schema["$ref"]] if "$ref" in schema else schema
        if schema["type"] == "array":
            assert isinstance(value, list), where
            for each in value:
                check(each, schema["items"], where)
        elif schema["type"] == "object" and "properties" in schema:
            for key, inner in value.items():
                assert key in schema["properties"], f"{where}.{key} is no field of Google's"
                check(inner, schema["properties"][key], f"{where}.{key}")
        elif "enum" in schema:
            assert value in schema["enum"], f"{where}: {value}"
        else:
            kinds = {"string": str, "boolean": bool, "integer": int, "number": float}
            assert isinstance(value, kinds[schema["type"]]) or schema.get("format") == "int64", f"{where}: {value!r}"

    for name, each in read("gcp")["available_node_types"].items():
        check(each["node_config"], {"$ref": "Instance"}, name)
