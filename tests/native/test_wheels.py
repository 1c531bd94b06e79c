"""The package's wheel: built without a compiler, the same from every folder, with the commit in its version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from expertd.version import RELEASE
from tests.support.native.arm64 import run_python
from tests.support.native.build import ROOT, SUFFIX

REVISION = "0123456789abcdef0123456789abcdef01234567"
DATE = 1_700_000_000
BUILD = """
import building
wanted = building.get_requires_for_build_wheel()
assert [name for name in wanted if name.startswith("ziglang")], wanted
assert building.get_requires_for_build_editable() == wanted
print(building.build_wheel("dist"))
"""
USE = """
import _native
assert _native.crc32c(b"123456789") == 0xE3069283
print(_native.instruction_set())
"""
ORIGIN = "import origin; print(origin.revision(), origin.date())"
COMMIT = ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message=a")
HERE = {"PYTHONPATH": "native"}
GIT = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "GIT_COMMITTER_DATE": "@5 +0000"}


def python(code: str, folder: Path, environment: dict[str, str], umask: int = -1) -> str:
    """What `code` prints, run in `folder`."""
    command = (sys.executable, "-c", code)
    done = subprocess.run(
        command, cwd=folder, env=environment, umask=umask, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def build(folder: Path, home: Path, umask: int = 0o022, compiled: Path | None = None, **told: str) -> Path:
    """A wheel from a checkout at `folder`, on a machine without a compiler; what another folder has compiled is kept.

    zig keeps its own libraries, as it compiled them, in `home`; what is compiled for the wheel it does not.
    """
    names = ["client", "kernels", "native", "proto", "server", "src"]
    names += ["LICENSE", "README.md", "pyproject.toml", "setup.py"]
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    folder.mkdir(parents=True)
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=built)
        else:
            shutil.copyfile(ROOT / name, folder / name)
    if compiled is not None:
        (extension,) = compiled.glob(f"build/lib*/expertd/_native{SUFFIX}")
        place = folder / extension.relative_to(compiled)
        place.parent.mkdir(parents=True)
        # Newer than the sources: it is not compiled again.
        shutil.copy(extension, place)
    known = {"EXPERTD_REVISION": REVISION, "SOURCE_DATE_EPOCH": str(DATE)}
    known |= {"PATH": str(home / "nothing"), "HOME": str(home), "PYTHONPATH": "native"}
    python(BUILD, folder, known | told, umask)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def wheel(home: Path) -> Path:
    return build(home / "expertd", home)


@pytest.fixture
def package(wheel: Path, tmp_path: Path) -> Path:
    """`expertd` as the wheel has it."""
    shutil.unpack_archive(wheel, tmp_path / "wheel", "zip")
    return tmp_path / "wheel/expertd"


def test_a_wheel_is_built_without_a_compiler(package: Path) -> None:
    assert {path.name for path in package.glob("_native*")} == {"_native.pyi", f"_native{SUFFIX}"}
    assert python(USE, package, {"PYTHONPATH": str(package)}).strip()
    # Compiled for this processor's family, not for this processor: glibc and libraries that every Linux has.
    needed = subprocess.check_output(["readelf", "--version-info", package / f"_native{SUFFIX}"], text=True)
    versions = {word for word in needed.split() if word.startswith("GLIBC_2.")}
    assert max(int(word.split(".")[1]) for word in versions) <= 17


def test_a_wheel_does_not_say_where_it_was_built(package: Path, home: Path) -> None:
    """Nor do zig's own libraries in it."""
    compiled = (package / f"_native{SUFFIX}").read_bytes()
    assert str(home).encode() not in compiled


def test_another_folder_gives_the_same_wheel(wheel: Path, home: Path, tmp_path: Path) -> None:
    """At another time and with another umask, bit for bit. `make images-twice` compiles twice, too, for minutes."""
    again = build(tmp_path / "another" / "name", home / "nobody", umask=0o077, compiled=wheel.parent.parent)
    assert not (home / "nobody").exists(), "it was compiled again"
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert {one.filename: (one.CRC, one.external_attr) for one in first.infolist()} == {
            one.filename: (one.CRC, one.external_attr) for one in second.infolist()
        }
    assert again.read_bytes() == wheel.read_bytes()


def test_a_wheel_for_arm64_computes_there(home: Path, tmp_path: Path) -> None:
    wheel = build(home / "arm64", home, EXPERTD_ARCH="aarch64")
    assert wheel.name.endswith("-linux_aarch64.whl")
    shutil.unpack_archive(wheel, tmp_path / "wheel", "zip")
    pytest_there = (
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::pytest.PytestConfigWarning",
    )
    done = run_python(
        *pytest_there,
        "--override-ini=addopts=--import-mode=importlib",
        "tests/native/test_core.py",
        folder=ROOT,
        paths=[tmp_path / "wheel"],
    )
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE), done.stdout + done.stderr


def test_a_processor_without_wheels_is_refused() -> None:
    with pytest.raises(
        AssertionError, match="EXPERTD_ARCH is 'sparc'; wheels are built on Linux, for x86_64 or aarch64"
    ):
        python("import building", ROOT, HERE | {"EXPERTD_ARCH": "sparc"})


def test_a_wheel_says_its_commit(package: Path) -> None:
    code = "from expertd.cli import main; main(['--version'])"
    assert python(code, package, {"PYTHONPATH": str(package.parent)}) == f"expertd {RELEASE}+g{REVISION[:12]}\n"


def test_a_checkout_knows_its_commit_and_date(tmp_path: Path) -> None:
    (tmp_path / "native").mkdir()
    source = tmp_path / "native/origin.py"
    shutil.copyfile(ROOT / "native/origin.py", source)
    assert python(ORIGIN, tmp_path, HERE) == " \n", "no repository, nothing known"

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", *arguments], cwd=tmp_path, text=True, env=GIT).strip()

    git("init", "--quiet")
    git("add", "native/origin.py")
    git(*COMMIT)
    commit = git("rev-parse", "HEAD")[:12]
    assert python(ORIGIN, tmp_path, HERE | GIT) == f"{commit} 5\n"
    source.write_text(source.read_text() + "\n")
    assert python(ORIGIN, tmp_path, HERE | GIT) == f"{commit}.dirty 5\n"
    told = {"EXPERTD_REVISION": f"{REVISION}-dirty", "SOURCE_DATE_EPOCH": "7"}
    assert python(ORIGIN, tmp_path, HERE | told) == f"{REVISION[:12]}.dirty 7\n"


def test_a_revision_that_is_no_commit_is_refused(tmp_path: Path) -> None:
    code = "import origin; origin.revision()"
    command = (sys.executable, "-c", code)
    environment = {"PYTHONPATH": str(ROOT / "native"), "EXPERTD_REVISION": "main"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "ValueError: EXPERTD_REVISION is 'main'; it must be 12 to 40 digits of a commit" in done.stderr
