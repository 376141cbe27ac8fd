"""The commands in the documentation are ones that the jobs accept."""

import importlib.util
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro

from nsl_dist.commandline import parse_train_config
from nsl_dist.config import EvaluateConfig, SearchConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "jobs/README.md", "cluster/README.md", "CONTRIBUTING.md")


def parse_study(arguments: list[str]) -> None:
    study, *rest = arguments
    assert study == "layer-norm"
    seeds = rest.index("--seeds") if "--seeds" in rest else len(rest)
    parse_train_config(rest[:seeds], description="")


def parse_of(job: str) -> Callable[[list[str]], object]:
    """Return what parses the command line of a job."""
    if job.startswith("train") or job == "reproduce":
        return lambda arguments: parse_train_config(arguments, description="")
    if job == "ablate":
        return parse_study
    if job in ("evaluate", "search"):
        return lambda arguments: tyro.cli(EvaluateConfig if job == "evaluate" else SearchConfig, args=arguments)
    spec = importlib.util.spec_from_file_location(job.replace("/", "_"), ROOT / "jobs" / f"{job}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (config,) = (
        each for name, each in vars(module).items() if re.fullmatch("(Export|Prepare|Bench|Chaos)Config", name)
    )
    return lambda arguments: tyro.cli(config, args=arguments)


def commands() -> list[tuple[str, str, str]]:
    """Return document, job and arguments of each command that runs a job."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            submitted = [
                f"jobs/train_sop.py {each}" for each in re.findall(r'make submit .*ARGS="([^"]*)"', "\n".join(lines))
            ]
            for line in [*lines, *submitted]:
                match = re.search(r"\bjobs/(\S+)\.py(.*)", line)
                if match and "..." not in line:
                    found.append((document, match[1], match[2]))
    return found


@pytest.mark.parametrize(("document", "job", "arguments"), commands())
def test_commands_are_accepted(document: str, job: str, arguments: str) -> None:
    if job == "bench/train":  # its own flags and those of a training
        arguments = ""
    parse_of(job)(shlex.split(arguments, comments=True))


def test_every_job_is_documented() -> None:
    text = (ROOT / "jobs" / "README.md").read_text()
    jobs = {str(path.relative_to(ROOT / "jobs")) for path in (ROOT / "jobs").rglob("*.py")}
    assert len(jobs) > 15
    assert {job for job in jobs if f"`{job}`" not in text} == set()


def test_links_lead_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "jobs").glob("*.md"), *(ROOT / "cluster").glob("*.md")]
    documents += [*(ROOT / "nsl_dist").glob("*.md"), *(ROOT / "tests").glob("*.md")]
    assert len(documents) >= 7
    for document in documents:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document}: {target}"
