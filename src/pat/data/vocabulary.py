"""The tokenizer of a run, with the chat template and tokens asked for, and what it asks of the model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pat.data.alpaca_chat import alpaca_chat, is_alpaca_chat
from pat.data.load import chat_template_of
from pat.errors import PatError
from pat.families import get_family
from pat.loading import check_special_ids, grow_embedding, grown_rows, padded
from pat.loading.tokenizer import load_plain_tokenizer
from pat.loading.trimming import MULTIPLE, choose_tokens, renumber_specials, special_ids, trim_embedding, trim_tokenizer
from pat.shape import DEFAULT_PRUNING_RATIO, ShapeOptions, asked_sizes
from pat.surgery.describe import count_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from pat.tuner.config import PatConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and the embedding that it needs."""

    tokenizer: PreTrainedTokenizerBase
    num_embeddings: int
    """Rows of the embedding, those for added tokens included."""
    added: Sequence[int] = ()
    """Tokens that another tokenizer brought along with its chat template."""
    written: PreTrainedTokenizerBase | None = None
    """The tokenizer as it is to be written, without a padding token that was only needed here, and maybe with a chat
    template that it had not."""
    kept: Sequence[int] | None = None
    """Ids, in the base, of the tokens of a trimmed vocabulary; None where it is whole."""
    num_untrimmed: int | None = None
    """Rows of the base's embedding, where the vocabulary is trimmed."""

    def trimmed(self, size: int, counts: Mapping[int, int], base_config: PretrainedConfig) -> Vocabulary:
        """Return the vocabulary of as many tokens, see `choose_tokens`.

        Raises:
            PatError: the tokenizer cannot be trimmed to that size, or tokens were added to it for this run.
        """
        if self.added:
            raise PatError(
                "Got vocabulary_size beside a chat_template_path that brings tokens along; give the base these tokens "
                "first, and save it."
            )
        written = self.written or self.tokenizer
        kept = choose_tokens(written, counts, size, needed=special_ids(base_config.get_text_config()))
        if kept[-1] >= self.num_embeddings:
            token = written.convert_ids_to_tokens(kept[-1])
            raise PatError(
                f"Got vocabulary_size={size} and the special token {token!r} (id {kept[-1]}), but the model has "
                f"embeddings for {self.num_embeddings} tokens; resize its embedding and save both."
            )
        small = trim_tokenizer(written, kept)
        config = copy.deepcopy(base_config)
        renumber_specials(config.get_text_config(), kept)
        return Vocabulary(
            padded(small, config),
            size,
            written=small,
            kept=kept,
            num_untrimmed=base_config.get_text_config().vocab_size,
        )

    def asked_as_alpaca(self) -> Vocabulary:
        """Return it with Alpaca's words as the chat template that is written, where the tokenizer has none of its own.

        The tokenizer that reads the data stays without: its rows have these words already.
        """
        written = self.written or self.tokenizer
        if chat_template_of(written):
            return self
        template = alpaca_chat(written)
        if template is None:
            logger.warning(
                "No chat template makes the tokens of Alpaca's words with this tokenizer, so that none is written: ask "
                "the model for completions of the prompts that its card shows."
            )
            return self
        written = copy.deepcopy(written)
        written.chat_template = template
        return replace(self, written=written)

    @property
    def writes_alpaca(self) -> bool:
        """Whether the chat template that is written beside the model has Alpaca's words."""
        return is_alpaca_chat(chat_template_of(self.written or self.tokenizer))

    def config_of(self, base_config: PretrainedConfig) -> PretrainedConfig:
        """Return the base's configuration as it is with this vocabulary."""
        if self.kept is None:
            return base_config
        config = copy.deepcopy(base_config)
        config.vocab_size = len(self.kept)
        renumber_specials(config, self.kept)
        return config

    def check(self, largest: int) -> None:
        """Check that the model has an embedding for the tokens that occur, up to the largest, and the special ones.

        Raises:
            PatError: it has not.
        """
        check_special_ids(self.tokenizer, self.num_embeddings)
        if largest >= self.num_embeddings:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise PatError(
                f"Got the token {token!r} (id {largest}), but the model has embeddings for {self.num_embeddings} "
                "tokens; use its own tokenizer, or resize its embedding and save both."
            )

    def fit(self, model: PreTrainedModel) -> None:
        """Give a base model the embeddings and the end token of a tokenizer that was trimmed, or has added tokens."""
        if self.kept is not None and model.config.vocab_size > len(self.kept):
            trim_embedding(model, self.kept)
        grow_embedding(model, self.num_embeddings)
        if self.added:
            for config in (model.config.get_text_config(), model.generation_config):
                if config is not None:
                    config.eos_token_id = self.tokenizer.eos_token_id

    def note(self, config: PatConfig, base_config: PretrainedConfig) -> PatConfig:
        """Note in an adapter's configuration that the vocabulary was trimmed, and have added tokens trained.

        They are trained in both stages, like TRL does with an adapter that it makes itself.
        """
        config.base_vocab_size = self.num_untrimmed
        if self.added:
            given = cast(list[int], config.trainable_token_indices or [])
            config.trainable_token_indices = sorted({*given, *self.added})
            text_config = base_config.get_text_config()
            if not text_config.tie_word_embeddings:
                head = get_family(text_config.model_type).head
                config.modules_to_save = sorted({*(config.modules_to_save or ()), head})
        return config


def check_vocabulary_size(name: str, base_config: PretrainedConfig, size: int) -> None:
    """Check, before there is data, that the tokenizer of a model can be trimmed; without one nothing is checked.

    Raises:
        PatError: it cannot be trimmed to that size.
    """
    try:
        tokenizer = load_plain_tokenizer(name)
    except PatError:  # a plan needs a configuration alone
        return
    choose_tokens(tokenizer, {}, size, needed=special_ids(base_config.get_text_config()))


def trimmed_budget(
    options: ShapeOptions, base_config: PretrainedConfig, size: int
) -> tuple[PretrainedConfig, float | None]:
    """Return a base's configuration with a trimmed vocabulary, and what is left to cut of such a model.

    Args:
        options: which pruned model is asked for.
        base_config: of the base model.
        size: tokens that are kept.

    Returns:
        The configuration, and the share of its parameters that is still to be cut so that the budget is met; None where
        the options name sizes or a target, which hold for the pruned model whatever its vocabulary is.

    Raises:
        PatError: the vocabulary is not made smaller, or alone saves as much as the budget asks.
    """
    if not 0 < size < base_config.vocab_size or size % MULTIPLE:
        raise PatError(
            f"Got vocabulary_size={size}; expected a multiple of {MULTIPLE} below the base's {base_config.vocab_size}."
        )
    if options.target_latency is not None:
        raise PatError("Got vocabulary_size beside target_latency; give a ratio, a number of parameters or of bytes.")
    trimmed_config = copy.deepcopy(base_config)
    trimmed_config.vocab_size = size
    if asked_sizes(options) or options.target_num_parameters is not None or options.target_bytes is not None:
        return trimmed_config, None
    whole, trimmed = count_parameters(base_config), count_parameters(trimmed_config)
    ratio = DEFAULT_PRUNING_RATIO if options.pruning_ratio is None else options.pruning_ratio
    rest = 1 - (1 - ratio) * whole / trimmed
    if rest <= 0:
        raise PatError(
            f"Got pruning_ratio={ratio:g} with vocabulary_size={size}, but the vocabulary alone saves "
            f"{1 - trimmed / whole:.1%} of the parameters; keep more tokens, or ask for more."
        )
    return trimmed_config, rest


def load_vocabulary(
    name: str,
    base_config: PretrainedConfig,
    *,
    revision: str | None = None,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
) -> Vocabulary:
    """Load the tokenizer of a model as TRL's trainer would make it, since data is looked at before.

    The chat template is that of a Jinja file, or of a tokenizer (folder or hub id) whose added tokens and end token are
    taken over as well.

    Raises:
        PatError: there is no such tokenizer, file, template or token.
    """
    tokenizer = load_plain_tokenizer(name, revision=revision)
    num_embeddings = base_config.get_text_config().vocab_size
    added: list[int] = []
    if chat_template_path is not None and chat_template_path.endswith((".jinja", ".j2")):
        path = Path(chat_template_path)
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise PatError(
                f"Got --chat_template_path {path}, which is not readable ({error}); expected a Jinja file."
            ) from error
        if not tokenizer.chat_template.strip():
            raise PatError(f"Got --chat_template_path {path}, which is empty; expected a Jinja template in it.")
    elif chat_template_path is not None:
        try:
            source = load_plain_tokenizer(chat_template_path)
        except PatError as error:
            raise PatError(
                f"Got --chat_template_path {chat_template_path}, which is no Jinja file (.jinja or .j2) and no "
                f"tokenizer: {error}"
            ) from error
        if not source.chat_template:
            raise PatError(f"Got --chat_template_path {chat_template_path}, a tokenizer without a chat template.")
        tokenizer.chat_template = source.chat_template
        known = tokenizer.get_vocab()
        tokens = [token for token in source.added_tokens_decoder.values() if token.content not in known]
        tokenizer.add_tokens(cast(Any, tokens))
        added = sorted(tokenizer.get_vocab()[token.content] for token in tokens)
        eos_token = eos_token or cast("str | None", source.eos_token)
    for field, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise PatError(f"Got {field}={token!r}, which the tokenizer does not know; expected one it has.")
            setattr(tokenizer, field, token)
    num_embeddings = grown_rows(num_embeddings, max(added, default=0))
    return Vocabulary(padded(tokenizer, base_config), num_embeddings, added, tokenizer)
