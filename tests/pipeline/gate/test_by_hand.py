"""What `rollback` says when it fails on its way; who becomes champion is tests/infra/registry/test_aliases.py."""

from collections.abc import Callable

import pytest
from click.testing import CliRunner

from infra.errors import RegistryError
from infra.registry.versions import PREVIOUS, ROLLED_BACK, Version
from pipeline.commands import models
from pipeline.gate import by_hand

HINT = "to go on, and take no other version away: python -m pipeline rollback mine --version 3"


@pytest.fixture
def rolled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The output of a rollback of version 3 that fails before or after the alias has moved to version 2."""

    def call(*options: str, after: bool, answers: bool = True) -> str:
        leads, gone = [Version("mine.merged", 3, {PREVIOUS: "2"})], {}

        def rollback(*_: object) -> tuple[Version, Version]:
            if not after:
                raise RegistryError("version 3 of 'mine.merged' is its first champion")
            leads[0] = Version("mine.merged", 2, {PREVIOUS: ""})
            gone[ROLLED_BACK] = "today: rude"
            return leads[0], Version("mine.merged", 3, {})

        def champion(_: str) -> Version:
            if leads[0].version == 2 and not answers:
                raise RegistryError("no answer")
            return leads[0]

        def follow(*_: object, **__: object) -> None:
            raise RegistryError("the aliases of 'mine.merged-checkpoint' are being changed by somebody else")

        monkeypatch.setattr(by_hand, "_model", lambda suite, task: (None, f"{suite}.{task}"))
        monkeypatch.setattr(by_hand, "_follow", follow)
        monkeypatch.setattr(by_hand.aliases, "rollback", rollback)
        monkeypatch.setattr(by_hand.versions, "champion", champion)
        monkeypatch.setattr(
            by_hand.versions,
            "find_version",
            lambda name, n: Version(name, n, {PREVIOUS: str(n - 1), **gone}),
        )
        done = CliRunner().invoke(models.rollback, ["mine", *options])
        assert done.exit_code == 2
        return done.output

    return call


@pytest.mark.parametrize("answers", [True, False])
def test_what_was_begun_can_be_gone_on_with(rolled: Callable[..., str], answers: bool) -> None:
    output = rolled(after=True, answers=answers)
    assert "version 2 is champion again" in output
    assert "being changed by somebody else" in output
    assert HINT in output
    assert f"{HINT} --task in0" in rolled("--task", "in0", after=True)


def test_where_nothing_was_done_nothing_is_to_be_gone_on_with(rolled: Callable[..., str]) -> None:
    output = rolled(after=False)
    assert "first champion" in output
    assert "to go on" not in output
