"""Finds what comments, docstrings and pages point at and what is not there: python .ci/pointers.py [ROOT]

In backticks, and looked up by reading the sources, without importing any:

- a source file (`setup.py`, also with ::NAME of what it holds) or a folder below one of the top level: it is there;
- `fastppo.ops.gae`, or the same of tests and benches: the module is there and has the name, and so on into a class;
- `ops.gae`, `Path.name` and the like, of any module or class of this repository: likewise;
- `ppo.lam` and `--ppo.lam`, fields of dataclasses: the class of the section has the setting.

A word of which several of these can be meant is right if one of them is. What begins with a name that the file imports
from elsewhere (`torch.compile`), or with one of its own variables, is none of ours.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "fastppo"
FOLDERS = ("fastppo", "kernels", "tests", "bench", "docs", ".ci")
PAGES = ("README.md", "CONTRIBUTING.md", "kernels/README.md", "docs/**/*.md")
FILE = re.compile(r"[\w./-]+\.(?:py|pyi|cpp|h|cu|cuh|md|toml)")
OF_RUNS = ("css", "html", "js", "json", "jsonl", "lock", "pt", "safetensors", "txt", "yaml")  # endings, not attributes
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
SPAN = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
FENCE = re.compile(r"^( *)(```+|:::+).*?^\1\2`*$", re.DOTALL | re.MULTILINE)


class Names(NamedTuple):
    """What a module or class holds."""

    members: dict[str, set[str]]  # by name, the names that its annotation, base or value mentions
    open: bool  # may hold more than can be read: inherits from elsewhere, or imports *


class File(NamedTuple):
    imported: dict[str, str]  # by name in the file, what it stands for, with dots
    variables: set[str]
    names: Names
    classes: dict[str, Names]


class Tree(NamedTuple):
    """All of the repository that can be pointed at."""

    root: Path
    files: set[str]  # paths from the root, folders too
    modules: dict[str, File]  # by dotted path
    stems: dict[str, list[str]]  # by last part of it, the dotted paths
    classes: dict[str, list[Names]]


def main(root: Path) -> int:
    """Prints each broken pointer and returns how many there are."""
    tree, broken = read_tree(root), 0
    for path, line, word in pointers(tree):
        if problem := missing(word, path, tree):
            print(f"{path}:{line}: `{word}`: {problem}")
            broken += 1
    return broken


# The tree


def read_tree(root: Path) -> Tree:
    files, modules = {"."}, {}
    for path in walk(root):
        name = path.relative_to(root).as_posix()
        files.add(name)
        if path.suffix in (".py", ".pyi"):
            modules[module_of(name)] = read_file(path)
    stems, classes = defaultdict(list), defaultdict(list)
    for module, file in modules.items():
        stems[module.rpartition(".")[2]].append(module)
        for name, held in file.classes.items():
            classes[name].append(held)
    return Tree(root, files, modules, stems, classes)


def module_of(path: str) -> str:
    return re.sub(r"(/__init__)?\.pyi?$", "", path).replace("/", ".")


def walk(folder: Path) -> Iterator[Path]:
    """Files and folders below it, but for what is built, and for hidden ones apart from those of FOLDERS."""
    for path in sorted(folder.iterdir()):
        if path.name in ("build", "dist", "runs", "__pycache__") or path.name.endswith(".egg-info"):
            continue
        if path.name.startswith(".") and path.name not in FOLDERS:
            continue
        yield path
        if path.is_dir():
            yield from walk(path)


def read_file(path: Path) -> File:
    module = ast.parse(path.read_text(encoding="utf-8"))
    imported, variables, classes = {}, set(), {}
    for node in ast.walk(module):
        match node:
            case ast.Import():
                imported |= {
                    (a.asname or a.name.partition(".")[0]): (a.asname and a.name) or a.name for a in node.names
                }
            case ast.ImportFrom():
                imported |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            case ast.arg():
                variables.add(node.arg)
            case ast.Name(ctx=ast.Store()):
                variables.add(node.id)
            case ast.ClassDef():
                classes[node.name] = held_by(node)
    return File(imported, variables, held_by(module), classes)


def held_by(owner: ast.Module | ast.ClassDef) -> Names:
    members: dict[str, set[str]] = {}
    unread = isinstance(owner, ast.ClassDef) and bool(owner.bases or owner.keywords)
    for node in inside(owner.body):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                members[node.name] = set()
            case ast.AnnAssign(target=ast.Name(id=name)):
                members[name] = mentioned(node.annotation)
            case ast.Assign():
                targets = [t for target in node.targets for t in ast.walk(target)]
                members |= {t.id: set() for t in targets if isinstance(t, ast.Name)}
            case ast.Import() | ast.ImportFrom():
                members |= {a.asname or a.name.partition(".")[0]: set() for a in node.names}
                unread |= any(a.name == "*" for a in node.names)
    if "__getattr__" in members:  # a door that loads lazily says in strings what it has
        members = {c.value: set() for c in ast.walk(owner) if isinstance(c, ast.Constant)} | members
    if isinstance(owner, ast.ClassDef):  # self.x = ...
        stored = [n for n in ast.walk(owner) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
        members = {n.attr: set() for n in stored} | members
    return Names(members, unread)


def inside(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, also those under if, try and with."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from inside([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])
            for handler in getattr(node, "handlers", []):
                yield from inside(handler.body)


def mentioned(annotation: ast.expr) -> set[str]:
    words = [n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)]
    quoted = [n.value for n in ast.walk(annotation) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return {*words, *(word for text in quoted for word in re.findall(r"\w+", text))}


# The pointers


def pointers(tree: Tree) -> Iterator[tuple[str, int, str]]:
    """Path, line and word of everything in backticks that may point at something here."""
    pages = {path.relative_to(tree.root).as_posix() for page in PAGES for path in tree.root.glob(page)}
    for name in sorted(tree.files):
        path = tree.root / name
        if name in pages:
            texts = [(1, FENCE.sub(lambda block: re.sub(r"[^\n]", "", block[0]), path.read_text(encoding="utf-8")))]
        elif path.suffix == ".py" and not (path.resolve() != path and path.is_symlink()) and in_folders(name):
            texts = list(said(path.read_text(encoding="utf-8")))
        else:
            continue
        for line, text in texts:
            for span in SPAN.finditer(text):
                for word in span[2].split():
                    yield name, line + text.count("\n", 0, span.start()), word.strip("\"'(),;:[]{}")


def in_folders(name: str) -> bool:
    return name.partition("/")[0] in FOLDERS and not name.startswith(f"{PACKAGE}/kernels/")  # that is kernels/ again


def said(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each comment, those below each other as one, and of each docstring, of fields too."""
    block: list[str] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1 and block:
                yield last - len(block) + 1, "\n".join(block)
                block = []
            block.append(token.string.lstrip("# "))
            last = token.start[0]
    if block:
        yield last - len(block) + 1, "\n".join(block)
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


# Whether a pointer is right


def missing(word: str, path: str, tree: Tree) -> str | None:
    """What is not there, or None: all is, or the word points at nothing of ours."""
    word, flag = word.removeprefix("--"), word.startswith("--")
    name, _, inner = word.partition("::")
    if FILE.fullmatch(name):
        return missing_file(name, inner, path, tree)
    top, slash, _ = word.partition("/")
    if slash and top in FOLDERS and re.fullmatch(r"[\w./-]+", word):
        return None if word.rstrip("/") in tree.files else "there is no such folder or file"
    dotted = DOTTED.match(word)
    if dotted is None or word[dotted.end() :][:1] not in ("", "(") or dotted[0].rpartition(".")[2] in OF_RUNS:
        return None
    return missing_name(dotted[0], path, tree, flag)


def missing_file(name: str, inner: str, path: str, tree: Tree) -> str | None:
    beside = (Path(path).parent / name).as_posix()
    found = [f for f in tree.files if f in (name, beside) or f.endswith(f"/{name}")]
    if not found:
        return "there is no such file"
    held = [tree.modules[module_of(f)] for f in found if f.endswith(".py")]
    if inner and not any(inner.partition("[")[0] in file.names.members for file in held):
        return f"{found[0]} has no {inner}"
    return None


def missing_name(dotted: str, path: str, tree: Tree, flag: bool) -> str | None:
    parts = dotted.split(".")
    first, rest = parts[0], parts[1:]
    if first == PACKAGE:
        return None if in_module(first, rest, tree) else f"{PACKAGE} has no such name"
    file = tree.modules.get(module_of(path))
    sections = [names for held in tree.classes.values() for names in held if first in names.members]
    if flag:
        meant = [in_classes(names.members[first], rest, tree) for names in sections]
    else:
        if file and first in file.imported:
            whole = file.imported[first].split(".")
            if whole[0] != PACKAGE and whole[0] not in tree.stems:
                return None
        elif file and first in file.variables:
            return None
        meant = [in_module(module, rest, tree) for module in tree.stems.get(first, [])]
        meant += [in_class(names, rest, tree) for names in tree.classes.get(first, [])]
        if not meant and not any(names.members[first] & tree.classes.keys() for names in sections):
            return None
        meant += [in_classes(names.members[first], rest, tree) for names in sections]
    return None if any(meant) else f"no module, class or section of settings {first} has {'.'.join(rest)}"


def in_module(module: str, rest: list[str], tree: Tree) -> bool:
    if not rest:
        return module in tree.modules or module.replace(".", "/") in tree.files
    if f"{module}.{rest[0]}".replace(".", "/") in tree.files or f"{module}.{rest[0]}" in tree.modules:
        return in_module(f"{module}.{rest[0]}", rest[1:], tree)
    file = tree.modules.get(module)
    if file is None:  # a folder without __init__.py
        return False
    if rest[0] in file.classes:
        return in_class(file.classes[rest[0]], rest[1:], tree)
    if rest[0] not in file.names.members:
        return file.names.open
    source = file.imported.get(rest[0], "").rpartition(".")
    return in_module(source[0], [source[2], *rest[1:]], tree) if source[0] in tree.modules else True


def in_class(names: Names, rest: list[str], tree: Tree) -> bool:
    if not rest:
        return True
    if rest[0] not in names.members:
        return names.open
    kinds = names.members[rest[0]] & tree.classes.keys()
    return len(rest) == 1 or not kinds or in_classes(kinds, rest[1:], tree)


def in_classes(kinds: set[str], rest: list[str], tree: Tree) -> bool:
    return any(in_class(names, rest, tree) for kind in kinds for names in tree.classes.get(kind, []))


if __name__ == "__main__":
    above = Path(__file__).resolve().parent.parent
    sys.exit(1 if main(Path(sys.argv[1]).resolve() if sys.argv[1:] else above) else 0)
