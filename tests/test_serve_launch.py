"""The application as Ray Serve builds it from a config file, which is how KubeRay's RayService starts it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from jobs import cluster, promote
from mmagent import storage as storages
from mmagent.roles import LABEL as ROLE_LABEL
from serve.launch import STORE_VARIABLE, StartError, configured
from serve.replica import build_app
from serve.switches import free_ports

KEY = "a-key-of-more-than-16-characters"


def point(channel: str, bundle: Path) -> None:
    """A channel's history with one line."""
    file = storages.root() / "channels" / f"{channel}.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"bundle": str(bundle)}) + "\n")


@pytest.mark.long
def test_a_config_file_starts_the_service(
    ray_cluster: cluster.Cluster, tiny_bundle: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve
    from ray.serve.config import ProxyLocation
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    point("production", tiny_bundle)
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    file = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "built",
                "import_path": "serve.replica:build_app",
                "route_prefix": "/",
                "args": {"channel": "production", "host": "127.0.0.1", "port": port, "url": url, "max_replicas": 1},
                "runtime_env": {"env_vars": {"PYTHONPATH": str(cluster.CHECKOUT), "MMAGENT_STORAGE": str(storage)}},
            }
        ],
    }
    schema = ServeDeploySchema.model_validate(file)
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options={"host": "127.0.0.1", "port": port})
    try:
        client: Any = _get_global_client()
        client.deploy_apps(schema, _blocking=True)
        answer = ask(url, {"text": "what color is the shape?"})
        assert answer["mmagent"]["bundle"] == "tiny"
        assert answer["mmagent"]["channel"] == "production"
        assert promote.service_of("production") == url, "jobs.promote must find it"
    finally:
        serve.delete("built")
        serve.shutdown()


def ask(url: str, question: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{url}/v1/predict", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.URLError:  # the proxy may hear of the application a moment later
            assert time.monotonic() < end, f"nothing answers at {url}"
            time.sleep(0.2)


def test_it_goes_where_its_role_says(ray_cluster: cluster.Cluster, tiny_bundle: Path, storage: Path) -> None:
    app = build_app({"bundle": str(tiny_bundle), "role": "serve", "cpus": 2})
    [deployment] = [app._bound_deployment]
    options: Any = deployment.ray_actor_options
    assert options["label_selector"] == {ROLE_LABEL: "serve"}
    assert options["num_cpus"] == 2
    anywhere: Any = build_app({"bundle": str(tiny_bundle)})._bound_deployment.ray_actor_options
    assert not anywhere.get("label_selector")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({}, "one of the two is wanted"),
        ({"bundle": "x", "channel": "y"}, "one of the two is wanted"),
        ({"bundle": "x", "host": "0.0.0.0"}, "MMAGENT_API_KEYS"),
        ({"bundle": "x", "key_hashes": ["00"]}, "come from the environment"),
        ({"bundle": "x", "tls_cert": "c", "tls_key": "k"}, "TLS ends at what stands before"),
        ({"bundle": "x", "url": "http://h"}, "only a channel's service"),
        ({"bundle": "x", "max_replica": 2}, "max-replica"),
        ({"bundle": "x", "max_replicas": 0}, "--max-replicas is 0"),
    ],
)
def test_wrong_arguments_say_what_to_do(storage: Path, args: dict[str, Any], says: str) -> None:
    with pytest.raises(StartError, match=says):
        build_app(args)


def test_keys_and_store_come_from_the_environment(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMAGENT_API_KEYS", KEY)
    monkeypatch.setenv(STORE_VARIABLE, "redis://:secret@redis:6379/1")
    config = configured({"host": "0.0.0.0"})
    assert (len(config.key_hashes), config.store) == (1, "redis://:secret@redis:6379/1")
    assert configured({"store": "redis://other:6379/0"}).store == "redis://other:6379/0"
