"""The residual stream of a model as data: which parameters read it, write it, or normalise it.

Built from names alone, so that the same map serves a model in memory and a checkpoint on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from pat.errors import PatError
from pat.families import Branch, Family


@dataclass(frozen=True)
class Linear:
    """A linear map: the module (or bare parameter) path, and its parameters' full names."""

    path: str
    weight: str
    bias: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Full parameter names."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class ResidualBranch:
    """One branch of one layer, by full names; see `pat.families.Branch`."""

    kind: Literal["attention", "mlp"]
    readers: tuple[Linear, ...]
    writer: Linear
    site: str
    pre_norm: str | None
    post_norm: str | None
    inner: tuple[Linear, ...]
    """Readers whose rows lie in the space that the writer's columns lie in: all but routers."""
    per_head: tuple[str, ...] = ()
    """Names of parameters with one entry for each query head."""
    is_beside_experts: bool = False
    """Whether this is a dense MLP in a family whose other layers have experts."""

    @property
    def axis(self) -> str | None:
        """Name of the axis that the space inside the branch belongs to, see `pat.shape.AXES`; None if it stays."""
        if self.is_beside_experts:
            return None
        return "heads" if self.kind == "attention" else "mlp"

    @property
    def has_experts(self) -> bool:
        """Whether the writer is the stacked parameter of several experts, `(experts, d, channels)`."""
        return self.writer.weight == self.writer.path

    @property
    def gate_site(self) -> str:
        """Module that what is inside the branch goes into, or happens in: the writer, or the module of the experts."""
        return self.writer.path.rpartition(".")[0] if self.has_experts else self.writer.path

    @property
    def end(self) -> str:
        """Module whose output is added to the residual stream."""
        return self.post_norm or self.site


@dataclass(frozen=True)
class ResidualStream:
    """Everything attached to the residual stream of one model, in execution order."""

    family: Family
    embedding: str
    branches: tuple[ResidualBranch, ...]
    final_norm: str
    head: Linear | None
    """None if the checkpoint has no head of its own (tied to the embedding)."""
    untouched: tuple[str, ...]
    """Names of tensors that do not touch the residual stream: norms over the head dimension, and bystanders."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Modules whose output goes into the residual stream, the embedding first."""
        return (self.embedding, *(branch.site for branch in self.branches))

    @property
    def num_tensors(self) -> int:
        """Number of tensors the stream accounts for."""
        return sum(1 for _ in _accounted_names(self))

    def untie(self) -> ResidualStream:
        """Return the same stream with a head of its own that starts as the embedding's matrix."""
        return replace(self, head=Linear(self.family.head, f"{self.family.head}.weight", None))

    def scaled_projections(self) -> frozenset[str]:
        """Paths of the projections that carry the q/k-norm factor (they are followed by a norm of fixed size)."""
        suffixes = tuple("." + path for path in self.family.qk_projections) if self.family.qk_norm else ()
        return frozenset(
            reader.path for branch in self.branches for reader in branch.readers if reader.path.endswith(suffixes)
        )


def model_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what a checkpoint of a model without adapters holds, by name: parameters and persistent buffers.

    A shared parameter is there once.
    """
    recomputed = {name for name, _ in model.named_non_persistent_buffers()}
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in recomputed}
    return dict(model.named_parameters()) | buffers


def map_residual_stream(family: Family, names: Iterable[str], *, tied: bool) -> ResidualStream:
    """Map a model's tensors to their roles.

    Args:
        family: record of the model's type.
        names: full names of the tensors in the base model, see `model_tensors`.
        tied: whether the head shares the embedding's weight.

    Raises:
        PatError: a tensor the record expects is missing, or one is left that the record does not account for.
    """
    names = set(names)
    num_layers = 1 + max(_layer_indices(family, names), default=-1)
    if num_layers == 0:
        raise PatError(
            f"Found no parameter under {family.layers!r} in a model of type {family.model_type!r}; "
            "expected a causal language model with decoder layers."
        )
    branches: list[ResidualBranch] = []
    untouched: list[str] = []
    for index in range(num_layers):
        prefix = f"{family.layers}.{index}."
        feed_forward = next((b for b in family.feed_forward if _exists(prefix + b.writer, names)), None)
        if feed_forward is None:
            raise PatError(f"Layer {index} has no feed-forward writer known to the record of {family.model_type!r}.")
        mlp = _branch(prefix, "mlp", feed_forward, names)
        mlp = replace(mlp, is_beside_experts=bool(family.expert_parameters) and not mlp.has_experts)
        branches += [_branch(prefix, "attention", family.attention, names), mlp]
        untouched += [f"{prefix}{norm}.weight" for norm in family.qk_norm]
        untouched += [prefix + name for name in family.bystanders if prefix + name in names]
    stream = ResidualStream(
        family=family,
        embedding=family.embedding,
        branches=tuple(branches),
        final_norm=family.final_norm,
        head=None if tied else _linear(family.head, names),
        untouched=tuple(untouched),
    )
    accounted = set(_accounted_names(stream))
    if missing := accounted - names:
        raise PatError(f"The model has no tensor {min(missing)}, which its family's record expects.")
    unaccounted = names - accounted - ({f"{family.head}.weight"} if tied else set())
    if unaccounted:
        raise PatError(
            f"The record of family {family.model_type!r} does not account for {len(unaccounted)} tensor(s) of this "
            f"model, such as {min(unaccounted)!r}; extend the record in pat/families.py before pruning it."
        )
    return stream


def _branch(prefix: str, kind: Literal["attention", "mlp"], branch: Branch, names: set[str]) -> ResidualBranch:
    return ResidualBranch(
        kind=kind,
        readers=tuple(_linear(prefix + reader, names) for reader in branch.readers),
        writer=_linear(prefix + branch.writer, names),
        site=prefix + branch.hook_site,
        pre_norm=None if branch.pre_norm is None else prefix + branch.pre_norm,
        post_norm=None if branch.post_norm is None else prefix + branch.post_norm,
        inner=tuple(_linear(prefix + reader, names) for reader in branch.readers if reader not in branch.routers),
        per_head=tuple(prefix + name for name in branch.per_head if prefix + name in names),
    )


def _linear(path: str, names: set[str]) -> Linear:
    """Resolve a path to a module's weight and bias, or to a bare parameter."""
    if f"{path}.weight" in names:
        bias = f"{path}.bias"
        return Linear(path, f"{path}.weight", bias if bias in names else None)
    if path in names:
        return Linear(path, path, None)
    raise PatError(f"The model has no tensor {path}.weight, which its family's record expects.")


def _exists(path: str, names: set[str]) -> bool:
    return f"{path}.weight" in names or path in names


def _layer_indices(family: Family, names: set[str]) -> Iterator[int]:
    prefix = family.layers + "."
    for name in names:
        if name.startswith(prefix):
            yield int(name[len(prefix) :].partition(".")[0])


def _accounted_names(stream: ResidualStream) -> Iterator[str]:
    yield f"{stream.embedding}.weight"
    yield f"{stream.final_norm}.weight"
    yield from stream.untouched
    if stream.head is not None:
        yield from stream.head.names
    for branch in stream.branches:
        yield from branch.writer.names
        for reader in branch.readers:
            yield from reader.names
        for norm in (branch.pre_norm, branch.post_norm):
            if norm is not None:
                yield f"{norm}.weight"
