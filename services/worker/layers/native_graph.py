"""The operations of a network as a graph, before it is lowered to a program of native kernels; and what is changed in it first.

`forward` of a model states that logits are wanted of sampled tokens only at its very end. What the last layer does with each row by
itself (nearly all of it) is then of no use for other rows: `sample_early` has it done for sampled rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

_ROW_BY_ROW: Final = frozenset({"norm", "linear", "gated", "add", "scaled", "soft_cap"})
"""Operations in which a row depends on the same row of the inputs alone."""


@dataclass(eq=False, slots=True)
class Node:
    """One operation and the value that it gives.

    Attributes:
        op: Its name; see `_Lowering` in native_ops.py.
        inputs: Values it reads.
        width: Numbers a row.
        is_sampled: Whether the value has rows for sampled tokens only.
        what: Whatever the operation needs besides.
        uses: Nodes that read the value, in order.
    """

    op: str
    inputs: tuple[Node, ...]
    width: int
    is_sampled: bool
    what: tuple[Any, ...] = ()
    uses: list[Node] = field(default_factory=list)

    @property
    def is_read_sampled(self) -> bool:
        """Whether only the rows of sampled tokens are read."""
        return bool(self.uses) and all(use.op == "sampled" for use in self.uses)


def sample_early(nodes: list[Node]) -> list[Node]:
    """Take sampled rows out of values as early as can be; every row that is left is computed as before.

    Args:
        nodes: All nodes in order. They are changed.

    Returns:
        The nodes in order, with other `sampled` nodes where that helps.
    """
    movable = {id(node) for node in nodes if node.op == "sampled"}
    for node in reversed(nodes):
        if node.op in _ROW_BY_ROW and not node.is_sampled and node.uses and all(id(use) in movable for use in node.uses):
            movable.add(id(node))
    gathers: dict[int, Node] = {}
    ordered: list[Node] = []
    for node in nodes:
        if id(node) not in movable:
            ordered.append(node)
        elif node.op == "sampled" and id(node.inputs[0]) in movable:
            _replace(node, node.inputs[0])
        elif node.op == "sampled":
            gathers.setdefault(id(node.inputs[0]), node)
            if gathers[id(node.inputs[0])] is node:
                ordered.append(node)
            else:
                _replace(node, gathers[id(node.inputs[0])])
        else:
            for value in dict.fromkeys(node.inputs):
                if id(value) not in movable:
                    _read_sampled(node, value, gathers, ordered)
            node.is_sampled = True
            ordered.append(node)
    return ordered


def _read_sampled(node: Node, value: Node, gathers: dict[int, Node], ordered: list[Node]) -> None:
    """Let a node read the sampled rows of a value."""
    gather = gathers.get(id(value))
    if gather is None:
        gather = gathers[id(value)] = Node("sampled", (value,), value.width, True)
        value.uses.append(gather)
        ordered.append(gather)
    node.inputs = tuple(gather if each is value else each for each in node.inputs)
    value.uses.remove(node)
    gather.uses.append(node)


def _replace(node: Node, by: Node) -> None:
    """Let whoever reads a node read another one."""
    by.uses.remove(node)
    for use in node.uses:
        use.inputs = tuple(by if each is node else each for each in use.inputs)
        by.uses.append(use)
