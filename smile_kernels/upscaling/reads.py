"""Finds linear layers with a weight that code outside their own forward reads, where experts would have no effect.

It reads the source of every module of a model, before anything runs. `guard.guard_weights` checks the first forward
pass of a SMILE model, for what the source does not show.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["weight_readers"]

# A step of a path for any child: an entry of a ModuleList, a name computed at run time.
_ANY = "*"

# What is asked of a weight without computing with it.
_HARMLESS = {
    "device", "dim", "dtype", "element_size", "grad", "is_contiguous", "is_cpu", "is_cuda", "is_floating_point",
    "is_meta", "itemsize", "layout", "ndim", "numel", "requires_grad", "shape", "size", "stride",
}  # fmt: skip
_HARMLESS_CALLS = {"getattr", "hasattr", "id", "isinstance", "issubclass", "len", "type"}

# `nn.replace_linears` switches off the paths on which these read the weights of their layers.
_SWITCHED_OFF = (nn.TransformerEncoderLayer, nn.TransformerEncoder)

_Path = tuple[str, ...]


def weight_readers(model: nn.Module, names: Mapping[str, nn.Module]) -> dict[str, str]:
    """The layers of `names` whose weight or bias is read outside their own forward.

    The forward of every module of the model, and what it calls, is searched for `<path to a layer>.weight` in a place
    that computes with it. Paths through attributes, local names, loops, ModuleLists and arguments are followed. A
    path that is only taken on a GPU counts as well.

    Args:
        model: any module; nothing of it is run.
        names: the linear layers by their names in the model.

    Returns:
        Layer name -> the class and method that read its weight, such as "WavLMAttention.forward".
    """
    layers = {id(layer): name for name, layer in names.items()}
    found: dict[str, str] = {}
    reads_of_class: dict[type, set[tuple[_Path, str]]] = {}
    for module in model.modules():
        if isinstance(module, _SWITCHED_OFF) or id(module) in layers:
            continue
        kind = type(module)
        if kind not in reads_of_class:
            reads_of_class[kind] = _class_reads(module)
        for path, reader in sorted(reads_of_class[kind]):
            for layer in _resolve(module, path):
                if layer is not module and id(layer) in layers:
                    found.setdefault(layers[id(layer)], reader)
    return found


def _class_reads(module: nn.Module) -> set[tuple[_Path, str]]:
    """(path from the module to a layer, reader) for each read that the module's forward can reach."""
    reads: set[tuple[_Path, str]] = set()
    seen: set[tuple[Any, ...]] = set()
    todo: list[tuple[Callable[..., Any], dict[str, _Path]]] = [(type(module).forward, {})]
    while todo:
        function, bound = todo.pop()
        function = inspect.unwrap(function)
        key = (function, *sorted(bound.items()))
        tree = _source(function)
        if tree is None or key in seen:
            continue
        seen.add(key)
        scan = _Scan(module, function, tree, bound)
        reads |= {(path, f"{function.__qualname__}") for path in scan.reads}
        todo += scan.calls
    return reads


@functools.lru_cache(maxsize=4096)
def _source(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """The definition of a Python function; None without source, or for a function of PyTorch outside of modules."""
    if not inspect.isfunction(function):
        return None
    if (
        function.__module__
        and function.__module__.startswith("torch.")
        and not function.__module__.startswith("torch.nn.modules")
    ):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


class _Scan:
    """One function's reads of weights, by path from the module, and the functions that it hands modules to."""

    def __init__(self, module: nn.Module, function: Callable[..., Any], tree: ast.FunctionDef, bound: dict[str, _Path]):
        self.module, self.function = module, function
        self.reads: set[_Path] = set()
        self.calls: list[tuple[Callable[..., Any], dict[str, _Path]]] = []
        arguments = [argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args)]
        # A method is entered without bindings: its first argument is the module itself.
        self.names: dict[str, _Path] = dict(bound) if bound else {arguments[0]: ()} if arguments else {}
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        nodes = sorted(ast.walk(tree), key=lambda node: (getattr(node, "lineno", 0), getattr(node, "col_offset", 0)))
        for node in nodes:
            self._bind(node)
        for node in nodes:
            if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias") and isinstance(node.ctx, ast.Load):
                path = self._path(node.value)
                if path is not None and not self._harmless(node):
                    self.reads.add(path)
            elif isinstance(node, ast.Call):
                self._follow(node)

    def _path(self, node: ast.AST) -> _Path | None:
        """The path from the module that an expression denotes; None if it is not one."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self._path(node.value)
            return None if base is None else (*base, node.attr)
        if isinstance(node, ast.Subscript):
            base = self._path(node.value)
            return None if base is None else (*base, _ANY)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) >= 2:
                base, name = self._path(node.args[0]), node.args[1]
                known = isinstance(name, ast.Constant) and isinstance(name.value, str)
                return None if base is None else (*base, name.value if known else _ANY)  # type: ignore[attr-defined]
            if isinstance(node.func, ast.Name) and node.func.id in ("enumerate", "reversed", "list", "tuple", "iter"):
                return self._path(node.args[0]) if node.args else None
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("children", "modules", "values", "items"):
                return self._path(node.func.value)
        return None

    def _bind(self, node: ast.AST) -> None:
        """Follow names: `layer = self.layer`, `for layer in self.layers`, `for a, b in zip(self.a, self.b)`."""
        if isinstance(node, ast.Assign):
            for target in node.targets:
                values = node.value.elts if isinstance(node.value, ast.Tuple) else None
                if isinstance(target, ast.Tuple) and values and len(values) == len(target.elts):
                    for one, value in zip(target.elts, values):
                        self._assign(one, self._path(value))
                else:
                    self._assign(target, self._path(node.value))
        elif isinstance(node, ast.NamedExpr):
            self._assign(node.target, self._path(node.value))
        elif isinstance(node, (ast.For, ast.comprehension)):
            called = (
                node.iter.func.id if isinstance(node.iter, ast.Call) and isinstance(node.iter.func, ast.Name) else ""
            )
            if called == "zip" and isinstance(node.target, ast.Tuple):
                for target, source in zip(node.target.elts, node.iter.args):  # type: ignore[attr-defined]
                    self._assign(target, self._entry(source))
            elif isinstance(node.target, ast.Tuple):  # enumerate(...), items(): the last is the module
                self._assign(node.target.elts[-1], self._entry(node.iter))
            else:
                self._assign(node.target, self._entry(node.iter))

    def _entry(self, iterable: ast.AST) -> _Path | None:
        path = self._path(iterable)
        return None if path is None else (*path, _ANY)

    def _assign(self, target: ast.AST, path: _Path | None) -> None:
        if isinstance(target, ast.Name) and path is not None:
            self.names[target.id] = path

    def _harmless(self, node: ast.AST) -> bool:
        """Whether a read of a weight asks for its dtype, its presence and the like only."""
        parent = self.parents.get(node)
        if isinstance(parent, ast.Attribute):
            return parent.attr in _HARMLESS
        if isinstance(parent, ast.Compare):
            return all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in parent.ops)
        return isinstance(parent, ast.Call) and getattr(parent.func, "id", None) in _HARMLESS_CALLS

    def _follow(self, node: ast.Call) -> None:
        """Note a call of a method, or of a function with a module as argument, to be scanned later."""
        callee = node.func
        if isinstance(callee, ast.Attribute):
            if isinstance(callee.value, ast.Call) and getattr(callee.value.func, "id", None) == "super":
                if method := self._inherited(callee.attr):
                    self.calls.append((method, {}))
                return
            owner = self._path(callee.value)
            for one in _resolve(self.module, owner) if owner is not None else ():
                method = getattr(type(one), callee.attr, None)
                if inspect.isfunction(method) and (one is self.module or callee.attr != "forward"):
                    self._enter(method, node, first=owner)
        elif isinstance(callee, ast.Name):
            function = inspect.unwrap(self.function).__globals__.get(callee.id)
            if inspect.isfunction(function):
                self._enter(function, node)

    def _enter(self, function: Callable[..., Any], node: ast.Call, first: _Path | None = None) -> None:
        try:
            arguments = list(inspect.signature(inspect.unwrap(function)).parameters)
        except (TypeError, ValueError):
            return
        bound = {} if first is None else {arguments[0]: first}
        for name, value in zip(arguments[first is not None :], node.args):
            if (path := self._path(value)) is not None:
                bound[name] = path
        for keyword in node.keywords:
            if keyword.arg and (path := self._path(keyword.value)) is not None:
                bound[keyword.arg] = path
        if bound:
            self.calls.append((function, bound))

    def _inherited(self, name: str) -> Callable[..., Any] | None:
        """The method that super().<name> calls from here."""
        classes = type(self.module).__mro__
        here = next((i for i, kind in enumerate(classes) if self.function in map(inspect.unwrap, _functions(kind))), -1)
        return next((vars(kind)[name] for kind in classes[here + 1 :] if name in vars(kind)), None)


def _functions(kind: type) -> list[Callable[..., Any]]:
    return [value for value in vars(kind).values() if inspect.isfunction(value)]


def _resolve(module: Any, path: _Path) -> Iterator[nn.Module]:
    """The modules at the end of a path."""
    if not path:
        if isinstance(module, nn.Module):
            yield module
        return
    if isinstance(module, nn.Module) and path[0] == _ANY:
        for child in module.children():
            yield from _resolve(child, path[1:])
    elif isinstance(module, (list, tuple)) and path[0] == _ANY:
        for child in module:
            yield from _resolve(child, path[1:])
    elif path[0] != _ANY:
        children = module._modules if isinstance(module, nn.Module) else {}
        named: Any = children.get(path[0], vars(module).get(path[0]) if hasattr(module, "__dict__") else None)
        if named is not None:
            yield from _resolve(named, path[1:])
