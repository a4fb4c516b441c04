"""A GGUF file -> a plain safetensors folder with tokenizer, chat template and generation config."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.errors import LinearizeError
from linearize.weights import check_gguf, check_promise, check_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMMON = ("\u2581the", "\u0120the")  # one token wherever a vocabulary has it: of SentencePiece, of byte-level BPE
BEGINS = "tokenizer.ggml.add_bos_token"  # the file's word on whether its tokenizer puts a token first
# Above this many parameters the copy is stored in bfloat16: fp32 would be eight times the GGUF file.
FP32_LIMIT = 1_000_000_000


def convert_gguf(path: Path, target: Path, notes: dict[str, str]) -> None:
    """Write the model of a GGUF file to `target`, which appears whole or not at all.

    transformers keeps a GGUF model marked as quantized, even when its weights are dense, and then refuses to save or
    train it; so its class is rebuilt from the config without that mark.

    Args:
        path: the .gguf file.
        target: a folder that does not exist yet.
        notes: further small files of the folder, name -> text.

    Raises:
        LinearizeError: the file is damaged, or transformers cannot read its architecture or tokenizer.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    header = check_gguf(path)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        check_sizes(config, str(path))
        check_promise(config, header.elements, str(path))
        packed, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except LinearizeError:
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds, `Exception` itself among them
        raise LinearizeError(
            f"transformers cannot read {path}: {' '.join(str(error).split())[:300]}. "
            "Give the model's safetensors folder or hub id instead."
        ) from error
    if takes_words_apart(tokenizer):
        raise LinearizeError(
            f"transformers {transformers.__version__} reads the tokenizer in {path} wrongly: words that are one token "
            "come apart. Install a later transformers (Gemma's needs 5.18), or give the model's safetensors folder or "
            "hub id instead."
        )
    if header.flags.get(BEGINS) and not tokenizer.encode(""):
        tokenizer.add_bos_token = True  # transformers 5.18 reads Gemma's without
    if report["missing_keys"]:
        raise LinearizeError(f"{path} lacks {len(report['missing_keys'])} of the model's tensors. Download it again.")
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    weights = packed.state_dict()
    dense = type(packed)(config)
    dense.load_state_dict(weights)
    dense.generation_config = packed.generation_config
    if dense.num_parameters() > FP32_LIMIT:
        dense = dense.to(torch.bfloat16)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        dense.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for name, text in notes.items():
            (temporary / name).write_text(text, encoding="utf-8")
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was first, with the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def takes_words_apart(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer has a common word as one token and yet writes it as several: its merges are wrong."""
    known = tokenizer.get_vocab()
    return any(word in known and word not in tokenizer.tokenize("of the house") for word in COMMON)
