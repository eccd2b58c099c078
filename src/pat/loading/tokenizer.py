"""Load a tokenizer, and keep what a run says of its tokens together with the weights it belongs to."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME

from pat.errors import PatError
from pat.loading.config import NO_PADDING, TOKEN_IDS
from pat.loading.hub import hub_options
from pat.named import check_model

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")

_FILES = (TOKENIZER_CONFIG_FILE, FULL_TOKENIZER_FILE, CONFIG_NAME)
"""Files by which a tokenizer is in the hub's cache. It may lie there without a model, or beside one without the first
two."""

_SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def load_tokenizer(name_or_path: str, *, config: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model, made to pad if it has no padding token (see `padded`).

    Its special tokens are held against the model's configuration, if that is given.

    Raises:
        PatError: there is no tokenizer, or see `check_special_ids`.
    """
    tokenizer = load_plain_tokenizer(name_or_path)
    if config is not None:
        check_special_ids(tokenizer, config.vocab_size)
    return padded(tokenizer, config)


def load_plain_tokenizer(name_or_path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model as it is.

    Raises:
        PatError: there is no tokenizer, or none that can be used.
    """
    name_or_path = check_model(name_or_path)
    hub = hub_options(name_or_path, revision, files=_FILES)
    try:
        # Without the third, transformers would ask at the terminal whether to run code that the tokenizer brings.
        loaded = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=False, **hub)
        loaded("a text")  # what a tokenizer's configuration sets is looked at only when it is used
        for name in _SPECIAL:  # an unknown token that is no token is looked for without end
            getattr(loaded, f"{name}_id")
        return cast(PreTrainedTokenizerBase, loaded)
    except Exception as error:  # of any kind: files, packages that are missing, and the tokenizers' own code
        detail = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise PatError(
            f"Could not load a tokenizer from {name_or_path!r}: {detail}; expected it beside the model."
        ) from error


def padded(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """Return a tokenizer that can pad: the same one if it has a padding token, or else a copy to which one is given.

    Padding is masked, so any token will do: the one the model's configuration names, or the end-of-sequence token, or
    the first there is. A copy, because what is written beside a model is the tokenizer as it was.
    """
    if tokenizer.pad_token is not None:
        return tokenizer
    twin = copy.deepcopy(tokenizer)
    named = getattr(config, "pad_token_id", None)
    from_config = None if named in (None, NO_PADDING) else twin.convert_ids_to_tokens(named)
    twin.pad_token = from_config or twin.eos_token or twin.bos_token or twin.unk_token or twin.convert_ids_to_tokens(0)
    return twin


def check_special_ids(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    """Hold a tokenizer's special tokens against the number of rows of the model's embedding.

    Raises:
        PatError: one of them has no row.
    """
    for name in _SPECIAL:
        token_id = getattr(tokenizer, f"{name}_id")
        if token_id is not None and token_id >= num_rows:
            raise PatError(
                f"The tokenizer knows {len(tokenizer)} tokens, the model {num_rows}: its {name} "
                f"{getattr(tokenizer, name)!r} is token {token_id}; resize the model's embedding (and save the model), "
                "or use the tokenizer that belongs to it."
            )


@dataclass(frozen=True)
class TokenSetup:
    """The tokenizer, generation config and special tokens that are written beside the weights of a run."""

    tokenizer: PreTrainedTokenizerBase
    """The tokenizer to write: it has the run's special tokens and template, and the base's padding."""
    generation_config: GenerationConfig
    token_ids: dict[str, Any]
    """Special token ids of `config.json`."""

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        generation_config: GenerationConfig | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> TokenSetup:
        """Put a run's tokenizer beside what the base says of its tokens; none of the arguments is changed.

        The end-of-sequence and beginning-of-sequence tokens become the tokenizer's, as transformers' trainer has it;
        further tokens that end a text are kept. The padding token stays the base's, unless the run has given the
        tokenizer another one than `base_tokenizer` has; without that the run's is taken for the base's own. Without a
        generation config it is what the configuration says.
        """
        ids = {name: copy.deepcopy(getattr(config, name, None)) for name in TOKEN_IDS}
        generation = savable_generation_config(generation_config or GenerationConfig.from_model_config(config))
        ids["eos_token_id"] = _with_first(tokenizer.eos_token_id, ids["eos_token_id"])
        ids["bos_token_id"] = ids["bos_token_id"] if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        repadded = base_tokenizer is not None and tokenizer.pad_token != base_tokenizer.pad_token
        if repadded:
            ids["pad_token_id"] = tokenizer.pad_token_id
            generation.pad_token_id = tokenizer.pad_token_id
        known = generation.eos_token_id
        listed = [known] if isinstance(known, int) and known != tokenizer.eos_token_id else known
        generation.eos_token_id = _with_first(tokenizer.eos_token_id, listed)
        generation.bos_token_id = ids["bos_token_id"]
        return cls(tokenizer, generation, ids)

    @property
    def ends(self) -> list[int]:
        """Tokens with which generation stops."""
        return end_tokens(self.generation_config)

    def ending_with(self, more: Sequence[int]) -> TokenSetup:
        """Return a copy with which generation stops at further tokens, too."""
        generation = copy.deepcopy(self.generation_config)
        generation.eos_token_id = list(dict.fromkeys([*self.ends, *more]))
        return replace(self, generation_config=generation)

    def describe(self, config: PretrainedConfig) -> None:
        """Set the special tokens of a configuration that is about to be written."""
        for name, value in self.token_ids.items():
            setattr(config, name, value)

    def save(self, folder: Path) -> None:
        """Write tokenizer and generation config."""
        save_tokenizer(self.tokenizer, folder)
        self.generation_config.save_pretrained(folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer in words that transformers 4 understands as well; transformers 5 reads them alike.

    Python files that came with it were never loaded, and are not named.
    """
    tokenizer.save_pretrained(folder)
    path = folder / TOKENIZER_CONFIG_FILE
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields.pop("auto_map", None)
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_first(token_id: int | None, known: int | list[int] | None) -> int | list[int] | None:
    """Return end-of-sequence tokens with another one among them: in place of a single one, before the first of many."""
    if token_id is None or token_id == known or (isinstance(known, list) and token_id in known):
        return known
    return [token_id, *known] if isinstance(known, list) else token_id


def end_tokens(config: GenerationConfig | PretrainedConfig) -> list[int]:
    """Return the tokens that end a text by a configuration, which names none, one or several."""
    known = cast(int | list[int] | None, config.eos_token_id)
    return list(known) if isinstance(known, list) else [] if known is None else [known]


def savable_generation_config(config: GenerationConfig) -> GenerationConfig:
    """Return a copy that transformers agrees to save.

    It refuses sampling parameters beside greedy decoding, which older checkpoints have (Llama 2) and generation
    ignores: they are unset.
    """
    config = copy.deepcopy(config)
    if not config.do_sample:
        for flag in _SAMPLING_FLAGS:
            if hasattr(config, flag):
                setattr(config, flag, None)
    return config
