"""The peak memory of a training step, predicted from shapes alone; nothing is read or run.

In bytes, with T = rows * length tokens, s bytes an activation, and only the layers from the lowest
trained one up, since those below keep nothing for the backward pass:

    resident    = weights + moments, and for packed parameters trained + moments once more
    kept        = s * (T * (layer.kept + mlp_arrays * layer.mlp_width)
                  + score_share * rows * heads * length^2), for each layer; and where a device
                  pads attention from length to padded, its output twice and what is padded:
                  s * rows * (length * attention + (padded - length) * (attention + qkv))
    logits      = (s + 8) * vocabulary * rows of the chunks that exist at once;
                  (s + 12) * vocabulary * T where every position has its logits
    dequantized = dequantized_weights * the largest quantized weight once it is dequantized
    in_flight   = arrays that are used up and not freed yet, since MLX runs ahead of the device:
                  layers_in_flight times the largest `kept`, without attention's padding. On CUDA
                  that is, of all layers, the share MIN_SHARE + SHARE_PER_OPERATION * operations
                  of a commit * b, where b = min(1, kept / BYTES_OF_BUSY_LAYER): the host runs less
                  far ahead of a device whose layers are done before it has started the next one
    peak        = resident + the largest of
                  kept of all layers + logits + dequantized + in_flight, where a recomputed layer
                  keeps its input alone;
                  inputs of the recomputed layers + in_flight + LAYERS_HELD_WHILE_RECOMPUTING
                  layers, where in flight on CUDA are RECOMPUTED_IN_FLIGHT of the recomputed layers;
                  3 * trained + moments: gradients and new values beside the old ones

`layer.kept` is what derivatives read again, in elements a token: the outputs of the linear layers
in attention and MLP, the inputs of trained ones, each once, and the inputs of norms. For a Llama of
width d, attention width a, key-value width k and MLP width m, with LoRA of rank r on all seven, it
is 4 d + 2 a + 2 k + 3 m + 7 r; on CUDA an m less, where the MLP's product is recomputed.

The constants are fitted to measurements: see "The forecast of peak memory" in benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nested_core.kernels.device_operations import FUSED_LENGTH_MULTIPLE
from nested_core.training.loss.cross_entropy import round_up_position_count
from nested_core.training.loss.loss_interface import BatchShape

HALF_PRECISION_BYTES = 2  # of the elements that our kernels compute with
LAYERS_HELD_WHILE_RECOMPUTING = 1.8  # a layer that is recomputed, and its gradients
# Of a logit, beside the logit itself, where logits are made in chunks.
EXTRA_BYTES_PER_CHUNKED_LOGIT = 8
EXTRA_BYTES_PER_UNCHUNKED_LOGIT = 12  # the same where every position has its logits
DEQUANTIZED_WEIGHT_COPIES = 2  # the output layer's for all products, and as much again
CUDA_MIN_SHARE_IN_FLIGHT = 0.187  # of the layers, without the operations of a commit
CUDA_SHARE_IN_FLIGHT_PER_OPERATION = 0.0322  # for each operation of a commit
CUDA_MAX_IN_FLIGHT_RATIO = 1.36  # to the layers
CUDA_RECOMPUTED_IN_FLIGHT = 1.3  # to the layers that are recomputed
CUDA_MIN_LOGIT_CHUNKS = 2
CUDA_LOGIT_CHUNKS_PER_OPERATION = 0.45  # as the host runs ahead: chunks not freed yet
CUDA_BYTES_OF_BUSY_LAYER = 75 * 2**20  # kept by a layer that takes a device longer than its host


@dataclass(frozen=True)
class DeviceProfile:
    """What a device keeps in memory while it computes.

    score_share: share of a head's length^2 attention probabilities kept; 0 for fused attention.
    mlp_arrays: arrays of the MLP's inner width kept beside gate, up and their product.
    layers_in_flight: layers whose arrays are used up and not freed yet, on a busy device.
    min_layers_in_flight: the same on an idle one; between both in proportion to a layer's bytes.
    in_flight_are_shares: whether both are shares of the layers that are trained, not their number.
    bytes_of_busy_layer: what a layer keeps for the backward pass where the device is busy.
    logit_chunks: chunks of logits that exist at once.
    recomputed_in_flight: layers in flight while layers are recomputed, as a ratio to those; 0 where
        they are as many as without.
    max_in_flight_ratio: bound of `layers_in_flight`, as a ratio to all layers that are trained.
    recomputes_mlp_product: whether the product of an MLP of LoRA layers is recomputed, not kept.
    attention_multiple: lengths that attention is padded to; 1 where it is not.
    dequantized_weights: number of dequantized weight matrices alive at once; 0 where MLX multiplies
        by quantized weights itself.
    """

    score_share: float
    mlp_arrays: float
    layers_in_flight: float
    min_layers_in_flight: float = 0
    in_flight_are_shares: bool = False
    bytes_of_busy_layer: int = 0
    logit_chunks: float = 5
    recomputed_in_flight: float = 0
    max_in_flight_ratio: float = 1
    recomputes_mlp_product: bool = False
    attention_multiple: int = 1
    dequantized_weights: int = DEQUANTIZED_WEIGHT_COPIES


CPU_PROFILE = DeviceProfile(score_share=1, mlp_arrays=2, layers_in_flight=1.5)
METAL_PROFILE = DeviceProfile(
    score_share=1, mlp_arrays=2, layers_in_flight=2, dequantized_weights=0
)


def cuda_profile(operations_per_commit: int) -> DeviceProfile:
    """Return a CUDA device to which MLX commits `operations_per_commit` operations at once."""
    return DeviceProfile(
        score_share=0,
        mlp_arrays=0,
        layers_in_flight=CUDA_MIN_SHARE_IN_FLIGHT
        + CUDA_SHARE_IN_FLIGHT_PER_OPERATION * operations_per_commit,
        min_layers_in_flight=CUDA_MIN_SHARE_IN_FLIGHT,
        in_flight_are_shares=True,
        bytes_of_busy_layer=CUDA_BYTES_OF_BUSY_LAYER,
        logit_chunks=max(
            CUDA_MIN_LOGIT_CHUNKS, CUDA_LOGIT_CHUNKS_PER_OPERATION * operations_per_commit
        ),
        recomputed_in_flight=CUDA_RECOMPUTED_IN_FLIGHT,
        max_in_flight_ratio=CUDA_MAX_IN_FLIGHT_RATIO,
        recomputes_mlp_product=True,
        attention_multiple=FUSED_LENGTH_MULTIPLE,
    )


@dataclass(frozen=True)
class LayerFootprint:
    """One layer, in elements a token: its input, what it keeps, and the inner width of its MLP.

    `mlp_product` is the part of `kept` that a device with `recomputes_mlp_product` does not keep;
    `attention` is attention's output, and `qkv` are the queries, keys and values that it reads.
    """

    width: int
    kept: int
    mlp_width: int
    heads: int
    is_trained: bool
    mlp_product: int = 0
    attention: int = 0
    qkv: int = 0


@dataclass(frozen=True)
class ModelFootprint:
    """What a model holds during training, in bytes, and the shapes of what its layers keep.

    weights: all weights, trained ones included.
    trained: the trained parameters, as float32.
    moments: the optimizer's state.
    activation_bytes: bytes of one element of an activation.
    chunk_rows: rows of logits made at once; None if every position has its logits.
    is_packed: whether trained parameters and moments are kept a second time, packed by tier.
    dequantized: the largest quantized weight once it is dequantized; 0 without one.
    """

    weights: int
    trained: int
    moments: int
    activation_bytes: int
    layers: tuple[LayerFootprint, ...]
    vocabulary: int
    chunk_rows: int | None
    is_packed: bool = True
    dequantized: int = 0

    @property
    def resident(self) -> int:
        """Bytes held from step to step: weights, moments, and what is packed of both."""
        return self.weights + self.moments + self.is_packed * (self.trained + self.moments)

    @property
    def layers_of_backward_pass(self) -> tuple[LayerFootprint, ...]:
        """The layers that the backward pass goes through: from the lowest trained one up."""
        first = next((i for i, layer in enumerate(self.layers) if layer.is_trained), 0)
        return self.layers[first:]


def bytes_kept_for_backward(
    footprint: ModelFootprint, layer: LayerFootprint, batch: BatchShape, device: DeviceProfile
) -> float:
    """Count what one layer that is not recomputed keeps for the backward pass."""
    scores = device.score_share * batch.rows * layer.heads * batch.length**2
    kept = layer.kept + device.mlp_arrays * layer.mlp_width
    if device.recomputes_mlp_product and _is_half_precision(footprint):
        kept -= layer.mlp_product
    return footprint.activation_bytes * (batch.rows * batch.length * kept + scores)


def bytes_of_padded_attention(
    footprint: ModelFootprint, layer: LayerFootprint, batch: BatchShape, device: DeviceProfile
) -> float:
    """Count what a layer keeps besides if the device pads attention to another length."""
    more = -batch.length % device.attention_multiple
    if not more or not _is_half_precision(footprint):
        return 0.0
    elements = batch.length * layer.attention + more * (layer.attention + layer.qkv)
    return footprint.activation_bytes * batch.rows * elements


def _is_half_precision(footprint: ModelFootprint) -> bool:
    """Return whether activations are as the kernels take them."""
    return footprint.activation_bytes == HALF_PRECISION_BYTES


def bytes_of_logits(footprint: ModelFootprint, batch: BatchShape, device: DeviceProfile) -> float:
    """Return the logits that exist at once, and what the loss computes from them."""
    tokens = batch.rows * batch.length
    if footprint.chunk_rows is None:
        return (
            (footprint.activation_bytes + EXTRA_BYTES_PER_UNCHUNKED_LOGIT)
            * footprint.vocabulary
            * tokens
        )
    rows = min(
        round_up_position_count(batch.target_tokens, tokens),
        device.logit_chunks * footprint.chunk_rows,
    )
    return (
        (footprint.activation_bytes + EXTRA_BYTES_PER_CHUNKED_LOGIT) * footprint.vocabulary * rows
    )


def bytes_in_flight(kept: Sequence[float], device: DeviceProfile) -> float:
    """Count what is used up and not freed yet, from what each layer of the backward pass keeps."""
    largest = max(kept, default=0.0)
    idle, busy = device.min_layers_in_flight, device.layers_in_flight
    is_busy = min(1.0, largest / device.bytes_of_busy_layer) if device.bytes_of_busy_layer else 1.0
    layers = idle + (busy - idle) * is_busy
    if device.in_flight_are_shares:
        layers *= len(kept)
    return min(layers, device.max_in_flight_ratio * len(kept)) * largest


def estimate_peak_bytes(
    footprint: ModelFootprint, batch: BatchShape, device: DeviceProfile, recomputed: int = 0
) -> int:
    """Return the peak of a step that recomputes the `recomputed` lowest of the trained layers."""
    layers = footprint.layers_of_backward_pass
    kept = [bytes_kept_for_backward(footprint, layer, batch, device) for layer in layers]
    in_flight = bytes_in_flight(kept, device)
    kept = [
        own + bytes_of_padded_attention(footprint, layer, batch, device)
        for own, layer in zip(kept, layers, strict=True)
    ]
    tokens = batch.rows * batch.length
    inputs = footprint.activation_bytes * tokens * sum(e.width for e in layers[:recomputed])
    logits = bytes_of_logits(footprint, batch, device)
    dequantized = device.dequantized_weights * footprint.dequantized
    forward = sum(kept[recomputed:]) + inputs + (logits + dequantized) + in_flight
    backward = 0.0
    if recomputed:
        if device.recomputed_in_flight:
            in_flight = device.recomputed_in_flight * recomputed * max(kept)
        backward = inputs + in_flight + LAYERS_HELD_WHILE_RECOMPUTING * max(kept)
    update = 3 * footprint.trained + footprint.moments
    return int(footprint.resident + max(forward, backward, update))


def fewest_recomputed_layers(
    footprint: ModelFootprint, batch: BatchShape, device: DeviceProfile, limit: float
) -> int:
    """Find the fewest recomputed layers whose peak is within `limit` bytes; all if no number is."""
    layers = len(footprint.layers_of_backward_pass)
    peaks = ((n, estimate_peak_bytes(footprint, batch, device, n)) for n in range(layers))
    return next((n for n, peak in peaks if peak <= limit), layers)
