from __future__ import annotations

import pytest
import torch

from quiesce.graph.partition import partition
from quiesce.preparation import Prepared, prepare
from quiesce.reconstruct.streams import Network, Streams
from tiny import Chain, images, recipe


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(Chain(3), images(), recipe("nearest"))


def whole(prepared: Prepared, *, quantized: bool, batch: int = 64) -> torch.Tensor:
    network = Network(prepared.graph)
    out = network.run(0, network.end, {network.inputs[0]: images()}, batch, quantized=quantized)
    return out[network.outputs[0]]


@pytest.mark.parametrize("quantized", [True, False])
def test_stretches_in_a_row_give_what_the_whole_network_gives(prepared: Prepared, quantized: bool) -> None:
    network = Network(prepared.graph)
    alive = {network.inputs[0]: images()}
    for start in range(network.end):
        alive = network.run(start, start + 1, alive, 64, quantized=quantized)
    assert list(alive) == list(network.outputs)
    assert torch.equal(alive[network.outputs[0]], whole(prepared, quantized=quantized))


def test_streams_are_the_float_and_the_quantized_network(prepared: Prepared) -> None:
    assert torch.equal(whole(prepared, quantized=True), prepared.graph(images())[0])
    assert not torch.equal(whole(prepared, quantized=True), whole(prepared, quantized=False))
    torch.testing.assert_close(whole(prepared, quantized=False), Chain(3)(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_the_batch_size_changes_no_value(prepared: Prepared, batch: int) -> None:
    torch.testing.assert_close(whole(prepared, quantized=True, batch=batch), whole(prepared, quantized=True))


def test_only_what_is_still_needed_stays_alive(prepared: Prepared) -> None:
    network = Network(prepared.graph)
    streams = Streams.at_input({network.inputs[0]: images()})
    for module in prepared.modules:
        streams = streams.advance(network, module.stop, 64)
        assert streams.position == module.stop
        assert len(streams.float) == len(streams.quantized) == 1  # one tensor between two residual blocks
        assert streams.float.keys() == streams.quantized.keys()


@pytest.mark.parametrize("step_sizes", [True, False])
def test_a_stretch_learns_where_it_quantizes(step_sizes: bool) -> None:
    left = prepare(Chain(2), images(8), recipe("nearest", leave_float=["blocks.0.*", "blocks.1.conv1"]))
    network = Network(left.graph)
    learning = {u.name: network.learns(u.start, u.stop, step_sizes) for u in partition(left.graph, "layer")}
    # What the layer behind quantizes of a layer's output is learned with that layer.
    assert learning == {
        "stem": True,
        "blocks.0.conv1": False,
        "blocks.0.conv2": False,
        "blocks.1.conv1": step_sizes,
        "blocks.1.conv2": True,
        "head": True,
    }


def test_executions_are_nodes_times_batches(prepared: Prepared) -> None:
    network = Network(prepared.graph)
    assert network.executions == 0
    network.run(0, 5, {network.inputs[0]: images(32)}, 10, quantized=True)
    assert network.executions == 5 * 4
