"""The base model: find its folder, identify it by fingerprint, and load it at a precision.

MLX is only imported to load a model: workers and the registry's commands need folders alone.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nested_core import backend
from nested_core.config.names import HUB_NAME_PATTERN
from nested_core.errors import ConfigError, DamagedError, NestedTuneError, shorten
from nested_core.models.chat_template import Tokenizer
from nested_core.models.tokenizer_cell import (
    TokenizerFiles,
    load_bounded_tokenizer,
    start_kept_cell,
)
from nested_core.storage.atomic import canonical_json, digest_json, write_json
from nested_core.storage.kept_hashes import cached_sha256
from nested_core.storage.untrusted_files import read_json_object, read_regular

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from nested_core.config.schema import FineTuneConfig

MAX_CONFIG_BYTES = 16 * 1024 * 1024
LAYER_NUMBER_PATTERN = re.compile(r"\.\d+\.")
TOKENIZER_CONFIG = "tokenizer_config.json"
FINGERPRINT_PREFIX = "sha256:"  # of fingerprints that cover every byte of the files
# The files from which tokenizer, chat template, end-of-answer tokens and configuration are read.
TOKENIZER_FILES = (
    *("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.txt", "*.tiktoken"),
    "*.py",
)
# The files that define the vocabulary in a folder without a tokenizer.json.
VOCABULARY_FILES = ("*.model", "*.tiktoken", "vocab.*", "merges.txt")


GGUF_ADVICE = (
    "is a GGUF file, which mlx-lm does not train. Give the folder or the hub's name of the model "
    "that it was made from."
)
UNKNOWN_TYPE_ADVICE = (
    " mlx_lm has no language model of the type {}. Give one that it has, such as llama, mistral, "
    "qwen3 or gemma3; docs/support.md says which were tried."
)
UNLOADABLE = (  # what mlx_lm raises for a folder that is no sound model
    *(OSError, ValueError, RuntimeError, LookupError, ImportError, TypeError),
    *(ArithmeticError, AssertionError),  # for sizes of zero
)
TORCH = {".bin", ".pt", ".pth"}
TORCH_ADVICE = (
    " It holds weights of PyTorch alone. transformers writes safetensors (`save_pretrained(NEW)`), "
    "of which `mlx_lm.convert --hf-path NEW --mlx-path OUT` makes a model of mlx."
)


def find_model_folder(model: str, revision: str | None = None) -> Path:
    """Return the local folder of a model, which may be a path or a hub repository's name.

    A repository is downloaded at `revision`, by default its main branch, unless it is cached.
    Raises ConfigError if the model cannot be found.
    """
    require_folder_or_hub_name(model)
    if Path(model).exists():
        return Path(model)
    from mlx_lm.utils import _download

    try:
        return Path(_download(model, revision))
    except NestedTuneError:  # from a signal handler, in the middle of a download
        raise
    except Exception as error:  # the hub client raises many types if there is no such model
        raise ConfigError(
            f"model: {model!r} is no local directory and could not be fetched as a Hugging Face "
            f"repository ({type(error).__name__}: {shorten(error, 100)}). Looked for the folder "
            f"{Path(model).absolute()}. Give the path of an mlx model folder, or a repository name "
            f"that can be reached from here."
        ) from error


def require_folder_or_hub_name(model: str) -> None:
    """Raise ConfigError unless `model` is a folder or could be the name of a hub repository.

    A folder whose weights are a GGUF or PyTorch's alone is refused, too.
    """
    if model.lower().endswith(".gguf") and not Path(model).is_dir():
        raise ConfigError(f"model: {model} {GGUF_ADVICE}")
    if Path(model).is_dir() and (advice := _advise_on_weights(Path(model))):
        raise ConfigError(f"model: {model} has no safetensors.{advice}")
    if Path(model).is_dir() or HUB_NAME_PATTERN.fullmatch(model):
        return
    raise ConfigError(
        f"model: {model!r} is no local directory: {Path(model).absolute()} does not exist or is a "
        f"file. Give the path of an mlx model folder, or a name of the Hugging Face hub, such as "
        f"mlx-community/Qwen3-0.6B-4bit."
    )


def read_model_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a JSON file of a model's folder; DamagedError if it is missing or holds no object."""
    return read_json_object(folder / name, MAX_CONFIG_BYTES, follow_links=True)


def estimate_weight_count(folder: Path) -> int:
    """Estimate a model's number of weights from file sizes and config.json's bits per weight."""
    files = [path for path in folder.glob("*.safetensors") if path.is_file()]
    quantization = None
    with suppress(DamagedError, OSError):  # loading the model reports what is wrong with the folder
        quantization = read_model_config(folder).get("quantization")
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    if not isinstance(bits, int) or bits <= 0:
        bits = 16
    return sum(path.stat().st_size for path in files) * 8 // bits


def fingerprint_base_model(folder: Path, *, max_age: float = math.inf) -> str:
    """Return the fingerprint of a base model: "sha256:" and a SHA-256 over its files.

    The files are config.json, the model's own code, if any, and its weights, each with its name.
    Hashes of files whose change time is unchanged are cached (`kept_hashes`). Corruption below the
    file system leaves the change time as it is. What serves or ships a base first reads all of its
    bytes again with `max_age=0`, which renews the cache for the comparisons that follow.

    max_age: seconds after which a cached hash is computed again.

    Raises ConfigError for files of which more than one model could be made.
    """
    paths = sorted([folder / "config.json", *folder.glob("*.py"), *folder.glob("*.safetensors")])
    hashes = cached_sha256(paths, max_age=max_age)
    _require_each_tensor_once(folder)
    named = [[path.name, digest] for path, digest in zip(paths, hashes, strict=True)]
    return FINGERPRINT_PREFIX + digest_json(named)


def _require_each_tensor_once(folder: Path) -> None:
    """Raise ConfigError for a tensor in two files: mlx_lm takes that of the file it reads last.

    It reads them in the folder's order, which is another one in a copy.
    """
    from safetensors import SafetensorError, safe_open

    files = [*filter(Path.is_file, folder.glob("model*.safetensors"))]
    found: dict[str, str] = {}
    for file in sorted(files) if len(files) > 1 else ():
        # Loading says what is wrong with a file
        with suppress(SafetensorError, OSError), safe_open(str(file), "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118
                if (other := found.setdefault(name, file.name)) != file.name:
                    raise ConfigError(
                        f"model: {folder} has the tensor {shorten(name)} in {other} and in "
                        f"{file.name}, and mlx_lm takes either, by the order in which the folder "
                        f"was written. Move away the file that does not belong to the model."
                    )


def fingerprint_tokenizer(folder: Path) -> str:
    """Return a SHA-256 over all files that decide how a model reads text and ends an answer.

    These are TOKENIZER_FILES, each with its name. `fingerprint_base_model` covers few of them.
    """
    paths = sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)})
    names = [path.relative_to(folder).as_posix() for path in paths]
    return digest_json(sorted(zip(names, cached_sha256(paths), strict=True)))


def find_tokenizer_files(folder: Path, trust_remote_code: bool) -> TokenizerFiles:
    """Return what is loaded of a folder's tokenizer, in whatever process; changed files differ."""
    return TokenizerFiles(str(folder.absolute()), trust_remote_code, fingerprint_tokenizer(folder))


def is_same_base(recorded: str, folder: Path) -> bool:
    """Whether `folder` holds the base model that a recorded fingerprint was taken of.

    Raises DamagedError for a fingerprint of another kind, which cannot be compared.
    """
    if not recorded.startswith(FINGERPRINT_PREFIX):
        raise DamagedError(
            f"The adapter's base was recorded as {recorded:.40}, which is no fingerprint that this "
            f"version takes (they begin with {FINGERPRINT_PREFIX}). Train or import it again."
        )
    return recorded == fingerprint_base_model(folder)


def shorten_fingerprint(fingerprint: str) -> str:
    """Return a fingerprint's prefix and its first 12 digits, for a message."""
    rule, separator, digest = fingerprint.rpartition(":")
    return f"{rule}{separator}{digest:.12}"


def find_model_folder_offline(model: str) -> Path | None:
    """Return the folder of a model that is already on this machine, or None; downloads nothing."""
    folder = Path(model)
    try:
        if folder.is_dir():
            return folder
    except OSError:  # a name that no file can have
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def context_length(folder: Path) -> int | None:
    """Return the most tokens that a model can see; None if its config.json does not say."""
    return _read_size(folder, "max_position_embeddings")


def vocabulary_size(folder: Path) -> int | None:
    """Return the number of rows of a model's embedding; None if its config.json does not say."""
    return _read_size(folder, "vocab_size")


def count_embedding_rows(model: nn.Module) -> int | None:
    """Return the rows of a loaded model's largest embedding; None without one of mlx's classes."""
    import mlx.nn as nn

    embeddings = (nn.Embedding, nn.QuantizedEmbedding)
    modules = (module for _, module in model.named_modules() if isinstance(module, embeddings))
    return max((module.weight.shape[0] for module in modules), default=None)


def _read_size(folder: Path, key: str) -> int | None:
    """Return a positive integer of config.json, at the top or in `text_config`; else None."""
    config = read_model_config(folder)
    for section in (config, config.get("text_config")):
        size = section.get(key) if isinstance(section, dict) else None
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return size
    return None


def describe_token_beyond(
    tokenizer: Tokenizer, tokens: Sequence[int], rows: int | None
) -> str | None:
    """Describe a token that has no row in the embedding; None if all tokens have one.

    MLX would read such a row from outside of the array without an error. `rows` is the number of
    rows; None checks nothing.
    """
    largest = max(tokens, default=0)
    if rows is None or largest < rows:
        return None
    name = shorten(tokenizer.convert_ids_to_tokens(int(largest)))
    return (
        f"{name} has id {largest}, the model has {rows} rows (vocab_size of its config.json): the "
        f"tokenizer has a token that the model does not know. Take it out of the text, or bring "
        f"back the tokenizer that belongs to the model"
    )


def read_chat_templates(folder: Path) -> list[object]:
    """Return the chat templates of a model's folder, the one that is used last; at most two."""
    templates: list[object] = []
    if (folder / TOKENIZER_CONFIG).is_file():
        templates = [read_model_config(folder, TOKENIZER_CONFIG).get("chat_template")]
    file = folder / "chat_template.jinja"
    if file.is_file():
        templates.append(read_regular(file, MAX_CONFIG_BYTES, follow_links=True).decode())
    return [one for one in templates if one is not None]


def has_two_templates(folder: Path) -> bool:
    """Return whether a model's folder has two chat templates that differ, of which one is used."""
    return len({one.strip() for one in read_chat_templates(folder) if isinstance(one, str)}) > 1


def write_used_template(folder: Path) -> None:
    """Write the chat template that is used over another one in the same folder."""
    if has_two_templates(folder):
        settings = read_model_config(folder, TOKENIZER_CONFIG)
        *_, used = read_chat_templates(folder)
        write_json(folder / TOKENIZER_CONFIG, settings | {"chat_template": used})


def chat_template_digest(folder: Path) -> str | None:
    """Return the SHA-256 of the chat template in a model's folder; None without a template."""
    template = ([None] + read_chat_templates(folder))[-1]
    if isinstance(template, str):  # half a surrogate pair is for who renders it to refuse
        return hashlib.sha256(template.encode(errors="surrogatepass")).hexdigest()
    return None if template is None else hashlib.sha256(canonical_json(template)).hexdigest()


def vocabulary_digest(folder: Path) -> str | None:
    """Return a SHA-256 over the files that cut text into tokens; None without such a file.

    If there is a tokenizer.json, it alone counts, because transformers then reads none of the other
    files.
    """
    tokenizer_json = folder / "tokenizer.json"
    others = {path for pattern in VOCABULARY_FILES for path in folder.glob(pattern)}
    paths = [tokenizer_json] if tokenizer_json.is_file() else sorted(others)
    if not paths:
        return None
    return digest_json(list(zip([path.name for path in paths], cached_sha256(paths), strict=True)))


@dataclass(frozen=True)
class TrainedTokenizer:
    """Digests of the tokenizer that an adapter was trained with, as SHA-256.

    Attributes:
        chat_template: see `chat_template_digest`; None is not compared.
        vocabulary: see `vocabulary_digest`; None is not compared.
    """

    chat_template: str | None = None
    vocabulary: str | None = None

    @classmethod
    def read(cls, dataset_or_provenance: Path) -> TrainedTokenizer:
        """Read them from dataset.json or provenance.json; None of either without the file."""
        is_there = dataset_or_provenance.is_file()
        recorded = read_json_object(dataset_or_provenance) if is_there else {}
        return cls(recorded.get("chat_template"), recorded.get("vocabulary"))

    def require_in(self, base: Path, what: str) -> None:
        """Raise ConfigError if the model in folder `base` has another chat template or vocabulary.

        `what` names the adapter, at the beginning of a sentence.
        """
        for name, recorded, digest in (
            ("chat template", self.chat_template, chat_template_digest),
            ("tokenizer", self.vocabulary, vocabulary_digest),
        ):
            if recorded is not None and recorded != digest(base):
                raise ConfigError(
                    f"{what} was trained with another {name} than {base} has now: it would read "
                    f"questions otherwise than it learnt. Bring back the {name} that was there, "
                    f"or train again."
                )


def prepare_for_base_model(config: FineTuneConfig) -> Path:
    """Find the configured base model's folder, and set up the backend for a model of its size."""
    folder = find_model_folder(config.model)
    backend.prepare_for_model_size(estimate_weight_count(folder))
    return folder


def load_base_model(
    config: FineTuneConfig, *, as_stored: bool = False, shares_layers: bool = False
) -> tuple[nn.Module, Tokenizer]:
    """Load model and tokenizer as mlx_lm.load does, at the configured precision or as stored.

    With `shares_layers` the model only has correct shapes, not correct results, see `share_layers`.
    """
    import mlx.core as mx

    folder = prepare_for_base_model(config)
    model, tokenizer, _ = load_lazily(folder, trust_remote_code=config.trust_remote_code)
    dtype = model_compute_dtype(config)
    if dtype is not None and not as_stored:
        model.set_dtype(dtype)
    if shares_layers:
        share_layers(model)
    mx.eval(model.parameters())
    return model, tokenizer


def load_lazily(
    folder: Path, *, trust_remote_code: bool
) -> tuple[nn.Module, Tokenizer, dict[str, object]]:
    """Return the model in a folder, its tokenizer and its config.json, as mlx_lm.load does.

    Arrays are only read from the file when they are first used. Raises ConfigError if loading
    fails.
    """
    start_kept_cell()  # it imports mlx-lm beside this process
    from mlx_lm.utils import load_model

    with naming_unloadable_model(folder):
        model, config = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
    tokenizer: Any = load_bounded_tokenizer(find_tokenizer_files(folder, trust_remote_code))
    return model, tokenizer, config


@contextmanager
def naming_unloadable_model(folder: Path) -> Iterator[None]:
    """Turn the errors of mlx_lm when it loads a model into a ConfigError with a next step."""
    _require_each_tensor_once(folder)
    try:
        yield
    except UNLOADABLE as error:
        reason = str(error).rstrip(".") or "a size in its config.json is one that no model has"
        said = f"model: {folder} could not be loaded: {reason}."
        raise ConfigError(f"{said}{_advise_on_model(folder)}") from error


def _advise_on_model(folder: Path) -> str:
    """Return a sentence on what to do about a model in another form than is trained, or ""."""
    from mlx_lm.utils import MODEL_REMAPPING

    if advice := _advise_on_weights(folder):
        return advice
    has_config = (folder / "config.json").is_file()
    kind = read_model_config(folder).get("model_type") if has_config else None
    is_known = not kind or find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}")
    return "" if is_known else UNKNOWN_TYPE_ADVICE.format(kind)


def _advise_on_weights(folder: Path) -> str:
    """Return a sentence on what to do about a folder of a GGUF or of PyTorch's weights, or ""."""
    suffixes = {file.suffix for file in folder.iterdir()}
    if ".safetensors" in suffixes:
        return ""
    return f" It {GGUF_ADVICE}" if ".gguf" in suffixes else TORCH_ADVICE * bool(suffixes & TORCH)


def share_layers(model: nn.Module) -> None:
    """Let all layers of a model use the weights of the first layer of the same kind.

    The model then runs the same kernels as before with the memory of one layer of each kind, and
    unread weights are never read from their file. Its results are meaningless.
    """
    from mlx.utils import tree_flatten, tree_unflatten

    first_arrays: dict[tuple[object, ...], mx.array] = {}  # by name without layer, shape, dtype
    shared = []
    for name, array in cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())):
        kind = (LAYER_NUMBER_PATTERN.sub(".", name), tuple(array.shape), array.dtype)
        shared.append((name, first_arrays.setdefault(kind, array)))
    model.update(tree_unflatten(shared))


def model_compute_dtype(config: FineTuneConfig) -> mx.Dtype | None:
    """Return the dtype of forward and backward pass; None keeps the model's stored dtype.

    `auto` means float32 on a CPU, where bfloat16 has no fast matmul, and the stored dtype
    elsewhere.
    """
    import mlx.core as mx

    if config.training.reference is not None:
        return None
    if config.training.precision == "auto":
        return mx.float32 if backend.device() == "cpu" else None
    return mx.float32 if config.training.precision == "float32" else mx.bfloat16


def describe_computation(config: FineTuneConfig) -> str:
    """Name the device and the dtype of a model's computation, which affect its last bits."""
    return f"{backend.device_name()} {model_compute_dtype(config)}"
