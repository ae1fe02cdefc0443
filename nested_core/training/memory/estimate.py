"""The peak memory of a training step by arithmetic, from shapes alone; nothing is read or run.

In bytes, with T = rows * length tokens, s bytes an activation, and the layers from the lowest
trained one up, for those below keep nothing:

    held   = weights + trained + 2 * moments: an adapter is kept by name and as vectors
    kept   = s * (T * (layer.kept + gates * gated) + scores * rows * heads * length^2), a layer
    loss   = (s + 8) * vocabulary * rows: the logits asked for, as given and twice float32;
             (s + 12) where the output layer is not computed apart and all positions have theirs
    wholes = 4 * the largest weight of those that are quantised and made whole for each product: of
             the output layer, which is computed forwards and backwards at once
    peak   = the largest of
             held + kept of the layers kept whole + inputs of the others + loss + wholes
             + in_flight layers
             held + inputs of the layers recomputed + (in_flight + REFILLED) layers
             held + 3 * trained + moments: gradients and new values beside the old

`layer.kept` is what derivatives read again, in elements a token: the outputs of the linear layers
in attention and MLP, the inputs of trained ones, each once, and the inputs of norms. For a Llama of
width d, attention width a, key-value width k and MLP width m, with LoRA of rank r on all seven, it
is 4 d + 2 a + 2 k + 3 m + 7 r; on CUDA an m less, for the MLP's product is made again. `in_flight`
are arrays that are done with and not free again, for MLX runs ahead of the device: in layers, the
largest of them.

Numbers are fitted, to MLX 0.32.4. On a CPU, to some 30 Llamas such as benchmarks/forecast.py has:
the two arrays beside the logits and five chunks of them at once, in_flight and REFILLED. On CUDA,
in_flight, its bound and two chunks: to 14 rows of H200s from 135M to 7B, with 8 to 100 operations a
commit, which are in benchmarks/README.md. The 4 of `wholes`: to ten such Llamas and 4 rows with
4-bit weights. Recomputation on a GPU, adapters there that leave the MLP or parts of it out, dtypes
other than bfloat16, and all of Metal follow the same arithmetic and were not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from nested_core.kernels.cuda.launch import DTYPE
from nested_core.training.loss.chunked import room_for

REFILLED = 1.8  # layers: one that is computed again, and its gradients
LOGIT_BYTES = 8  # beside the logits as they are given, of those that are made in chunks
ALL_LOGIT_BYTES = 12  # where every position has its own
WHOLES = 4  # two products, with as much again: integers unpacked on a CPU, another chunk on CUDA
IN_FLIGHT, IN_FLIGHT_AN_OPERATION = 5, 0.95  # layers on CUDA: always, and for each of a commit


@dataclass(frozen=True)
class Device:
    """How a device computes, as far as memory goes.

    scores: share of a head's length^2 probabilities kept (0: fused attention); gates: arrays of the
    MLP's inner width kept beside gate, up and product; in_flight: layers, at most so many times
    all there are; chunks: of logits that exist at once; remakes: whether the product of an MLP of
    LoRA layers is made again; wholes: quantised weights that are whole at once.
    """

    scores: float
    gates: float
    in_flight: float
    chunks: int
    most: float = 1
    remakes: bool = False
    wholes: int = 0


CPU = Device(scores=5 / 8, gates=1, in_flight=1.5, chunks=5, wholes=WHOLES)
METAL = Device(scores=1, gates=2, in_flight=2, chunks=5)


def cuda(operations: int) -> Device:
    """A CUDA device to which MLX commits so many operations at once."""
    in_flight = IN_FLIGHT + IN_FLIGHT_AN_OPERATION * operations
    return Device(
        scores=0, gates=0, in_flight=in_flight, chunks=2, most=1.3, remakes=True, wholes=WHOLES
    )


@dataclass(frozen=True)
class Layer:
    """One layer in elements a token: its input, what it keeps, and the inner width of its MLP.

    `remade` is the part of what it keeps that a device which remakes products does not.
    """

    width: int
    kept: int
    gated: int
    heads: int
    is_trained: bool
    remade: int = 0


@dataclass(frozen=True)
class Load:
    """What trains: bytes of all weights, of what is trained, of its moments, and an activation's.

    `chunk` is the rows of logits made at once, None where every position has its own; `joins`
    whether what is trained is kept a second time, as vectors; `whole` the bytes of the largest
    quantised weight once it is made whole.
    """

    weights: int
    trained: int
    moments: int
    item: int
    layers: tuple[Layer, ...]
    vocabulary: int
    chunk: int | None
    joins: bool = True
    whole: int = 0

    @property
    def trained_layers(self) -> tuple[Layer, ...]:
        """The layers that the backward pass goes through: from the lowest trained one up."""
        first = next((i for i, layer in enumerate(self.layers) if layer.is_trained), 0)
        return self.layers[first:]


@dataclass(frozen=True)
class BatchShape:
    """Rows, tokens a row, and the tokens of all rows that are learnt."""

    rows: int
    length: int
    learnt: int


def kept_bytes(load: Load, layer: Layer, batch: BatchShape, device: Device) -> float:
    """What one layer keeps for the backward pass where it is not recomputed."""
    tokens = batch.rows * batch.length
    scores = device.scores * batch.rows * layer.heads * batch.length**2
    is_remade = device.remakes and load.item == DTYPE.size  # kernels take bfloat16 alone
    kept = layer.kept - is_remade * layer.remade + device.gates * layer.gated
    return load.item * (tokens * kept + scores)


def loss_bytes(load: Load, batch: BatchShape, device: Device) -> int:
    """The logits that exist at once, and what is made of them."""
    tokens = batch.rows * batch.length
    if load.chunk is None:
        return (load.item + ALL_LOGIT_BYTES) * load.vocabulary * tokens
    rows = min(room_for(batch.learnt, tokens), device.chunks * load.chunk)
    return (load.item + LOGIT_BYTES) * load.vocabulary * rows


def peak_bytes(load: Load, batch: BatchShape, device: Device, recomputed: int = 0) -> int:
    """The peak of a step in which so many layers, the lowest of those that keep anything, are
    recomputed."""
    kept = [kept_bytes(load, layer, batch, device) for layer in load.trained_layers]
    tokens = batch.rows * batch.length
    inputs = load.item * tokens * sum(e.width for e in load.trained_layers[:recomputed])
    largest, layers = max(kept, default=0.0), len(kept)
    held = load.weights + load.moments + (load.trained + load.moments if load.joins else 0)
    in_flight = min(device.in_flight, device.most * layers) * largest
    loss = loss_bytes(load, batch, device) + device.wholes * load.whole
    forward = sum(kept[recomputed:]) + inputs + loss + in_flight
    backward = inputs + in_flight + REFILLED * largest if recomputed else 0.0
    update = 3 * load.trained + load.moments
    return int(held + max(forward, backward, update))


def fewest_recomputed(load: Load, batch: BatchShape, device: Device, limit: float) -> int:
    """The fewest recomputed layers with which the peak is within a limit; all where none are."""
    layers = len(load.trained_layers)
    fitting = (n for n in range(layers) if peak_bytes(load, batch, device, n) <= limit)
    return next(fitting, layers)
