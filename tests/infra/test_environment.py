"""What manifests record of code and machine: git where there is a checkout, else what the submitter says."""

import shutil
import subprocess
from pathlib import Path

import pytest

from infra import environment
from infra.environment import STOP_VARIABLES, STORE_VARIABLES, git_commit, job_variables, source_sha256
from infra.store.s3 import Store


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A committed checkout with one module and one page."""
    root = tmp_path / "checkout"
    (root / "infra" / "deep").mkdir(parents=True)
    (root / "infra" / "deep" / "module.py").write_text("x = 1\n")
    (root / "README.md").write_text("a page\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(root), *who, *arguments], check=True)
    return root


def test_a_commit_says_when_the_code_differs_from_it(checkout: Path) -> None:
    commit = git_commit(checkout)
    assert len(commit) == 40
    (checkout / "README.md").write_text("another page\n")
    assert git_commit(checkout) == commit  # no code
    (checkout / "infra" / "new.py").write_text("y = 2\n")
    assert git_commit(checkout) == f"{commit}-dirty"
    (checkout / "infra" / "new.py").unlink()
    (checkout / "infra" / "deep" / "module.py").write_text("x = 2\n")
    assert git_commit(checkout) == f"{commit}-dirty"


def test_a_copy_is_no_checkout_and_has_the_same_hash(checkout: Path) -> None:
    copy = checkout / "elsewhere" / "copy"  # inside a checkout that is not its own
    shutil.copytree(checkout / "infra", copy / "infra")
    (copy / "infra" / "module.pyc").write_bytes(b"0")
    assert git_commit(copy) == ""
    assert source_sha256(copy) == source_sha256(checkout)
    (copy / "infra" / "deep" / "module.py").rename(copy / "infra" / "module.py")
    assert source_sha256(copy) != source_sha256(checkout)


def test_a_copy_believes_its_submitter(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STORE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    copy = checkout / "copy"
    shutil.copytree(checkout / "infra", copy / "infra")
    commit = git_commit(checkout)

    def found(root: Path, variable: str) -> dict[str, str]:
        monkeypatch.setattr(environment, "ROOT", root)
        monkeypatch.setenv("FACTORY_GIT_COMMIT", variable)
        environment.code_version.cache_clear()
        return environment.code_version()

    try:
        assert found(checkout, "")["git_commit"] == commit
        assert job_variables() == {"FACTORY_GIT_COMMIT": commit, **STOP_VARIABLES}
        assert found(copy, commit) == {"git_commit": commit, "source_sha256": source_sha256(checkout)}
        assert found(checkout, "0" * 40)["git_commit"] == commit  # git knows better
        assert found(copy, "") == {"source_sha256": source_sha256(checkout)}
        assert job_variables() == STOP_VARIABLES
    finally:
        environment.code_version.cache_clear()


def test_a_job_works_in_the_factory_of_the_shell_that_submits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STORE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FACTORY_S3_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    assert set(job_variables()) <= {"FACTORY_GIT_COMMIT", *STOP_VARIABLES}  # the cluster's own apply
    monkeypatch.setenv("FACTORY_S3_PREFIX", "team/a")
    monkeypatch.setenv("FACTORY_S3_BUCKET", "models")
    given = {name: value for name, value in job_variables().items() if name in STORE_VARIABLES}
    assert given == {"FACTORY_S3_PREFIX": "team/a", "FACTORY_S3_BUCKET": "models"}
    assert Store.from_env().uri("x") == "s3://models/team/a/x"


def test_an_environment_names_versions_device_and_host() -> None:
    """Without Ray there is no node; tests/e2e/test_loads_anywhere.py sees those of workers."""
    found = environment.environment(["cpu", "cpu"])
    assert {"python", "machine", "torch", "ray", "mlflow", "device", "host", "source_sha256"} <= set(found)
    assert found["device"] == "cpu, cpu"
