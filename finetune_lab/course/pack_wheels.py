"""Every wheel that an install needs on a named platform, fetched by pip: round after round until nothing is missing.

`pip download --platform` asks for wheels of another system, but reads the conditions of dependencies (`; sys_platform ==
"win32"`) on the system that it runs on, and so forgets what only the other one needs. So pip fetches without
dependencies here, the metadata of each wheel that arrived say what it needs on the target, and the next round fetches
that. What is in the folder already is not fetched again.

It leaves out: the resolution of conflicts. Every version comes from constraints.txt, which is a lock of everything
that Linux needs; the few packages that only Windows or macOS needs come in their newest fitting version.
"""

import email
import functools
import platform
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from finetune_lab.errors import UserError

MANYLINUX = [f"manylinux_2_{minor}_{{}}" for minor in range(28, 4, -1)] + [
    "manylinux2014_{}",
    "manylinux1_{}",
    "linux_{}",
]
PLATFORMS = {  # name: (pip's tags, what a dependency's condition sees)
    "linux": ([tag.format("x86_64") for tag in MANYLINUX], ("posix", "linux", "Linux", "x86_64")),
    "linux-arm": ([tag.format("aarch64") for tag in MANYLINUX], ("posix", "linux", "Linux", "aarch64")),
    "windows": (["win_amd64"], ("nt", "win32", "Windows", "AMD64")),
    "macos": (["macosx_14_0_arm64", "macosx_14_0_universal2"], ("posix", "darwin", "Darwin", "arm64")),
}


@dataclass(frozen=True)
class Target:
    """A system to install on: a name of PLATFORMS and a Python like `3.11`."""

    platform: str
    python: str

    def environment(self) -> dict[str, str]:
        """What the conditions of dependencies are read against."""
        system = dict(zip(("os_name", "sys_platform", "platform_system", "platform_machine"),
                          PLATFORMS[self.platform][1], strict=True))  # fmt: skip
        python = {"python_version": self.python, "python_full_version": f"{self.python}.0"}
        unknown = {"platform_release": "", "platform_version": "", "platform_python_implementation": "CPython"}
        return default_environment() | system | python | unknown | {"implementation_name": "cpython"}

    def pip(self) -> list[str]:
        """pip's words for it."""
        short = self.python.replace(".", "")
        tags = [word for tag in PLATFORMS[self.platform][0] for word in ("--platform", tag)]
        abis = [word for abi in (f"cp{short}", "abi3", "none") for word in ("--abi", abi)]
        return [*tags, "--python-version", self.python, "--implementation", "cp", *abis]


def here() -> Target:
    """This machine, where it is one of PLATFORMS.

    Raises:
        UserError: it is not.
    """
    seen = (platform.system(), platform.machine().lower())
    for name, (_, (_, _, system, machine)) in PLATFORMS.items():
        if seen == (system, machine.lower()):
            return Target(name, f"{sys.version_info.major}.{sys.version_info.minor}")
    raise UserError(f"no name for this machine ({' '.join(seen)}): give --platform, one of {', '.join(PLATFORMS)}.")


def needs(wheel: Path, extras: frozenset[str], environment: dict[str, str]) -> list[Requirement]:
    """What a wheel says that it needs in this environment, with these of its extras."""
    with zipfile.ZipFile(wheel) as zipped:
        (name,) = [name for name in zipped.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1]
        lines = email.message_from_bytes(zipped.read(name)).get_all("Requires-Dist") or []
    return wanted([Requirement(line) for line in lines], extras, environment)


def wanted(requirements: list[Requirement], extras: frozenset[str], environment: dict[str, str]) -> list[Requirement]:
    """Those whose condition holds in this environment, for one of the extras or without any."""
    cases = [environment | {"extra": extra} for extra in (extras or {""})]
    return [one for one in requirements if one.marker is None or any(one.marker.evaluate(case) for case in cases)]


@functools.cache
def sound(wheel: Path, size: int) -> bool:
    """Whether the file, of `size` bytes, is a whole archive: a broken download is fetched again."""
    try:
        with zipfile.ZipFile(wheel) as zipped:
            return zipped.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def present(folder: Path) -> dict[str, Path]:
    """canonical name -> wheel, for the whole wheels of a folder; a broken one is removed."""
    found = {}
    for path in sorted(folder.glob("*.whl")):
        try:
            name = parse_wheel_filename(path.name)[0]
        except InvalidWheelFilename:
            continue
        if sound(path, path.stat().st_size):
            found[name] = path
        else:
            path.unlink()
    return found


def fits(wheel: Path, requirement: str) -> bool:
    """Whether a wheel's version is the one that is asked for (`+cpu` and the like do not count against it)."""
    return Requirement(requirement).specifier.contains(parse_wheel_filename(wheel.name)[1], prereleases=True)


def download(requirements: list[str], folder: Path, target: Target, index: str | None = None) -> None:
    """Let pip put exactly these wheels into the folder, without what they need; its own settings count.

    Raises:
        UserError: pip could not; with its reason.
    """
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet",
        "--disable-pip-version-check", "--retries", "3", "--dest", str(folder), *target.pip(),
        *(["--index-url", index] if index else []), *requirements,
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        reasons = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line or "No space left" in line]
        if any("No space left" in line for line in reasons):
            raise UserError(f"the disk of {folder} is full; make room and run the same command again: it goes on.")
        reason = reasons[-1].removeprefix("ERROR: ")[:300] if reasons else "no reason given"
        raise UserError(f"pip stopped ({reason}). Run the same command again: what arrived is kept.")


def collect(
    first: list[str], pins: dict[str, str], folder: Path, target: Target, index: str | None = None, fetch=download
) -> list[Path]:
    """Bring `first` and everything they need on the target into `folder`; returns the wheels, by name.

    pins: canonical name -> version. index: where torch comes from, if not from where everything else does.
    fetch: `download`, or a stand-in for tests. A wheel in the folder that nothing asks for is removed.

    Raises:
        UserError: pip could not fetch something, or there is no wheel of it for the target.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = target.environment()
    asked: dict[str, str] = {}  # name -> requirement as given to pip
    extras: dict[str, frozenset[str]] = {}
    todo = wanted([Requirement(line) for line in first], frozenset(), environment)
    rounds = 0
    while todo:
        for one in todo:
            name = canonicalize_name(one.name)
            asked.setdefault(name, f"{name}=={pins[name]}" if name in pins else f"{name}{one.specifier}")
            extras[name] = extras.get(name, frozenset()) | one.extras
        have = {name: path for name, path in present(folder).items() if name in asked and fits(path, asked[name])}
        missing = sorted(set(asked) - set(have))
        if missing:
            rounds += 1
            print(f"wheels, round {rounds}: {len(missing)} more, {missing[0]} to {missing[-1]}", flush=True)
            for names, where in ([name for name in missing if name != "torch"], None), (["torch"], index):
                if chosen := [asked[name] for name in names if name in missing]:
                    fetch(chosen, folder, target, where)
            have = {name: path for name, path in present(folder).items() if name in asked}
        if lost := sorted(set(asked) - set(have)):
            raise UserError(f"pip gave no wheel for {', '.join(lost)} on {target.platform}, Python {target.python}.")
        todo = []
        for name, path in have.items():
            for one in needs(path, extras[name], environment):
                known = canonicalize_name(one.name)
                if known not in asked or not one.extras <= extras[known]:
                    todo.append(one)
    for stale in set(folder.glob("*.whl")) - set(have.values()):
        stale.unlink()  # of other pins
    return [have[name] for name in sorted(have)]
