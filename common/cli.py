"""The flags that all scripts share, and the way from a YAML file to a checked config.

A script is `Config` (a dataclass), `run(config, job) -> Measured`, and one line:

    if __name__ == "__main__":
        cli.main(run, Config, __file__)
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import os
import sys
from pathlib import Path

import pydantic
import yaml

from common import runtime
from common.errors import UserError

TIERS = ("quick", "short", "full")
# Safe: plain values alone, no objects. In C where PyYAML has it, since a paper.yaml is long.
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything about a run that is not its config: where it runs, and where it writes."""

    seed: int
    world: runtime.World
    work_dir: Path
    data: Path
    resume: str = "auto"
    deterministic: bool = False

    @property
    def device(self):
        return self.world.device

    def sub(self, name: str) -> "Job":
        """The same job in a folder below: one stage of an experiment, with checkpoints of its own."""
        return dataclasses.replace(self, work_dir=self.work_dir / name)


# ------------------------------------------------------------------------------------------------ configs
def check_keys(given: dict, config_class: type, where: str) -> None:
    known = [field.name for field in dataclasses.fields(config_class)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{where}: unknown config key {key!r}{hint} Known keys: {', '.join(known)}")


def build_config(config_class: type, values: dict, where: str):
    """A `config_class` from plain values. Types and Literal choices are checked; unknown keys name the known ones."""
    check_keys(values, config_class, where)
    try:
        return pydantic.TypeAdapter(config_class).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "config"
        shown = f" (got {first['input']!r})" if first["loc"] else ""
        raise UserError(f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}{shown}") from None


def read_yaml(path: Path) -> dict:
    try:
        content = yaml.load(path.read_text(), Loader=SafeLoader)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping at the top, found {type(content).__name__}")
    return content


def load_config(config_class: type, folder: Path, name: str, section: str, **overrides):
    """`folder/configs/<name>.yaml`, its part `section`, with `overrides` on top, as a checked `config_class`."""
    path = folder / "configs" / f"{name}.yaml"
    if not path.exists():
        found = ", ".join(sorted(p.stem for p in (folder / "configs").glob("*.yaml")))
        raise UserError(f"no config {name!r} in {folder}/configs; found: {found or 'none'}")
    content = read_yaml(path)
    if section not in content:
        raise UserError(f"{path} has no part {section!r}; it has: {', '.join(content)}")
    return build_config(config_class, {**(content[section] or {}), **overrides}, f"{path} [{section}]")


def config_of(config_class: type, identity: dict, where: str):
    """The config that the identity of a checkpoint (see common.checkpoints) holds among other things, checked."""
    known = {field.name for field in dataclasses.fields(config_class)}
    return build_config(config_class, {key: value for key, value in identity.items() if key in known}, where)


def parse_settings(pairs: list[str]) -> dict:
    """`key=value ...` of --set; a value is read as YAML (`8`, `0.1`, `true`, `[1, 2]`, text)."""
    settings = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise UserError(f"--set {pair!r} is not of the form key=value")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {key}: {value!r} is not valid YAML; quote it") from None
    return settings


# ------------------------------------------------------------------------------------------------ the command line
class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message: str):
        print(f"error: {message}; --help lists what there is", file=sys.stderr)
        sys.exit(runtime.EXIT_BAD_INPUT)


def shared_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tier", choices=TIERS, default="quick", help="how much of the paper (default: quick)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA if there is one"
    )
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("REPRO_DATA") or "data"), help="data root")
    parser.add_argument("--work-dir", type=Path, help="checkpoints, metrics and record.json (default: under runs/)")
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help="go on from a checkpoint, or not")
    parser.add_argument("--deterministic", action="store_true", help="repeatable CUDA kernels, slower")


@contextlib.contextmanager
def exit_codes():
    """Ends the process: 2 bad input, 3 not finite or collapsed, 75 stopped after saving; one line, no traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(runtime.EXIT_BAD_INPUT)
    except (runtime.NotFinite, runtime.Collapsed) as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(runtime.EXIT_DIVERGED)
    except runtime.Stopped as error:
        print(f"stopped by a signal, saved: {error}", file=sys.stderr)
        sys.exit(runtime.EXIT_STOPPED)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def source_of(name: str, script: str) -> str:
    """The lines of class `name` in a file: its fields and their comments are the help of --set."""
    text = Path(script).read_text()
    found = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == name)
    return ast.get_source_segment(text, found)


def main(run, config_class: type, script: str, argv: list[str] | None = None) -> None:
    """Run a paper's script: parse the flags, resolve the config, `run(config, job)`, write and print the record."""
    from common.results import records

    folder, section = Path(script).parent, Path(script).stem
    parser = Parser(
        prog=f"python -m papers.{folder.name}.{section}",
        description=sys.modules[run.__module__].__doc__,
        epilog="config keys, for --set key=value:\n\n" + source_of(config_class.__name__, script),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared_flags(parser)
    parser.add_argument("--config", help="a file of configs/, without .yaml (default: the tier's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="config overrides")
    args = parser.parse_args(argv)
    with exit_codes():
        name = args.config or args.tier
        config = load_config(config_class, folder, name, section, **parse_settings(args.set))
        world = runtime.set_up_world(args.device)
        work_dir = args.work_dir or Path("runs") / folder.name / f"{section}-{name}-s{args.seed}"
        job = Job(args.seed, world, work_dir, args.data, args.resume, args.deterministic)
        record = records.execute(lambda: run(config, job), folder, section, args.tier, job)
        if world.is_main:
            print(records.summary(record))
