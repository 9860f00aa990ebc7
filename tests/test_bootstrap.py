"""The environment: lock, conda file and pyproject.toml agree; make sets up .venv once, whole or not at all."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
MAKE = shutil.which("make")
MACHINES = [
    {
        "sys_platform": platform,
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.4",
    }
    for platform, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
    for python in ("3.11", "3.12", "3.13")
]


def machine_name(machine):
    return "-".join((machine["sys_platform"], machine["platform_machine"], machine["python_version"]))


def locked_lines():
    return (ROOT / "requirements.txt").read_text().replace("\\\n", " ").splitlines()


def locked_on(machine) -> dict[str, Version]:
    """What the lock installs on a machine: canonical name -> version. No package twice."""
    versions = {}
    for line in locked_lines():
        requirement = Requirement(line.split(" --hash")[0])
        if requirement.marker is None or requirement.marker.evaluate(machine):
            name = canonicalize_name(requirement.name)
            assert name not in versions, f"{name} is locked twice"
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            versions[name] = Version(pin.version)
    return versions


# ------------------------------------------------------------------------------------------------ the lock
def test_every_locked_line_has_hashes():
    for line in locked_lines():
        assert re.fullmatch(r"[\w.-]+==\S+ ?(; [^\\]+?)?( +--hash=sha256:[0-9a-f]{64})+ *", line), line[:80]


@pytest.mark.parametrize("machine", MACHINES, ids=machine_name)
def test_lock_satisfies_pyproject(machine):
    locked = locked_on(machine)
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        wanted = Requirement(text)
        assert locked[canonicalize_name(wanted.name)] in wanted.specifier, f"{text}: run make lock"
    assert (locked["torch"], locked["torchvision"]) == (Version("2.11.0"), Version("0.26.0"))
    assert ("triton" in locked) == (machine["sys_platform"] == "linux")


def test_conda_environment_is_the_lock():
    python, *rest = CONDA["dependencies"]
    assert rest == ["pip", {"pip": ["-r requirements.txt"]}]
    name, version = python.split("=")
    assert name == "python"
    assert f"{version}.0" in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.parametrize("file", ["requirements.txt", "pyproject.toml", "environment.yml"])
def test_no_registry_is_named(file):
    assert not re.search(r"https?:|index[-_]url|find[-_]links|tool\.uv\.index|--index\b", (ROOT / file).read_text())


# ------------------------------------------------------------------------------------------------ make, dry
def run_make(*arguments, cwd=ROOT, path=None, **environment):
    """make in a clean environment: no MAKEFLAGS or PAPER of an outer make."""
    environment = {"PATH": path or os.environ["PATH"], "HOME": "/home/me", **environment}
    command = [MAKE, "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_help_lists_everything():
    start = time.monotonic()
    text = run_make().stdout
    assert time.monotonic() - start < 1
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()) - {"FORCE"}
    assert set(re.findall(r"^  make (\w+) +\S", text, re.M)) == targets
    assert run_make("help").stdout == text
    documented = [
        "PAPER",
        "TIER",
        "CLAIM",
        "SEEDS",
        "DEVICE",
        "RESUME",
        "DATA",
        "DATASET",
        "RUN",
        "DEST",
        "BUDGET",
        "OUT",
        "PYTHON",
        "TORCH_BACKEND",
    ]
    variables = set(re.findall(r"^  ([A-Z_]+)=\S+ +\S", text.replace('"0 1 2"', "0"), re.M))
    assert variables == set(documented)


@pytest.fixture
def house(tmp_path):
    """The files that `make` needs, a paper, and a folder of commands: everything but uv and Python."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    for name in ("__init__.py", "paper.yaml", "bench.py", "figures.py", "kernels/__init__.py"):
        (tmp_path / "papers/toy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "papers/toy" / name).touch()
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("awk", "cat", "cp", "dirname", "head", "mkdir", "mv", "rm", "sh"):
        (commands / name).symlink_to(shutil.which(name))
    script(commands / "uname", 'case "$1" in -s) echo ${SYSTEM:-Linux} ;; *) echo x86_64 ;; esac')
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("reproduce", "PAPER"),
        ("figures", "PAPER"),
        ("new", "PAPER"),
        ("export DEST=there", "PAPER"),
        ("export PAPER=toy", "DEST"),
        ("data", "DATASET"),
        ("site", "OUT"),
        ("record", "RUN"),
        ("reproduce PAPER=other", "papers/other"),
        ("bench PAPER=other", "papers/other"),
    ],
)
def test_missing_variable_is_one_line(house, arguments, named):
    done = run_make(*arguments.split(), cwd=house, path=str(house / "bin"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert named in line
    assert f"make {arguments.split()[0]} " in line or "the papers: toy" in line
    assert not done.stdout
    assert not (house / ".venv").exists()  # nothing was installed first


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ("reproduce PAPER=toy", "-m common.results.reproduce --paper toy --tier quick --device auto"),
        (
            "reproduce PAPER=toy TIER=short CLAIM=c SEEDS='0 1' DEVICE=cpu DATA='~/a b'",
            "-m common.results.reproduce --paper toy --tier short --claim c --seeds '0 1' --device cpu "
            "--data '/home/me/a b'",
        ),
        (
            "reproduce PAPER=all RESUME=never",
            "-m common.results.reproduce_all --tier quick --device auto --resume never",
        ),
        ("results", "-m common.results"),
        ("site OUT='~/my site'", "-m common.results.site --out '/home/me/my site'"),
        ("record RUN=runs/a", "-m common.results.record runs/a"),
        ("data DATASET=cifar10", "-m common.datasets cifar10"),
        ("data DATASET=cifar10 DATA=d", "-m common.datasets cifar10 --root d"),
        ("bench", "-m common.datasets.bench"),
        ("bench PAPER=toy DEVICE=cpu", "-m papers.toy.bench --device cpu"),
        ("figures PAPER=toy", "-m papers.toy.figures"),
        ("gpu", "-m common.results.gpu --budget 25"),
        ("gpu BUDGET=7.5 DATA=d OUT='~/a b'", "-m common.results.gpu --budget 7.5 --data d --out '/home/me/a b'"),
        ("test", "-m pytest -n 2 --dist worksteal -m 'not slow and not gpu'"),
        (
            "coverage",
            "-m pytest -n 2 -m 'not slow and not gpu' --cov --cov-report=term-missing tests/common tests/test_house.py",
        ),
        ("export PAPER=toy DEST=there", "-m common.results.export --paper toy --dest there"),
        ("new PAPER=mine", "-m common.results.new mine"),
    ],
)
def test_commands(house, arguments, command):
    """With PYTHON= the command runs on that interpreter, and nothing is set up."""
    script(house / "bin/python9", 'printf "%s\\n" "$@"; echo "data=$REPRO_DATA"')
    arguments = shlex.split(arguments)
    done = run_make("-s", *arguments, "PYTHON=python9", cwd=house, path=str(house / "bin"))
    assert done.returncode == 0, done.stderr
    data = next((a[5:].replace("~", "/home/me") for a in arguments if a.startswith("DATA=")), "")
    assert done.stdout.splitlines() == [*shlex.split(command), f"data={data}"]
    assert not (house / ".venv").exists()


def test_lint_runs_two_commands(house):
    script(house / "bin/python9", 'echo "$1 $2 $3 $4"')
    path = str(house / "bin")
    lint = run_make("-s", "lint", "PYTHON=python9", cwd=house, path=path).stdout.splitlines()
    assert [line.rstrip() for line in lint] == ["-m ruff check .", "-m ruff format --check"]


# ------------------------------------------------------------------------------------------------ make setup, stubbed
LOCKED = "uv pip install --python .venv/bin/python --require-hashes -r requirements.txt"
BACKEND = "--extra dev --constraint .venv/constraints.txt"


def script(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def add_python(house, name="python3.12"):
    """A stub: `-m venv` copies it, `-m pip install uv==` brings the stub uv; it logs what installs something."""
    script(
        house / "bin" / name,
        """case "$*" in
  *version_info*) exit ${UNSUPPORTED:-0} ;;
  *ensurepip*) exit ${NO_VENV:-0} ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *"pip install"*uv==*) [ -z "$NO_UV" ] && cp uv-stub .venv/bin/uv; exit ;;
  *"pip --version" | *torchvision*) exit 0 ;;
esac
echo "${0##*/} $*" >>log""",
    )


@pytest.fixture
def uv_house(house):
    """The house with a stub uv on the PATH."""
    add_python(house, "made-by-uv")
    body = """[ "$1" = --version ] && exit ${NO_UV:-0}
echo "uv $*" >>log
case "$1" in
  venv) mkdir -p .venv/bin; cp bin/made-by-uv .venv/bin/python ;;
  pip) case "$INSTALL" in kill) kill -9 $PPID ;; fail) exit 1 ;; esac ;;
esac"""
    script(house / "uv-stub", body)
    shutil.copy(house / "uv-stub", house / "bin/uv")
    return house


@pytest.fixture
def python_house(uv_house):
    """The house with stubs of Python, but no uv on the PATH."""
    (uv_house / "bin/uv").unlink()
    add_python(uv_house)
    return uv_house


def setup(house, *arguments, **environment):
    """Run make setup; returns the finished process and the commands it ran."""
    (house / "log").write_text("")
    done = run_make("setup", *arguments, cwd=house, path=str(house / "bin"), **environment)
    return done, (house / "log").read_text().splitlines()


def touch_later(path):
    later = time.time() + 60
    os.utime(path, (later, later))


def test_setup_with_uv_then_nothing(uv_house):
    done, log = setup(uv_house)
    assert done.returncode == 0, done.stderr
    assert log == ["uv venv --quiet --allow-existing --python >=3.11,<3.14 .venv", LOCKED]
    assert (uv_house / ".venv/.ready").exists()
    start = time.monotonic()
    assert setup(uv_house)[1] == []
    assert time.monotonic() - start < 1
    done = run_make("test", cwd=uv_house, path=str(uv_house / "bin"))
    expected = "python -m pytest -n 2 --dist worksteal -m not slow and not gpu"
    assert (uv_house / "log").read_text().splitlines() == [expected]


def test_any_target_sets_up(uv_house):
    done = run_make("results", cwd=uv_house, path=str(uv_house / "bin"))
    assert done.returncode == 0, done.stderr
    assert (uv_house / "log").read_text().splitlines()[-1] == "python -m common.results"


def test_setup_without_uv(python_house):
    done, log = setup(python_house)
    assert done.returncode == 0, done.stderr
    assert log == ["python3.12 -m venv .venv", LOCKED]


def test_setup_where_uv_cannot_be_had(python_house):
    done, log = setup(python_house, NO_UV="1")
    assert done.returncode == 0, done.stderr
    assert log[1:] == ["python -m pip install --disable-pip-version-check --require-hashes -r requirements.txt"]
    assert (python_house / ".venv/.ready").exists()


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"UNSUPPORTED": "1"}, "no Python 3.11-3.13 and no uv"),
        ({"NO_VENV": "1"}, "python3.12 lacks venv or ensurepip"),
        ({"SYSTEM": "Darwin"}, "no torch 2.11 for Darwin x86_64"),
        ({"NO_UV": "1", "TORCH_BACKEND": "cpu"}, "needs uv"),
    ],
)
def test_setup_that_cannot_be(python_house, environment, told):
    done, _ = setup(python_house, **environment)
    assert done.returncode == 2
    line, make_line = done.stderr.splitlines()
    assert line.startswith("setup: ")
    assert told in line
    assert ".venv/.ready] Error 2" in make_line
    assert not (python_house / ".venv/.ready").exists()


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_interrupted_setup_starts_afresh(uv_house, how):
    done, _ = setup(uv_house, INSTALL=how)
    assert done.returncode == 2
    assert not (uv_house / ".venv/.ready").exists()
    (uv_house / ".venv/half-written").touch()
    done, log = setup(uv_house)
    assert done.returncode == 0
    assert log[-1] == LOCKED
    assert not (uv_house / ".venv/half-written").exists()


def test_a_uv_that_does_not_run_is_no_uv(uv_house):
    add_python(uv_house)
    done, log = setup(uv_house, NO_UV="1")
    assert done.returncode == 0, done.stderr
    assert log[0] == "python3.12 -m venv .venv"


def test_new_lock_updates_in_place(uv_house):
    setup(uv_house)
    (uv_house / ".venv/kept").touch()
    touch_later(uv_house / "requirements.txt")
    assert setup(uv_house)[1] == [LOCKED]
    assert (uv_house / ".venv/kept").exists()


def test_a_venv_made_by_hand_is_used(uv_house):
    (uv_house / ".venv/bin").mkdir(parents=True)
    shutil.copy(uv_house / "bin/made-by-uv", uv_house / ".venv/bin/python")
    assert setup(uv_house)[1] == [LOCKED]


def test_a_dead_interpreter_is_replaced(uv_house):
    setup(uv_house)
    python = uv_house / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nowhere/python")
    assert len(setup(uv_house)[1]) == 2
    assert not python.is_symlink()


def test_torch_backend(uv_house):
    done, log = setup(uv_house, "TORCH_BACKEND=cpu")
    assert done.returncode == 0, done.stderr
    install = f"uv pip install --python .venv/bin/python --torch-backend cpu -r pyproject.toml {BACKEND}"
    assert log[1:] == [install]
    constraints = (uv_house / ".venv/constraints.txt").read_text()
    names = set(re.findall(r"^([\w.-]+)==", constraints, re.M))
    every = {re.match(r"[\w.-]+", line)[0] for line in locked_lines()}
    assert {"torch", "torchvision", "triton", "cuda-toolkit", "nvidia-cudnn-cu13"} <= every - names
    assert all(re.match("torch|triton|nvidia-|cuda-", name) for name in every - names)
    assert constraints.count("--hash=sha256:") > len(names)  # the others keep version and hashes
    assert setup(uv_house)[1] == setup(uv_house, "TORCH_BACKEND=cpu")[1] == []
    touch_later(uv_house / "requirements.txt")
    assert setup(uv_house)[1] == [install]  # a new lock keeps the backend
    os.utime(uv_house / "requirements.txt", (0, 0))
    (uv_house / ".venv/other-torch").touch()
    assert setup(uv_house, "TORCH_BACKEND=locked")[1][-1] == LOCKED
    assert not (uv_house / ".venv/other-torch").exists()  # builds of torch are not mixed


# ------------------------------------------------------------------------------------------------ hooks and CI
def test_hooks_are_local():
    assert [repo["repo"] for repo in HOOKS] == ["local"]
    assert {hook["language"] for hook in HOOKS[0]["hooks"]} == {"system"}


@pytest.mark.parametrize(
    ("hook", "name", "bad", "good"),
    [
        ("yaml", "a.yaml", b"a: [1", b"a: [1]"),
        ("small-files", "a b.bin", bytes(600_000), bytes(400_000)),
        ("ruff-check", "a.py", b"import os\n", b"x = 1\n"),
    ],
)
def test_hooks_refuse(tmp_path, hook, name, bad, good):
    entry = next(h["entry"] for h in HOOKS[0]["hooks"] if h["id"] == hook)
    command = shlex.split(entry.replace(".venv/bin/python", shlex.quote(sys.executable)))
    for content, passes in ((bad, False), (good, True)):
        (tmp_path / name).write_bytes(content)
        done = subprocess.run([*command, name], cwd=tmp_path, capture_output=True, timeout=60)
        assert (done.returncode == 0) == passes


def test_ci_runs_lint_then_test(house):
    script(house / "bin/make", 'echo "$*" >>log')
    path = f"{house / 'bin'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([house / ".ci/run"], check=True, env={"PATH": path}, timeout=60)
    assert (house / "log").read_text().split() == ["lint", "test"]
