"""The first imports of a script: a warm spare may run them before it is needed, since the script begins with them. Pure."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

_MISSING = {"ImportError", "ModuleNotFoundError", "Exception"}


@dataclass(frozen=True)
class Statement:
    """A statement that imports, or that sets a variable for the imports behind it.

    Args:
        source: of the statement.
        line: where it begins.
        modules: the top-level packages that it imports; "" stands for the package of the script itself.
    """

    source: str
    line: int
    modules: tuple[str, ...]


def first_imports(source: str) -> list[Statement]:
    """Return the statements that a script runs before any of its own code, in their order.

    They are its imports up to the first statement that could change what the imports behind it do, such as a call. Between
    them are only definitions, constants, and ``os.environ["NAME"] = "value"``, which is returned as well. Running them twice
    does the same as running them once.

    Args:
        source: of the script. If it can't be parsed, nothing is returned.
    """
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return []
    found: list[Statement] = []
    has_lazy_annotations = any(
        isinstance(one, ast.ImportFrom) and one.module == "__future__" and any(name.name == "annotations" for name in one.names)
        for one in body
    )
    names_of_os: set[str] = set()
    for one in body:
        if _does_nothing(one, has_lazy_annotations=has_lazy_annotations):
            continue
        if isinstance(one, (ast.Import, ast.ImportFrom)) or _is_guarded_import(one):
            if "*" in _bound(one) or names_of_os & set(_bound(one)) - {"os"}:
                break
            names_of_os |= {alias.asname or alias.name for alias in _aliases(one) if alias.name == "os"}
        elif not _sets_variable(one, names_of_os):
            break
        if not (isinstance(one, ast.ImportFrom) and one.module == "__future__"):
            found.append(Statement(ast.unparse(one), one.lineno, tuple(dict.fromkeys(_modules(one)))))
    return found


def imports_torch(statements: Sequence[Statement]) -> bool:
    """Return whether these statements import torch, or transformers, which imports it: the most of what a start takes."""
    return any({"torch", "transformers", "accelerate"} & set(one.modules) for one in statements)


def _aliases(one: ast.stmt) -> list[ast.alias]:
    if isinstance(one, ast.Import):
        return one.names
    return [alias for inner in getattr(one, "body", []) for alias in _aliases(inner)] if isinstance(one, ast.Try) else []


def _bound(one: ast.stmt) -> list[str]:
    """Return the names that an import gives to what it imports."""
    if isinstance(one, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in one.names]
    inner = [*one.body, *(each for handler in one.handlers for each in handler.body)] if isinstance(one, ast.Try) else []
    return [name for each in inner for name in _bound(each)]


def _modules(one: ast.stmt) -> list[str]:
    if isinstance(one, ast.Import):
        return [alias.name.partition(".")[0] for alias in one.names]
    if isinstance(one, ast.ImportFrom):
        return ["" if one.level else (one.module or "").partition(".")[0]]
    if isinstance(one, ast.Try):
        inner = [*one.body, *one.orelse, *(each for handler in one.handlers for each in handler.body)]
        return [name for each in inner for name in _modules(each)]
    return []


def _does_nothing(one: ast.stmt, *, has_lazy_annotations: bool) -> bool:
    """Return whether a statement only defines something, without running anything that others could notice."""
    if isinstance(one, ast.Pass) or (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)):
        return True
    if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef)):
        defaults = [*one.args.defaults, *(each for each in one.args.kw_defaults if each is not None)]
        arguments = [*one.args.posonlyargs, *one.args.args, *one.args.kwonlyargs, one.args.vararg, one.args.kwarg]
        annotations = [each.annotation for each in arguments if each is not None and each.annotation is not None]
        annotations += [one.returns] if one.returns is not None else []
        plain = has_lazy_annotations or all(isinstance(each, (ast.Constant, ast.Name)) for each in annotations)
        return not one.decorator_list and all(map(_is_constant, defaults)) and plain
    if isinstance(one, ast.Assign):
        return all(isinstance(each, ast.Name) for each in one.targets) and _is_constant(one.value)
    if isinstance(one, ast.If):
        return isinstance(one.test, ast.Name) and one.test.id == "TYPE_CHECKING" and not one.orelse
    return False


def _is_constant(value: ast.expr) -> bool:
    if isinstance(value, ast.Constant):
        return True
    if isinstance(value, ast.UnaryOp):
        return _is_constant(value.operand)
    if isinstance(value, (ast.Tuple, ast.List, ast.Set)):
        return all(map(_is_constant, value.elts))
    if isinstance(value, ast.Dict):
        return all(each is not None and _is_constant(each) for each in (*value.keys, *value.values))
    return False


def _is_guarded_import(one: ast.stmt) -> bool:
    """Return whether a statement imports something that may be missing: ``try: import … except ImportError: …``."""
    if not isinstance(one, ast.Try) or one.finalbody:
        return False

    def is_plain(each: ast.stmt) -> bool:
        return isinstance(each, (ast.Import, ast.ImportFrom)) or _does_nothing(each, has_lazy_annotations=False)

    kinds = [each.type for each in one.handlers]
    caught = [name for kind in kinds for name in (kind.elts if isinstance(kind, ast.Tuple) else [kind])]
    return (
        all(isinstance(name, ast.Name) and name.id in _MISSING for name in caught)
        and all(is_plain(each) for each in (*one.body, *one.orelse))
        and all(is_plain(each) for handler in one.handlers for each in handler.body)
    )


def _sets_variable(one: ast.stmt, names_of_os: set[str]) -> bool:
    """Return whether a statement gives an environment variable a constant value."""

    def is_environ(value: ast.expr) -> bool:
        return (
            isinstance(value, ast.Attribute)
            and value.attr == "environ"
            and isinstance(value.value, ast.Name)
            and value.value.id in names_of_os
        )

    def is_text(value: ast.expr) -> bool:
        return isinstance(value, ast.Constant) and isinstance(value.value, str)

    if isinstance(one, ast.Assign) and len(one.targets) == 1 and isinstance(target := one.targets[0], ast.Subscript):
        return is_environ(target.value) and is_text(target.slice) and is_text(one.value)
    if isinstance(one, ast.Expr) and isinstance(call := one.value, ast.Call) and isinstance(call.func, ast.Attribute):
        is_set = call.func.attr == "setdefault" and is_environ(call.func.value)
        return is_set and len(call.args) == 2 and all(map(is_text, call.args)) and not call.keywords
    return False
