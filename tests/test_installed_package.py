"""What a user gets who installs the wheel: the backend without `import esper`, the command, the second source root."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("installed")]  # so that it is installed once


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment with the wheel in it; third-party packages come from this one's."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = folder.glob("esper_fx-*.whl")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    here = [entry for entry in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]} if entry]
    # appended to the path, so that the wheel's own packages come first; .pth lines of that folder are not executed
    (Path(site) / "third_party.pth").write_text("\n".join(here) + "\n")
    return python


def _run(python: Path, code: str, folder: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean["ESPER_TEZZERET__PIPELINE"] = "fast"
    done = subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_backend_is_found_without_importing_esper(environment: Path, tmp_path: Path) -> None:
    code = """
import torch
model = torch.nn.Linear(4, 3)
x = torch.randn(2, 4)
compiled = torch.compile(model, backend="esper", options={"inner": "aot_eager"})
assert torch.allclose(compiled(x), model(x))
import esper, esper_passes
print(esper.__file__)
"""
    where = _run(environment, code, tmp_path)
    assert str(environment.parent.parent) in where


def test_a_kernel_is_compiled_and_loaded_by_the_installed_package(environment: Path, tmp_path: Path) -> None:
    code = """
import asyncio, torch, esper
async def main():
    async with esper.Platform.embedded("platform") as platform:
        kernel = await platform.compile(esper.Blueprint.low_rank(4, 3, rank=1, start="kaiming"), timeout=240)
        model = esper.wrap(torch.nn.Sequential(torch.nn.Linear(4, 3)), platform=platform)
        compiled = torch.compile(model, backend="esper", options={"inner": "aot_eager"})
        x = torch.randn(2, 4)
        before = compiled(x)
        assert await model.load_kernel("0", 0, kernel.id, alpha=0.5)
        assert not torch.allclose(compiled(x), before)
        print(model.get_model_stats()["layers"]["0"]["active_seeds"])
asyncio.run(main())
"""
    assert _run(environment, code, tmp_path).strip() == "1"


def test_the_command_is_installed(environment: Path) -> None:
    done = subprocess.run([environment.parent / "esper", "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("esper ")
