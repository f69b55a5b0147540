"""The files for Kubernetes: taken by its schemas and KubeRay's, pointing only at what exists, and shut by default."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jobs import cluster, promote
from mmagent import config as configs
from mmagent.arguments import Parser
from mmagent.roles import LABEL as ROLE_LABEL
from serve.config import KEYS_VARIABLE, ServeConfig
from serve.launch import STORE_VARIABLE, configured
from serve.metrics import Metrics
from tests import kuberay

FOLDER = cluster.CHECKOUT / "cluster/kubernetes"
KUBERNETES = "1.33"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
RAY_KINDS = tuple(kuberay.KINDS)
OWN_KINDS = ("PodMonitor", "ServiceMonitor")  # of the Prometheus Operator: no schema is at hand
Document = dict[str, Any]


def documents(*folders: str) -> list[Document]:
    files = [file for folder in folders for file in sorted((FOLDER / folder).glob("*.yaml"))]
    found = [each for file in files for each in yaml.safe_load_all(file.read_text()) if each]
    return [each for each in found if each["kind"] not in ("Kustomization", "Component")]


ALL = documents("base", "jobs", "monitoring")
SECRETS: list[Document] = list(yaml.safe_load_all((FOLDER / "secrets.example.yaml").read_text()))


def name(document: Mapping[str, Any]) -> str:
    found = document["metadata"]
    return f"{document['kind']}/{found.get('name') or found['generateName']}"


@functools.cache
def rendered(overlay: str) -> tuple[Document, ...]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed (Debian, Ubuntu: apt-get install kubernetes-client)")
    made = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / "overlays" / overlay)], check=False, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return tuple(yaml.safe_load_all(made.stdout))


def validate(document: Document) -> None:
    """
    Raises:
        jsonschema.ValidationError: the API server would refuse it.
    """
    if document["kind"] in OWN_KINDS:
        assert document["apiVersion"] == "monitoring.coreos.com/v1"
        return
    if document["kind"] not in RAY_KINDS:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.validate(document, kuberay.KINDS[document["kind"]])
    for template in templates(document):
        kubernetes_validate.validate(wrapped(template), KUBERNETES, strict=True)
    if found := kuberay.cluster_of(document):
        options = found["autoscalerOptions"]
        sidecar = {"name": "autoscaler", **{key: options[key] for key in ("resources", "securityContext")}}
        kubernetes_validate.validate(wrapped({"spec": {"containers": [sidecar]}}), KUBERNETES, strict=True)
    if service := document["spec"].get("serveService"):
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Service", **service}, KUBERNETES, strict=True)


def wrapped(template: Mapping[str, Any]) -> Document:
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": dict(template)}


def templates(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The pods that a document brings."""
    kind, spec = document["kind"], document.get("spec", {})
    if kind == "StatefulSet":
        yield spec["template"]
    elif kind == "CronJob":
        yield spec["jobTemplate"]["spec"]["template"]
    elif kind in RAY_KINDS:
        if "submitterPodTemplate" in spec:
            yield spec["submitterPodTemplate"]
        if found := kuberay.cluster_of(document):
            yield from (group["template"] for group in kuberay.groups(found))


def pods() -> list[tuple[str, Mapping[str, Any]]]:
    return [(name(document), template) for document in ALL for template in templates(document)]


# ---- what the API server takes ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("document", [*ALL, *SECRETS], ids=name)
def test_a_document_is_taken(document: Document) -> None:
    validate(document)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_taken_and_changes_all_images_alike(overlay: str) -> None:
    found = rendered(overlay)
    for document in found:
        validate(document)
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == "mmagent", name(document)
    assert {name(each) for each in documents("base", "monitoring")} <= {name(each) for each in found}
    images = {image for document in found for image in images_of(document)} - {"redis:7.2-bookworm"}
    assert len(images) == 1, images
    assert "example.com" not in images.pop()
    [claim] = [each for each in found if each["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["storageClassName"]
    [training] = [each for each in found if each["kind"] == "RayCluster"]
    train = next(g for g in training["spec"]["workerGroupSpecs"] if g["groupName"] == "train")["template"]["spec"]
    assert train["nodeSelector"], "GPU pods need their machines"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in train["tolerations"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda spec: spec.update(workerGroupSpec=[]), "workerGroupSpec"),
        (lambda spec: spec["authOptions"].update(mode="on"), "'on'"),
        (lambda spec: spec["workerGroupSpecs"][0].pop("maxReplicas"), "maxReplicas"),
        (lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].update(img="x"), "img"),
        (lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "0 is not of type"),
    ],
)
def test_a_mistake_is_found(change: Any, says: str) -> None:
    document = json.loads(json.dumps(next(each for each in ALL if each["kind"] == "RayCluster")))
    change(document["spec"])
    with pytest.raises(jsonschema.ValidationError, match=says):
        validate(document)


def test_the_files_name_the_version_of_kuberay() -> None:
    for file in ("base/raycluster.yaml", "base/rayservice.yaml", *(f"jobs/{each}.yaml" for each in JOBS)):
        assert f"KubeRay {kuberay.VERSION}" in (FOLDER / file).read_text(), file


# ---- references ------------------------------------------------------------------------------------------------------
def images_of(document: Mapping[str, Any]) -> Iterator[str]:
    for template in templates(document):
        yield from (container["image"] for container in template["spec"]["containers"])


def test_one_image_and_one_ray() -> None:
    images = {image for document in ALL for image in images_of(document)} - {"redis:7.2-bookworm"}
    assert len(images) == 1, images
    clusters = [found for document in ALL if document["kind"] in RAY_KINDS if (found := kuberay.cluster_of(document))]
    assert {found["rayVersion"] for found in clusters} == {importlib.metadata.version("ray")}


def test_whatever_is_named_exists() -> None:
    known = {name(document) for document in [*ALL, *SECRETS]}
    generated = yaml.safe_load((FOLDER / "monitoring/kustomization.yaml").read_text())["configMapGenerator"]
    known |= {f"ConfigMap/{each['name']}" for each in generated}
    keys = {each["metadata"]["name"]: set(each["stringData"]) for each in SECRETS}

    def look(value: Any, where: str) -> None:
        if isinstance(value, list):
            for each in value:
                look(each, where)
        if not isinstance(value, dict):
            return
        for key, inner in value.items():
            if key in ("secretKeyRef", "credentials"):
                assert inner["key"] in keys[inner["name"]], f"{where}: {inner}"
            elif key in ("configMapRef", "configMapKeyRef", "configMap"):
                assert f"ConfigMap/{inner['name']}" in known, f"{where}: {inner}"
            elif key == "persistentVolumeClaim":
                assert f"PersistentVolumeClaim/{inner['claimName']}" in known, f"{where}: {inner}"
            elif key == "serviceAccountName":
                assert f"ServiceAccount/{inner}" in known, f"{where}: {inner}"
            elif key == "secretName":
                assert inner in keys, f"{where}: {inner}"
            look(inner, where)

    for document in ALL:
        look(document, name(document))
    for _, template in pods():
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])} | {"data"}
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


def services() -> dict[str, set[int]]:
    """The services by their names, KubeRay's own among them, and their ports."""
    found = {
        each["metadata"]["name"]: {p["port"] for p in each["spec"]["ports"]}
        for each in ALL
        if each["kind"] == "Service"
    }
    for document in ALL:
        if document["kind"] in ("RayCluster", "RayService"):
            found[f"{document['metadata']['name']}-head-svc"] = {6379, 8265, 10001, 8080}
        if serve := document["spec"].get("serveService") if "spec" in document else None:
            found[serve["metadata"]["name"]] = {port["port"] for port in serve["spec"]["ports"]}
    return found


def test_addresses_are_those_of_services() -> None:
    text = "\n".join(file.read_text() for file in (FOLDER / "base").glob("*.yaml"))
    addresses = set(re.findall(r"(mmagent-[a-z-]+)(?:\.mmagent\.svc)?:(\d+)", text))
    assert {host for host, _ in addresses} == {"mmagent-redis", "mmagent-head-svc", "mmagent-agent-serve-svc"}
    for host, port in addresses:
        assert int(port) in services()[host], (host, port)


def labels_of_pods() -> list[dict[str, str]]:
    """Of every pod, with what KubeRay adds."""
    found: list[dict[str, str]] = []
    for document in ALL:
        given = kuberay.cluster_of(document) if document["kind"] in RAY_KINDS else None
        for template in templates(document):
            own = dict(template["metadata"]["labels"])
            if given:
                head = template is given["headGroupSpec"]["template"]
                own |= {"ray.io/node-type": "head" if head else "worker", "ray.io/is-ray-node": "yes"}
                own["ray.io/cluster"] = document["metadata"]["name"]
            found.append(own)
    return found


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", []))


def test_every_selector_meets_a_pod() -> None:
    labels = labels_of_pods()
    for document in ALL:
        spec = document.get("spec", {})
        selectors = []
        if document["kind"] in ("PodDisruptionBudget", "PodMonitor", "StatefulSet"):
            selectors.append(spec["selector"])
        if document["kind"] == "NetworkPolicy":
            selectors.append(spec["podSelector"])
            for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
                peers = [*rule.get("from", []), *rule.get("to", [])]
                selectors += [peer["podSelector"] for peer in peers if "podSelector" in peer and len(peer) == 1]
        if document["kind"] == "Service":
            selectors.append({"matchLabels": spec["selector"]})
        if document["kind"] == "RayJob":
            selectors.append({"matchLabels": spec["clusterSelector"]})
        for selector in selectors:
            assert any(matches(selector, each) for each in labels), f"{name(document)}: {selector} selects nobody"
    [monitor] = [each for each in ALL if each["kind"] == "ServiceMonitor"]
    [agent] = [each for each in ALL if each["kind"] == "RayService"]
    serve = agent["spec"]["serveService"]
    assert matches(monitor["spec"]["selector"], serve["metadata"]["labels"])
    assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in serve["spec"]["ports"]}


# ---- commands --------------------------------------------------------------------------------------------------------
JOBS = ("train", "search", "refine")


def entrypoints() -> list[tuple[str, str]]:
    found = [(name(each), each["spec"]["entrypoint"]) for each in ALL if each["kind"] == "RayJob"]
    for document in ALL:
        if document["kind"] == "CronJob":
            [container] = next(iter(templates(document)))["spec"]["containers"]
            command = container["args"][0].replace("\\\n", " ")
            assert command.startswith("ray job submit --address http://mmagent-head-svc:8265 -- ")
            found.append((name(document), command.partition(" -- ")[2]))
    return found


@pytest.mark.parametrize(("where", "command"), entrypoints(), ids=[where for where, _ in entrypoints()])
def test_a_command_is_one_that_its_parser_knows(where: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    python, flag, module, *arguments = shlex.split(command)
    assert (python, flag) == ("python", "-m")
    assert importlib.util.find_spec(module)
    taken: list[Any] = []

    class Taken(Exception):
        pass

    parse = Parser.parse_args

    def only_parse(self: Parser, args: Any = None, namespace: Any = None) -> Any:
        taken.append(parse(self, args, namespace))
        raise Taken

    monkeypatch.setattr(Parser, "parse_args", only_parse)
    with pytest.raises(Taken):
        importlib.import_module(module).main(arguments)
    [given] = taken
    for file in [getattr(given, key) for key in ("config", "space", "rules") if getattr(given, key, None)]:
        assert (cluster.CHECKOUT / file).is_file(), file
    if config := getattr(given, "config", None):
        recipe = yaml.safe_load((cluster.CHECKOUT / config).read_text())
        overrides = dict(item.split("=", 1) for item in given.overrides)
        resolved = configs.resolve(recipe, {key: yaml.safe_load(value) for key, value in overrides.items()})
        assert resolved.cluster.gpu


def test_there_is_a_job_of_each_kind() -> None:
    assert {each["metadata"]["generateName"] for each in ALL if each["kind"] == "RayJob"} == {
        f"mmagent-{kind}-" for kind in JOBS
    }


def test_the_service_is_one_that_its_builder_takes(monkeypatch: pytest.MonkeyPatch, storage: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    [agent] = [each for each in ALL if each["kind"] == "RayService"]
    file = yaml.safe_load(agent["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(file)
    [app] = schema.applications
    module, _, function = app.import_path.partition(":")
    assert list(inspect.signature(getattr(importlib.import_module(module), function)).parameters) == ["args"]
    args = dict(app.args)
    assert (args["host"], args["port"]) == (schema.http_options.host, schema.http_options.port)
    channel, url = args.pop("channel"), args.pop("url")
    assert channel == "production"
    assert set(args) <= set(ServeConfig.model_fields)
    monkeypatch.setenv(KEYS_VARIABLE, "a-key-of-more-than-16-characters")
    monkeypatch.setenv(STORE_VARIABLE, "redis://:x@mmagent-redis:6379/1")
    config = configured(args)
    assert f":{config.port}" in url
    [group] = agent["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["labels"] == {ROLE_LABEL: config.role}
    assert group["minReplicas"] >= config.min_replicas > 1, "an upgrade or a lost machine must leave one"
    cpus = float(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert config.cpus <= cpus
    assert config.threads <= cpus
    assert agent["spec"]["excludeHeadPodFromServeSvc"] is True
    assert agent["spec"]["upgradeStrategy"] == {"type": "NewCluster"}


def test_the_service_gets_keys_and_store_from_secrets() -> None:
    [agent] = [each for each in ALL if each["kind"] == "RayService"]
    for template in templates(agent):
        variables = {each["name"]: each for each in template["spec"]["containers"][0]["env"]}
        assert "secretKeyRef" in variables[KEYS_VARIABLE]["valueFrom"]
        assert "$(REDIS_PASSWORD)" in variables[STORE_VARIABLE]["value"]
        names = [each["name"] for each in template["spec"]["containers"][0]["env"]]
        assert names.index("REDIS_PASSWORD") < names.index(STORE_VARIABLE), "Kubernetes fills in what stands before"
    [training] = [each for each in ALL if each["kind"] == "RayCluster"]
    for template in templates(training):
        assert promote.KEY_VARIABLE in {each["name"] for each in template["spec"]["containers"][0]["env"]}


def test_the_manual_names_what_exists() -> None:
    text = (cluster.CHECKOUT / "cluster/README.md").read_text()
    for file in re.findall(r"(?<!-f )\b(?:cluster|tests|kubernetes)/[\w./-]+\w", text):
        place = cluster.CHECKOUT / "cluster" if file.startswith("kubernetes/") else cluster.CHECKOUT
        assert (place / file).exists(), file
    for service, port in re.findall(r"(mmagent-[a-z-]+-svc)[: ](\d+)", text):
        assert int(port) in services()[service]
    assert f"--version {kuberay.VERSION.removeprefix('v')} " in text


# ---- safety ----------------------------------------------------------------------------------------------------------
def test_every_ray_has_a_token_from_the_secret_and_survives_its_head() -> None:
    for document in ALL:
        found = kuberay.cluster_of(document) if document["kind"] in RAY_KINDS else None
        if found:
            assert found["authOptions"] == {"mode": "token", "secretName": "mmagent-ray-token"}
            assert "secretKeyRef" in found["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
            assert found["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
            for group in found["workerGroupSpecs"]:
                assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
                assert group["labels"][ROLE_LABEL] == group["groupName"]
        elif document["kind"] in ("RayJob", "CronJob"):
            [template] = templates(document)
            variables = {each["name"]: each for each in template["spec"]["containers"][0]["env"]}
            assert variables["RAY_AUTH_MODE"]["value"] == "token"
            assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "mmagent-ray-token"


@pytest.mark.parametrize(("where", "template"), pods(), ids=[where for where, _ in pods()])
def test_a_pod_is_not_root_and_has_bounds(where: str, template: Mapping[str, Any]) -> None:
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    head = spec["containers"][0]["name"] == "ray-head"
    assert head or spec["automountServiceAccountToken"] is False, "only a head speaks to Kubernetes"
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        asked, most = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= asked.keys() & most.keys()
        assert asked["memory"] == most["memory"] or container["name"] in ("submit", "ray-job-submitter")
        if "nvidia.com/gpu" in most:
            assert asked["nvidia.com/gpu"] == most["nvidia.com/gpu"]
            assert spec["tolerations"]
        for each in container.get("env", []):
            secret = re.search(r"TOKEN|PASSWORD|KEY|SECRET", each["name"])
            assert not secret or "secretKeyRef" in each["valueFrom"], each["name"]


def test_rays_objects_fit_into_shared_memory() -> None:
    """Else Ray puts them on the disk, with a warning that nobody reads."""
    from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION

    for where, template in pods():
        volumes = {each["name"]: each for each in template["spec"].get("volumes", [])}
        if "shm" in volumes:
            memory = gib(template["spec"]["containers"][0]["resources"]["limits"]["memory"])
            assert gib(volumes["shm"]["emptyDir"]["sizeLimit"]) >= DEFAULT_OBJECT_STORE_MEMORY_PROPORTION * memory, (
                where
            )


def gib(quantity: str) -> int:
    assert quantity.endswith("Gi"), quantity
    return int(quantity.removesuffix("Gi"))


def test_the_accounts_of_kuberay_are_left_to_it() -> None:
    """It makes one of a RayCluster's name for its head, and would take ours for it."""
    accounts = {each["metadata"]["name"] for each in ALL if each["kind"] == "ServiceAccount"}
    rays = {each["metadata"].get("name") for each in ALL if each["kind"] in RAY_KINDS}
    assert not accounts & rays


def test_no_secret_is_in_git() -> None:
    for document in SECRETS:
        assert set(document["stringData"].values()) == {""}, name(document)
    assert not [each for each in ALL if each["kind"] == "Secret"]
    assert "secrets.example.yaml" not in (FOLDER / "base/kustomization.yaml").read_text()
    commands = (FOLDER / "secrets.example.yaml").read_text()
    for document in SECRETS:
        assert f"create secret generic {document['metadata']['name']} " in commands
        for key in document["stringData"]:
            assert f"--from-literal={key}=" in commands


def test_all_is_shut_and_each_component_is_opened_by_name() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in ALL if each["kind"] == "NetworkPolicy"}
    assert policies["deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for label, spec in policies.items():
        for rule in spec.get("ingress", []):
            assert rule.get("from"), f"{label}: from anywhere"
            assert all(peer.get("podSelector") or peer.get("namespaceSelector") for peer in rule["from"]), label
        for rule in spec.get("egress", []):
            assert rule.get("to") or label == "heads-to-kubernetes", f"{label}: to anywhere"
    text = "\n".join(file.read_text() for file in FOLDER.rglob("*.yaml"))
    assert "0.0.0.0/0" not in text
    assert "::/0" not in text
    assert not re.search(r"type: (LoadBalancer|NodePort)", text), "nothing faces the world by itself"
    components = {each["app.kubernetes.io/component"] for each in labels_of_pods()}
    assert components == {"training", "agent", "redis", "submitter"}
    assert components <= set(policies)


# ---- the dashboard ---------------------------------------------------------------------------------------------------
_ENDINGS = r"_(bucket|count|sum|created|total)$"


def queries() -> list[str]:
    panels = json.loads((FOLDER / "monitoring/dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def exported() -> dict[str, set[str]]:
    """The names at our /metrics, each with its labels."""
    metrics = Metrics()
    found: dict[str, set[str]] = {}
    for metric in vars(metrics).values():
        if not hasattr(metric, "_labelnames"):
            continue
        child = metric.labels(*["x"] * len(metric._labelnames)) if metric._labelnames else metric
        for act in ("inc", "observe"):
            if hasattr(child, act):
                getattr(child, act)(1)
                break
    for line in metrics.text().decode().splitlines():
        if not line.startswith("#") and (parts := re.match(r"([a-z_]+)(?:\{(.*)\})? ", line)):
            found.setdefault(parts[1], set()).update(re.findall(r"(\w+)=", parts[2] or ""))
    return found


def rays_own() -> set[str]:
    """The names that Ray exports: its reporter's, and those that its own dashboards ask for."""
    from ray.dashboard.modules.metrics import dashboards
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    folder = Path(inspect.getfile(dashboards)).parent
    asked = {word for file in folder.glob("*_panels.py") for word in re.findall(r"\bray_[a-z_]+", file.read_text())}
    return {f"ray_{word}" for word in METRICS_GAUGES} | asked


def test_the_dashboard_asks_for_what_is_exported() -> None:
    ours, rays = exported(), rays_own()
    asked: set[str] = set()
    for query in queries():
        for metric in re.findall(r"\b((?:mmagent|ray)_[a-z_]+)(?=\{)", query):
            asked.add(metric)
            assert metric in ours or metric in rays, f"{metric} is exported by nobody"
            labels = ours.get(metric)
            for group in re.findall(r"by \(([^)]*)\)", query) if labels is not None else []:
                wanted = {word.strip() for word in group.split(",")} - {"namespace"}
                assert labels is not None
                assert wanted <= labels, f"{query}: {metric} has {sorted(labels)}"
        assert query.count("(") == query.count(")")
    counted = {re.sub(_ENDINGS, "", each) for each in ours}
    shown = {re.sub(_ENDINGS, "", each) for each in asked}
    assert counted <= shown, f"exported, and shown nowhere: {sorted(counted - shown)}"


def test_the_dashboard_is_one() -> None:
    board = json.loads((FOLDER / "monitoring/dashboard.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}
    assert len(places) == len(ids)
    names = {each["name"] for each in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(board["panels"]))) - {"__rate_interval"}
    assert used <= names
