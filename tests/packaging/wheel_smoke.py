"""Install the wheel of a folder outside the checkout and use it: `python wheel_smoke.py dist`.

The wheel goes into a fresh virtual environment. Torch and the trainer's libraries are not installed again: a .pth file
adds the folder they lie in. Python reads .pth files only in an environment's own site-packages, so the checkout's
editable install, which is such a file in the borrowed folder, stays out of sight.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

USE_PACKAGE = Path(__file__).resolve().with_name("use_package.py")
# Networks of milliseconds.
SMALL_RUN = (
    *("--iterations", "2", "--batch-size", "4", "--device", "cpu", "--network.resolution", "32"),
    *("--network.base-width", "1", "--network.g-attention", "16", "--network.d-attention", "8"),
)


def main() -> None:
    wheels = sorted(Path(sys.argv[1]).glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"expected one wheel in {sys.argv[1]}, found {[path.name for path in wheels]}")
    with tempfile.TemporaryDirectory(prefix="wheel-smoke-") as scratch:
        environment = Path(scratch, "venv")
        venv.create(environment, symlinks=True)
        python = str(environment / "bin" / "python")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
        subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheels[0])], check=True)
        site_packages = subprocess.run(
            [python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        # Only now: before, pip would see the editable install and take the version for installed.
        borrowed = "".join(f"{sysconfig.get_path(kind)}\n" for kind in ("purelib", "platlib"))
        Path(site_packages, "borrowed.pth").write_text(borrowed)
        for command in commands(environment):
            print("$", *command, flush=True)
            used = subprocess.run(
                command, cwd=scratch, env=clean_environment(), capture_output=True, text=True, check=False
            )
            if used.returncode:
                sys.exit(f"exit code {used.returncode}\n{used.stdout}{used.stderr}")
        missing = [
            name for name in ("verdict.json", "samples.png") if not Path(scratch, "demo", name).exists()
        ]
        if missing:
            sys.exit(f"sagan demo did not write {missing}")
        print(f"{wheels[0].name} works outside the checkout")


def commands(environment: Path) -> list[list[str]]:
    """Return what a user of the wheel does, in a folder that is no checkout."""
    python, sagan = str(environment / "bin" / "python"), str(environment / "bin" / "sagan")
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sagan"]
    return [
        [python, "-I", str(USE_PACKAGE)],
        [sagan, "--help"],
        [sagan, "demo", "--iterations", "2", "--out", "demo"],
        [*torchrun, "train", "--data", "demo/digits", "--out", "run", *SMALL_RUN],
    ]


def clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()
