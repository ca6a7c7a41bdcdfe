"""Checks what a release ships: ``check_wheels.py DIST [--torch-from SITE_PACKAGES]``, ``check_wheels.py --tag vX.Y.Z``.

The wheel and the sdist of a folder are looked into and installed into environments of their own: the wheel, which must
run its native kernels; the sdist where there is no compiler, which must say so and work on the reference; and the sdist
where there is one. torch is installed from the index, or, with ``--torch-from``, seen in another environment.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMOKE = """
import sys, torch, fastxattn
from fastxattn.runtime import native
loaded = native.cpu_library()
assert (loaded.reason is None) == (sys.argv[1] == "native"), loaded.reason
if sys.argv[1] != "native":
    assert "were not built" in loaded.reason, loaded.reason
q, k, cu = torch.randn(5, 2, 16), torch.randn(9, 2, 16), torch.tensor([0, 2, 5], dtype=torch.int32)
cu_k = torch.tensor([0, 9, 9], dtype=torch.int32)
out = fastxattn.varlen_cross_attention(q, k, k, cu, cu_k)
exact = fastxattn.varlen_cross_attention(q.double(), k.double(), k.double(), cu, cu_k, backend="reference")
assert (out - exact).abs().max() < 1e-5 and not out[2:].any()
print(f"ok: {fastxattn.__file__}, torch {torch.__version__}, {native.active_cpu_isa() or 'reference'}")
"""


def contents(dist: Path) -> tuple[Path, Path]:
    """The wheel and the sdist, looked into."""
    (wheel,), (sdist,) = sorted(dist.glob("*.whl")), sorted(dist.glob("*.tar.gz"))
    if wheel.stem.split("-")[2:4] != ["py3", "none"] or wheel.stem.endswith("-any"):
        raise SystemExit(f"{wheel.name}: must be a py3-none wheel of a platform")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {f"fastxattn/{n}" for n in ("py.typed", "_lib/libfastxattn_cpu.so", "_lib/libfastxattn_ort.so")}
    if missing := expected - names:
        raise SystemExit(f"{wheel.name}: lacks {', '.join(sorted(missing))}")
    if foreign := {n.split("/")[0] for n in names} - {"fastxattn", f"{wheel.stem.rsplit('-', 3)[0]}.dist-info"}:
        raise SystemExit(f"{wheel.name}: also installs {', '.join(sorted(foreign))}")
    with tarfile.open(sdist) as packed:
        inside = {n.partition("/")[2] for n in packed.getnames()}
    expected = {"build_native.py", "setup.py", "LICENSE", "csrc/core/cpu/isas.def", "csrc/attention/attention_cpu.inl"}
    if missing := expected - inside:
        raise SystemExit(f"{sdist.name}: lacks {', '.join(sorted(missing))}")
    if built := [n for n in inside if n.endswith((".so", ".o", ".pyc"))]:
        raise SystemExit(f"{sdist.name}: carries what was built here: {', '.join(sorted(built))}")
    print(f"ok: {wheel.name} ({wheel.stat().st_size / 2**20:.1f} MiB), {sdist.name}", flush=True)
    return wheel, sdist


def install(what: Path, expect: str, torch_from: str | None, **variables: str) -> None:
    """Install ``what`` into an environment of its own and run the smoke test there."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin/python"
        if torch_from:
            (site,) = Path(folder).glob("lib/python*/site-packages")
            (site / "torch_from.pth").write_text(torch_from + "\n")
            run(python, "-m", "pip", "install", "-q", "-U", "setuptools>=70.1", "wheel")
        else:
            run(python, "-m", "pip", "install", "-q", "-r", str(ROOT / "requirements/build.txt"))
        command = ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", str(what)]
        run(python, *command, **variables)
        run(python, "-c", SMOKE, expect, cwd=folder)
        run(python, "-m", "pip", "uninstall", "-q", "-y", "fastxattn")


def run(python: Path, *arguments: str, cwd: str | None = None, **variables: str) -> None:
    """Run Python without this checkout in sight."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([str(python), *arguments], check=True, cwd=cwd or tempfile.gettempdir(), env={**clean, **variables})


def check_tag(tag: str) -> None:
    """The tag, the package, its metadata and the citation name one version, and the changelog has it."""
    places = {
        "fastxattn/__init__.py": r'^__version__ = "([^"]+)"',
        "pyproject.toml": r'^version = "([^"]+)"',
        "CITATION.cff": r"^version: (\S+)",
    }
    found = {"tag": tag.removeprefix("v")}
    for name, pattern in places.items():
        match = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
        found[name] = match[1] if match else "none"
    if len(set(found.values())) > 1:
        raise SystemExit(f"versions differ: {found}")
    if not re.search(rf"^## {re.escape(found['tag'])}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE):
        raise SystemExit(f"CHANGELOG.md has no section {found['tag']}")
    print(f"ok: {found['tag']}")


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, nargs="?", help="folder with one wheel and one sdist")
    parser.add_argument("--torch-from", help="site-packages of an environment that has torch")
    parser.add_argument("--skip-compile", action="store_true", help="do not build the sdist with a compiler")
    parser.add_argument("--tag", help="check a release tag instead")
    options = parser.parse_args()
    if options.tag:
        check_tag(options.tag)
        return
    if options.dist is None:
        parser.error("DIST or --tag is needed")
    wheel, sdist = contents(options.dist.resolve())
    install(wheel, "native", options.torch_from)
    install(sdist, "reference", options.torch_from, CXX="/nonexistent/c++")
    if not options.skip_compile:
        install(sdist, "native", options.torch_from, FASTXATTN_BUILD_NATIVE="1")


if __name__ == "__main__":
    sys.exit(main())
