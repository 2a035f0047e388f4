"""Install the wheel of a folder outside the checkout and use it: `python wheel_smoke.py dist`.

The wheel goes into a fresh virtual environment. Torch is not installed again: a .pth file adds the folder
it lies in. Python reads .pth files only in an environment's own site-packages, so the checkout's editable
install, which is such a file in the borrowed folder, stays out of sight.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

USE_PACKAGE = Path(__file__).resolve().with_name("use_package.py")


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
        used = subprocess.run([python, "-I", str(USE_PACKAGE)], cwd=scratch, check=False)
    sys.exit(used.returncode)


if __name__ == "__main__":
    main()
