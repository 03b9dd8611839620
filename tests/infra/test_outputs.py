"""Where nothing can be written is known before the work."""

from pathlib import Path

import pytest

from infra.errors import ConfigError
from infra.outputs import check_output


def test_folders_are_made_and_nothing_is_left(tmp_path: Path) -> None:
    check_output(tmp_path / "deep" / "er" / "file", "--out")
    check_output(tmp_path / "folder", "--out", folder=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "er", "folder"]


REFUSED = {
    "a folder where a file is meant": (".", False, "is a folder; name a file in it"),
    "below a file": ("file/x", False, "cannot be written"),
    "a file where a folder is meant": ("file", True, r"cannot be written \(File exists\)"),
    "where nobody may write": ("/proc/nothing/x", False, r"cannot be written \(.*\); name another place"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    name, folder, text = REFUSED[case]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"^--out .*{text}"):
        check_output(tmp_path / name, "--out", folder)
