"""Check what was built: `python tests/check_wheel.py VENV DIST`, with the wheel alone installed in the environment
VENV.

Its modules must be there, compile and be all that this interpreter imports (it lends its packages, and only those); so
must the files that are no code.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path


ROOT = Path(__file__).parent.parent
CHECK = """
import importlib, pkgutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import peft_cast
assert Path(peft_cast.__file__).is_relative_to(sys.argv[1]), peft_cast.__file__
for module in pkgutil.walk_packages(peft_cast.__path__, "peft_cast."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in peft_cast.__all__:
    getattr(peft_cast, name)
print(peft_cast.__version__, "imports from the wheel")
"""


def main(venv: Path, dist: Path) -> None:
    [installed] = venv.glob("lib/python*/site-packages")
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "peft_cast").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    found = {
        str(path.relative_to(installed)) for path in (installed / "peft_cast").rglob("*") if path.suffix != ".pyc"
    }
    if missing := sorted(wanted - found):
        raise SystemExit(f"The wheel lacks {', '.join(missing)}.")
    [sdist] = dist.glob("peft_cast-*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    if missing := sorted((wanted | {"LICENSE", "README.md", "pyproject.toml"}) - packed):
        raise SystemExit(f"The sdist lacks {', '.join(missing)}.")
    if not (venv / "bin" / "peft-cast").exists():
        raise SystemExit("The wheel installs no command `peft-cast`.")
    subprocess.run([sys.executable, "-I", "-c", CHECK, str(installed.resolve())], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
