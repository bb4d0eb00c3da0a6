# SPDX-License-Identifier: LGPL-2.1-or-later
"""The order in which the program is to be read, and how much of it has to be read at a time."""

from __future__ import annotations

import ast
import functools
import re
import symtable
from collections.abc import Iterator
from pathlib import Path

import storagetm

SOURCE = Path(storagetm.__file__).read_text()
BANNER = re.compile(r"^# -{107}\n# (\d+)\. (.+)\n# -{107}\n", re.MULTILINE)
SECTION_MAX, CLASS_MAX, FUNCTION_MAX = 700, 301, 61  # lines

Named = ast.FunctionDef | ast.ClassDef


@functools.cache
def sections() -> list[tuple[str, int]]:
    """Titles, with the line in which each begins."""
    return [(m[2], SOURCE.count("\n", 0, m.start()) + 1) for m in BANNER.finditer(SOURCE)]


@functools.cache
def section_of(line: int) -> int:
    return sum(start <= line for _, start in sections()) - 1


def defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, Named):
        yield node.name
    for target in getattr(node, "targets", [getattr(node, "target", None)]):
        yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name)) if target else ()


class WithoutAnnotations(ast.NodeTransformer):
    """They are not evaluated, so that they may name what comes later."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant("")
        self.generic_visit(node)
        return node


def used(node: ast.stmt) -> set[str]:
    """The names of the module's own that a statement refers to."""

    def names(table: symtable.SymbolTable) -> Iterator[str]:
        outermost = table.get_type() == "module"
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (outermost or symbol.is_global()):
                yield symbol.get_name()
        for child in table.get_children():
            yield from names(child)

    return set(names(symtable.symtable(ast.unparse(WithoutAnnotations().visit(node)), "x", "exec")))


def test_table_of_contents_has_all_sections() -> None:
    numbered = [f"{i:>2}. {title}" for i, (title, _) in enumerate(sections(), 1)]
    assert len(numbered) > 10
    assert "\n".join(numbered) in (storagetm.__doc__ or "")
    assert [m[1] for m in BANNER.finditer(SOURCE)] == [str(i) for i in range(1, len(numbered) + 1)]


def test_sections_use_only_what_is_above_them() -> None:
    nodes = ast.parse(SOURCE).body
    places = {name: section_of(node.lineno) for node in nodes for name in defined(node)}
    found = []
    for node in nodes:
        here = section_of(node.lineno)
        found += [f"{name} in line {node.lineno}" for name in used(node) if places.get(name, -1) > here]
    assert found == []


def test_nothing_is_too_long() -> None:
    starts = [start for _, start in sections()] + [SOURCE.count("\n")]
    for (title, start), end in zip(sections(), starts[1:]):
        assert end - start <= SECTION_MAX, title
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, Named):
            most = CLASS_MAX if isinstance(node, ast.ClassDef) else FUNCTION_MAX
            assert (node.end_lineno or 0) - node.lineno < most, node.name


def code_of(title: str) -> str:
    """A section without what only people read."""
    number = [name for name, _ in sections()].index(title)
    nodes = [node for node in ast.parse(SOURCE).body if section_of(node.lineno) == number]
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, Named) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return "\n".join(map(ast.unparse, nodes))


def test_tree_knows_neither_kinds_of_entries_nor_transports() -> None:
    for title in ("The ledger", "The tree"):
        code = code_of(title)
        assert len(code) > 1000
        assert "isinstance" not in code
        assert not re.search(r"nvme|subsystem|namespace", code, re.IGNORECASE), title


def test_what_is_shown_names_no_transport() -> None:
    """Nor does what says when, not even in a comment: commands and names come from the transport."""
    starts = [SOURCE.index(f". {title}\n# -") for title, _ in sections()] + [len(SOURCE)]
    for title in ("The exporter", "The report", "Outputs", "The service"):
        number = [name for name, _ in sections()].index(title)
        text = SOURCE[starts[number] : starts[number + 1]]
        assert text.count("\n") > 200
        assert re.findall(r"(?i)\w*(?:nvme|nvmet|namespace|subsystem|nqn)\w*", text) == [], title


def test_no_class_in_use_lacks_what_its_base_leaves_open() -> None:
    """A base class says what there has to be; whoever made another kind of it has filled all of that in."""

    def leaves(kind: type[object]) -> list[type[object]]:
        subclasses = [s for s in type.__subclasses__(kind) if s.__module__ == storagetm.__name__]
        return [leaf for s in subclasses for leaf in leaves(s)] or [kind]

    tree = ast.parse(SOURCE)
    opened = [
        (outer.name, inner.name)
        for outer in tree.body
        if isinstance(outer, ast.ClassDef)
        for inner in outer.body
        if isinstance(inner, ast.FunctionDef) and "raise NotImplementedError" in ast.unparse(inner)
    ]
    assert {base for base, _ in opened} == {"Disk", "OnePort", "Source", "Transport", "Output"}
    for base, method in opened:
        kind = getattr(storagetm, base)
        for leaf in leaves(kind):
            assert leaf is not kind
            assert getattr(leaf, method) is not getattr(kind, method), (leaf, method)


def test_no_codec_is_used_that_an_initrd_has_not() -> None:
    """Those that Python has built in; all others are modules of the package encodings."""
    built_in = {"utf-8", "ascii", "latin-1"}
    calls = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Call)]
    names = [
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("decode", "encode")
        if call.args and isinstance(call.args[0], ast.Constant)
    ]
    assert len(names) > 5
    assert set(names) <= built_in


def test_words_of_the_vocabulary_are_used() -> None:
    """Each is the name of something, or stands in names."""
    doc = storagetm.__doc__ or ""
    words = re.findall(r"^- ([a-z]+)(?:, ([a-z]+))?:", doc, re.MULTILINE)
    assert len(words) > 10
    code = SOURCE.replace(doc, "")
    for word in {w for pair in words for w in pair if w}:
        assert re.search(rf"(?i)\b(class|def) \w*{word}|self\.{word}", code), word
