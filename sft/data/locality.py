"""Templates that provably write their messages one after another, each knowing only those before it.

For such a template the rendering of messages[:k] is a beginning of the rendering of all messages, so one rendering
with a mark at the start of each message shows where every served prompt ends. The proof reads the syntax tree: one
loop over the messages at the top level; nothing before or in it looks at later messages, at their number or at
`add_generation_prompt`; nothing after it looks at messages or at what the loop left behind. A branch that looks ahead
but is taken for one role only (tool results, mostly) is allowed where a conversation has no such message. Whatever the
proof does not know, it refuses: those templates are rendered once a turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sft.errors import TemplateError
from sft.templating import parse

MARK = "\U000f5f7e"
AHEAD = frozenset(("last", "length", "revindex", "revindex0", "nextitem"))
UNKNOWN = ("Block", "Extends", "Include", "Import", "FromImport", "FilterBlock", "Break")
STATEFUL = frozenset(("cycler", "joiner"))


@dataclass(frozen=True)
class Local:
    """A template with marks, and the conversations it is right for."""

    template: str
    needs: int
    """Messages that a beginning must hold for the constant indices (`messages[0]`) to mean the same."""
    without_roles: frozenset[str]
    constant: bool
    """Whether what follows the last message is the same for all conversations."""

    def fits(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        return not any(m.get("role") in self.without_roles for m in messages)


class NotLocal(Exception):
    """The proof failed; the text says at what."""


@lru_cache(maxsize=8)
def local_template(template: str) -> Local | None:
    """The template with a mark at the start of each message, or None where it isn't provably local."""
    try:
        return prove(template)
    except (NotLocal, TemplateError):
        return None


def prove(template: str) -> Local:
    """Raises NotLocal."""
    from jinja2 import nodes

    tree = parse(template)
    if any(type(node).__name__ in UNKNOWN for node in tree.find_all(nodes.Node) if node is not tree):
        raise NotLocal("the template is composed of others, or breaks off")
    names = aliases(tree)
    loops = [n for n in tree.find_all(nodes.For) if is_alias_value(n.iter, names)]
    at_top = [i for i, node in enumerate(tree.body) if node in loops]
    if len(loops) != 1 or not at_top:
        raise NotLocal("not one loop over the messages at the top level")
    loop, place = loops[0], at_top[0]
    if loop.recursive or loop.test is not None or loop.else_:
        raise NotLocal("the loop filters, recurses or has an else")
    if not isinstance(loop.target, nodes.Name) or loop.target.name in stored(tree, besides=loop.target):
        raise NotLocal("the message has another name, or its name is set again")
    before, after = tree.body[:place], tree.body[place + 1 :]
    walk = Walk(names, loop, offsets(tree, names))
    for node in before:
        walk.visit(node, frozenset(), None)
    for node in loop.body:
        walk.visit(node, frozenset(), loop)
    spaces = {
        n.target.name
        for n in tree.find_all(nodes.Assign)
        if isinstance(n.target, nodes.Name) and not isinstance(n.node, nodes.Const)
    }
    for node in after:
        for name in loads(node):
            if name in spaces or name in names or name == "loop":
                raise NotLocal(f"{name} is read after the loop")
    for macro in tree.find_all(nodes.Macro):
        own = {argument.name for argument in macro.args}
        for name in loads(macro):
            if name not in own and (name in names or name in spaces or name == "add_generation_prompt"):
                raise NotLocal(f"a macro reads {name}")
    assigned = stored(tree, besides=loop.target)
    constant = not any(name in assigned or name == "tools" for node in after for name in loads(node))
    return Local(with_marks(template, names), walk.needs, frozenset(walk.guarded), constant)


def offsets(tree: Any, names: set[str]) -> dict[str, int]:
    """How many messages a name may have lost at the front: none where it is never set, else all slices together."""
    from jinja2 import nodes

    lost = sum(n.start.value for n in tree.find_all(nodes.Slice) if isinstance(n.start, nodes.Const))
    assigned = stored(tree, besides=None)
    return {name: lost if name in assigned else 0 for name in names}


def stored(tree: Any, besides: Any) -> set[str]:
    from jinja2 import nodes

    return {n.name for n in tree.find_all(nodes.Name) if n.ctx != "load" and n is not besides}


def loads(node: Any) -> Iterator[str]:
    from jinja2 import nodes

    found = [node] if isinstance(node, nodes.Name) else []
    for name in [*found, *node.find_all(nodes.Name)]:
        if name.ctx == "load":
            yield name.name


def aliases(tree: Any) -> set[str]:
    """`messages` and every name that is set to it or to its rest (`messages[1:]`)."""
    from jinja2 import nodes

    names = {"messages"}
    for _ in range(3):  # aliases of aliases
        for node in tree.find_all(nodes.Assign):
            if isinstance(node.target, nodes.Name) and is_alias_value(node.node, names):
                names.add(node.target.name)
    return names


def is_alias_value(node: Any, names: set[str]) -> bool:
    from jinja2 import nodes

    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        start, whole = node.arg.start, node.arg.stop is None and node.arg.step is None
        value = start.value if isinstance(start, nodes.Const) else None
        forward = start is None or (isinstance(value, int) and value >= 0)
        return whole and forward and is_alias_value(node.node, names)
    return isinstance(node, nodes.Name) and node.name in names


class Walk:
    """Visits what runs before and in the loop and objects to every look ahead."""

    def __init__(self, names: set[str], main: Any, offset: Mapping[str, int]) -> None:
        self.names, self.main, self.offset = names, main, offset
        self.needs = 1
        self.guarded: set[str] = set()

    def object(self, what: str, roles: frozenset[str]) -> None:
        """Fail, unless this runs only for messages of one role."""
        if not roles:
            raise NotLocal(what)
        self.guarded |= roles

    def visit(self, node: Any, roles: frozenset[str], loop: Any) -> None:
        """`roles`: those for which the node runs, where that is known; `loop`: the innermost loop around it."""
        from jinja2 import nodes

        if isinstance(node, nodes.Name):
            if node.ctx == "load":
                self.name(node.name, roles, loop)
        elif isinstance(node, nodes.Getattr) and is_name(node.node, "loop"):
            if loop is self.main and node.attr in AHEAD:
                self.object(f"loop.{node.attr}", roles)
        elif isinstance(node, nodes.Getitem) and is_alias_value(node.node, self.names):
            self.index(node, roles)
        elif isinstance(node, nodes.Assign) and is_alias_value(node.node, self.names):
            pass  # messages[1:] is judged where it is used
        elif isinstance(node, nodes.Test) and node.name == "defined" and isinstance(node.node, nodes.Name):
            pass
        elif isinstance(node, nodes.Compare) and self.is_emptiness(node):
            self.needs = max(self.needs, max(self.offset.values()) + 1)
        elif isinstance(node, nodes.For):
            self.visit(node.iter, roles, loop)
            for child in [*node.body, *node.else_, *([node.test] if node.test else [])]:
                self.visit(child, roles, node)
        elif isinstance(node, nodes.If):
            self.visit(node.test, roles, loop)
            inside = roles or self.roles_of(node.test)
            for child in node.body:
                self.visit(child, inside, loop)
            for child in [*node.elif_, *node.else_]:
                self.visit(child, roles, loop)
        else:
            for child in node.iter_child_nodes():
                self.visit(child, roles, loop)

    def is_emptiness(self, node: Any) -> bool:
        """`messages | length != 0`: the same answer for every beginning that is long enough."""
        from jinja2 import nodes

        left, ops = node.expr, node.ops
        counted = isinstance(left, nodes.Filter) and left.name in ("length", "count") and not left.args
        zero = len(ops) == 1 and isinstance(ops[0].expr, nodes.Const) and ops[0].expr.value == 0
        return counted and zero and ops[0].op in ("ne", "eq", "gt") and is_alias_value(left.node, self.names)

    def name(self, name: str, roles: frozenset[str], loop: Any) -> None:
        if name in self.names:
            self.object(f"{name} as a whole", roles)
        elif name == "add_generation_prompt" or name in STATEFUL:
            raise NotLocal(f"{name} before the end of the loop")
        elif name == "loop" and loop is self.main:
            raise NotLocal("loop as a whole")

    def index(self, node: Any, roles: frozenset[str]) -> None:
        """A fixed message from the front. Others may look ahead: `messages[loop.index0 - 1]` starts at the last."""
        from jinja2 import nodes

        place = node.arg.value if isinstance(node.arg, nodes.Const) else None
        if isinstance(place, int) and place >= 0 and isinstance(node.node, nodes.Name):
            self.needs = max(self.needs, self.offset[node.node.name] + place + 1)
        else:
            self.object("a message by its index", roles)

    def roles_of(self, test: Any) -> frozenset[str]:
        """The role for which a test of the loop's message is true: `message.role == 'tool'`, alone or with `and`."""
        from jinja2 import nodes

        if isinstance(test, nodes.And):
            return self.roles_of(test.left) or self.roles_of(test.right)
        target = self.main.target
        if not (isinstance(test, nodes.Compare) and len(test.ops) == 1 and test.ops[0].op == "eq"):
            return frozenset()
        value = test.ops[0].expr
        subject = test.expr
        role = (isinstance(subject, nodes.Getattr) and subject.attr == "role") or (
            isinstance(subject, nodes.Getitem) and isinstance(subject.arg, nodes.Const) and subject.arg.value == "role"
        )
        known = role and isinstance(target, nodes.Name) and is_name(getattr(subject, "node", None), target.name)
        return frozenset((value.value,)) if known and isinstance(value, nodes.Const) else frozenset()


def is_name(node: Any, name: str) -> bool:
    from jinja2 import nodes

    return isinstance(node, nodes.Name) and node.name == name


def with_marks(template: str, names: set[str]) -> str:
    """The template with a mark written at the start of each message. Raises NotLocal.

    The mark stands in a block that ends as the loop's own tag ends, so that blanks around it fare as before.
    """
    alias = "|".join(map(re.escape, names))
    tag = re.compile(rf"\{{%[-+]?\s*for\s+\w+\s+in\s+(?:{alias})\s*(?:\[\s*\d*\s*:\s*\])?\s*([-+]?)%\}}")
    found = list(tag.finditer(template))
    if len(found) != 1:
        raise NotLocal("the loop's tag cannot be told in the text")
    end = found[0].end()
    return f"{template[:end]}{{% if true %}}{{{{ '{MARK}' }}}}{{% endif {found[0].group(1)}%}}{template[end:]}"
