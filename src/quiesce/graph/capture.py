"""Capture: a PyTorch network becomes one flat, functional ATen graph (torch.export, dynamic batch).

The captured GraphModule takes the flat list of input tensors and returns the tuple of output tensors; how the
caller's arguments and results nest is kept beside it as :class:`Interface`. Its tensors are copies.
"""

from __future__ import annotations

import copy
import inspect
import io
import logging
import operator
import re
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from quiesce.data import Samples
from quiesce.errors import ModelError
from quiesce.graph.rewrite import add_tensor, tidy

aten = torch.ops.aten
LARGEST_CLIP = 32
"""Images up to which a batch size is looked for that a network runs on which does not run on two."""
OWN_FRAMES = (str(Path(torch.__file__).parent), __file__, "<")
"""Where frames of a traceback begin that are not the user's."""


@dataclass(frozen=True)
class TensorForm:
    """What an input tensor looks like; None stands for a dimension that is free, as the batch's is."""

    dtype: torch.dtype
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Interface:
    """How the caller's arguments and results nest: trees with a :class:`Leaf` at each tensor."""

    inputs: Any
    """``(args, kwargs)``."""
    outputs: Any
    """The model's result, with constants (None, numbers) where it returns those."""
    forms: tuple[TensorForm, ...]
    """One of each input tensor, in the order of the flat inputs."""

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the flat inputs of a call; keyword arguments may come in any order."""
        expected = pytree.tree_structure(self.inputs)
        if set(kwargs) == set(self.inputs[1]):
            kwargs = {name: kwargs[name] for name in self.inputs[1]}
        leaves, given = pytree.tree_flatten((args, kwargs))
        if given != expected:
            names = ", ".join([f"{len(self.inputs[0])} positional", *self.inputs[1]])
            raise ModelError(f"the network was captured with other arguments; call it with: {names}.")
        return leaves

    def unflatten(self, outputs: tuple[Tensor, ...]) -> Any:
        """Nest the flat outputs as the model does."""
        return pytree.tree_map(lambda leaf: outputs[leaf.index] if isinstance(leaf, Leaf) else leaf, self.outputs)


@dataclass(frozen=True)
class Leaf:
    """A tensor's place in the flat list of inputs or outputs."""

    index: int


def capture(model: nn.Module | ExportedProgram, example: Samples) -> fx.GraphModule:
    """Return the network as a flat functional graph in eval mode, with dropout gone and the batch size free.

    Args:
        model: a network (never changed), or a program already exported.
        example: at least two samples to run it on; only shapes, dtypes and the device matter.

    Raises:
        ModelError: torch.export refuses the network (its reason and the source line are kept), the network changes
            its buffers or inputs while it runs, returns something else than what it computes, or a program was
            exported with a fixed batch size.
    """
    program = model if isinstance(model, ExportedProgram) else _export(model, example)
    program = _functional(program)
    _refuse_mutation(program)
    _refuse_fixed_batch(program)
    gm = _flat_graph(program)
    for rewrite in (
        _drop_checks,
        _whole_batch_norms,
        _fold_constants,
        _linear_products,
        _drop_no_ops,
        _any_layout,
        _local_sizes,
    ):
        rewrite(gm)
    return tidy(gm)


def interface_of(gm: fx.GraphModule) -> Interface:
    """Return how the captured network's arguments and results nest."""
    found = gm.meta["interface"]
    assert isinstance(found, Interface)
    return found


def _export(model: nn.Module, example: Samples) -> ExportedProgram:
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        shapes = _dynamic_shapes(model, example)
        with torch.no_grad(), _quiet():
            return torch.export.export(model, example.args, example.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        larger = _larger_example(model, example, error)
        if larger is None:
            raise ModelError(_export_message(model, error)) from error
        return _export(model, larger)
    finally:
        for module, training in modes.items():
            module.training = training


def _larger_example(model: nn.Module, example: Samples, error: Exception) -> Samples | None:
    """Repeat the example where a larger one may be exported: twice the least that the network runs on.

    That is for images that are frames of clips, and because torch.export takes sizes of 1, as that of the rest of a
    batch of two behind its first image, for constants. None if the example is not why export failed.

    Raises:
        ModelError: it runs on no batch, as with images of a wrong shape or dtype.
    """
    try:
        model = copy.deepcopy(model)  # forward may change buffers
    except Exception:  # some keep tensors with gradients; what torch.export says has to do for them
        return None
    refused = _run_error(model, example)
    if refused is None:
        larger = example.select(torch.arange(4 * len(example)) % len(example))
        return larger if len(example) == 2 and _constant_batch(error) and not _run_error(model, larger) else None
    for size in range(len(example) + 1, LARGEST_CLIP + 1):
        repeated = example.select(torch.arange(2 * size) % len(example))
        if _run_error(model, repeated.select(slice(size))) is None and _run_error(model, repeated) is None:
            return repeated
    forms = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {['N', *t.shape[1:]]}" for t in example.inputs.values())
    raise ModelError(
        f"{type(model).__name__} does not run on the calibration inputs ({forms}){_user_line(refused)}; "
        "give inputs of the shape and dtype that it takes, and let it take any number of them. "
        f"torch says: {_reason(refused)}"
    ) from error


def _run_error(network: Callable[..., Any], samples: Samples) -> Exception | None:
    try:
        with torch.no_grad():
            network(*samples.args, **samples.kwargs)
    except Exception as error:
        return error
    return None


def images_together(gm: fx.GraphModule, samples: Samples) -> int:
    """Return how many images the captured network takes together, as the frames of a clip; 1 if it takes each alone.

    Batches must be multiples of this, and the images of one stay together.

    Args:
        samples: one or more that it runs on; they are repeated.
    """
    flatten = interface_of(gm).flatten

    def runs(size: int) -> bool:
        batch = samples.select(torch.arange(size) % len(samples))
        return _run_error(lambda *args, **kwargs: gm(*flatten(args, kwargs)), batch) is None

    least = next((size for size in range(1, LARGEST_CLIP + 1) if runs(size)), 1)
    # What needs two images, as some do that squeeze the batch away, may take three.
    return 1 if least > 1 and runs(least + 1) else least


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export from printing the half-traced graph, as its reason is in the error, and from warning of what
    recurrent layers do: they list their weights anew.
    """
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The tensor attributes? \S*_flat_weights")
            yield
    finally:
        logger.setLevel(level)


def _dynamic_shapes(model: nn.Module, example: Samples) -> Any:
    """A free batch size for every tensor, nested as ``forward``'s parameters take them (``*args`` are a tuple)."""
    return _free_batch(dict(inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments))


def _free_batch(tree: Any) -> Any:
    """Put a free batch size in place of each tensor, and a list of its parts in place of a class of the user's."""

    def is_own(part: Any) -> bool:
        return type(part) in pytree.SUPPORTED_NODES and type(part) not in pytree.BUILTIN_TYPES

    def free(part: Any) -> Any:
        parts = pytree.SUPPORTED_NODES[type(part)].flatten_fn(part)[0] if is_own(part) else None
        return {0: Dim.DYNAMIC} if parts is None else _free_batch(list(parts))

    return pytree.tree_map(free, tree, is_leaf=is_own)


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Turn in-place operators and writes to views into pure ones; convolutions and the like stay whole."""
    try:
        functional: ExportedProgram = program.run_decompositions({})
    except Exception as error:
        raise ModelError(
            "torch.export accepted the network, but torch can't make its graph functional; simplify what the message "
            f"names. torch says: {type(error).__name__}: {error}"
        ) from error
    return functional


def _export_message(model: nn.Module, error: Exception) -> str:
    """Name the model's own innermost source line and keep torch's reason."""
    constant = _constant_batch(error)
    if constant:
        return (
            f"{type(model).__name__} takes batches of {constant} only, as its forward holds the batch size as a "
            "constant; write x.shape[0] (or -1 in a reshape) where that number stands."
        )
    where = _user_line(error)
    remedy = "change that line" if where else "change it"
    return (
        f"{type(model).__name__} can't be exported{where}; {remedy} so that torch.export accepts it. "
        f"torch says: {_reason(error)}"
    )


def _constant_batch(error: Exception) -> str | None:
    """The number that torch.export says the batch size is, when the network does not let it be free."""
    found = re.search(r"specialized it to be a constant \((\d+)\)", str(error))
    return found[1] if found else None


def _user_line(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_ours(f.filename)]
    return f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


def _is_ours(file: str) -> bool:
    """True for what is torch's, Quiesce's or Python's own; packages may lie within Python's library."""
    installed = file.startswith((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    return file.startswith(OWN_FRAMES) or (file.startswith(sysconfig.get_path("stdlib")) and not installed)


def _reason(error: Exception) -> str:
    """The first paragraph says what is wrong; torch's advice on debugging torch is in the chained error."""
    paragraph = str(error).strip().split("\n\n")[0]
    return f"{type(error).__name__}: {paragraph}" if paragraph else type(error).__name__


def _refuse_mutation(program: ExportedProgram) -> None:
    signature = program.graph_signature
    if signature.buffers_to_mutate:
        names = ", ".join(sorted(signature.buffers_to_mutate.values()))
        raise ModelError(
            f"the network changes its buffers while it runs ({names}); make forward leave them alone in eval mode."
        )
    if signature.user_inputs_to_mutate:
        names = ", ".join(sorted(signature.user_inputs_to_mutate.values()))
        raise ModelError(f"the network changes its inputs in place ({names}); clone them first in forward.")


def _refuse_fixed_batch(program: ExportedProgram) -> None:
    names = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" and node.name in names else None
        if isinstance(value, Tensor) and (value.ndim == 0 or isinstance(value.shape[0], int)):
            raise ModelError(
                f"the program was exported with a fixed batch size (input {node.name}, shape {list(value.shape)}); "
                "export it with dynamic_shapes={0: Dim.DYNAMIC} for every input."
            )


def _flat_graph(program: ExportedProgram) -> fx.GraphModule:
    """Rebuild the program with tensors copied as buffers of one flat root and plain inputs and outputs."""
    source = program.module(check_guards=False)
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    graph = gm.graph
    mapped: dict[fx.Node, fx.Node] = {}
    outputs: list[Any] = []
    for node in source.graph.nodes:
        _refuse_opaque(source, node)
        if node.op == "get_attr":
            tensor = operator.attrgetter(node.target)(source)
            mapped[node] = graph.get_attr(add_tensor(gm, node.name, tensor.detach().clone()))
            mapped[node].name = node.name
            mapped[node].meta = {**node.meta, "path": node.target}
        elif node.op == "output":
            outputs = list(pytree.tree_leaves(node.args[0]))
        else:
            mapped[node] = graph.node_copy(node, mapped.__getitem__)
    kept = [n for n in outputs if isinstance(n, fx.Node)]
    if not kept:
        raise ModelError("the network returns no tensor; there is nothing to compare its quantized outputs with.")
    gm.meta["interface"] = _interface(program, outputs, [n for n in graph.nodes if n.op == "placeholder"])
    batch = {_hint(n.meta["val"].shape[0]) for n in graph.nodes if n.op == "placeholder"}
    for node in kept:
        _check_output(node, batch)
    graph.output(tuple(mapped[n] for n in kept))
    return gm


def _refuse_opaque(source: fx.GraphModule, node: fx.Node) -> None:
    """Refuse what hides a graph of its own: branches, loops, submodules."""
    hidden = node.op == "call_module" or isinstance(node.target, torch._ops.HigherOrderOperator)
    if hidden or (node.op == "get_attr" and isinstance(operator.attrgetter(str(node.target))(source), fx.GraphModule)):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
        raise ModelError(
            f"the captured graph holds {name!r} ({node.name}), which is not an ATen operator; it can't be quantized."
        )


def _check_output(node: fx.Node, batch: set[Any]) -> None:
    value = node.meta.get("val")
    if node.op == "get_attr" or not isinstance(value, Tensor):
        raise ModelError(
            f"the network returns {node.target}, a size or a constant; return only tensors that it computes."
        )
    if value.ndim == 0 or _hint(value.shape[0]) not in batch:
        shape = ", ".join(map(str, value.shape))
        raise ModelError(
            f"the network returns {node.name} of shape [{shape}]; return tensors [images, ...], one row an image."
        )


def _hint(size: int | torch.SymInt) -> Any:
    """What a free size was in the example; None for a fixed one, and for one that depends on data."""
    return size.node.hint if isinstance(size, torch.SymInt) and size.node.has_hint() else None


def _interface(program: ExportedProgram, outputs: list[Any], placeholders: list[fx.Node]) -> Interface:
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    inputs = pytree.tree_unflatten([Leaf(i) for i in range(len(placeholders))], in_spec)
    places = iter(range(len(outputs)))
    leaves = [Leaf(next(places)) if isinstance(n, fx.Node) else n for n in outputs]
    return Interface(inputs, pytree.tree_unflatten(leaves, out_spec), tuple(_form(node) for node in placeholders))


def _form(placeholder: fx.Node) -> TensorForm:
    value = placeholder.meta.get("val")
    if not isinstance(value, Tensor):
        raise ModelError(f"input {placeholder.name} of the network is no tensor; export it with tensors only.")
    return TensorForm(value.dtype, tuple(s if isinstance(s, int) else None for s in value.shape))


def _drop_checks(gm: fx.GraphModule) -> None:
    """Remove run-time assertions: shapes are checked once, when samples are gathered."""
    for node in reversed(gm.graph.nodes):
        name = str(node.target)
        if node.op == "call_function" and ("_assert" in name or "sym_constrain_range" in name) and not node.users:
            gm.graph.erase_node(node)


def _whole_batch_norms(gm: fx.GraphModule) -> None:
    """Turn the three-output inference batch-norm with its getitem back into one ``batch_norm`` node."""
    for node in gm.graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_no_training.default):
        with gm.graph.inserting_before(node):
            x, weight, bias, mean, variance, momentum, eps = node.args
            args = (x, weight, bias, mean, variance, False, momentum, eps, False)
            whole = gm.graph.call_function(aten.batch_norm.default, args)
        for user in list(node.users):
            assert user.target is operator.getitem and user.args[1] == 0
            whole.meta = dict(user.meta)
            user.replace_all_uses_with(whole)
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)


def _fold_constants(gm: fx.GraphModule) -> None:
    """Evaluate once, now, what comes from tensors of the network and no input: normalized weights, position tables, ….

    Tensors that operators make of numbers (``arange``, …) are computed with, but stay operators where they are read.
    """
    values: dict[fx.Node, Any] = {}
    stored: set[fx.Node] = set()
    for node in list(gm.graph.nodes):
        sources = node.all_input_nodes
        if node.op == "get_attr":
            values[node] = getattr(gm, node.target)
            stored.add(node)
        elif node.op == "call_function" and (all(n in values for n in sources) if sources else _is_made(node)):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
            if any(source in stored for source in sources):
                stored.add(node)
    for node, value in values.items():
        if (
            node.op == "call_function"
            and node in stored
            and isinstance(value, Tensor)
            and any(u not in values for u in node.users)
        ):
            name = add_tensor(gm, node.name, value.detach().clone())
            with gm.graph.inserting_before(node):
                constant = gm.graph.get_attr(name)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)


def _is_made(node: fx.Node) -> bool:
    """True for an operator that makes a tensor of numbers alone, always the same."""
    return isinstance(node.meta.get("val"), Tensor) and "empty" not in str(node.target)


def _linear_products(gm: fx.GraphModule) -> None:
    """Turn products of the input with a matrix of weights, ``x @ w`` and ``addmm``, into linear layers, which they are.

    The weight is the transposed view, so that the same numbers are computed.
    """
    for node in list(gm.graph.nodes):
        place = {aten.matmul.default: 1, aten.mm.default: 1, aten.addmm.default: 2}.get(node.target)
        if place is None or node.kwargs:
            continue
        x, weight, bias = node.args[place - 1], node.args[place], node.args[0] if place == 2 else None
        vector = bias is None or (
            bias.op == "get_attr" and list(bias.meta["val"].shape) == [weight.meta["val"].shape[1]]
        )
        if weight.op == "get_attr" and weight.meta["val"].ndim == 2 and x.meta["val"].ndim > 1 and vector:
            name = add_tensor(gm, f"{weight.target}_rows", getattr(gm, weight.target).t())
            with gm.graph.inserting_before(node):
                rows = gm.graph.get_attr(name)
            rows.meta = {**weight.meta, "val": weight.meta["val"].t()}
            node.target, node.args = aten.linear.default, (x, rows) if bias is None else (x, rows, bias)


def _drop_no_ops(gm: fx.GraphModule) -> None:
    """Remove what returns its input: inference dropout, alias, slices over everything, and copies over all of it."""
    whole_slice = (0, 2**63 - 1)
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        no_op = node.target in {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
        if node.target is aten.dropout.default:
            no_op = not node.args[2]
        if node.target is aten.slice.Tensor and len(node.args) == 4:
            no_op = tuple(node.args[2:]) == whole_slice
        if node.target is aten.copy.default and _alike(*node.args[:2]):
            node.args = node.args[1:]
            no_op = True
        if no_op:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def _alike(*nodes: fx.Node) -> bool:
    """True for tensors of one form."""
    return len({(n.meta["val"].dtype, str(n.meta["val"].shape)) for n in nodes}) == 1


def _any_layout(gm: fx.GraphModule) -> None:
    """Let the network take any memory layout: a view holds for the layout it was captured with, a reshape for all."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default


def _local_sizes(gm: fx.GraphModule) -> None:
    """Read the batch size where it is used, so that no size is alive from one end of the network to the other.

    Each use of ``sym_size(x, d)`` is replaced by the same size read off a tensor that its user takes anyway.
    """
    for node in list(gm.graph.nodes):
        if _is_size(node):
            for user in list(node.users):
                if not _is_size(user):
                    _sink(gm, node, user)
    gm.graph.eliminate_dead_code()


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt | int)


def _sink(gm: fx.GraphModule, size: fx.Node, user: fx.Node) -> None:
    """Recompute ``size`` (and the arithmetic it comes from) right before ``user``, from a tensor of ``user``'s."""
    tensors = [n for n in user.all_input_nodes if isinstance(n.meta.get("val"), Tensor) and n.op != "get_attr"]

    def local(node: fx.Node) -> fx.Node:
        if not _is_size(node):
            return node
        for tensor in tensors:
            for dim, length in enumerate(tensor.meta["val"].shape):
                if isinstance(length, torch.SymInt) and str(length) == str(node.meta["val"]):
                    return _make(gm, aten.sym_size.int, (tensor, dim), node, user)
        return _make(gm, node.target, fx.node.map_arg(node.args, local), node, user)

    with gm.graph.inserting_before(user):
        user.replace_input_with(size, local(size))


def _make(gm: fx.GraphModule, target: Callable[..., Any] | Any, args: Any, like: fx.Node, owner: fx.Node) -> fx.Node:
    made = gm.graph.call_function(target, args)
    made.meta = {**like.meta, "nn_module_stack": owner.meta.get("nn_module_stack")}
    return made
