"""Copy one paper and exactly the `common` modules it uses: `python -m common.results.export --paper X --dest DIR`."""

import ast
import shutil
from pathlib import Path

from common.cli import Parser, exit_codes
from common.errors import UserError
from common.results import claims

ALWAYS = ("common.results.reproduce", "common.results.__main__", "common.results.record", "common.datasets.__main__")


def module_file(name: str, root: Path) -> Path | None:
    path = root.joinpath(*name.split("."))
    if path.with_suffix(".py").exists():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").exists() else None


def common_modules(files: list[Path], root: Path) -> set[str]:
    """Every `common...` module that `files` import, and those that these import."""
    found, todo = set(), list(files)
    while todo:
        path = todo.pop()
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.ImportFrom) and node.level and path.is_relative_to(root / "common"):
                package = ".".join(path.relative_to(root).parts[: -node.level])
                base = f"{package}.{node.module}" if node.module else package
                names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        for name in names:
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):  # a module brings its packages
                module = ".".join(parts[:depth])
                file = module_file(module, root) if parts[0] == "common" else None
                if file and module not in found:
                    found.add(module)
                    todo.append(file)
    return found


def export(slug: str, dest: Path, root: Path = claims.PAPERS.parent) -> list[Path]:
    """Copy; returns the files written. `dest` must not exist or be empty."""
    folder = claims.paper_folder(slug, root / "papers")
    if dest.exists() and any(dest.iterdir()):
        raise UserError(f"{dest} is not empty; name a new folder with DEST=")
    target = dest / "papers" / slug
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__"))
    (dest / "papers" / "__init__.py").touch()
    seeds = [module_file(name, root) for name in ALWAYS]
    for name in common_modules([*folder.rglob("*.py"), *filter(None, seeds)], root) | set(ALWAYS):
        source = module_file(name, root)
        if source:
            copy = dest / source.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    for name in ("requirements.txt", "LICENSE"):
        shutil.copy2(root / name, dest / name)
    return sorted(p for p in dest.rglob("*") if p.is_file())


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m common.results.export", description=__doc__)
    parser.add_argument("--paper", required=True)
    parser.add_argument("--dest", type=Path, required=True)
    args = parser.parse_args(argv)
    with exit_codes():
        files = export(args.paper, args.dest)
        print(
            f"{len(files)} files in {args.dest}; there, with the packages of requirements.txt:\n"
            f"  python -m papers.{args.paper}.reproduce --tier quick"
        )


if __name__ == "__main__":
    main()
