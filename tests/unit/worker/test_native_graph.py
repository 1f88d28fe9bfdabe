"""Sampled rows are taken out as early as can be, and nothing else changes."""

from __future__ import annotations

from services.worker.layers.native_graph import Node, sample_early


class Graph:
    """A network being stated."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(self, op: str, *inputs: Node) -> Node:
        is_sampled = op == "sampled" or any(value.is_sampled for value in inputs)
        node = Node(op, inputs, 32, is_sampled)
        for value in inputs:
            value.uses.append(node)
        self.nodes.append(node)
        return node

    def layer(self, x: Node) -> Node:
        attended = self.add("linear", self.add("attend", self.add("linear", self.add("norm", x))))
        x = self.add("add", x, attended)
        return self.add("add", x, self.add("linear", self.add("gated", self.add("linear", self.add("norm", x)))))

    def logits(self, x: Node) -> Node:
        return self.add("linear", self.add("norm", self.add("sampled", x)))


def assert_consistent(nodes: list[Node]) -> None:
    """Every input stands before its reader, knows it, and has the rows that it reads."""
    seen: set[int] = set()
    for node in nodes:
        for value in node.inputs:
            assert id(value) in seen
            assert node in value.uses
            assert node.op == "sampled" or value.is_sampled == node.is_sampled
        for use in node.uses:
            assert use in nodes
            assert node in use.inputs
        seen.add(id(node))


def test_after_the_last_attention_only_sampled_rows_are_computed() -> None:
    graph = Graph()
    first = graph.layer(graph.add("embed"))
    logits = graph.logits(graph.layer(first))
    nodes = sample_early(graph.nodes)
    assert_consistent(nodes)
    attends = [index for index, node in enumerate(nodes) if node.op == "attend"]
    gathers = [node for node in nodes if node.op == "sampled"]
    assert {id(node.inputs[0]) for node in gathers} == {id(first), id(nodes[attends[-1]])}
    assert [node.is_sampled for node in nodes] == [False] * (attends[-1] + 1) + [True] * (len(nodes) - attends[-1] - 1)
    assert [node.is_read_sampled for node in nodes if node.op == "attend"] == [False, True]
    assert nodes[-1] is logits
    assert len(nodes) == len(graph.nodes) + 1


def test_a_value_that_other_rows_need_is_computed_for_them() -> None:
    """The norm is read by the next attention as well as by the logits."""
    graph = Graph()
    normed = graph.add("norm", graph.layer(graph.add("embed")))
    graph.add("attend", graph.add("linear", normed))
    graph.logits(normed)
    nodes = sample_early(graph.nodes)
    assert_consistent(nodes)
    assert not normed.is_sampled
    assert [node.inputs[0] for node in nodes if node.op == "sampled"] == [normed]


def test_a_network_without_attention_samples_its_embedding() -> None:
    graph = Graph()
    embedded = graph.add("embed")
    graph.logits(graph.add("add", embedded, graph.add("linear", graph.add("norm", embedded))))
    nodes = sample_early(graph.nodes)
    assert_consistent(nodes)
    assert [node.op for node in nodes] == ["embed", "sampled", "norm", "linear", "add", "norm", "linear"]
