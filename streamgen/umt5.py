"""The UMT5 text encoder of the Wan models (arXiv 2304.09151), by transformers; loaded when a new prompt comes.

Rows beyond a prompt's end are zeros and are attended to, as Wan was trained (facts of the released code: 512 rows).
What was encoded once is kept on disk by the prompt's hash, so a prompt that is known needs neither the weights nor
transformers. Letters: B prompts, L rows, D width.
"""

from __future__ import annotations

import html
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from streamgen.checkpoints.detect import open_checkpoint
from streamgen.checkpoints.places import cache_dir
from streamgen.checkpoints.tensors import LazyTensors, open_safetensors
from streamgen.checkpoints.text_names import text_tensors
from streamgen.errors import UserError
from streamgen.text import EncodedPrompt
from streamgen.weights import check_tensors, fingerprint_files, replacing

OFFLOADS = ("keep", "cpu", "drop")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class UMT5TextConfig:
    """Sizes of the encoder (the defaults are UMT5-XXL's), and where it is."""

    weights: str
    """Its weights file or index (Wan's or transformers' names), relative to the folder of this config."""
    tokenizer: str = "tokenizer"
    """Folder of its tokenizer, relative to the folder of this config."""
    text_len: int = 512
    text_dim: int = 4096
    vocab_size: int = 256384
    head_dim: int = 64
    ffn_dim: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    num_buckets: int = 32
    offload: str = "cpu"
    """Where the weights go after a prompt: "keep" (nowhere), "cpu" (out of the GPU) or "drop" (out of memory)."""

    def __post_init__(self) -> None:
        if self.offload not in OFFLOADS:
            raise ValueError(f"offload={self.offload!r}: must be one of {', '.join(OFFLOADS)}")
        if self.text_len < 2:
            raise ValueError(f"text_len={self.text_len}: must be at least 2")


class UMT5TextEncoder(nn.Module):
    """Prompts -> float [B, text_len, text_dim], zero rows for padding, in the weights' own dtype."""

    def __init__(
        self,
        config: UMT5TextConfig,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        cache: Path | None = None,
        trust_pickle: bool = False,
    ) -> None:
        """folder: what the config's paths are relative to. cache: where encoded prompts are kept; the user's own."""
        super().__init__()
        self.config, self.folder, self.device = config, folder, torch.device(device)
        self.text_len, self.text_dim = config.text_len, config.text_dim
        self._trust_pickle = trust_pickle
        self._cache = cache
        self._lock = threading.Lock()
        self._model: list[Any] = []  # in a list: no part of this module, so that .to() and state_dict() leave it alone
        self._tokenizer: Any = None
        for path, what in ((folder / config.weights, "weights"), (folder / config.tokenizer, "tokenizer")):
            if not path.exists():
                raise UserError(f"the text encoder needs its {what}: there is no {path}")

    @classmethod
    def from_folder(cls, folder: Path, config: UMT5TextConfig, *, device: torch.device | str) -> UMT5TextEncoder:
        """As a model folder has it (`pipeline._load_part`)."""
        return cls(config, folder, device=device)

    # Prompts.

    def tokenize(self, prompt: str) -> EncodedPrompt:
        """Token ids with the end mark; UserError when the prompt is empty, a warning when it is cut."""
        text = clean(prompt)
        if not text:
            raise UserError("the prompt is empty; describe a scene, the longer the better")
        known = self._load(text)
        ids = json.loads(known[1]) if known else self._ids(text)
        cut = (
            () if len(ids) < self.text_len else (f"a prompt has room for {self.text_len} tokens; the rest is left out",)
        )
        return EncodedPrompt(tuple(ids), cut)

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """Padded token ids, int64 [B, text_len], 0 for padding."""
        table = torch.zeros(len(prompts), self.text_len, dtype=torch.long)
        for row, prompt in zip(table, prompts, strict=True):
            found = self._ids(clean(prompt))
            row[: len(found)] = torch.tensor(found)
        return table

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> rows [B, text_len, text_dim] on the encoder's device; from disk where they are known."""
        texts = [clean(prompt) for prompt in prompts]
        found = {text: known[0] for text in dict.fromkeys(texts) if (known := self._load(text)) is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if missing:
            for text, rows in zip(missing, self.encode_ids(self.ids(missing)), strict=True):
                ids = self._ids(text)
                found[text] = rows[: len(ids)].cpu()
                self._save(text, ids, found[text])
        out = torch.zeros(len(texts), self.text_len, self.text_dim, dtype=found[texts[0]].dtype)
        for row, text in zip(out, texts, strict=True):
            row[: len(found[text])] = found[text]
        return out.to(self.device)

    def encode_ids(self, ids_BL: Tensor) -> Tensor:
        """Token ids [..., text_len], 0 for padding -> rows [..., text_len, D], zero for padding. Always computed."""
        flat = ids_BL.flatten(0, -2).to(self.device)
        mask = flat > 0
        longest = max(1, int(mask.sum(1).max()))  # what is masked changes nothing, so it is not computed
        with self._lock, torch.no_grad():
            model = self._loaded()
            rows = model(input_ids=flat[:, :longest], attention_mask=mask[:, :longest].long()).last_hidden_state
            self._unload()
        padded = rows.new_zeros(len(flat), self.text_len, self.text_dim)
        padded[:, :longest] = rows * mask[:, :longest, None]
        return padded.unflatten(0, ids_BL.shape[:-1])

    def _ids(self, text: str) -> list[int]:
        """Token ids of a cleaned prompt, the end mark included, cut to text_len."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = open_tokenizer(self.folder / self.config.tokenizer)
        return list(self._tokenizer(text, truncation=True, max_length=self.text_len)["input_ids"])

    # Weights.

    def _loaded(self) -> Any:
        if not self._model:
            self._model.append(load_encoder(self.config, self.folder / self.config.weights, self._trust_pickle))
        self._model[0].to(self.device)
        return self._model[0]

    def _unload(self) -> None:
        if self.config.offload == "drop":
            self._model.clear()
        elif self.config.offload == "cpu":
            self._model[0].to("cpu")

    # Encoded prompts on disk: the rows that are not padding, and the token ids.

    def _place(self, text: str) -> Path:
        name = sha256(f"{self.text_len}\n{text}".encode()).hexdigest()
        return (self._cache or cache_dir("text")) / self._identity() / f"{name}.safetensors"

    def _identity(self) -> str:
        """Of everything that a prompt's rows depend on, besides the prompt."""
        if not hasattr(self, "_named"):
            weights, tokenizer = self.folder / self.config.weights, self.folder / self.config.tokenizer
            files = {f"weights/{path.name}": path for path in weights_files(weights)}
            files |= {f"tokenizer/{name}": tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()}
            self._named = fingerprint_files(files)[:24]
        return self._named

    def _load(self, text: str) -> tuple[Tensor, str] | None:
        path = self._place(text)
        if not path.is_file():
            return None
        tensors = open_safetensors(path)
        return tensors["rows"], json.dumps(tensors["ids"].tolist())

    def _save(self, text: str, ids: Sequence[int], rows: Tensor) -> None:
        with replacing(self._place(text)) as temporary:
            save_file({"rows": rows.contiguous(), "ids": torch.tensor(ids, dtype=torch.int32)}, temporary)


def clean(prompt: str) -> str:
    """As Wan cleans prompts: broken Unicode repaired, HTML entities resolved (twice), white space collapsed."""
    try:
        import ftfy
    except ImportError as error:
        raise UserError(f"this text encoder needs the package ftfy ({error}): pip install 'streamgen[wan]'") from error
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def weights_files(path: Path) -> list[Path]:
    """The files that a weights path stands for: itself, or an index and what it lists."""
    if path.name.endswith(".json"):
        listed = json.loads(path.read_text())["weight_map"].values()
        return [path, *(path.parent / name for name in sorted(set(listed)))]
    return [path]


def open_tokenizer(folder: Path) -> Any:
    """A tokenizer of transformers from a folder on this machine."""
    transformers = _transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{folder} holds no tokenizer that transformers reads: {error}") from error


def load_encoder(config: UMT5TextConfig, weights: Path, trust_pickle: bool = False) -> Any:
    """`UMT5EncoderModel` on the CPU with these weights, in the dtype that they are kept in."""
    checkpoint = open_checkpoint(weights, trust_pickle=trust_pickle)
    tensors = text_tensors(checkpoint.choose()[1], str(weights))
    transformers = _transformers()
    settings = transformers.UMT5Config(
        vocab_size=config.vocab_size,
        d_model=config.text_dim,
        d_kv=config.head_dim,
        d_ff=config.ffn_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.num_buckets,
        tie_word_embeddings=False,
        dropout_rate=0.0,
    )
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(settings)
    _fill(model, tensors, str(weights))
    return model.eval().requires_grad_(False)


def _fill(model: Any, tensors: LazyTensors, where: str) -> None:
    """Give a model on the meta device its weights, one tensor at a time."""
    tied = "encoder.embed_tokens.weight"
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != tied}
    check_tensors(expected, tensors.shapes, where)
    model.load_state_dict({name: tensors[name] for name in expected}, assign=True, strict=False)
    model.encoder.embed_tokens = model.shared
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, left


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"a new prompt needs transformers ({error}): pip install 'streamgen[wan]'") from error
    return transformers


def settings_of(config: UMT5TextConfig) -> dict[str, Any]:
    """config.json of the model folder's text part."""
    return {"_class_name": UMT5TextEncoder.__name__, **asdict(config)}
