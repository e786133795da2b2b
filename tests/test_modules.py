import configparser
import site
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What setup.cfg calls the folders that are no part of `finedeep`.
OWN_NAMES = {"cli": "finedeep_cli", "files": "finedeep_files"}
IMPORT_ALL = """
import sys
sys.path[:0] = sys.argv[1:3]
import from_checkout
import importlib
for name in sys.argv[3:]:
    importlib.import_module(name)
print(sys.modules["finedeep"].__file__)
"""


def packages():
    """Name -> folder of each package below the root that setup.cfg installs."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "setup.cfg")
    found = {}
    for name in settings["options"]["packages"].split():
        parts = name.split(".")
        top = next((folder for folder, own in OWN_NAMES.items() if own == parts[0]), "")
        found[name] = ROOT.joinpath(top, *parts[1:])
    return found


def test_every_package_is_installed():
    folders = {
        init.parent
        for top in ("benchmarks", "cli", "convert", "demo", "eval", "files")
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert folders | {ROOT} == set(packages().values())


def test_every_module_can_be_imported_from_a_checkout_that_is_not_installed():
    """What the scripts for GPU machines rely on. -S keeps the editable installation out, which would find it anyway."""
    names = [
        f"{package}.{file.stem}"
        for package, folder in packages().items()
        for file in sorted(folder.glob("*.py"))
        if file.stem not in ("__init__", "__main__") and folder != ROOT
    ]
    (installed,) = [folder for folder in site.getsitepackages() if Path(folder, "torch").is_dir()]
    done = subprocess.run(
        [sys.executable, "-S", "-c", IMPORT_ALL, installed, str(ROOT / "examples"), *names],
        capture_output=True,
        text=True,
        cwd=ROOT.anchor,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(ROOT / "__init__.py")]
