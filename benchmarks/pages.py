"""Runs the examples and writes a page for each: ``python -m benchmarks.pages [NAME...]`` (``make pages``).

A page of docs/guide/examples holds the script, its output and its figure, all of one run. The tests compare the
page's code with the script; a script that was changed has to be run again.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.harness.records import versions
from fastxattn.runtime.timing import device_name

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs/guide/examples"
IMAGES = ROOT / "docs/images"
EXAMPLES = {"swap_qformer": True, "train_clip": True, "prune_vlm": True, "deploy_onnx": False}
"""Which have a page, and whether they draw a figure."""


def script(name: str) -> Path:
    """The example's file."""
    return ROOT / "examples" / f"{name}.py"


def picture(name: str) -> Path:
    """Where its figure is kept."""
    return IMAGES / f"example_{name}.png"


def run(name: str, *arguments: str) -> str:
    """Run an example as a user would; its output, or ``RuntimeError`` with what it said."""
    command = ["examples/" + script(name).name, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
    return done.stdout.replace(str(ROOT) + "/", "").strip()


def page(name: str, output: str) -> str:
    """The page of an example that printed ``output``."""
    source = script(name).read_text()
    title, _, rest = (ast.get_docstring(ast.parse(source)) or name).partition("\n")
    # Of the docstring's paragraphs those that are not its command line.
    told = [p for p in rest.strip().split("\n\n") if p and not p.lstrip().startswith("python examples/")]
    headline, _, more = title.rstrip(".").partition(": ")
    parts = [f"# {headline}", *([f"{more[0].upper()}{more[1:]}."] if more else []), *told]
    if EXAMPLES[name]:
        parts.append(f"![what {name}.py drew](../../images/{picture(name).name})")
    threads = torch.get_num_threads()
    where = f"Executed on {device_name()}, {threads} thread{'s' * (threads > 1)}, shared with other work; {versions()}."
    parts += [
        f"```\n$ python examples/{name}.py\n{output}\n```",
        f"{where} Times move from run to run; ratios are of interleaved rounds.",
        f"## The script\n\n```python\n{source}```",
        f"`python -m benchmarks.pages {name}` runs it and writes this page again.",
    ]
    return "\n\n".join(parts) + "\n"


def code_of(text: str) -> str:
    """The script that a page shows."""
    found = re.search(r"^## The script\n\n```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def main() -> None:
    """Run the examples named, or all, and write their pages."""
    for name in sys.argv[1:] or EXAMPLES:
        if name not in EXAMPLES:
            raise SystemExit(f"pages: NAME must be one of {', '.join(EXAMPLES)}; got {name!r}")
        output = run(name, *(["--out", str(picture(name))] if EXAMPLES[name] else []))
        (PAGES / f"{name}.md").write_text(page(name, output))
        print(f"docs/guide/examples/{name}.md", flush=True)


if __name__ == "__main__":
    main()
