"""What KubeRay's API server would take: the fields of ray.io/v1 in KubeRay v1.6.2, and their types.

Written down from its reference of the API (docs/reference/api.md at the tag v1.6.2). A field that is not here is
refused, which is stricter than the API server: that drops it in silence. Pod templates are left to Kubernetes'
own schemas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

VERSION = "v1.6.2"

_STRING = {"type": "string"}
_BOOL = {"type": "boolean"}
_COUNT = {"type": "integer", "minimum": 0}
_MAP = {"type": "object", "additionalProperties": _STRING}
_TEMPLATE = {"type": "object", "required": ["spec"]}
_ANY = {"type": "object"}
_MANAGED = {"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]}


def _object(required: str = "", **fields: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required.split(), "properties": fields}


_CREDENTIAL = _object(valueFrom=_ANY, value=_STRING)
_DELETION = {"enum": ["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]}
_RULE = _object(
    "policy condition",
    policy=_DELETION,
    condition=_object(jobStatus=_STRING, jobDeploymentStatus=_STRING, ttlSeconds=_COUNT),
)

CLUSTER = _object(
    "headGroupSpec",
    upgradeStrategy=_object(type={"enum": ["Recreate", "None"]}),
    authOptions=_object(enableK8sTokenAuth=_BOOL, secretName=_STRING, mode={"enum": ["disabled", "token"]}),
    suspend=_BOOL,
    managedBy=_MANAGED,
    autoscalerOptions=_object(
        resources=_ANY,
        image=_STRING,
        imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
        securityContext=_ANY,
        idleTimeoutSeconds=_COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]},
        env={"type": "array"},
        envFrom={"type": "array"},
        volumeMounts={"type": "array"},
    ),
    headServiceAnnotations=_MAP,
    enableInTreeAutoscaling=_BOOL,
    gcsFaultToleranceOptions=_object(
        "redisAddress",
        redisUsername=_CREDENTIAL,
        redisPassword=_CREDENTIAL,
        externalStorageNamespace=_STRING,
        redisAddress=_STRING,
    ),
    headGroupSpec=_object(
        "template",
        template=_TEMPLATE,
        headService=_ANY,
        enableIngress=_BOOL,
        resources=_MAP,
        labels=_MAP,
        rayStartParams=_MAP,
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    ),
    rayVersion=_STRING,
    workerGroupSpecs={
        "type": "array",
        "items": _object(
            "groupName maxReplicas minReplicas template",
            suspend=_BOOL,
            groupName=_STRING,
            replicas=_COUNT,
            minReplicas=_COUNT,
            maxReplicas=_COUNT,
            idleTimeoutSeconds=_COUNT,
            resources=_MAP,
            labels=_MAP,
            rayStartParams=_MAP,
            template=_TEMPLATE,
            scaleStrategy=_object(workersToDelete={"type": "array", "items": _STRING}),
            numOfHosts={"type": "integer", "minimum": 1},
        ),
    },
)

JOB = _object(
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    backoffLimit=_COUNT,
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=_TEMPLATE,
    metadata=_MAP,
    clusterSelector=_MAP,
    submitterConfig=_object(backoffLimit=_COUNT),
    managedBy=_MANAGED,
    deletionStrategy=_object(
        onSuccess=_object(policy=_DELETION),
        onFailure=_object(policy=_DELETION),
        deletionRules={"type": "array", "minItems": 1, "items": _RULE},
    ),
    entrypoint=_STRING,
    runtimeEnvYAML=_STRING,
    jobId=_STRING,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypointResources=_STRING,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    ttlSecondsAfterFinished=_COUNT,
    preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=_BOOL,
    suspend=_BOOL,
)

SERVICE = _object(
    "rayClusterConfig",
    rayClusterDeletionDelaySeconds=_COUNT,
    serviceUnhealthySecondThreshold=_COUNT,
    deploymentUnhealthySecondThreshold=_COUNT,
    serveService=_ANY,
    upgradeStrategy=_object(
        type={"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]},
        clusterUpgradeOptions=_object(
            "gatewayClassName",
            maxSurgePercent=_COUNT,
            stepSizePercent=_COUNT,
            intervalSeconds=_COUNT,
            gatewayClassName=_STRING,
        ),
    ),
    managedBy=_MANAGED,
    serveConfigV2=_STRING,
    rayClusterConfig=CLUSTER,
    excludeHeadPodFromServeSvc=_BOOL,
)

KINDS = {
    kind: _object(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=_ANY,
        spec=spec,
    )
    for kind, spec in {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVICE}.items()
}


def cluster_of(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The Ray that a document describes, if it describes one."""
    spec: Mapping[str, Any] = document["spec"]
    if document["kind"] == "RayCluster":
        return spec
    return spec.get("rayClusterConfig") or spec.get("rayClusterSpec")


def groups(cluster: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Head and workers."""
    yield cluster["headGroupSpec"]
    yield from cluster.get("workerGroupSpecs", [])
