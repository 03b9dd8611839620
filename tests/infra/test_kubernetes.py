"""The manifests against the published schemas, and against each other, the code and the pinned versions."""

import json
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import mlflow.environment_variables
import pytest
import yaml

from infra.schedule import rayjob
from infra.schedule.rayjob import Cluster, scheduled, tick_of_job
from pipeline.commands.run import run
from pipeline.config.model import load_config

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "infra/kubernetes"
CRDS = ROOT.parent / "shared/kuberay-crds"
VERSION = "1.34"  # of the Kubernetes schemas


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((MANIFESTS / name).read_text()))


def only(name: str, kind: str) -> dict[str, Any]:
    found = [document for document in documents(name) if document["kind"] == kind]
    assert len(found) == 1
    return found[0]


FILES = sorted(path.name for path in MANIFESTS.glob("*.yaml") if path.name != "kustomization.yaml")
BUILT_IN = [
    (name, document["kind"])
    for name in FILES
    for document in documents(name)
    if not document["apiVersion"].startswith("ray.io/")
]


def clusters() -> dict[str, dict[str, Any]]:
    return {
        "rayjob.yaml": only("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"],
        "raycronjob.yaml": only("raycronjob.yaml", "RayCronJob")["spec"]["jobTemplate"]["rayClusterSpec"],
        "raycluster.yaml": only("raycluster.yaml", "RayCluster")["spec"],
    }


def templates() -> dict[str, dict[str, Any]]:
    """Every pod template, by where it is."""
    cron, mlflow_server = only("cronjob.yaml", "CronJob"), only("mlflow.yaml", "Deployment")
    found = {"cronjob": cron["spec"]["jobTemplate"]["spec"]["template"], "mlflow": mlflow_server["spec"]["template"]}
    jobs = {
        "rayjob.yaml": only("rayjob.yaml", "RayJob")["spec"],
        "raycronjob.yaml": only("raycronjob.yaml", "RayCronJob")["spec"]["jobTemplate"],
    }
    found |= {f"submitter of {name}": job["submitterPodTemplate"] for name, job in jobs.items()}
    for name, cluster in clusters().items():
        found[f"{name} head"] = cluster["headGroupSpec"]["template"]
        found |= {f"{name} {group['groupName']}": group["template"] for group in cluster["workerGroupSpecs"]}
    return found


def containers() -> list[dict[str, Any]]:
    return [container for template in templates().values() for container in template["spec"]["containers"]]


# -- schemas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), BUILT_IN)
def test_built_in_kinds_fit_the_published_schema(name: str, kind: str) -> None:
    kubernetes_validate.validate(only(name, kind), VERSION, strict=True)


def test_pods_of_rays_kinds_fit_the_published_schema() -> None:
    for name, template in templates().items():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(pod, VERSION, strict=True)
        assert template["spec"]["containers"], name


def closed(schema: Any) -> Any:
    """The schema, refusing unknown fields (which Kubernetes would silently drop)."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.mark.parametrize(("name", "kind"), [("rayjob.yaml", "RayJob"), ("raycronjob.yaml", "RayCronJob")])
def test_rays_kinds_fit_their_definitions(name: str, kind: str) -> None:
    file = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.skip(f"KubeRay's definitions are not in {CRDS}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the definitions are long
    definition, manifest = yaml.load(file.read_text(), loader), only(name, kind)
    schemas = {version["name"]: version["schema"]["openAPIV3Schema"] for version in definition["spec"]["versions"]}
    schema = schemas[manifest["apiVersion"].removeprefix("ray.io/")]
    schema["properties"]["metadata"] = {}  # its schema is Kubernetes' own
    validator = jsonschema.Draft202012Validator(closed(schema))
    assert [f"{list(error.path)}: {error.message}" for error in validator.iter_errors(manifest)] == []
    del manifest["spec"]["jobTemplate" if kind == "RayCronJob" else "shutdownAfterJobFinishes"]
    manifest["spec"]["unheardOf"] = 1
    assert list(validator.iter_errors(manifest))  # the schema does refuse


def test_kustomize_builds_it() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(MANIFESTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert not [document for document in built if document["kind"] == "RayJob"]  # it would run at once
    made = [document for document in built if document["metadata"]["name"].startswith("expert-factory-rayjob-")]
    assert yaml.safe_load(made[0]["data"]["rayjob.yaml"]) == only("rayjob.yaml", "RayJob")
    cron = next(document for document in built if document["kind"] == "CronJob")
    volumes = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["volumes"]
    assert made[0]["metadata"]["name"] in [volume.get("configMap", {}).get("name") for volume in volumes]


# -- against each other, the code and the pins ---------------------------------------------------------------------


def test_one_cluster_and_one_job_everywhere() -> None:
    job = only("rayjob.yaml", "RayJob")
    assert only("raycronjob.yaml", "RayCronJob")["spec"]["jobTemplate"] == job["spec"]
    assert only("raycluster.yaml", "RayCluster")["spec"] == job["spec"]["rayClusterSpec"]
    assert (
        only("raycronjob.yaml", "RayCronJob")["spec"]["schedule"] == only("cronjob.yaml", "CronJob")["spec"]["schedule"]
    )
    kustomization = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())
    assert kustomization["configMapGenerator"] == [{"name": "expert-factory-rayjob", "files": ["rayjob.yaml"]}]
    pod = templates()["cronjob"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert {"name": "rayjob", "configMap": {"name": "expert-factory-rayjob"}} in pod["volumes"]
    assert pod["containers"][0]["command"][-1] == f"{mounts['rayjob']}/rayjob.yaml"


def test_versions() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    pinned = re.search(r"^ray==(\S+)$", lock, re.M)
    assert pinned is not None
    assert {cluster["rayVersion"] for cluster in clusters().values()} == {pinned[1]}
    images = {container["image"] for container in containers()}
    assert len(images) == 1
    image = images.pop()
    assert f"-t {image} " in (MANIFESTS / "Dockerfile").read_text()
    assert f'version = "{image.rpartition(":")[2]}"' in (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^FROM python:3\.11-slim$", (MANIFESTS / "Dockerfile").read_text(), re.M)


def test_the_cron_job_does_not_overlap_and_makes_up() -> None:
    spec = only("cronjob.yaml", "CronJob")["spec"]
    run = only("rayjob.yaml", "RayJob")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["startingDeadlineSeconds"] > 0
    # KubeRay's deadline is that of one attempt. The pod outlives them all, and the next tick finds them ended.
    job, attempts = spec["jobTemplate"]["spec"], run["backoffLimit"] + 1
    assert attempts * run["activeDeadlineSeconds"] < job["activeDeadlineSeconds"] < 24 * 3600
    assert run["shutdownAfterJobFinishes"] is True
    assert run["ttlSecondsAfterFinished"] > 0
    assert run["backoffLimit"] > 0


def test_a_failed_run_is_told_once() -> None:
    """The pod's exit statuses for a run that failed, and for bad input, start no other pod; a lost pod does."""
    job = only("cronjob.yaml", "CronJob")["spec"]["jobTemplate"]["spec"]
    fails, lost = job["podFailurePolicy"]["rules"]
    assert (fails["action"], fails["onExitCodes"]["operator"], fails["onExitCodes"]["values"]) == (
        "FailJob",
        "In",
        [1, 2],
    )
    assert fails["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert (lost["action"], lost["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # a failure policy needs it
    assert job["backoffLimit"] > 0


def test_the_service_account_may_do_what_the_pod_does_and_no_more() -> None:
    role, binding = only("cronjob.yaml", "Role"), only("cronjob.yaml", "RoleBinding")
    account = only("cronjob.yaml", "ServiceAccount")["metadata"]["name"]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert templates()["cronjob"]["spec"]["serviceAccountName"] == account
    others = [template for name, template in templates().items() if name != "cronjob"]
    assert all(template["spec"]["automountServiceAccountToken"] is False for template in others)


def test_the_entrypoint_is_one_that_the_main_job_takes() -> None:
    job = only("rayjob.yaml", "RayJob")
    python, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert python == "python"
    assert (ROOT / script.removeprefix("/app/")).is_file()
    given = run.make_context("main", list(arguments)).params
    config = load_config(ROOT / given["config_path"].removeprefix("/app/"), list(given["overrides"]))
    assert config.suite == job["metadata"]["labels"][rayjob.SUITE_LABEL]
    head, worker = (
        (group["template"]["spec"]["containers"][0]["resources"], int(group["rayStartParams"]["object-store-memory"]))
        for group in (
            job["spec"]["rayClusterSpec"]["headGroupSpec"],
            job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0],
        )
    )
    asked, node = [config.resources.expert, config.resources.evaluator], config.resources.node
    assert sum(one.gpus for one in asked) <= int(worker[0]["limits"]["nvidia.com/gpu"])
    assert sum(one.cpus for one in asked) <= int(worker[0]["requests"]["cpu"])
    # A merge node finds room on the head, and beside the experts of a worker: neither ever waits for the other.
    for (resources, objects), workers in ((head, []), (worker, asked)):
        memory = int(resources["limits"]["memory"].removesuffix("Gi")) - objects / (1 << 30)
        assert sum(one.memory_gib for one in [*workers, node]) <= 0.9 * memory


def test_every_variable_is_one_that_something_reads() -> None:
    code = "".join(
        path.read_text() for folder in ("infra", "workers", "pipeline") for path in (ROOT / folder).rglob("*.py")
    )
    names = set(only("configmap.yaml", "ConfigMap")["data"])
    names |= {entry["name"] for container in containers() for entry in container.get("env", ())}
    names |= set(re.findall(r"FACTORY_\w+(?==)", (MANIFESTS / "Dockerfile").read_text()))
    arguments = [word for container in containers() for word in container.get("command", ())]
    for name in names:
        if any(f"$({name})" in word for word in arguments):
            continue  # Kubernetes fills it in
        if name.startswith("MLFLOW_"):
            assert hasattr(mlflow.environment_variables, name) or name in code, name
        else:
            assert name.startswith("RAY_") or f'"{name}"' in code, name
    page = (ROOT / "docs" / "operations.md").read_text()
    wanted = {"FACTORY_S3_BUCKET", "FACTORY_S3_ENDPOINT", "MLFLOW_TRACKING_URI", "FACTORY_CACHE"}
    assert wanted <= names
    assert all(name in page for name in wanted)
    references = {
        entry["configMapRef"]["name"] for c in containers() for entry in c.get("envFrom", ()) if "configMapRef" in entry
    }
    assert references == {only("configmap.yaml", "ConfigMap")["metadata"]["name"]}
    for name, template in templates().items():
        if name.startswith("ray"):  # every Ray pod has the services' addresses and a cache that it may write
            container = template["spec"]["containers"][0]
            assert {"configMapRef": {"name": "expert-factory"}} in container["envFrom"]
            assert "/cache" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_no_secret_is_in_any_file() -> None:
    for path in MANIFESTS.iterdir():
        text = path.read_text()
        assert "kind: Secret\n" not in text
        secret = r"(SECRET|PASSWORD|TOKEN|ACCESS_KEY_ID|WEBHOOK_URL)\w*"
        values = re.findall(rf"(?m)^(?!#).*?\b\w*{secret}\s*[:=]\s*(\S+)", text)
        assert values == [], path.name
    for container in containers():
        for entry in container.get("env", ()):
            assert "valueFrom" in entry or entry["value"] in ("false", "true"), entry
    references = [
        entry["secretRef"]["name"] for c in containers() for entry in c.get("envFrom", ()) if "secretRef" in entry
    ]
    assert set(references) == {"expert-factory-credentials"}
    own = [name for name in templates() if not name.startswith("submitter")]  # that pod only talks to Ray's head
    assert len(references) == len(own)


def test_pods_run_without_privileges() -> None:
    for name, template in templates().items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["limits"]["memory"], name
            assert container["imagePullPolicy"] == "Always", (
                name
            )  # the tag may be built again, with other configurations
    dockerfile = (MANIFESTS / "Dockerfile").read_text()
    assert re.search(r"^USER 1000:1000$", dockerfile, re.M)
    copied = re.findall(r"^COPY (.+) \S+$", dockerfile, re.M)
    allowed = {
        line[1:] for line in (MANIFESTS / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    sources = {source for line in copied for source in line.split()}
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_gpu_workers_ask_for_a_gpu_and_bear_spot_nodes() -> None:
    for cluster in clusters().values():
        pod = cluster["workerGroupSpecs"][0]["template"]["spec"]
        resources = pod["containers"][0]["resources"]
        assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"]
        assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= {
            toleration["key"] for toleration in pod["tolerations"]
        }
        assert pod["nodeSelector"]
        assert cluster["authOptions"] == {"mode": "token"}


def test_the_mlflow_server_answers_to_the_name_that_clients_use() -> None:
    server = templates()["mlflow"]["spec"]["containers"][0]
    host = only("configmap.yaml", "ConfigMap")["data"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    allowed = next(word for word in server["command"] if word.startswith("--allowed-hosts="))
    assert host in allowed.removeprefix("--allowed-hosts=").split(",")
    service = only("mlflow.yaml", "Service")
    assert host == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert "MLFLOW_TRACKING_URI" not in [entry["name"] for entry in server["env"]]
    assert not [entry for entry in server["envFrom"] if "configMapRef" in entry]


# -- the CronJob's pod ---------------------------------------------------------------------------------------------


class Api:
    """The part of the Kubernetes API that the pod talks to; ``answers`` are the statuses of coming GETs."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.refuse: list[int] = []
        self.answers: list[dict[str, Any]] = []
        self.tokens: set[str] = set()
        self.told: list[dict[str, Any]] = []
        self.address = ""


@pytest.fixture
def api() -> Iterator[Api]:
    found = Api()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/hook":
                found.told.append(body)
                return self._answer(200, {})
            found.tokens.add(self.headers["Authorization"])
            assert self.path == "/apis/ray.io/v1/namespaces/ml/rayjobs"
            if found.refuse:
                return self._answer(found.refuse.pop(0), {})
            if body["metadata"]["name"] in [made["metadata"]["name"] for made in found.created]:
                return self._answer(409, {})
            found.created.append(body)
            return self._answer(201, body)

        def do_GET(self) -> None:
            assert (
                self.path.removeprefix("/apis/ray.io/v1/namespaces/ml/rayjobs/") == found.created[0]["metadata"]["name"]
            )
            answer = found.answers.pop(0)
            self._answer(answer.get("code", 200), {"status": answer})

        def _answer(self, code: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


JOB = "expert-factory-retrain-29384120"
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "jobId": "j1"}
FAILED = {
    "jobDeploymentStatus": "Failed",
    "jobStatus": "FAILED",
    "reason": "AppFailed",
    "message": "no",
    "jobId": "j1",
}


@pytest.fixture
def pod(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Run the pod's command, without waits."""
    (tmp_path / "token").write_text("t0ken\n")
    cluster = Cluster(api.address, "ml", tmp_path)
    monkeypatch.setattr(Cluster, "of_this_pod", classmethod(lambda _: cluster))
    monkeypatch.setenv("FACTORY_JOB_NAME", JOB)
    monkeypatch.setenv("FACTORY_JOB_UID", "u-1")
    monkeypatch.setenv("FACTORY_WEBHOOK_URL", f"{api.address}/hook")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return lambda: rayjob.retrain(MANIFESTS / "rayjob.yaml", wait=lambda _: None)


def test_a_tick_creates_its_job_waits_and_tells(api: Api, pod: Callable[[], int]) -> None:
    api.refuse = [503]
    api.answers = [{}, {"code": 500}, {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, SUCCEEDED]
    assert pod() == 0
    assert api.tokens == {"Bearer t0ken"}
    [made] = api.created
    assert made["spec"] == only("rayjob.yaml", "RayJob")["spec"]
    assert made["metadata"]["name"] == f"{JOB}-run" != JOB  # KubeRay's submitter is a Job named as the RayJob
    assert len(made["metadata"]["name"]) <= 47  # KubeRay's limit
    assert "generateName" not in made["metadata"]
    assert made["metadata"]["ownerReferences"][0]["uid"] == "u-1"
    assert api.told == [
        {"suite": "flan20", "tick": "2025-11-13T15:20:00+00:00", "submission_id": "j1", "status": "SUCCEEDED",
         "exit_code": None, "message": "", "mlflow_run": None}
    ]  # fmt: skip


def test_a_replaced_pod_finds_the_job_of_its_tick(api: Api, pod: Callable[[], int]) -> None:
    api.answers = [{"jobDeploymentStatus": "Running"}, FAILED]
    api.created.append(scheduled(only("rayjob.yaml", "RayJob"), JOB, "u-1"))
    assert pod() == 1
    assert len(api.created) == 1
    assert (api.told[0]["status"], api.told[0]["message"]) == ("FAILED", "AppFailed: no")


def test_a_run_that_its_deadline_ended_has_failed(api: Api, pod: Callable[[], int]) -> None:
    """KubeRay then leaves the job's status as it was."""
    status = {"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "DeadlineExceeded", "jobId": "j1"}
    api.answers = [status]
    assert pod() == 1
    assert (api.told[0]["status"], api.told[0]["message"]) == ("FAILED", "DeadlineExceeded")


def test_what_kubernetes_refuses_ends_the_pod(
    api: Api, pod: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    api.refuse = [403]
    assert pod() == 1
    assert "did not create" in capsys.readouterr().err
    api.answers = [{"code": 404}]
    assert pod() == 1
    assert "did not look at" in capsys.readouterr().err
    assert [(told["suite"], told["tick"], told["status"], told["submission_id"]) for told in api.told] == [
        ("flan20", "2025-11-13T15:20:00+00:00", "FAILED", "")
    ] * 2
    assert "did not create" in api.told[0]["message"]


def test_a_token_that_was_just_replaced_ends_nothing(api: Api, pod: Callable[[], int]) -> None:
    api.refuse, api.answers = [401], [{"code": 401}, SUCCEEDED]
    assert pod() == 0
    api.refuse = [401] * 20
    assert pod() == 1, "but one that is never accepted"
    assert "401" in api.told[-1]["message"]


def test_outside_a_pod(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("FACTORY_JOB_NAME", JOB)
    assert rayjob.retrain(MANIFESTS / "rayjob.yaml") == 2
    assert "not in a Kubernetes pod" in capsys.readouterr().err


def test_ticks_of_job_names() -> None:
    assert tick_of_job(JOB) == "2025-11-13T15:20:00+00:00"
    assert tick_of_job("by-hand") is None
